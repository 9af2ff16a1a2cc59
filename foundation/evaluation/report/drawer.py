"""Figures for a page: drawn by the functions of `foundation.evaluation.figures`, put into the HTML as data."""

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

from data.nifti import written_whole
from foundation.evaluation.report.markup import Markup, element

_FONT_PT = 10.5
"""With panels 4.2 inches wide, this is 11 pixels on a phone that shows 328 of them."""


@dataclass(frozen=True, kw_only=True)
class Drawer:
    """Draws a report's figures, each into the page and, where they are wanted, as a PNG file."""

    scratch: Path
    """A directory for files on their way into the page."""
    png: Path | None = None
    """A directory for PNG files; None: none are written."""

    def figure(self, name: str, draw: Callable[[Path], None], *, alt: str) -> Markup:
        """Return a figure as an element."""
        return element("figure", self.image(name, draw, alt=alt))

    def image(self, name: str, draw: Callable[[Path], None], *, alt: str) -> Markup:
        """Return a drawing as an element that holds it.

        Parameters
        ----------
        name
            Of the PNG file, unique in the report.
        draw
            Draws the figure into a file, whose ending says what kind.
        alt
            What a reader who doesn't see it should know.
        """
        name = re.sub(r"[^\w.-]+", "-", name)
        path = self.scratch / f"{name}.svg"
        with mpl.rc_context({"font.size": _FONT_PT, "svg.fonttype": "path", "text.parse_math": False}):
            draw(path)
            if self.png is not None:
                with written_whole(self.png / f"{name}.png") as draft:
                    draw(draft)
        return image(path.read_bytes(), "svg+xml", alt=alt)


def image(data: bytes, kind: str, *, alt: str, width: int | None = None) -> Markup:
    """Return a picture of the media type ``image/<kind>`` as an element that holds its data."""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return element("img", src=source, alt=alt, width=width)


def panels(*figures: str, small: bool = False) -> Markup:
    """Return figures beside each other where there is room, else below each other."""
    return element("div", *figures, class_="panels small" if small else "panels")

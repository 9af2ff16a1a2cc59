"""A panel of one subject: as wide as a phone shows legibly, so that a page sets several beside or below each other."""

import textwrap
from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from foundation.evaluation.figures.canvas import new_figure

WIDTH = 4.2
"""Inches."""
_CHARACTERS_PER_INCH = 11


def new_panel(title: str, *, height: float = 3.4) -> tuple[Figure, Axes]:
    """Return a figure of one panel, and its axes."""
    figure = new_figure(WIDTH, height)
    ax = figure.add_subplot()
    ax.set_title(wrapped(title), fontsize="medium")
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


def wrapped(title: str) -> str:
    """Return a title in lines that fit a panel."""
    return "\n".join(textwrap.wrap(title, round(_CHARACTERS_PER_INCH * WIDTH)))


def legend_columns(figure: Figure, labels: Iterable[str]) -> int:
    """Return how many columns of a legend fit the figure's width, at least one."""
    longest = max((len(label) for label in labels), default=0)
    return max(1, int(_CHARACTERS_PER_INCH * figure.get_figwidth() // (longest + 7)))


def legend_below(figure: Figure, ax: Axes) -> None:
    """Put the legend below the panel, where it hides nothing."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(2, legend_columns(figure, labels)),
            frameon=False,
            fontsize="small",
        )

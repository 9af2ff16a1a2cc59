"""HTML that is escaped unless it was made here: names come from users, so what is plain text stays plain text."""

from collections.abc import Iterable
from html import escape

_VOID = ("img", "meta", "br")


class Markup(str):
    """HTML that may stand in a page as it is; a plain `str` is escaped wherever it is put."""

    __slots__ = ()


def element(tag: str, *content: str | None, **attributes: str | int | None) -> Markup:
    """Return an element; None among the content or the attributes is left out.

    Parameters
    ----------
    content
        Markup as it stands, other text escaped.
    attributes
        By name; ``class_`` is ``class``, and ``aria_label`` is ``aria-label``. An empty string is a bare attribute.
    """
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    told = "".join(f' {key}="{escape(str(value))}"' if value != "" else f" {key}" for key, value in named.items())
    if tag in _VOID:
        return Markup(f"<{tag}{told}>")
    return Markup(f"<{tag}{told}>{together(content)}</{tag}>")


def together(content: Iterable[str | None]) -> Markup:
    """Return pieces one after the other, each escaped unless it is markup."""
    return Markup("".join(p if isinstance(p, Markup) else escape(p) for p in content if p is not None))


def paragraphs(*texts: str | None) -> Markup:
    """Return a paragraph for each text."""
    return together(element("p", text) for text in texts if text)


def listed(items: Iterable[str]) -> Markup:
    """Return a list with a point for each item; nothing where there is none."""
    points = [element("li", item) for item in items]
    return element("ul", *points) if points else Markup()

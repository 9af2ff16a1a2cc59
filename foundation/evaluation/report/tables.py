"""Tables of a report: headings with their scope, numbers to the right, wide ones in a box that scrolls."""

from collections.abc import Sequence

from foundation.evaluation.report.markup import Markup, element
from foundation.evaluation.table import number


def table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str, n_leading: int = 1, ruled: bool = False
) -> Markup:
    """Return a table whose first `n_leading` cells of a row are its headings.

    Parameters
    ----------
    caption
        What the numbers are, for those who hear the table.
    ruled
        A line is drawn where the first heading changes.
    """
    head = element(
        "tr",
        *(
            element("th", heading, scope="col", class_="leading" if k < n_leading else None)
            for k, heading in enumerate(headings)
        ),
    )
    body = []
    before = None
    for row in rows:
        leading = [element("th", cell, scope="row") for cell in row[:n_leading]]
        cells = [element("td", cell) for cell in row[n_leading:]]
        new = ruled and before is not None and row[0] != before
        body.append(element("tr", *leading, *cells, class_="ruled" if new else None))
        before = row[0]
    whole = element("table", element("caption", caption), element("thead", head), element("tbody", *body))
    return element("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def details(summary: str, *content: str) -> Markup:
    """Return content that is shown when its summary is opened."""
    return element("details", element("summary", summary), *content)


def with_interval(value: float | None, low: float | None, high: float | None, *, signed: bool = False) -> str:
    """Return a number and its interval as text, ``n/a`` where it is undefined."""
    told = with_sign if signed else number
    if value is None or low is None or high is None:
        return told(value)
    return f"{told(value)} [{told(low)} {told(high)}]"


def p_value(p: float | None) -> str:
    """Return a p value as text."""
    return "n/a" if p is None else "< .001" if p < 0.001 else f"{p:.3f}".replace("0.", ".", 1)


def with_sign(value: float | None) -> str:
    """Return a number with its sign, ``n/a`` for None."""
    text = number(value)
    return text if value is None or text.startswith("-") else f"+{text}"

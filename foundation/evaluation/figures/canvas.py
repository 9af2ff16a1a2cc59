"""What all figures share: an Agg canvas, and how a system looks in each.

Colours are those of Okabe and Ito (2008), their yellow darkened, which colour-blind readers can tell apart; markers and
hatches tell systems apart without any colour.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from foundation.evaluation.score import CEILING

DPI = 120


@dataclass(frozen=True)
class Look:
    """How one system is drawn."""

    colour: str
    marker: str
    hatch: str


_LOOKS = {
    "manybrains": Look("#0072B2", "o", ""),
    "ridge": Look("#E69F00", "s", "//"),
    "banded-ridge": Look("#D55E00", "D", "\\\\"),
    "spatial": Look("#009E73", "^", ".."),
    "cls-probe": Look("#56B4E9", "v", "xx"),
    "stacked": Look("#CC79A7", "P", "--"),
    "roi-transformer": Look("#B8A800", "*", "oo"),
}
_OTHER = Look("#555555", "X", "++")
FAMILY_LOOKS = {
    "early": Look("#0072B2", "o", ""),
    "mid": Look("#009E73", "^", ""),
    "higher": Look("#D55E00", "s", ""),
}
"""ROI families', in every figure."""
OTHER_FAMILY = Look("#777777", "x", "")


def looks(systems: Iterable[str]) -> dict[str, Look]:
    """Return each system's look: its own in every figure, or, of a system without one, one that is free in this."""
    wanted = [system for system in dict.fromkeys(systems) if system != CEILING]
    free = [look for name, look in _LOOKS.items() if name not in wanted] + [_OTHER]
    found = {}
    for system in wanted:
        found[system] = _LOOKS.get(system) or (free.pop(0) if len(free) > 1 else free[0])
    return found


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches; it needs no display and leaves no global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure

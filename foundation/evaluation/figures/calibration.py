"""Calibration: how often targets lie in a system's central intervals, against how often they should."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from foundation.evaluation.figures.canvas import DPI, looks
from foundation.evaluation.figures.panel import legend_below, new_panel


def calibration_plot(
    covered: Mapping[str, Float[np.ndarray, " level"]],
    levels: Sequence[float],
    path: Path,
    *,
    title: str,
    systems: Sequence[str],
) -> None:
    """Draw the share of targets inside each level's interval, a line per system, as a picture.

    Parameters
    ----------
    covered
        By system (`foundation.evaluation.sampling.calibration`); NaN is left out.
    systems
        All that the report compares, so that each looks as it does in other figures.
    """
    figure, ax = new_panel(title, height=3.9)
    ax.plot([0, 100], [0, 100], color="black", linewidth=1, linestyle="--", label="right spread")
    drawn_as = looks(systems)
    for system, shares in covered.items():
        look = drawn_as[system]
        known = np.isfinite(shares)
        x, y = 100 * np.array(levels)[known], 100 * shares[known]
        ax.plot(x, y, color=look.colour, marker=look.marker, markersize=6, label=system)
    ax.annotate("samples spread too much", (4, 96), va="top", fontsize="small", color="#555555")
    ax.annotate("too little", (96, 4), ha="right", fontsize="small", color="#555555")
    ax.set_xlim(0, 100)
    ax.set_ylim(0, 100)
    ax.set_aspect("equal")
    ax.set_xlabel("nominal level of the interval (%)")
    ax.set_ylabel("targets inside (%)")
    legend_below(figure, ax)
    figure.savefig(path, dpi=DPI)

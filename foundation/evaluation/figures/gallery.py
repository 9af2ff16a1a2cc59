"""One image's measured responses against the predicted ones, voxel by voxel."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.ticker import MaxNLocator

from foundation.evaluation.figures.canvas import DPI, FAMILY_LOOKS, OTHER_FAMILY, new_figure

_ALL = "all voxels"
_LOOKS = {_ALL: FAMILY_LOOKS["early"], **FAMILY_LOOKS}
_MANY = 2000
"""Voxels from which points hide each other."""
_LEGEND_SIZE = 30.0
"""Of a marker in the legend, in square points, whatever the size of the points."""
_SIZE = 2.75
"""Inches; three stand beside each other, and each fits a phone."""


def measured_against_predicted(
    measured: Float[np.ndarray, " voxel"],
    predicted: Float[np.ndarray, " voxel"],
    path: Path,
    *,
    families: Mapping[str, Bool[np.ndarray, " voxel"]],
    limit: float,
) -> None:
    """Draw a point per voxel, families by colour and marker, and the line of equality, as a picture.

    Parameters
    ----------
    limit
        The axes reach from ``-limit`` to ``limit``, in SD; what lies beyond stands at the edge.
    """
    figure = new_figure(_SIZE, _SIZE + (0.5 if families else 0.0))
    ax = figure.add_subplot()
    rest = ~np.any([np.zeros(len(measured), bool), *families.values()], axis=0)
    groups = {"no family": rest, **families} if families else {_ALL: rest}
    x, y = (np.clip(values, -limit, limit) for values in (predicted, measured))
    size = float(np.clip(8000 / max(1, len(measured)), 2, 22))
    for name, mask in groups.items():
        if mask.any():
            look = _LOOKS.get(name, OTHER_FAMILY)
            ax.scatter(
                x[mask],
                y[mask],
                s=size,
                color=look.colour,
                marker=look.marker,
                alpha=0.6 if len(measured) < _MANY else 0.3,
                linewidths=0.8 if look.marker == "x" else 0,
                label=name,
                rasterized=True,
                clip_on=False,
            )
    ax.plot([-limit, limit], [-limit, limit], color="black", linewidth=0.8, linestyle=":")
    ax.set_xlim(-limit, limit)
    ax.set_ylim(-limit, limit)
    ticks = [tick for tick in MaxNLocator(4).tick_values(-limit, limit) if abs(tick) <= limit]
    ax.set_xticks(ticks)
    ax.set_yticks(ticks)
    ax.set_aspect("equal")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("predicted (SD)")
    ax.set_ylabel("measured (SD)")
    if families:
        legend = figure.legend(
            loc="outside lower center",
            ncols=2,
            frameon=False,
            fontsize="small",
            markerscale=float(np.sqrt(_LEGEND_SIZE / size)),
            handletextpad=0.1,
            columnspacing=0.8,
        )
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_alpha(1.0)
    figure.savefig(path, dpi=DPI)

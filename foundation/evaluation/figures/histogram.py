"""Scores of single voxels: how they are distributed, and how near they come to what the noise allows.

The highest r is the correlation with the mean of an image's repeats that a perfect prediction is expected to reach: the
root of the noise ceiling, which is a share of variance.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.colors import LogNorm

from foundation.evaluation.figures.canvas import DPI, looks
from foundation.evaluation.figures.panel import legend_below, new_panel

_MOST_BINS = 40
_LINES = ("-", (0, (4, 1.5)), "-.", (0, (1, 1)), (0, (6, 1, 1, 1, 1, 1)))


def voxel_histogram(
    r: Mapping[str, Float[np.ndarray, " voxel"]],
    path: Path,
    *,
    highest_r: Float[np.ndarray, " voxel"] | None = None,
    title: str,
    limits: tuple[float, float],
) -> None:
    """Draw how many voxels have which r, a line per system, and how many could reach which, as a picture.

    Parameters
    ----------
    r
        By system; NaN is left out.
    highest_r
        That a perfect prediction is expected to reach.
    limits
        Of the axis of r; what lies beyond counts in the outermost bins.
    """
    figure, ax = new_panel(title)
    edges = np.linspace(*limits, _n_bins(r) + 1)

    def counted(values: np.ndarray) -> np.ndarray:
        return np.histogram(np.clip(values[np.isfinite(values)], *limits), edges)[0]

    if highest_r is not None:
        label = "highest possible r"
        ax.stairs(counted(highest_r), edges, fill=True, color="#D9D9D9", label=label)
    for k, (system, look) in enumerate(looks(r).items()):
        line = _LINES[k % len(_LINES)]
        ax.stairs(counted(r[system]), edges, color=look.colour, linestyle=line, linewidth=1.8, label=system)
    ax.axvline(0, color="black", linewidth=0.6)
    ax.set_xlabel("voxel r (correlation over test images)")
    ax.set_ylabel("voxels (count per bin)")
    legend_below(figure, ax)
    figure.savefig(path, dpi=DPI)


def r_against_highest(
    r: Float[np.ndarray, " voxel"],
    highest_r: Float[np.ndarray, " voxel"],
    path: Path,
    *,
    title: str,
    limits: tuple[float, float],
) -> None:
    """Draw each voxel's r against the highest that it could reach, voxels counted in squares, as a picture.

    Parameters
    ----------
    limits
        Of the axis of r; what lies beyond counts at the edge.
    """
    figure, ax = new_panel(title)
    known = np.isfinite(r) & np.isfinite(highest_r)
    edges_x, edges_y = np.linspace(0, 1, 31), np.linspace(*limits, 31)
    counts, _, _ = np.histogram2d(highest_r[known], np.clip(r[known], *limits), (edges_x, edges_y))
    most = max(2.0, counts.max())
    drawn = ax.pcolormesh(
        edges_x, edges_y, np.ma.masked_equal(counts.T, 0), cmap="viridis_r", norm=LogNorm(1, most), rasterized=True
    )
    ax.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle="--")
    ax.annotate("r = highest", (0.98, 0.98), ha="right", va="bottom", rotation=0, fontsize="small")
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_xlim(0, 1)
    ax.set_ylim(limits[0], max(limits[1], 1.08))
    ax.set_xlabel("highest possible r (√ noise ceiling)")
    ax.set_ylabel("voxel r")
    bar = figure.colorbar(drawn, ax=ax, pad=0.02)
    bar.set_label("voxels (count, log scale)")
    ticks = [n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if n <= most]
    bar.set_ticks(ticks, labels=[str(n) for n in ticks])
    bar.minorticks_off()
    figure.savefig(path, dpi=DPI)


def _n_bins(r: Mapping[str, np.ndarray]) -> int:
    """Return fewer bins for few voxels, so that a line isn't all gaps."""
    n_voxels = max((len(values) for values in r.values()), default=0)
    return int(np.clip(np.sqrt(n_voxels), 10, _MOST_BINS))

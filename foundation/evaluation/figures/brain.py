"""A number per voxel where the voxels are: slices, a cortical surface, projections, or a strip where no place is known.

- Voxels of a volume: axial slices of the subject's own space, nothing resampled.
- Vertices of fsaverage: on fsaverage5 (`foundation.evaluation.figures.surface`).
- Else voxels with a position in mm: seen along the three axes.
- Else: a strip, sorted by ROI family and value.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure

from data.voxels import Surface, Volume, VoxelTable
from foundation.evaluation.figures.canvas import DPI, new_figure
from foundation.evaluation.figures.mosaic import axial_slices
from foundation.evaluation.figures.panel import WIDTH, wrapped
from foundation.evaluation.figures.surface import draw_surface, on_fsaverage5

N_SLICES = 6
_BAR_HEIGHT = 0.26
"""Inches."""
_VIEWS = (("from above", 0, 1), ("from behind", 0, 2), ("from the right", 1, 2))
"""Name and axes (x to the right, y to the front, z up) of the projections."""
_AXES = ("x, left to right (mm)", "y, back to front (mm)", "z, up (mm)")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What the colours of a map mean."""

    label: str
    low: float
    high: float

    @property
    def colours(self) -> Colormap:
        """Perceptually uniform; two-sided where the scale has 0 in its middle."""
        return colormaps["coolwarm" if self.low == -self.high else "viridis"]

    @property
    def norm(self) -> Normalize:
        """From values to colours."""
        return Normalize(self.low, self.high)


def how_shown(voxels: VoxelTable) -> str:
    """Return how `brain_map` shows these voxels, as a sentence for readers."""
    if isinstance(voxels.place, Volume):
        return "Axial slices of the subject's own space, its left on the left; white: no voxel."
    if on_fsaverage5(voxels.place):
        return (
            "On the inflated surface of fsaverage5, whose vertices are fsaverage's first 10,242 in each hemisphere; "
            "grey: no voxel."
        )
    if voxels.coordinates is not None:
        return (
            "The store knows positions in mm but no volume or common surface: voxels seen along three axes, those with "
            "larger values in front."
        )
    return "The store doesn't know where the voxels lie: a strip, sorted by ROI family and value."


def brain_map(
    values: Float[np.ndarray, " voxel"],
    path: Path,
    *,
    voxels: VoxelTable,
    families: Mapping[str, Bool[np.ndarray, " voxel"]],
    scale: Scale,
    title: str,
) -> None:
    """Draw a number per voxel as `how_shown` tells, as a picture; NaN isn't drawn."""
    if isinstance(voxels.place, Volume):
        figure = _slices(values, voxels.place, scale)
    elif isinstance(voxels.place, Surface) and on_fsaverage5(voxels.place):
        figure = new_figure(WIDTH, 4.9)
        draw_surface(figure, values, voxels.place, colours=scale.colours, limits=(scale.low, scale.high))
    elif voxels.coordinates is not None:
        figure = _projections(values, voxels.coordinates, scale)
    else:
        figure = _strip(values, families, scale)
    bar = figure.colorbar(
        ScalarMappable(scale.norm, scale.colours),
        ax=figure.axes,
        orientation="horizontal",
        aspect=30,
        fraction=_BAR_HEIGHT / figure.get_figheight(),
        extend="both",
    )
    bar.set_label(scale.label)
    figure.suptitle(wrapped(title), fontsize="medium")
    figure.savefig(path, dpi=DPI)


def _slices(values: np.ndarray, place: Volume, scale: Scale) -> Figure:
    slices = axial_slices(values, place, n_slices=N_SLICES)
    n_slices, n_rows, n_columns = slices.values.shape
    across = min(3, n_slices)
    down = -(-n_slices // across)
    figure = new_figure(WIDTH, 1.2 + down * (0.25 + WIDTH / across * n_rows / n_columns))
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for k, ax in enumerate(axes):
        ax.set_axis_off()
        if k < n_slices:
            ax.imshow(
                np.ma.masked_invalid(slices.values[k]),
                origin="lower",
                cmap=scale.colours,
                norm=scale.norm,
                interpolation="none",
            )
            ax.set_title(f"z = {slices.z_mm[k]:.0f} mm", fontsize="small")
    for x, hand in ((0.02, "L"), (0.98, "R")):
        axes[0].annotate(hand, (x, 0.02), xycoords="axes fraction", ha="left" if hand == "L" else "right")
    return figure


def _projections(values: np.ndarray, coordinates: np.ndarray, scale: Scale) -> Figure:
    figure = new_figure(WIDTH, 8.2)
    known = np.isfinite(values)
    order = np.flatnonzero(known)[np.argsort(np.abs(values[known]))]
    size = float(np.clip(9000 / max(1, len(values)), 1.5, 20))
    for ax, (view, across, up) in zip(figure.subplots(3, 1), _VIEWS, strict=True):
        ax.scatter(
            coordinates[order, across],
            coordinates[order, up],
            c=values[order],
            s=size,
            cmap=scale.colours,
            norm=scale.norm,
            linewidths=0,
            rasterized=True,
        )
        ax.set_aspect("equal", adjustable="datalim")
        ax.set_title(view, fontsize="small")
        ax.set_xlabel(_AXES[across], fontsize="small")
        ax.set_ylabel(_AXES[up], fontsize="small")
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def _strip(values: np.ndarray, families: Mapping[str, np.ndarray], scale: Scale) -> Figure:
    names = [*families, "no family"] if families else ["all voxels"]
    family = np.full(len(values), len(families))
    for k, mask in enumerate(families.values()):
        family[mask] = k
    order = np.lexsort((values, family))
    figure = new_figure(WIDTH, 2.3)
    ax = figure.add_subplot()
    ax.imshow(
        np.ma.masked_invalid(values[order][None]),
        aspect="auto",
        cmap=scale.colours,
        norm=scale.norm,
        interpolation="none",
    )
    counts = np.bincount(family, minlength=len(names))
    ends = np.cumsum(counts)
    for end in ends[counts > 0][:-1]:
        ax.axvline(end - 0.5, color="white", linewidth=2)
    labels = [f"{name}\n({n})" for name, n in zip(names, counts, strict=True) if n]
    ax.set_xticks((ends - counts / 2)[counts > 0] - 0.5, labels, fontsize="small")
    ax.set_yticks([])
    ax.tick_params(length=0)
    ax.set_xlabel("voxels (how many), lowest to highest", fontsize="small")
    return figure

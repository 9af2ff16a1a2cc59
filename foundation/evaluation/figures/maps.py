"""Predicted beside measured responses to single test images: the best, the median and the worst by pattern r.

Voxels with a place in a volume are shown in axial slices of the subject's own space, the subject's left on the left;
others as a strip, sorted by ROI family and predicted value.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import SubFigure
from matplotlib.lines import Line2D

from data.voxels import Surface, Volume
from foundation.evaluation.figures.canvas import DPI, FAMILY_LOOKS, OTHER_FAMILY, new_figure
from foundation.evaluation.figures.mosaic import axial_slices
from foundation.evaluation.metrics import patternwise_r

N_SLICES = 6
_NOTHING = "#E4E4E4"
"""Where there is no voxel: unlike white, which is a response of 0."""
Pair = tuple[np.ndarray, np.ndarray]
"""Measured and predicted responses to one image, each (voxel,)."""


def maps(
    predicted: Float[np.ndarray, "image voxel"],
    measured: Float[np.ndarray, "image voxel"],
    path: Path,
    *,
    images: Sequence[str],
    place: Volume | Surface | None = None,
    families: Mapping[str, Bool[np.ndarray, " voxel"]] | None = None,
    title: str = "",
) -> None:
    """Draw measured and predicted responses to three images on one colour scale, and voxel by voxel, as a picture.

    Parameters
    ----------
    measured
        Mean over an image's repeats, in SD of the session.
    images
        Names of the images, in the rows' order.
    families
        ROI families, by name (`foundation.evaluation.measured.Measured.families`).

    Raises
    ------
    ValueError
        If images and rows are not as many.
    """
    if not len(images) == len(predicted) == len(measured):
        raise ValueError(f"{len(images)} names for {len(predicted)} predicted and {len(measured)} measured images")
    families = families or {}
    r = patternwise_r(predicted, measured)
    shown = best_median_worst(r)
    limit = float(np.percentile(np.abs(measured[list(shown.values())]), 98)) or 1.0
    figure = new_figure(11.0, 0.8 + 2.6 * len(shown))
    blocks = figure.subfigures(len(shown) + 1, 1, height_ratios=[2.6] * len(shown) + [0.8], squeeze=False)[:, 0]
    for block, (which, row) in zip(blocks, shown.items(), strict=False):
        pair = measured[row], predicted[row]
        grid = block.add_gridspec(2, 2, width_ratios=[4, 1])
        if isinstance(place, Volume):
            _mosaics([block.add_subplot(grid[i, 0]) for i in range(2)], pair, place, limit)
        else:
            _strip(block.add_subplot(grid[:, 0]), pair, families, limit)
        _scatter(block.add_subplot(grid[:, 1]), pair, families, limit)
        block.suptitle(f"{which}: {_short(images[row])}, pattern r = {r[row]:.2f}", x=0.01, ha="left", fontsize=11)
    _legend(blocks[-1], [*families], limit, in_volume=isinstance(place, Volume))
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=DPI)


def _legend(block: SubFigure, families: Sequence[str], limit: float, *, in_volume: bool) -> None:
    bar = block.colorbar(
        ScalarMappable(Normalize(-limit, limit), _colours()),
        cax=block.add_axes((0.2, 0.6, 0.4, 0.2)),
        orientation="horizontal",
        extend="both",
    )
    bar.set_label(
        "response (SD of the session), measured and predicted on one scale" + ("; grey: no voxel" if in_volume else "")
    )
    dots = [Line2D([], [], marker="o", linestyle="", color=_colour_of(name), label=name) for name in families]
    if dots:
        block.legend(handles=dots, loc="center right", ncols=2, frameon=False)


def _short(name: str) -> str:
    """Return a name that fits a title; identities by digest are long."""
    return name if len(name) <= 40 else f"{name[:24]}…"


def best_median_worst(r: Float[np.ndarray, " image"]) -> dict[str, int]:
    """Return which images to show; one without a correlation counts as the worst, and none is shown twice."""
    order = np.argsort(-np.nan_to_num(r, nan=-np.inf), kind="stable")
    chosen = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    found: dict[str, int] = {}
    for which, row in chosen.items():
        if int(row) not in found.values():
            found[which] = int(row)
    return found


def _colour_of(family: str) -> str:
    return FAMILY_LOOKS.get(family, OTHER_FAMILY).colour


def _colours() -> Colormap:
    return colormaps["RdBu_r"].with_extremes(bad=_NOTHING)


def _mosaics(axes: Sequence[Axes], pair: Pair, place: Volume, limit: float) -> None:
    for ax, values, label, side in zip(axes, pair, ("measured", "predicted"), "SN", strict=True):
        slices = axial_slices(values, place, n_slices=N_SLICES)
        n_slices, height, width = slices.values.shape
        shown = np.ma.masked_invalid(np.concatenate([*slices.values], axis=1))
        ax.imshow(shown, origin="lower", cmap=_colours(), vmin=-limit, vmax=limit, interpolation="none")
        ax.set_anchor(side)  # the two stand together, whatever room is left
        for k in range(1, n_slices):
            ax.axvline(k * width - 0.5, color="white", linewidth=5)
        ax.set_ylabel(label, rotation=0, ha="right", va="center")
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
        if label == "measured":
            for k, z in enumerate(slices.z_mm):
                _write(ax, f"z = {z:.0f} mm", (k * width + width / 2, height - 0.5), above=True)
        else:
            for x, hand in ((0.0, "L"), (width - 1.0, "R")):
                _write(ax, hand, (x, -0.5), above=False)


def _write(ax: Axes, text: str, at: tuple[float, float], *, above: bool) -> None:
    ax.annotate(text, at, xytext=(0, 2 if above else -12), textcoords="offset points", ha="center", fontsize=8)


def _strip(ax: Axes, pair: Pair, families: Mapping[str, np.ndarray], limit: float) -> None:
    measured, predicted = pair
    names = [*families, "no family"] if families else ["all voxels"]
    family = np.full(len(predicted), len(families))
    for k, mask in enumerate(families.values()):
        family[mask] = k
    order = np.lexsort((predicted, family))
    rows = np.stack([measured[order], predicted[order]])
    ax.imshow(rows, aspect="auto", cmap=_colours(), vmin=-limit, vmax=limit, interpolation="none")
    ax.set_yticks([0, 1], ["measured", "predicted"])
    ax.axhline(0.5, color="white", linewidth=3)
    counts = np.bincount(family, minlength=len(names))
    ends = np.cumsum(counts)
    present = counts > 0
    for end in ends[present][:-1]:
        ax.axvline(end - 0.5, color="black", linewidth=1)
    labels = [f"{name} ({n})" for name, n in zip(names, counts, strict=True) if n]
    ax.set_xticks((ends - counts / 2)[present] - 0.5, labels)
    ax.tick_params(length=0)
    ax.set_xlabel("voxels (how many), in each family from the lowest prediction to the highest", fontsize=9)


def _scatter(ax: Axes, pair: Pair, families: Mapping[str, np.ndarray], limit: float) -> None:
    measured, predicted = pair
    rest = ~np.any([np.zeros(len(measured), bool), *families.values()], axis=0)
    size = float(np.clip(4000 / len(measured), 1, 8))
    for mask, colour in [(rest, OTHER_FAMILY.colour), *((mask, _colour_of(name)) for name, mask in families.items())]:
        ax.scatter(predicted[mask], measured[mask], s=size, color=colour, alpha=0.5, linewidths=0)
    reach = 1.5 * limit
    ax.plot([-reach, reach], [-reach, reach], color="black", linewidth=0.8, linestyle=":")
    ax.set_xlim(-reach, reach)
    ax.set_ylim(-reach, reach)
    ax.set_aspect("equal")
    ax.set_xlabel("predicted (SD)", fontsize=9)
    ax.set_ylabel("measured (SD)", fontsize=9)

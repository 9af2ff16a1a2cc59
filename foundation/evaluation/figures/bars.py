"""Bars of each system's score per subject and ROI family."""

from pathlib import Path

from foundation.evaluation.figures.canvas import DPI, looks, new_figure
from foundation.evaluation.figures.panel import legend_columns
from foundation.evaluation.score import CEILING, Row, Scores

_GROUP = 0.8
"""Width of all bars of one ROI together."""


def bars_per_roi(scores: Scores, path: Path, *, limits: tuple[float, float] | None = None) -> None:
    """Draw each system's voxelwise correlation per subject and ROI family, with intervals and the ceiling.

    Parameters
    ----------
    limits
        Of the axis of r, where several figures are compared.
    """
    rows = [r for r in scores.rows if (r.axis, r.metric, r.target) == ("voxel", "r", "mean") and r.value is not None]
    subjects = list(dict.fromkeys(r.subject for r in rows))
    drawn_as = looks(r.system for r in rows)
    figure = new_figure(1.6 + 2.6 * max(1, len(subjects)), 3.8)
    axes = figure.subplots(1, max(1, len(subjects)), sharey=True, squeeze=False)[0]
    for ax, subject in zip(axes, subjects, strict=False):
        mine = [r for r in rows if r.subject == subject]
        rois = list(dict.fromkeys(r.roi for r in mine))
        width = _GROUP / max(1, len(drawn_as))
        for k, (system, look) in enumerate(drawn_as.items()):
            of_system = [r for r in mine if r.system == system]
            x = [rois.index(r.roi) - _GROUP / 2 + (k + 0.5) * width for r in of_system]
            ax.bar(
                x,
                [r.value or 0.0 for r in of_system],
                0.92 * width,
                yerr=_error(of_system),
                color=look.colour,
                hatch=look.hatch,
                edgecolor="white",
                linewidth=0,
                error_kw={"elinewidth": 1, "capsize": 2},
                label=system,
            )
        for n, r in enumerate(r for r in mine if r.system == CEILING):
            x = rois.index(r.roi)
            label = "ceiling" if n == 0 else None
            ax.hlines(r.value, x - 0.45, x + 0.45, color="black", linestyle="--", linewidth=1.2, label=label)
        ax.set_xticks(range(len(rois)), rois)
        ax.set_xlabel("ROI family")
        ax.set_title(subject)
        ax.axhline(0, color="black", linewidth=0.5)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("correlation over test images\n(mean over voxels, 95 % interval)")
    if limits is not None:
        axes[0].set_ylim(*limits)
    named = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    columns = min(len(named), legend_columns(figure, named))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=max(1, columns), frameon=False)
    figure.savefig(path, dpi=DPI)


def _error(rows: list[Row]) -> list[list[float]]:
    """Return how far intervals reach below and above their values; not at all where there is none."""
    reach: list[list[float]] = [[], []]
    for row in rows:
        value = row.value or 0.0
        reach[0].append(0.0 if row.low is None else max(0.0, value - row.low))
        reach[1].append(0.0 if row.high is None else max(0.0, row.high - value))
    return reach

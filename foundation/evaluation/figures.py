"""Figures that a run keeps."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from foundation.evaluation.score import Scores

COLOURS = {"ridge": "#E69F00", "ceiling": "#999999"}
OURS = "#0072B2"


def bars_per_roi(scores: Scores, path: Path) -> None:
    """Draw each system's voxelwise correlation per subject and ROI family, with intervals and the ceiling, as PNG."""
    rows = [r for r in scores.rows if (r.axis, r.metric, r.target) == ("voxel", "r", "mean") and r.value is not None]
    subjects = list(dict.fromkeys(r.subject for r in rows))
    figure = Figure(figsize=(3.2 * max(2, len(subjects)), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(subjects), sharey=True, squeeze=False)[0]
    for ax, subject in zip(axes, subjects, strict=True):
        mine = [r for r in rows if r.subject == subject]
        rois = list(dict.fromkeys(r.roi for r in mine))
        systems = [s for s in dict.fromkeys(r.system for r in mine) if s != "ceiling"]
        for k, system in enumerate(systems):
            for r in (r for r in mine if r.system == system):
                assert r.value is not None
                x = rois.index(r.roi) + (k - (len(systems) - 1) / 2) * 0.8 / len(systems)
                low, high = (r.value if r.low is None else r.low), (r.value if r.high is None else r.high)
                error = [[max(0, r.value - low)], [max(0, high - r.value)]]
                label = system if r.roi == rois[0] and subject == subjects[0] else None
                ax.bar(
                    x, r.value, 0.8 / len(systems), yerr=error, color=COLOURS.get(system, OURS), label=label, capsize=2
                )
        for r in (r for r in mine if r.system == "ceiling"):
            x = rois.index(r.roi)
            label = "ceiling" if r.roi == rois[0] and subject == subjects[0] else None
            ax.hlines(r.value, x - 0.45, x + 0.45, color="black", linestyle="--", linewidth=1, label=label)
        ax.set_xticks(range(len(rois)), rois)
        ax.set_title(subject)
        ax.axhline(0, color="black", linewidth=0.5)
    axes[0].set_ylabel("correlation over test images\n(mean over voxels, 95 % interval)")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)

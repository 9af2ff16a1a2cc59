"""The ablation figure: what each intervention costs early and higher areas, subject by subject."""

from pathlib import Path

from foundation.evaluation.area_losses import Ablation
from foundation.evaluation.figures.canvas import DPI, FAMILY_LOOKS, OTHER_FAMILY, new_figure
from foundation.evaluation.interventions import CONTROL

_SHOWN = ("zero", "mean", "shuffled", CONTROL)
_OFFSETS = {"early": -0.16, "mid": 0.0, "higher": 0.16}
_NAMES = {"cls": "CLS stream", "patch": "patch stream"}


def ablation_figure(ablation: Ablation, path: Path) -> None:
    """Draw the loss of r by intervention, a row of panels per stream and a column per subject.

    Raises
    ------
    ValueError
        If there is nothing to draw: no intervention was possible.
    """
    rows = [r for r in ablation.rows if r.intervention in _SHOWN and r.branch in _NAMES]
    if not rows:
        raise ValueError("nothing was ablated, so there is nothing to draw; see the ablation's notes")
    subjects, branches = (list(dict.fromkeys(getattr(r, name) for r in rows)) for name in ("subject", "branch"))
    families = [roi for roi in _OFFSETS if any(r.roi == roi for r in rows)]
    figure = new_figure(1.6 + 2.8 * len(subjects), 1.0 + 2.6 * len(branches))
    panels = figure.subplots(len(branches), len(subjects), sharex=True, sharey="row", squeeze=False)
    for of_branch, branch in zip(panels, branches, strict=True):
        for ax, subject in zip(of_branch, subjects, strict=True):
            for roi in families or ["all"]:
                look, offset = FAMILY_LOOKS.get(roi, OTHER_FAMILY), _OFFSETS.get(roi, 0.0)
                mine = [r for r in rows if (r.subject, r.branch, r.roi) == (subject, branch, roi)]
                x = [_SHOWN.index(r.intervention) + offset for r in mine]
                ax.plot(x, [r.loss for r in mine], look.marker, color=look.colour, markersize=5, label=roi)
                for at, r in zip(x, mine, strict=True):
                    if r.low is not None and r.high is not None:
                        ax.vlines(at, r.low, r.high, color=look.colour, linewidth=1.2)
            ax.axhline(0, color="black", linewidth=0.5)
            ax.axvline(len(_SHOWN) - 1.5, color="#BBBBBB", linewidth=0.8, linestyle=":")
            ax.set_xticks(range(len(_SHOWN)), ["zero", "mean", "shuffled", "random\nsubspace"])
            ax.set_xlim(-0.5, len(_SHOWN) - 0.5)
            ax.spines[["top", "right"]].set_visible(False)
            ax.set_title(f"{subject}, {_NAMES[branch]}", fontsize=10)
        of_branch[0].set_ylabel("loss of correlation\n(mean over voxels,\n95 % over images)")
    for ax in panels[-1]:
        ax.set_xlabel("stream replaced by; right: control")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=DPI)

"""What lies between a strict number and a published one: the protocol's steps, one at a time, on one model.

From the strict score to the one that ``chasm-legacy`` prints, each step changes one thing: what the correlation is
against, the axis that it runs along, the unit of the responses, and the images on which the checkpoint was picked. A
gap that remains after the last step is the model's.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from rich.table import Table

from foundation.evaluation.evaluated import Evaluated, Protocol
from foundation.evaluation.score import Scores
from foundation.evaluation.table import new_table

STEPS: tuple[tuple[Protocol, str, str, str], ...] = (
    ("strict", "voxel", "trial", "over images, against single trials"),
    ("strict", "voxel", "mean", "... against the mean of an image's repeats"),
    ("strict", "pattern", "mean", "... over voxels instead (pattern r)"),
    ("chasm-legacy", "pattern", "mean", "... z-scored over all trials, test trials included"),
)
"""Protocol, axis and target of each r, and what the step to it changes."""
PICKED_STEP = "... checkpoint picked on the test images"


@dataclass(frozen=True, kw_only=True)
class ProtocolStep:
    """One step: the score after it, and what the step alone changed."""

    subject: str
    system: str
    step: str
    protocol: str
    axis: str
    target: str
    r: float | None
    change: float | None
    floor: float | None
    """What a model that knows nothing of the image scores: the training images' mean."""

    def to_json(self) -> dict[str, str | float | None]:
        """Return the step as plain JSON."""
        return asdict(self)


def protocol_steps(evaluated: Sequence[Evaluated], system: str, *, picked: str | None = None) -> list[ProtocolStep]:
    """Return the steps of `system`, subject by subject; both protocols must have been scored.

    Parameters
    ----------
    picked
        The system that is its checkpoint picked on test images, if its run kept any.
    """
    found = []
    for of in evaluated:
        before = None
        steps: list[tuple[Protocol, str, str, str, str]] = [(*step, system) for step in STEPS]
        if picked is not None:
            steps.append(("chasm-legacy", "pattern", "mean", PICKED_STEP, picked))
        for protocol, axis, target, told, name in steps:
            value, floor = (_r(of.scores[protocol], who, axis, target) for who in (name, "mean"))
            change = None if before is None or value is None else value - before
            found.append(
                ProtocolStep(
                    subject=of.subject,
                    system=system,
                    step=told,
                    protocol=protocol,
                    axis=axis,
                    target=target,
                    r=value,
                    change=change,
                    floor=floor,
                )
            )
            before = value
    return found


def _r(scores: Scores, system: str, axis: str, target: str) -> float | None:
    wanted = (system, "all", axis, target, "r")
    values = [r.value for r in scores.rows if (r.system, r.roi, r.axis, r.target, r.metric) == wanted]
    return values[0] if values else None


def steps_table(steps: Sequence[ProtocolStep]) -> Table:
    """Return a table with the steps below each other and subjects beside each other, and the mean over subjects."""
    subjects = list(dict.fromkeys(step.subject for step in steps))
    told = list(dict.fromkeys(step.step for step in steps))
    systems = ", ".join(dict.fromkeys(step.system for step in steps))
    table = new_table(
        f"How much of a gap is protocol: {systems}",
        "r, and in () what the step alone changed; floor: r of the training images' mean, the same for every image. "
        "Nothing about the model differs between the rows, but the last where a checkpoint was picked. mean: over the "
        "subjects that have every row.",
        left=("r ...",),
        right=(*subjects, *(["mean"] if len(subjects) > 1 else []), "floor"),
    )
    whole = [s for s in subjects if all(step.r is not None for step in steps if step.subject == s)]
    for name in told:
        mine = [step for step in steps if step.step == name]
        averaged = [step for step in mine if step.subject in whole]
        mean = [_cell(_mean([s.r for s in averaged]), _mean([s.change for s in averaged]))] if len(subjects) > 1 else []
        cells = [_cell(step.r, step.change) for step in mine]
        table.add_row(name, *cells, *mean, _cell(_mean([s.floor for s in averaged or mine]), None))
    return table


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _cell(value: float | None, change: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:.3f}" + ("" if change is None else f" ({change:+.3f})")

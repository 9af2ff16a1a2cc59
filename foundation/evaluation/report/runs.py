"""The sections on what earlier runs found: learning curves, ablations, and what a protocol alone changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from jaxtyping import Float

from foundation.evaluation.area_losses import Ablation
from foundation.evaluation.curve import REFERENCE, CurveRow
from foundation.evaluation.figures import bars_per_roi
from foundation.evaluation.figures.ablation import ablation_figure
from foundation.evaluation.figures.learning_curve import draw_curve
from foundation.evaluation.partition import PartitionRow
from foundation.evaluation.protocols import ProtocolStep
from foundation.evaluation.report.drawer import Drawer, panels
from foundation.evaluation.report.markup import Markup, element, listed, together
from foundation.evaluation.report.page import Section
from foundation.evaluation.report.tables import details, table, with_interval, with_sign
from foundation.evaluation.score import Row, Scores
from foundation.evaluation.table import number


@dataclass(frozen=True, kw_only=True)
class CurveRun:
    """A run's learning curve."""

    run: str
    rows: tuple[CurveRow, ...]


@dataclass(frozen=True, kw_only=True)
class AblationRun:
    """A run's ablation of a model."""

    run: str
    model: str
    ablation: Ablation
    sentences: tuple[str, ...]
    partition: tuple[PartitionRow, ...] = ()
    preference: Mapping[str, Float[np.ndarray, " voxel"]] = field(default_factory=dict, compare=False)
    """By subject: variance that patches alone explain of each voxel, less what CLS tokens alone do."""


@dataclass(frozen=True, kw_only=True)
class StepsRun:
    """A run's steps from one protocol to the other."""

    run: str
    steps: tuple[ProtocolStep, ...]


@dataclass(frozen=True, kw_only=True)
class ScoresRun:
    """A run's own scores, of networks that it trained and that no registry has."""

    run: str
    scores: Scores


def stored_section(runs: Sequence[ScoresRun], drawer: Drawer) -> Section | None:
    """Return the scores that comparisons kept; None where there is no such run."""
    blocks: list[Markup] = []
    for of in runs:
        shown = [r for r in of.scores.rows if (r.target, r.metric) == ("mean", "r") and r.value is not None]
        figures, rows = [], []
        for subject in dict.fromkeys(r.subject for r in shown):
            mine = {(r.system, r.roi, r.axis): r for r in shown if r.subject == subject}
            some = Scores(rows=tuple(mine.values()), comparisons=())
            told = ", ".join(f"{s} {number(r.value)}" for (s, *at), r in mine.items() if at == ["all", "voxel"])
            alt = f"Bars of voxel r per ROI family for {subject}, run {of.run}. All voxels: {told}."
            figures.append(drawer.figure(f"compared-{of.run}-{subject}", partial(bars_per_roi, some), alt=alt))
            for system, roi in dict.fromkeys((system, roi) for system, roi, _ in mine):
                found = [mine.get((system, roi, axis)) for axis in ("voxel", "pattern")]
                rows.append([subject, roi, system, *(_told(r) for r in found)])
        headings = ["subject", "ROI", "system", "voxel r [95 %]", "pattern r [95 %]"]
        numbers = table(headings, rows, caption=f"Scores of run {of.run}, protocol strict", n_leading=3, ruled=True)
        blocks += [element("h3", of.run), panels(*figures), details("The numbers", numbers)]
    if not blocks:
        return None
    return Section(
        key="compared",
        heading="Kept comparison",
        lead="Networks that a run trained and compared on the same images, as it scored them then: mean voxel r, with "
        "its 95 % interval; the dashed line is the ceiling.",
        body=together(blocks),
    )


def _told(row: Row | None) -> str:
    return "n/a" if row is None else with_interval(row.value, row.low, row.high)


def curve_section(runs: Sequence[CurveRun], drawer: Drawer) -> Section | None:
    """Return the learning curves; None where there is no run with one."""
    figures, blocks = [], []
    for of in runs:
        for subject in dict.fromkeys(row.subject for row in of.rows):
            rows = [row for row in of.rows if row.subject == subject]
            last = [f"{r.system} {number(r.value)}" for r in rows if r.sessions == max(r.sessions for r in rows)]
            figures.append(
                drawer.figure(
                    f"curve-{of.run}-{subject}",
                    partial(draw_curve, rows),
                    alt=f"Learning curve of {subject} ({of.run}); after all sessions: {', '.join(last)}.",
                )
            )
        blocks.append(
            table(
                ["subject", "sessions", "images", "system", "voxel r [95 %]", f"gain over {REFERENCE} [95 %]"],
                [
                    [
                        r.subject,
                        str(r.sessions),
                        "n/a" if r.n_train is None else str(r.n_train),
                        r.system,
                        with_interval(r.value, r.low, r.high),
                        with_interval(r.difference, r.difference_low, r.difference_high, signed=True),
                    ]
                    for r in of.rows
                ],
                caption=f"Learning curve, run {of.run}",
                n_leading=2,
            )
        )
    if not figures:
        return None
    return Section(
        key="curves",
        heading="Learning curves",
        lead="Voxel r after learning from the subject's first sessions only, and the gain over ridge that learned from "
        "the same ones; bands are 95 % intervals over test images.",
        body=together([panels(*figures), details("The numbers", *blocks)]),
    )


def ablation_section(runs: Sequence[AblationRun], drawer: Drawer) -> Section | None:
    """Return what disabling a stream costs; None where there is no such run."""
    if not runs:
        return None
    blocks: list[Markup] = []
    for of in runs:
        blocks += [element("h3", f"{of.model} (run {of.run})"), listed(of.sentences)]
        figures = []
        for subject in dict.fromkeys(row.subject for row in of.ablation.rows):
            some = Ablation(rows=tuple(row for row in of.ablation.rows if row.subject == subject))
            told = [
                f"{r.branch} {r.intervention} {with_interval(r.loss, r.low, r.high)}"
                for r in some.rows
                if r.roi == "all"
            ]
            figures.append(
                drawer.figure(
                    f"ablation-{of.run}-{subject}",
                    partial(ablation_figure, some),
                    alt=f"Loss of voxel r of {subject} by stream and intervention. All voxels: {', '.join(told)}.",
                )
            )
        blocks += [panels(*figures)] if figures else []
        rows = [
            [r.subject, r.roi, r.branch, r.intervention, number(r.intact), with_interval(r.loss, r.low, r.high)]
            for r in of.ablation.rows
        ]
        numbers = table(
            ["subject", "ROI", "stream", "intervention", "intact r", "loss of r [95 %]"],
            rows,
            caption="Loss of voxel r by intervention",
            n_leading=2,
            ruled=True,
        )
        blocks += [details("The numbers", numbers), details("Notes", listed(of.ablation.notes))]
    return Section(
        key="ablation",
        heading="Ablation",
        lead="What a prediction loses when one of the model's two streams is replaced: the higher, the more the model "
        "uses that stream; the random subspace is the control.",
        body=together(blocks),
    )


def protocol_section(runs: Sequence[StepsRun]) -> Section | None:
    """Return what each step of a protocol changes; None where there is no such run."""
    if not runs:
        return None
    blocks = []
    for of in runs:
        for system in dict.fromkeys(step.system for step in of.steps):
            mine = [step for step in of.steps if step.system == system]
            rows = [[s.subject, s.step, number(s.r), with_sign(s.change), number(s.floor)] for s in mine]
            blocks.append(
                table(
                    ["subject", "r ...", "r", "change", "floor"],
                    rows,
                    caption=f"{system}: strict to chasm-legacy, run {of.run}; floor: r of the training images' mean",
                    n_leading=2,
                    ruled=True,
                )
            )
    return Section(
        key="protocol",
        heading="How much is protocol",
        lead="The same predictions scored in the literature's way, one change at a time: what differs between the rows "
        "is the protocol, not the model.",
        body=together(blocks),
    )

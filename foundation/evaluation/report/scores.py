"""The sections with the scores themselves: the table, paired differences, and bars."""

from collections.abc import Sequence
from functools import partial

from foundation.evaluation.figures import bars_per_roi
from foundation.evaluation.report.drawer import Drawer, panels
from foundation.evaluation.report.kept import Shown
from foundation.evaluation.report.markup import Markup, element, listed, together
from foundation.evaluation.report.page import Section
from foundation.evaluation.report.tables import details, p_value, table, with_interval
from foundation.evaluation.score import FLOORS, Comparison, merge_scores
from foundation.evaluation.table import number, places

_COLUMNS = (
    ("mean", "voxel", "r", "voxel r"),
    ("trial", "voxel", "r", "voxel r (trial)"),
    ("mean", "pattern", "r", "pattern r"),
    ("trial", "pattern", "r", "pattern r (trial)"),
    ("mean", "voxel", "mse", "MSE"),
    ("trial", "voxel", "mse", "MSE (trial)"),
    ("mean", "voxel", "r2_ceiling", "r²/c"),
    ("mean", "voxel", "r2_ceiling_unclipped", "r²/c unclipped"),
)
"""Target, axis and metric of each column, and its heading."""
_WITH_INTERVAL = (0, 2, 4, 6)
_LEGEND = (
    "voxel r: correlation over images, averaged over voxels.",
    "pattern r: correlation over voxels, averaged over images.",
    "MSE: mean squared error, in SD² of the session; lower is better.",
    "Columns compare with the mean of an image's repeats; those marked (trial), with each single trial.",
    "r²/c: signed squared voxel r over the noise ceiling, per voxel; clipped to 0 to 1, so above 0 even for noise, and "
    "unclipped.",
    "Floors: zero predicts 0, mean predicts the training images' mean. ceiling: what the measured repeats allow.",
    "[ ]: 95 % bootstrap interval over images, the voxels and the ceiling being what they are.",
)
_TESTS = (
    "For MSE, negative is better. p is two-sided and not corrected for the number of comparisons. Voxel r has one "
    "value for all images, so its p comes from the paired bootstrap over images; pattern r and MSE have one per image "
    "and are tested by Wilcoxon's signed ranks over images."
)


def score_section(subjects: Sequence[Shown]) -> Section:
    """Return the strict score table with floors, ceiling and reasons for every n/a."""
    scores = merge_scores(of.scores for of in subjects)
    rows = {(r.subject, r.roi, r.system, r.target, r.axis, r.metric): r for r in scores.rows}
    blocks = []
    for subject in subjects:
        lines = []
        for place in places(subject.scores.rows):
            cells = []
            for k, (target, axis, metric, _) in enumerate(_COLUMNS):
                row = rows[*place, target, axis, metric]
                cells.append(with_interval(row.value, row.low, row.high) if k in _WITH_INTERVAL else number(row.value))
            lines.append([place[1], place[2], *cells])
        caption = f"{subject.subject}, protocol strict: {subject.n_images} images, {subject.n_voxels} voxels"
        headings = ["ROI", "system", *(heading for *_, heading in _COLUMNS)]
        blocks.append(table(headings, lines, caption=caption, n_leading=2, ruled=True))
    body = [
        *blocks,
        details("What the columns and rows are", listed(_LEGEND)),
        details("How responses were prepared, and why something is n/a", listed(_notes(scores.notes))),
    ]
    return Section(
        key="scores",
        heading="Scores",
        lead="Every system beside floors, which know nothing of the image, and the ceiling, which no prediction is "
        "expected to pass.",
        body=together(body),
    )


def comparison_section(subjects: Sequence[Shown], systems: Sequence[str]) -> Section | None:
    """Return paired differences between systems; None where there is a single one."""
    pairs = [(a, b) for k, a in enumerate(systems) for b in systems[k + 1 :]]
    if not pairs:
        return None
    found = [c for of in subjects for c in of.scores.comparisons]
    measures = (("voxel", "r"), ("pattern", "r"), ("voxel", "mse"))
    shown = [
        c
        for a, b in pairs
        for measure in measures
        for c in found
        if (c.system, c.versus) == (a, b) and (c.axis, c.metric) == measure and c.target == "mean"
    ]
    headline = [c for c in shown if c.roi == "all"]
    return Section(
        key="differences",
        heading="Paired differences",
        lead="One system minus another on the same images; an interval that leaves out 0 is a difference that other "
        "images of the kind would show too.",
        body=together(
            [
                _differences(headline, "Over all voxels, against the mean of an image's repeats"),
                element("p", _TESTS),
                details(
                    "Differences per ROI family",
                    _differences([c for c in shown if c.roi != "all"], "Per ROI family, against repeat means"),
                )
                if len(headline) < len(shown)
                else None,
            ]
        ),
    )


def _differences(found: Sequence[Comparison], caption: str) -> Markup:
    names = {("voxel", "r"): "voxel r", ("pattern", "r"): "pattern r", ("voxel", "mse"): "MSE"}
    return table(
        ["difference", "subject", "ROI", "score", "difference [95 %]", "p", "test"],
        [
            [
                f"{c.system} − {c.versus}",
                c.subject,
                c.roi,
                names[c.axis, c.metric],
                with_interval(c.difference, c.low, c.high, signed=True),
                p_value(c.p_value),
                c.test,
            ]
            for c in found
        ],
        caption=caption,
        n_leading=2,
        ruled=True,
    )


def bars_section(subjects: Sequence[Shown], drawer: Drawer) -> Section:
    """Return a panel of bars per subject, on one scale."""
    values = {
        of.subject: [r for r in of.scores.rows if (r.axis, r.metric, r.target) == ("voxel", "r", "mean")]
        for of in subjects
    }
    reach = [x for rows in values.values() for r in rows for x in (r.value, r.low, r.high) if x is not None]
    limits = (min(0.0, *reach) * 1.05, max(0.05, *reach) * 1.05)
    figures = []
    for of in subjects:
        told = [f"{r.system} {number(r.value)}" for r in values[of.subject] if r.roi == "all" and r.value is not None]
        figures.append(
            drawer.figure(
                f"bars-{of.subject}",
                partial(bars_per_roi, of.scores, limits=limits),
                alt=f"Bars of voxel r per ROI family for {of.subject}. All voxels: {', '.join(told)}.",
            )
        )
    rows = [
        [r.subject, r.roi, r.system, with_interval(r.value, r.low, r.high), str(r.n_voxels)]
        for of in subjects
        for r in values[of.subject]
        if r.system not in FLOORS and (r.subject, r.roi, r.system) in places(of.scores.rows)
    ]
    numbers = table(
        ["subject", "ROI", "system", "voxel r [95 %]", "voxels"],
        rows,
        caption="Voxel r per ROI family",
        n_leading=3,
        ruled=True,
    )
    labelled = any(of.families for of in subjects)
    return Section(
        key="families",
        heading="ROI families",
        lead="Mean voxel r of each system in early, mid and higher visual areas, with its 95 % interval; the dashed "
        "line is the ceiling."
        + ("" if labelled else " These data have no ROI labels, so there are only all voxels together."),
        body=together([panels(*figures), details("The numbers", numbers)]),
    )


def _notes(notes: Sequence[str]) -> list[str]:
    """Return the scores' notes; what several subjects share stands once."""
    shared: dict[str, list[str]] = {}
    for note in notes:
        subject, _, text = note.partition(": ")
        shared.setdefault(text, []).append(subject)
    return [f"{', '.join(who)}: {text}" for text, who in shared.items()]

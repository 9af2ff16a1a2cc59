"""The section on samples: whether a model's spread is right, beside the floors, which have none."""

from collections.abc import Sequence
from functools import partial

from foundation.evaluation.figures.calibration import calibration_plot
from foundation.evaluation.report.drawer import Drawer, panels
from foundation.evaluation.report.kept import LEVELS, Shown
from foundation.evaluation.report.markup import element, together
from foundation.evaluation.report.page import Section
from foundation.evaluation.report.tables import details, table, with_interval
from foundation.evaluation.score import FLOORS

_SAMPLED = (("crps", "CRPS [95 %]"), ("coverage90", "coverage of 90 % intervals [95 %]"))


def sample_section(subjects: Sequence[Shown], systems: Sequence[str], drawer: Drawer) -> Section | None:
    """Return the calibration plots and the CRPS; None where no system draws samples."""
    sampled = [of for of in subjects if of.covered]
    if not sampled:
        return None
    figures = []
    for of in sampled:
        at = LEVELS.index(0.9)
        told = ", ".join(f"{system} {100 * shares[at]:.0f} %" for system, shares in of.covered.items())
        figures.append(
            drawer.figure(
                f"calibration-{of.subject}",
                partial(calibration_plot, of.covered, LEVELS, title=of.subject, systems=systems),
                alt=f"Calibration for {of.subject}. Targets inside 90 % intervals: {told}.",
            )
        )
    rows = {
        (r.subject, r.system, r.metric): r
        for of in sampled
        for r in of.scores.rows
        if r.roi == "all" and r.value is not None
    }
    scored = []
    for of in sampled:
        for system in (*of.covered, *FLOORS):
            found = [rows.get((of.subject, system, metric)) for metric, _ in _SAMPLED]
            cells = ["n/a" if r is None else with_interval(r.value, r.low, r.high) for r in found]
            scored.append([of.subject, system, *cells])
    scores = table(
        ["subject", "system", *(heading for _, heading in _SAMPLED)],
        scored,
        caption="CRPS over all voxels, in SD of the session: lower is better, and of a floor it is the absolute error",
        n_leading=2,
        ruled=True,
    )
    curves = table(
        ["subject", "system", *(f"{100 * level:.0f} %" for level in LEVELS)],
        [
            [of.subject, system, *(f"{100 * share:.1f} %" if share == share else "n/a" for share in shares)]
            for of in sampled
            for system, shares in of.covered.items()
        ],
        caption="Targets inside the central interval of each nominal level",
        n_leading=2,
    )
    drawn = ", ".join(sorted({str(of.n_samples) for of in sampled}))
    averaged = [
        f"{of.subject}: {of.trial_reason}; samples are of single trials and so spread more than what they are compared "
        "with."
        for of in sampled
        if of.trial_reason
    ]
    return Section(
        key="calibration",
        heading="Calibration",
        lead=f"How often a measured trial lies inside the central interval of {drawn} trials that a model draws: on "
        "the dashed line the model knows how uncertain it is; above, it is too careful, below, too sure.",
        body=together(
            [
                panels(*figures),
                *(element("p", text) for text in averaged),
                scores,
                details("The numbers of the curves", curves),
            ]
        ),
    )

"""The section that opens a report: what was compared, how it came out, and what follows from it."""

from collections.abc import Mapping, Sequence

from foundation.evaluation.report.kept import Shown
from foundation.evaluation.report.markup import element, listed, together
from foundation.evaluation.report.page import Section
from foundation.evaluation.report.tables import table, with_interval
from foundation.evaluation.report.verdicts import verdict
from foundation.evaluation.score import CEILING, merge_scores

CAVEAT = (
    "Intervals are 95 % bootstrap intervals over test images within a subject. Every subject is shown; nothing is said "
    "of people who weren't measured."
)


def summary(
    subjects: Sequence[Shown],
    *,
    models: Mapping[str, Mapping[str, str]],
    baselines: Sequence[str],
    setting: Mapping[str, str],
    notes: Sequence[str] = (),
) -> Section:
    """Return the section.

    Parameters
    ----------
    models
        By label: what their lineage says, by name, for a table.
    setting
        What all systems share: store, split, protocol, date.
    notes
        What a reader has to know of the comparison.
    """
    systems = (*models, *baselines)
    scores = merge_scores(of.scores for of in subjects)
    said = [verdict(scores.comparisons, model, other) for model in models for other in baselines]
    names = list(models)
    said += [verdict(scores.comparisons, a, b) for k, a in enumerate(names) for b in names[k + 1 :]]
    if not models:
        said += [verdict(scores.comparisons, a, b) for k, a in enumerate(baselines) for b in baselines[k + 1 :]]
    values = {
        (r.system, r.subject): with_interval(r.value, r.low, r.high)
        for r in scores.rows
        if (r.roi, r.axis, r.target, r.metric) == ("all", "voxel", "mean", "r")
    }
    headline = table(
        ["subject", "system", "voxel r [95 %]"],
        [
            [of.subject, system, values.get((system, of.subject), "n/a")]
            for of in subjects
            for system in (*systems, CEILING)
        ],
        caption="voxel r: correlation over test images with the mean of their repeats, averaged over voxels; "
        "ceiling: the highest that the measured repeats allow",
        n_leading=2,
        ruled=True,
    )
    keys = list(dict.fromkeys(key for lineage in models.values() for key in lineage))
    lineages = [[key, *(lineage.get(key, "n/a") for lineage in models.values())] for key in keys]
    parts = [
        element("h3", "How it came out"),
        headline,
        listed([text for text in said if text is not None]),
        element("p", CAVEAT),
        element("h3", "What was compared"),
        element(
            "div", table(["all systems", ""], list(setting.items()), caption="How they were scored"), class_="wrapped"
        ),
        element("div", table(["model", *models], lineages, caption="What the models are made from"), class_="wrapped")
        if models
        else None,
        listed(notes),
    ]
    return Section(
        key="summary",
        heading="Summary",
        lead=f"{_counted(len(systems), 'system')} predicted the responses of {_counted(len(subjects), 'subject')} to "
        f"held-out test images; higher correlations are better, up to the ceiling.",
        body=together(parts),
    )


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"

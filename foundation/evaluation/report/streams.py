"""The section on what CLS and patch features explain of each voxel, alone and together."""

from collections.abc import Sequence

import numpy as np

from foundation.evaluation.figures.brain import Scale, how_shown
from foundation.evaluation.report.drawer import Drawer, panels
from foundation.evaluation.report.kept import Shown
from foundation.evaluation.report.markup import Markup, element, together
from foundation.evaluation.report.page import Section
from foundation.evaluation.report.runs import AblationRun
from foundation.evaluation.report.tables import details, table, with_interval
from foundation.evaluation.report.voxels import voxel_map

SMALLEST_REACH = 0.02
"""Of the colour scale, in shares of variance."""


def preference_section(runs: Sequence[AblationRun], subjects: Sequence[Shown], drawer: Drawer) -> Section | None:
    """Return maps of which stream's features a voxel prefers; None where no run partitioned variance."""
    blocks: list[Markup] = []
    for of in runs:
        if not of.partition:
            continue
        drawn = [(s, of.preference[s.subject]) for s in subjects if len(of.preference.get(s.subject, ())) == s.n_voxels]
        known = [np.abs(values[np.isfinite(values)]) for _, values in drawn]
        reach = max([SMALLEST_REACH, *(float(np.quantile(values, 0.98)) for values in known if values.size)])
        scale = Scale(label="unique variance, patch less CLS (share)", low=-reach, high=reach)
        for subject, values in drawn:
            figure = voxel_map(
                drawer, subject, f"preference-{of.run}", values, scale, f"{subject.subject}: stream preference"
            )
            blocks += [element("h3", subject.subject), element("p", how_shown(subject.voxels)), panels(figure)]
        rows = [[r.subject, r.roi, r.part, with_interval(r.value, r.low, r.high)] for r in of.partition]
        caption = f"Shares of variance by ridge on frozen features, run {of.run}"
        headings = ["subject", "ROI", "part", "share [95 %]"]
        blocks.append(details("The numbers", table(headings, rows, caption=caption, n_leading=2, ruled=True)))
    if not blocks:
        return None
    return Section(
        key="streams",
        heading="CLS or patches",
        lead="What the encoder's patches explain of a voxel that its CLS tokens don't, less the reverse (red: patches; "
        "blue: CLS): of frozen features, by ridge, so it says nothing of a trained model.",
        body=together(blocks),
    )

"""Which voxels are predicted at all: each system against its permutation null, as rows and as a table."""

from collections.abc import Mapping

import numpy as np
from rich.table import Table

from foundation.evaluation.permutation import PermutationTest
from foundation.evaluation.score import Row
from foundation.evaluation.table import new_table, number

FDR = 0.05


def significance_rows(
    tests: Mapping[str, PermutationTest],
    *,
    subject: str,
    families: Mapping[str, np.ndarray],
    n_images: int,
    protocol: str = "strict",
) -> list[Row]:
    """Return, per system and ROI, the p of the mean voxel r (``p_permutation``) and the share of voxels with a false
    discovery rate of at most 5 % (``share_fdr05``), against the mean of an image's repeats."""
    rows = []
    for system, test in tests.items():
        masks = {"all": np.ones(len(test.r), bool), **families}
        for roi, of_mean in test.mean_r.items():
            q = test.q[masks[roi]]
            enough = 1 / (1 + len(of_mean.null)) <= FDR
            share = float((q <= FDR).mean()) if q.size and enough else None
            p = None if np.isnan(of_mean.p_value) else of_mean.p_value
            for metric, value in (("p_permutation", p), ("share_fdr05", share)):
                place = (system, subject, roi, protocol, "voxel", "mean", metric)
                rows.append(Row(*place, value, None, None, n_images, of_mean.n_voxels))
    return rows


def significance_table(rows: list[Row], *, n_permutations: int) -> Table:
    """Return a table row per subject and system: all voxels, and the share that is predicted per family."""
    rois = list(dict.fromkeys(row.roi for row in rows))
    table = new_table(
        "Predicted at all? Against predictions of other images",
        f"p of the mean voxel r, one-sided, by {n_permutations} permutations of the images (it can't be below "
        f"{1 / (1 + n_permutations):.2g}); share of voxels whose own r passes a false discovery rate of "
        f"{FDR:.0%} (Benjamini-Hochberg over the subject's voxels; n/a where so few permutations can't reach it). "
        "Against the mean of an image's repeats, protocol strict.",
        left=("subject", "system"),
        right=("p", *(f"voxels {roi}" for roi in rois)),
    )
    values = {(r.subject, r.system, r.roi, r.metric): r.value for r in rows}
    for subject, system in dict.fromkeys((row.subject, row.system) for row in rows):
        shares = [values.get((subject, system, roi, "share_fdr05")) for roi in rois]
        p = values[subject, system, "all", "p_permutation"]
        table.add_row(subject, system, "n/a" if p is None else f"{p:.2g}", *map(number, shares))
    return table

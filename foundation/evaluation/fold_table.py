"""Cross-validated scores as rows and as a table, with their error bars."""

from collections.abc import Sequence
from dataclasses import replace

from rich.table import Table

from foundation.evaluation.folds import CrossValidated
from foundation.evaluation.score import Row
from foundation.evaluation.table import fill_by_place, new_table, number, places

_COLUMNS = (("voxel", "r", "voxel r"), ("pattern", "r", "pattern r"), ("voxel", "mse", "MSE"))


def fold_rows(cross_validated: Sequence[CrossValidated]) -> list[Row]:
    """Return the rows of several subjects; their protocol says how many folds there were."""
    return [replace(row, protocol=f"{row.protocol}-{len(of.folds)}-folds") for of in cross_validated for row in of.rows]


def fold_table(cross_validated: Sequence[CrossValidated]) -> Table:
    """Return a table row per subject, ROI and system: mean over folds and standard error, against repeat means."""
    rows = [row for of in cross_validated for row in of.rows]
    table = new_table(
        f"Cross-validation, {len(cross_validated[0].folds)} folds of all images, each fitted anew",
        "Mean over folds ± standard error over folds, against the mean of an image's repeats. Folds share training "
        "images, so the error is somewhat too small. Every image tests once: no model that has seen any of them can "
        "stand here.",
        left=("subject", "ROI", "system"),
        right=tuple(heading for *_, heading in _COLUMNS),
    )
    found = {(r.subject, r.roi, r.system, r.axis, r.metric): r for r in rows if r.target == "mean"}
    return fill_by_place(
        table,
        places(rows),
        lambda place: [_cell(found.get((*place, axis, metric))) for axis, metric, _ in _COLUMNS],
    )


def _cell(row: Row | None) -> str:
    if row is None or row.value is None or row.high is None:
        return "n/a"
    return f"{number(row.value)} ± {number(row.high - row.value)}"

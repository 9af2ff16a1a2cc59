"""Both protocols in one table, so that nobody takes a number of one for a number of the other."""

from collections.abc import Mapping
from dataclasses import replace

from rich.table import Table

from foundation.evaluation.score import Row, Scores
from foundation.evaluation.table import LEGACY_WARNING, caption, fill_by_place, new_table, number, places, with_interval

COLUMNS = (
    ("strict", "voxel", "trial", "r", "voxel r\n(trial)"),
    ("strict", "voxel", "mean", "r", "voxel r"),
    ("strict", "pattern", "mean", "r", "pattern r"),
    ("strict", "voxel", "mean", "mse", "MSE"),
    ("strict", "voxel", "mean", "r2_ceiling", "r²/c"),
    ("chasm-legacy", "voxel", "mean", "r", "LEGACY\nvoxel r"),
    ("chasm-legacy", "pattern", "mean", "r", "LEGACY\npattern r"),
    ("chasm-legacy", "voxel", "mean", "mse", "LEGACY\nMSE"),
)
"""Protocol, axis, target and metric of each column, and its heading."""
_INTERVALS = (1, 6)
"""Columns that show their intervals: what each protocol leads with."""


def side_by_side(scores: Mapping[str, Scores]) -> Table:
    """Return a table row per subject, ROI and system, with columns of both protocols.

    Parameters
    ----------
    scores
        By protocol: ``strict`` and ``chasm-legacy``. The latter may have further systems, picked on the test images.
    """
    rows: dict[tuple[str, ...], Row] = {}
    for protocol, of_protocol in scores.items():
        rows |= {(protocol, r.axis, r.target, r.metric, r.subject, r.roi, r.system): r for r in of_protocol.rows}
    table = new_table(
        "Scores under both protocols",
        f"{LEGACY_WARNING}\n{caption(_with_notes(scores), 'strict, and chasm-legacy in the columns LEGACY')}",
        left=("subject", "ROI", "system"),
        right=tuple(heading for *_, heading in COLUMNS),
    )

    def cells(place: tuple[str, str, str]) -> list[str]:
        told = []
        for k, (protocol, axis, target, metric, _) in enumerate(COLUMNS):
            row = rows.get((protocol, axis, target, metric, *place))
            told.append("–" if row is None else with_interval(row) if k in _INTERVALS else number(row.value))
        return told

    return fill_by_place(table, places(row for of_protocol in scores.values() for row in of_protocol.rows), cells)


def _with_notes(scores: Mapping[str, Scores]) -> Scores:
    """Return the strict scores with the notes that are of the other protocol alone, marked as such."""
    strict, legacy = scores["strict"], scores["chasm-legacy"]
    others = (note.partition(": ") for note in legacy.notes if note not in strict.notes)
    return replace(strict, notes=(*strict.notes, *(f"{who}: LEGACY: {text}" for who, _, text in others)))

"""Scores for a reader (a rich table) and for a program (JSON).

The table never prints a number without what it means: subject, target and ROI stand in the row, the axis in the column,
and protocol, normalisation, floors, ceiling and every reason for an ``n/a`` in title and caption.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich import box
from rich.console import Console
from rich.table import Table

from foundation.evaluation.score import CEILING, FAMILIES, FLOORS, Comparison, Row, Scores

LEGEND = (
    "Targets: the mean of an image's repeats; in (), each single trial. Axes: voxel r is the correlation over images, "
    "averaged over voxels; pattern r the correlation over voxels, averaged over images; MSE is one for both. "
    "r²/c: signed squared voxel r over the noise ceiling, clipped to 0 to 1 per voxel, so above 0 even for noise "
    "(unclipped in the JSON). "
    "Δ: interval of the paired difference with the named system (for MSE, negative is better), target mean. "
    "[ ]: 95 % bootstrap interval over images.\n"
    "Floors: zero predicts 0; mean predicts the training images' mean. ceiling: what the measured repeats allow."
)
SAMPLING_LEGEND = (
    "CRPS: fair, mean over voxels and images, in the responses' unit; lower is better, and of a floor it is the "
    "absolute error. energy: energy score, the CRPS of a whole pattern of voxels. coverage 90 %: targets inside the "
    "samples' central 90 % interval; .900 if the spread is right. "
    "[ ]: 95 % bootstrap interval over images."
)
SAMPLED = {"crps": "CRPS", "coverage90": "coverage 90 %", "energy": "energy"}
"""Metrics of sampling systems and the headings of their columns."""
WIDTH = 132
"""Columns that the table needs; print it to a console that is at least so wide."""
_OF_ONE_ROI = re.compile(r"r2_ceiling, target \w+, roi (?!all:)")
LEGACY_WARNING = (
    "WARNING: chasm-legacy repeats a published protocol so that its numbers can be audited: z-scored over all trials; "
    "a checkpoint is picked on the test images where the notes say so. Not comparable with strict."
)


def new_table(title: str, caption: str, *, left: Sequence[str], right: Sequence[str]) -> Table:
    """Return a table without rows in the look of all of ours; `left` and `right` are headings by their alignment."""
    table = Table(
        title=title,
        caption=caption.replace("[", "\\["),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        collapse_padding=True,
    )
    for heading in left:
        table.add_column(heading, overflow="fold")  # a name that is cut short could be another's
    for heading in right:
        table.add_column(heading, justify="right")
    return table


def fill_by_place(
    table: Table, found: Iterable[tuple[str, str, str]], cells: Callable[[tuple[str, str, str]], Sequence[str] | None]
) -> Table:
    """Add a row for each (subject, ROI, system) for which `cells` gives any, subject and ROI named once; return it."""
    section: tuple[str, ...] = ()
    for place in found:
        row = cells(place)
        if row is None:
            continue
        if section and section != place[:2]:
            table.add_section()
        leading = place[:2] if section != place[:2] else ("", "")
        table.add_row(*leading, place[2], *row)
        section = place[:2]
    return table


def score_table(scores: Scores, *, reference: str = "ridge") -> Table:
    """A table row per subject, ROI (all, early, mid, higher, other labels) and system.

    Parameters
    ----------
    scores
        Under one protocol; of one subject or of several (:func:`foundation.evaluation.score.merge_scores`).
    reference
        The system that the others' voxel r is compared with, where it was scored.

    Returns
    -------
    table
        One line a row on a console of `WIDTH` columns. ROIs without any number are left to the caption.

    Raises
    ------
    ValueError
        If the scores mix protocols.
    """
    protocols = list(dict.fromkeys(row.protocol for row in scores.rows))
    if len(protocols) != 1:
        raise ValueError(f"a table shows one protocol, these scores hold {protocols}; make one table of each")
    subjects = list(dict.fromkeys(row.subject for row in scores.rows))
    compared = any(comparison.versus == reference for comparison in scores.comparisons)
    versus = [(floor, "mse", f"ΔMSE {floor}") for floor in FLOORS]
    versus += [(reference, "r", f"Δr {reference}")] if compared else []
    table = new_table(
        f"Scores of {', '.join(subjects)}, protocol {protocols[0]}",
        caption(scores, protocols[0]),
        left=("subject", "ROI", "system"),
        right=(
            *("voxel r", "(trial)", "pattern r", "(trial)", "MSE", "(trial)", "r²/c"),
            *(heading for *_, heading in versus),
        ),
    )
    rows = {(row.subject, row.roi, row.system, row.target, row.axis, row.metric): row for row in scores.rows}
    differences = {
        (c.subject, c.roi, c.system, c.versus, c.metric): c
        for c in scores.comparisons
        if c.axis == "voxel" and c.target == "mean"
    }
    columns = (("voxel", "r", with_interval), ("pattern", "r", _plain), ("voxel", "mse", _plain))

    def cells(place: tuple[str, str, str]) -> list[str]:
        told = []
        for axis, metric, of_mean in columns:
            told += [of_mean(rows[*place, "mean", axis, metric]), _trial(rows[*place, "trial", axis, metric])]
        told.append(_plain(rows[*place, "mean", "voxel", "r2_ceiling"]))
        return told + [_difference(differences.get((*place, other, metric))) for other, metric, _ in versus]

    return fill_by_place(table, places(scores.rows), cells)


def sampling_table(scores: Scores) -> Table | None:
    """A table row per subject, ROI and system with samples, beside the floors; None where nothing was sampled."""
    rows = {
        (r.subject, r.roi, r.system, r.metric): r for r in scores.rows if r.metric in SAMPLED and r.value is not None
    }
    if not rows:
        return None
    table = new_table(
        f"Scores of samples, protocol {scores.rows[0].protocol}",
        SAMPLING_LEGEND,
        left=("subject", "ROI", "system", "target"),
        right=tuple(SAMPLED.values()),
    )

    def cells(place: tuple[str, str, str]) -> list[str] | None:
        found = [rows.get((*place, metric)) for metric in SAMPLED]
        target = next((row.target for row in found if row is not None), None)
        return None if target is None else [target, *("n/a" if row is None else with_interval(row) for row in found)]

    return fill_by_place(table, places(scores.rows), cells)


@runtime_checkable
class Plain(Protocol):
    """What tells itself as JSON: a score's row, a comparison, an ablation's row."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        ...


def write_rows_json(rows: Sequence[Plain], path: str | os.PathLike[str]) -> None:
    """Write rows as a JSON list; what is undefined is null. The file appears whole or not at all.

    Raises
    ------
    ValueError
        If a number is NaN or infinite, which JSON has no word for.
    """
    write_whole(json.dumps([row.to_json() for row in rows], indent=1, allow_nan=False) + "\n", path)


def write_rows_csv(rows: Sequence[Plain], path: str | os.PathLike[str]) -> None:
    """Write rows as CSV with a line of headings; what is undefined is empty. The file appears whole or not at all."""
    text, plain = io.StringIO(), [row.to_json() for row in rows]
    writer = csv.DictWriter(text, list(plain[0]) if plain else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain)
    write_whole(text.getvalue(), path)


def write_whole(text: str, path: str | os.PathLike[str]) -> None:
    """Write a text file under a temporary name, then rename it."""
    path = Path(path)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False, newline="") as file:
        temporary = Path(file.name)
        try:
            file.write(text)
            file.close()
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def places(rows: Iterable[Row]) -> list[tuple[str, str, str]]:
    """(subject, ROI, system) in the table's order; an ROI without a number shows only if it is ``all``."""
    rows = list(rows)
    measured = {(row.subject, row.roi) for row in rows if row.value is not None} | {(r.subject, "all") for r in rows}
    places = dict.fromkeys((r.subject, r.roi, r.system) for r in rows if (r.subject, r.roi) in measured)
    subjects = list(dict.fromkeys(row.subject for row in rows))
    rois = list(dict.fromkeys(("all", *FAMILIES, *(row.roi for row in rows))))
    systems = list(dict.fromkeys((*FLOORS, *(row.system for row in rows if row.system != CEILING), CEILING)))
    return sorted(places, key=lambda p: (subjects.index(p[0]), rois.index(p[1]), systems.index(p[2])))


def caption(scores: Scores, protocol: str) -> str:
    """Protocol, legend and notes; a note that several subjects share stands once, those on single ROIs' voxels that a
    low ceiling leaves out are summed up by the one on all."""
    warning = [LEGACY_WARNING] if protocol == "chasm-legacy" else []
    shared: dict[str, list[str]] = {}
    for note in scores.notes:
        subject, _, text = note.partition(": ")
        if not _OF_ONE_ROI.match(text):
            shared.setdefault(text, []).append(subject)
    notes = [f"{', '.join(subjects)}: {text}" for text, subjects in shared.items()]
    return "\n".join([*warning, f"Protocol: {protocol}.", LEGEND, *notes])


def with_interval(row: Row) -> str:
    """Return a value with its interval, as the table prints it."""
    if row.low is None or row.high is None:
        return number(row.value)
    return f"{number(row.value)} \\[{number(row.low)} {number(row.high)}]"


def _plain(row: Row) -> str:
    return number(row.value)


def _trial(row: Row) -> str:
    return f"({number(row.value)})"


def _difference(comparison: Comparison | None) -> str:
    if comparison is None or comparison.low is None or comparison.high is None:
        return "–"
    return f"\\[{number(comparison.low)} {number(comparison.high)}]"


def number(value: float | None) -> str:
    """Return a number as the table prints it: three digits behind the point, ``n/a`` for None."""
    if value is None:
        return "n/a"
    value = round(value, 3) + 0.0  # no minus before a zero
    return (
        f"{value:.3f}".replace("0.", ".", 1)
        if abs(value) < 1
        else f"{value:.3g}"
        if abs(value) >= 100
        else f"{value:.3f}"
    )


def print_scores(scores: Scores) -> None:
    """Print the tables, at their full width even where output goes to a file or a narrow terminal."""
    console = Console(width=max(Console().width, WIDTH))
    console.print(score_table(scores))
    sampled = sampling_table(scores)
    if sampled is not None:
        console.print(sampled)

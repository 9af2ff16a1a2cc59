"""The learning curve as data: one row per subject, number of sessions and system, for files and for people.

The score is the voxelwise correlation with repeat means, mean over all voxels. The difference from ridge is paired:
the same resampled images for both, and only voxels that are defined for both.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from data.nifti import written_whole
from foundation.evaluation.score import Scores

REFERENCE = "ridge"
"""The system that the others are compared with."""
WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class CurveRow:
    """One system's score after so many sessions; None is undefined."""

    subject: str
    sessions: int
    n_train: int | None
    """Training images in these sessions."""
    system: str
    value: float | None
    low: float | None
    high: float | None
    difference: float | None = None
    """From ridge, at equal data."""
    difference_low: float | None = None
    difference_high: float | None = None


def curve_rows(points: Sequence[tuple[int, Scores]], *, n_train: Mapping[int, int] | None = None) -> list[CurveRow]:
    """Return the curve's rows, by subject, then sessions; floors have no correlation and are left out.

    Parameters
    ----------
    points
        Numbers of sessions, and the scores of systems that learned from so many.
    n_train
        Training images by number of sessions.

    Raises
    ------
    ValueError
        If there is no point, or the same number of sessions stands twice.
    """
    sessions = [n for n, _ in points]
    if not points or len(set(sessions)) < len(sessions):
        raise ValueError(f"a learning curve needs points of different numbers of sessions, got {sessions}")
    rows = []
    for n_sessions, scores in sorted(points, key=lambda point: point[0]):
        paired = {
            (c.subject, c.system): c
            for c in scores.comparisons
            if (c.versus, c.roi, c.axis, c.target, c.metric) == (REFERENCE, "all", "voxel", "mean", "r")
        }
        for row in scores.rows:
            if (row.roi, row.axis, row.target, row.metric) != ("all", "voxel", "mean", "r") or row.value is None:
                continue
            gain = paired.get((row.subject, row.system))
            rows.append(
                CurveRow(
                    subject=row.subject,
                    sessions=n_sessions,
                    n_train=None if n_train is None else n_train.get(n_sessions),
                    system=row.system,
                    value=row.value,
                    low=row.low,
                    high=row.high,
                    difference=gain and gain.difference,
                    difference_low=gain and gain.low,
                    difference_high=gain and gain.high,
                )
            )
    return sorted(rows, key=lambda row: row.subject)  # stable: sessions and systems keep their order


def write_curve(rows: Sequence[CurveRow], path: Path) -> None:
    """Write rows as ``.json`` (a list, undefined is null) or ``.csv`` (undefined is empty), whole or not at all.

    Raises
    ------
    ValueError
        If the path ends in something else.
    """
    records = [asdict(row) for row in rows]
    if path.suffix == ".json":
        text = json.dumps(records, indent=1, allow_nan=False) + "\n"
    elif path.suffix == ".csv":
        lines = io.StringIO()
        writer = csv.DictWriter(lines, [field.name for field in fields(CurveRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        text = lines.getvalue()
    else:
        raise ValueError(f"a curve is written as .json or .csv, not as {path.name!r}")
    with written_whole(path) as draft:
        draft.write_text(text)


def curve_table(rows: Sequence[CurveRow]) -> Table:
    """Return a table with a section per subject and number of sessions."""
    table = Table(
        title="Learning curve",
        caption="voxel r: correlation over test images with the mean of their repeats, averaged over voxels. "
        f"gain: paired difference from {REFERENCE} that learned from the same sessions. "
        "\\[ ]: 95 % bootstrap interval over images.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("subject", "sessions", "images", "system"):
        table.add_column(heading, justify="right" if heading in ("sessions", "images") else "left")
    table.add_column("voxel r", justify="right")
    table.add_column(f"gain over {REFERENCE}", justify="right")
    section: tuple[str, int] | None = None
    for row in rows:
        place = (row.subject, row.sessions)
        leading = ["", "", ""]
        if place != section:
            if section is not None:
                table.add_section()
            leading = [row.subject, str(row.sessions), "" if row.n_train is None else str(row.n_train)]
        gain = _told(row.difference, row.difference_low, row.difference_high, sign="+")
        table.add_row(*leading, row.system, _told(row.value, row.low, row.high), gain)
        section = place
    return table


def print_curve(rows: Sequence[CurveRow]) -> None:
    """Print the table, at its full width even where output goes to a file or a narrow terminal."""
    console = Console(width=max(Console().width, WIDTH))
    console.print(curve_table(rows))


def _told(value: float | None, low: float | None, high: float | None, *, sign: str = "") -> str:
    if value is None:
        return "–"
    interval = "" if low is None or high is None else f" \\[{low:{sign}.3f} {high:{sign}.3f}]"
    return f"{value:{sign}.3f}{interval}"

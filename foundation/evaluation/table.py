"""Scores for a reader (a rich table) and for a program (JSON).

The table never prints a number without what it means: subject, target and ROI stand in the row, the axis in the column,
and protocol, normalisation, floors, ceiling and every reason for an ``n/a`` in title and caption.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from foundation.evaluation.score import CEILING, FAMILIES, FLOORS, Comparison, Row, Scores

LEGEND = (
    "Targets: trial, each single trial; mean, the mean of an image's repeats. Axes: voxel r is the correlation over "
    "images, averaged over voxels; pattern r the correlation over voxels, averaged over images; MSE is one for both. "
    "r²/ceiling: signed squared voxel r over the noise ceiling, clipped to 0 to 1, unclipped below. "
    "Δ: paired difference, system less the named one (voxel r; for MSE, negative is better). "
    "[ ]: 95 % bootstrap interval over images.\n"
    "Floors: zero predicts 0; mean predicts the training images' mean. ceiling: what the measured repeats allow."
)
LEGACY_WARNING = (
    "WARNING: chasm-legacy repeats a published protocol so that its numbers can be audited: z-scored over all trials, "
    "checkpoint picked on the test images. Not comparable with strict."
)


def score_table(scores: Scores, *, reference: str = "ridge") -> Table:
    """A table row per subject, target, ROI (all, early, mid, higher, other labels) and system.

    Parameters
    ----------
    scores
        Under one protocol; of one subject or of several (:func:`foundation.evaluation.score.merge_scores`).
    reference
        The system that the others' voxel r is compared with, where it was scored.

    Returns
    -------
    table
        At most 120 columns wide; in fewer, cells break between a value and its interval. ROIs without any number are
        left to the caption.

    Raises
    ------
    ValueError
        If the scores mix protocols.
    """
    protocols = list(dict.fromkeys(row.protocol for row in scores.rows))
    if len(protocols) != 1:
        raise ValueError(f"a table shows one protocol, these scores hold {protocols}; make one table of each")
    subjects = list(dict.fromkeys(row.subject for row in scores.rows))
    several = len(subjects) > 1
    compared = any(comparison.versus == reference for comparison in scores.comparisons)
    table = Table(
        title=f"Scores of {', '.join(subjects)}, protocol {protocols[0]}",
        caption=_caption(scores, protocols[0]),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    for heading in (*(["subject"] if several else []), "target", "ROI", "system"):
        table.add_column(heading)
    headings = ["voxel r", "pattern r", "MSE", "r²/ceiling", *(f"ΔMSE {floor}" for floor in FLOORS)]
    for heading in [*headings, f"Δr {reference}"] if compared else headings:
        table.add_column(heading, justify="right")

    rows = {(row.subject, row.target, row.roi, row.system, row.axis, row.metric): row for row in scores.rows}
    differences = {
        (c.subject, c.target, c.roi, c.system, c.versus, c.metric): c for c in scores.comparisons if c.axis == "voxel"
    }
    section: tuple[str, ...] = ()
    for place in _places(scores.rows):
        subject, target, roi, _ = place
        if section and section != place[:3]:
            table.add_section()
        leading = (subject, target, roi) if several else (target, roi)
        table.add_row(
            *(leading if section != place[:3] else [""] * len(leading)),
            place[3],
            _cell(rows[*place, "voxel", "r"]),
            _cell(rows[*place, "pattern", "r"]),
            _cell(rows[*place, "voxel", "mse"]),
            "\n".join(
                _number(rows[*place, "voxel", metric].value) for metric in ("r2_ceiling", "r2_ceiling_unclipped")
            ),
            *(_difference(differences.get((*place, floor, "mse"))) for floor in FLOORS),
            *([_difference(differences.get((*place, reference, "r")))] if compared else []),
        )
        section = place[:3]
    return table


def write_rows_json(rows: Sequence[Row | Comparison], path: str | os.PathLike[str]) -> None:
    """Write rows as a JSON list; what is undefined is null. The file appears whole or not at all.

    Raises
    ------
    ValueError
        If a number is NaN or infinite, which JSON has no word for.
    """
    path = Path(path)
    text = json.dumps([row.to_json() for row in rows], indent=1, allow_nan=False)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(text + "\n")
            file.close()
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _places(rows: Iterable[Row]) -> list[tuple[str, str, str, str]]:
    """(subject, target, ROI, system) in the table's order; an ROI without a number shows only if it is ``all``."""
    rows = list(rows)
    measured = {(row.subject, row.roi) for row in rows if row.value is not None} | {(r.subject, "all") for r in rows}
    places = dict.fromkeys((r.subject, r.target, r.roi, r.system) for r in rows if (r.subject, r.roi) in measured)
    subjects = list(dict.fromkeys(row.subject for row in rows))
    rois = list(dict.fromkeys(("all", *FAMILIES, *(row.roi for row in rows))))
    systems = list(dict.fromkeys((*FLOORS, *(row.system for row in rows if row.system != CEILING), CEILING)))
    return sorted(places, key=lambda p: (subjects.index(p[0]), p[1], rois.index(p[2]), systems.index(p[3])))


def _caption(scores: Scores, protocol: str) -> str:
    warning = [LEGACY_WARNING] if protocol == "chasm-legacy" else []
    return "\n".join([*warning, f"Protocol: {protocol}.", LEGEND, *scores.notes]).replace("[", "\\[")


def _cell(row: Row) -> str:
    return _with_interval(_number(row.value), row.low, row.high)


def _difference(comparison: Comparison | None) -> str:
    if comparison is None:
        return "–"
    sign = "+" if (comparison.difference or 0) > 0 else ""
    return _with_interval(sign + _number(comparison.difference), comparison.low, comparison.high)


def _with_interval(value: str, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return value
    return f"{value}\n\\[{_number(low)} {_number(high)}]"


def _number(value: float | None) -> str:
    if value is None:
        return "n/a"
    return (
        f"{value:.3f}".replace("0.", ".", 1)
        if abs(value) < 1
        else f"{value:.3g}"
        if abs(value) >= 100
        else f"{value:.3f}"
    )

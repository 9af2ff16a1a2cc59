"""What ablation found, for a reader: losses per family, and early less higher, as rich tables."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from foundation.evaluation.area_losses import Ablation, AblationRow, Differential
from foundation.evaluation.partition import PARTS, Partition, PartitionRow
from foundation.evaluation.score import FAMILIES
from foundation.evaluation.table import new_table

LOSS_LEGEND = (
    "Loss of the network's voxel r: correlation over test images with the mean of their repeats, averaged over voxels, "
    "intact less intervened. [ ]: 95 % bootstrap interval over images. %: the loss as a share of the intact r. "
    "random subspace: random directions that hold as much variance as the stream."
)
DIFFERENCE_LEGEND = (
    "Loss of early less loss of higher areas. [ ]: 95 % bootstrap interval over images and parcels of neighbouring "
    "voxels. shares: the same of losses as shares of the intact r. beyond control: less the difference that the random "
    "subspace makes. –: n/a, see the notes. p: two-sided, of one comparison; the sentences adjust for all of them."
)
PARTITION_LEGEND = (
    "Share of the variance of test images' mean responses that ridge models on frozen features explain, averaged over "
    "voxels. unique: explained by both sets, not without this one; preference: unique patch less unique cls. [ ]: "
    "95 % bootstrap interval over images. Below zero is estimation noise, or a worse prediction than the mean."
)
WIDTH = 156
"""Columns that the tables need."""


def loss_table(ablation: Ablation) -> Table:
    """Return a table with a row per subject and intervention, a column per family."""
    rois = [roi for roi in ("all", *FAMILIES) if any(row.roi == roi for row in ablation.rows)]
    table = new_table(
        "What disabling a stream costs",
        LOSS_LEGEND,
        left=("subject", "stream", "intervention"),
        right=[heading for roi in rois for heading in (f"{roi}, loss of r", "%")],
    )
    cases: dict[tuple[str, str, str], dict[str, AblationRow]] = {}
    for row in ablation.rows:
        cases.setdefault((row.subject, row.branch, row.intervention), {})[row.roi] = row
    before = ("", "")
    for (subject, branch, intervention), by_roi in cases.items():
        _section(table, before, (subject, branch))
        cells = []
        for roi in rois:
            row = by_roi.get(roi)
            share = None if row is None else row.share_of_intact
            cells += ["n/a" if row is None else _told(row.loss, row.low, row.high)]
            cells += ["n/a" if share is None else f"{100 * share:.0f}"]
        table.add_row(*_leading(before, (subject, branch)), intervention, *cells)
        before = (subject, branch)
    return table


def difference_table(ablation: Ablation) -> Table:
    """Return a table with a row per subject and intervention: early less higher, and beyond the control."""
    table = new_table(
        "Early less higher areas",
        DIFFERENCE_LEGEND,
        left=("subject", "stream", "intervention"),
        right=("loss of r", "p", "shares", "p", "beyond control", "p"),
    )
    before = ("", "")
    for d in ablation.differentials:
        _section(table, before, (d.subject, d.branch))
        table.add_row(*_leading(before, (d.subject, d.branch)), d.intervention, *_differences(d))
        before = (d.subject, d.branch)
    return table


def print_ablation(ablation: Ablation, sentences: list[str]) -> None:
    """Print tables, notes and sentences, at full width even where output goes to a file or a narrow terminal."""
    console = Console(width=max(Console().width, WIDTH))
    if ablation.rows:
        console.print(loss_table(ablation))
    if ablation.differentials:
        console.print(difference_table(ablation))
    for line in (*ablation.notes, *sentences):
        console.print(line, markup=False, highlight=False)


def partition_table(parts: Iterable[Partition]) -> Table:
    """Return a table with a row per subject and family, a column per part of the variance."""
    table = new_table(
        "Variance that CLS and patch features explain", PARTITION_LEGEND, left=("subject", "ROI"), right=PARTS
    )
    cases: dict[tuple[str, str], dict[str, PartitionRow]] = {}
    for part in parts:
        for row in part.rows:
            cases.setdefault((row.subject, row.roi), {})[row.part] = row
    before = ""
    for (subject, roi), by_part in cases.items():
        _section(table, (before, ""), (subject, ""))
        found = (by_part[part] for part in PARTS)
        table.add_row("" if before == subject else subject, roi, *(_told(r.value, r.low, r.high) for r in found))
        before = subject
    return table


def print_partition(parts: Iterable[Partition]) -> None:
    """Print the table of variance partitioning."""
    Console(width=max(Console().width, WIDTH)).print(partition_table(parts))


def _differences(d: Differential) -> list[str]:
    told = (
        (d.difference, d.low, d.high, d.p_value),
        (d.share_difference, d.share_low, d.share_high, d.share_p_value),
        (d.versus_control, d.versus_low, d.versus_high, d.versus_p_value),
    )
    return [cell for value, low, high, p in told for cell in (_told(value, low, high), _p(p))]


def _section(table: Table, before: tuple[str, str], now: tuple[str, str]) -> None:
    if before != now and table.row_count:
        table.add_section()


def _leading(before: tuple[str, str], now: tuple[str, str]) -> tuple[str, str]:
    return ("" if before[0] == now[0] else now[0], "" if before == now else now[1])


def _p(p: float | None) -> str:
    return "" if p is None else f"{p:.3f}"


def _told(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "–"
    interval = "" if low is None or high is None else f" \\[{low:+.3f} {high:+.3f}]"
    return f"{value:+.3f}{interval}"

"""Tables and the figure of an ablation show every number with what it means."""

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from foundation.evaluation.ablation_table import WIDTH, difference_table, loss_table, partition_table
from foundation.evaluation.area_losses import Ablation, AblationRow, Differential
from foundation.evaluation.figures.ablation import ablation_figure
from foundation.evaluation.interventions import CONTROL
from foundation.evaluation.partition import PARTS, Partition, PartitionRow

WAYS = ("zero", "mean", "shuffled", CONTROL)


@pytest.fixture
def ablation() -> Ablation:
    rows = tuple(
        AblationRow(
            subject=subject,
            branch=branch,
            intervention=way,
            roi=roi,
            intact=0.5,
            loss=0.1234,
            low=0.1,
            high=0.15,
            share_of_intact=0.2468,
            n_images=100,
            n_voxels=40,
        )
        for subject in ("subj01", "subj02")
        for branch in ("cls", "patch")
        for way in WAYS
        for roi in ("all", "early", "mid", "higher")
    )
    control = dict.fromkeys(("versus_control", "versus_low", "versus_high", "versus_p_value"))
    differential = Differential(
        subject="subj01",
        branch="cls",
        intervention=CONTROL,
        difference=-0.0321,
        low=-0.05,
        high=-0.01,
        p_value=0.004,
        share_difference=None,
        share_low=None,
        share_high=None,
        share_p_value=None,
        **control,
    )
    return Ablation(rows=rows, differentials=(differential,))


def printed(table) -> list[str]:
    console = Console(width=WIDTH, file=None, record=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


def test_a_loss_stands_on_one_line_with_its_interval_and_share(ablation):
    lines = [line for line in printed(loss_table(ablation)) if "shuffled" in line]
    assert len(lines) == 4
    assert all(line.count("+0.123 [+0.100 +0.150]") == 4 and line.split().count("25") == 4 for line in lines)


def test_what_is_undefined_in_a_difference_is_a_dash(ablation):
    (line,) = [line for line in printed(difference_table(ablation)) if "subj01" in line]
    assert "-0.032 [-0.050 -0.010] 0.004" in line
    assert line.count("–") == 2


def test_parts_of_variance_are_in_one_row_per_family():
    rows = tuple(
        PartitionRow(subject="subj01", roi="all", part=part, value=0.1, low=None, high=None, n_images=9, n_voxels=4)
        for part in PARTS
    )
    lines = printed(partition_table([Partition(rows=rows, voxelwise={"preference": np.zeros(4)})]))
    assert sum("+0.100" in line for line in lines) == 1


def test_the_figure_is_drawn_and_nothing_to_draw_is_an_error(ablation, tmp_path: Path):
    ablation_figure(ablation, tmp_path / "ablation.png")
    assert (tmp_path / "ablation.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="nothing was ablated"):
        ablation_figure(Ablation(), tmp_path / "none.png")

"""The steps from a strict number to a legacy one: what their table averages."""

import io

from rich.console import Console

from foundation.evaluation.protocols import ProtocolStep, steps_table


def step(subject: str, name: str, r: float | None, change: float | None) -> ProtocolStep:
    about = {"system": "model", "protocol": "strict", "axis": "voxel", "target": "trial", "floor": None}
    return ProtocolStep(subject=subject, step=name, r=r, change=change, **about)


def printed(*steps: ProtocolStep) -> str:
    console = Console(file=io.StringIO(), width=132)
    console.print(steps_table(steps))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_mean_is_over_subjects_that_have_every_row():
    """Else a row's change would be of other subjects than its r, and the column wouldn't add up."""
    told = printed(
        step("subj01", "first", 0.2, None),
        step("subj01", "second", 0.5, 0.3),
        step("subj02", "first", None, None),
        step("subj02", "second", 0.9, None),
    )
    (second,) = [line for line in told.splitlines() if line.lstrip().startswith("second")]
    assert second.split()[-3:] == ["0.500", "(+0.300)", "n/a"]


def test_a_mean_of_nobody_is_undefined():
    told = printed(
        step("subj01", "first", None, None), step("subj02", "first", 0.1, None), step("subj01", "second", 0.3, None)
    )
    assert "n/a" in told

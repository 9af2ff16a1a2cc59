"""Runs can be ticked and compared in MLflow's own UI, by a browser, over the store that a job writes."""

import math

import pytest

from foundation.tracking.runs import EXPERIMENT, TrackedRun
from tests.e2e.mlflow_compare import CHROMIUM, capture_compare_view

pytestmark = pytest.mark.skipif(
    not CHROMIUM.exists(), reason=f"needs Debian's chromium at {CHROMIUM}: apt-get install chromium"
)


def log_run(*, name: str, lr: float, voxel_r: float) -> TrackedRun:
    """A run as pretraining leaves it: parameters, a loss curve, a final score, tags."""
    run = TrackedRun.start(name, kind="pretrain", config={"optim": {"lr": lr}}, tags={"recipe": "phantom-tiny"})
    run.log_steps([(step, {"train/loss": math.exp(-step * lr)}) for step in range(10)])
    run.log({"test/voxel_r": voxel_r}, 9)
    run.finish()
    return run


def test_three_runs_are_ticked_and_compared(tmp_path, request):
    settings = {"slow": (0.1, 0.31), "middle": (0.2, 0.42), "fast": (0.4, 0.53)}
    runs = [log_run(name=n, lr=lr, voxel_r=r) for n, (lr, r) in settings.items()]
    screenshot = (request.config.getoption("--screenshots") or tmp_path) / "mlflow-compare.png"

    shown = capture_compare_view(runs[0].uri, EXPERIMENT, [run.id for run in runs], screenshot)

    # The columns stand in the table's order, newest run first; the last step's loss is shown, to three decimals.
    assert sorted(shown["test/voxel_r"]) == ["0.31", "0.42", "0.53"]
    assert sorted(shown["train/loss"]) == ["0.027", "0.165", "0.407"]
    assert screenshot.stat().st_size > 20_000

"""Runs can be ticked and compared in MLflow's own UI, by a browser, over the store that a job writes."""

import math

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from tests.e2e.mlflow_compare import CHROMIUM, capture_compare_view

pytestmark = pytest.mark.skipif(
    not CHROMIUM.exists(), reason=f"needs Debian's chromium at {CHROMIUM}: apt-get install chromium"
)


def log_run(client: MlflowClient, experiment_id: str, *, name: str, lr: float, voxel_r: float) -> str:
    """A run as pretraining leaves it: parameters, a loss curve, a final score, tags."""
    run_id = client.create_run(experiment_id, run_name=name).info.run_id
    curve = [Metric("val/loss", math.exp(-step * lr), 0, step) for step in range(10)]
    client.log_batch(
        run_id,
        metrics=[*curve, Metric("test/voxel_r", voxel_r, 0, 9)],
        params=[Param("optim.lr", str(lr)), Param("recipe", "phantom-tiny")],
        tags=[RunTag("stage", "pretrain")],
    )
    client.set_terminated(run_id)
    return run_id


def test_three_runs_are_ticked_and_compared(tmp_path, request):
    tracking_uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=tracking_uri)
    experiment_id = client.create_experiment("pretrain", artifact_location=(tmp_path / "artifacts").as_uri())
    settings = {"slow": (0.1, 0.31), "middle": (0.2, 0.42), "fast": (0.4, 0.53)}
    run_ids = [log_run(client, experiment_id, name=n, lr=lr, voxel_r=r) for n, (lr, r) in settings.items()]
    screenshot = (request.config.getoption("--screenshots") or tmp_path) / "mlflow-compare.png"

    shown = capture_compare_view(tracking_uri, "pretrain", run_ids, screenshot)

    # The columns stand in the table's order, newest run first; the last step's loss is shown, to three decimals.
    assert sorted(shown["test/voxel_r"]) == ["0.31", "0.42", "0.53"]
    assert sorted(shown["val/loss"]) == ["0.027", "0.165", "0.407"]
    assert screenshot.stat().st_size > 20_000

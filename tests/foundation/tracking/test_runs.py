"""What a run leaves in MLflow, read back with MLflow's own client."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from foundation.tracking.runs import EXPERIMENT, TrackedRun, find_runs, tracking_uri

CONFIG = {"name": "tiny", "optim": {"lr": 0.01, "epochs": 3}, "subjects": ["1", "2"], "long": "x" * 2000, "none": None}


@pytest.fixture
def started() -> TrackedRun:
    return TrackedRun.start("first", kind="pretrain", config=CONFIG, tags={"recipe": "tiny", "store": "a.zarr"})


def read(run: TrackedRun):
    return MlflowClient(tracking_uri=tracking_uri()).get_run(run.id)


def history(run: TrackedRun, key: str) -> list[tuple[int, float]]:
    found = MlflowClient(tracking_uri=tracking_uri()).get_metric_history(run.id, key)
    return sorted((metric.step, metric.value) for metric in found)


def test_runs_live_in_the_home_unless_a_server_is_named(tracking_home, monkeypatch):
    assert tracking_uri() == f"sqlite:///{tracking_home / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking_uri() == "http://tracking:5000"


def test_a_run_has_its_name_kind_tags_and_every_setting_by_its_path(started):
    found = read(started)
    assert found.info.run_name == "first"
    assert found.info.status == "RUNNING"
    assert MlflowClient(tracking_uri=tracking_uri()).get_experiment(found.info.experiment_id).name == EXPERIMENT
    tags = {key: value for key, value in found.data.tags.items() if key.startswith("manybrains.")}
    assert tags == {"manybrains.kind": "pretrain", "manybrains.recipe": "tiny", "manybrains.store": "a.zarr"}
    params = found.data.params
    assert params["optim.lr"] == "0.01"
    assert params["subjects"] == "['1', '2']"
    assert params["none"] == "None"
    assert params["long"] == "x" * 500
    assert len(params) == 6


def test_the_whole_config_is_kept_as_json(started):
    path = download_artifacts(run_id=started.id, artifact_path="config.json", tracking_uri=tracking_uri())
    assert json.loads(Path(path).read_text()) == CONFIG


def test_a_config_of_many_settings_is_logged_whole():
    config = {f"setting{i}": i for i in range(230)}
    run = TrackedRun.start("many", kind="pretrain", config=config, tags={})
    assert read(run).data.params == {key: str(value) for key, value in config.items()}


def test_metrics_keep_their_steps_and_undefined_ones_are_left_out(started):
    started.log_steps([(1, {"loss": 3.0, "r": float("nan")}), (2, {"loss": 2.0, "r": 0.25})])
    started.log({"loss": 1.0}, 3)
    started.log({"test/voxel_r/subj01/early": 0.5, "test/mse": float("nan")})
    assert history(started, "loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert history(started, "r") == [(2, 0.25)]
    assert history(started, "test/voxel_r/subj01/early") == [(0, 0.5)]
    assert "test/mse" not in read(started).data.metrics


def test_more_metrics_than_a_request_may_hold_all_arrive(started):
    started.log_steps([(step, {"a": float(step), "b": -1.0}) for step in range(601)])
    assert len(history(started, "a")) == len(history(started, "b")) == 601


def test_files_and_directories_are_kept_with_the_run(started, tmp_path):
    (tmp_path / "scores.json").write_text("[]")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text("{}")
    started.artifact(tmp_path / "scores.json")
    started.artifact(tmp_path / "model", "backbone")
    client = MlflowClient(tracking_uri=tracking_uri())
    assert {file.path for file in client.list_artifacts(started.id)} == {"backbone", "config.json", "scores.json"}
    assert [file.path for file in client.list_artifacts(started.id, "backbone")] == ["backbone/model.json"]


def test_artifacts_of_a_local_database_are_in_the_home_whatever_the_working_directory(
    tracking_home, started, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert read(started).info.artifact_uri.startswith((tracking_home / "artifacts").as_uri())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_ends_as_it_is_told_and_may_go_on(started, status):
    started.finish(status)
    assert read(started).info.status == status
    again = TrackedRun(started.id)
    again.reopen()
    assert read(started).info.status == "RUNNING"
    again.tag({"backbone": "tiny/1"})
    assert read(started).data.tags["manybrains.backbone"] == "tiny/1"


def test_runs_are_found_newest_first(started):
    second = TrackedRun.start("second", kind="adapt", config={}, tags={})
    assert [run.info.run_id for run in find_runs()[:2]] == [second.id, started.id]
    only = find_runs("tags.`manybrains.kind` = 'adapt'")
    assert second.id in {run.info.run_id for run in only}
    assert started.id not in {run.info.run_id for run in only}


@pytest.mark.parametrize(
    ("cause", "status"),
    [(None, "FINISHED"), (KeyboardInterrupt, "KILLED"), (ValueError, "FAILED"), (SystemExit, "FAILED")],
)
def test_a_run_ends_as_its_block_does_and_what_was_raised_is_passed_on(started, cause, status):
    seen = []

    def block() -> None:
        with started.ending() as run:
            seen.append(run)
            assert read(run).info.status == "RUNNING"
            if cause is not None:
                raise cause("cut off")

    with contextlib.nullcontext() if cause is None else pytest.raises(cause, match="cut off"):
        block()
    assert seen == [started]
    assert read(started).info.status == status


FIRST_RUN = """
import sys
from foundation.tracking.runs import TrackedRun
print("ready", flush=True)
sys.stdin.readline()
with TrackedRun.start("first", kind="adapt", config={}, tags={}).ending() as run:
    run.log({"r": 0.5})
"""


def test_processes_that_start_at_once_in_an_empty_home_make_one_database_between_them(tmp_path):
    environment = os.environ | {"MANYBRAINS_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", FIRST_RUN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", process.communicate()[1]
        for process in started:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        for process in started:
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
    finally:
        for process in started:
            process.kill()
            process.wait()
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name == EXPERIMENT]
    runs = client.search_runs([experiment.experiment_id])
    assert [(run.info.status, run.data.metrics) for run in runs] == [("FINISHED", {"r": 0.5})] * 2

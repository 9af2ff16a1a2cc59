"""What runs keep of scores, and the baselines as runs of their own, read back from MLflow."""

import json
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from foundation.evaluation.compare import headline
from foundation.evaluation.score import merge_scores
from foundation.tracking.runs import TrackedRun, find_runs, tracking_uri
from foundation.tracking.scores import log_baselines, log_curve, log_maps, log_scores
from tests.planted_scores import N_IMAGES, planted_measured, planted_scores

SYSTEMS = {"manybrains": 0.7, "ridge": 1.0, "spatial": 1.2}
TAGS = {"subject": "subj05", "sessions": "3", "seed": "0", "store": "a.zarr", "store_digest": "sha256:d"}
TAGS |= {"split_digest": "sha256:s", "preprocessing_digest": "sha256:p", "code_version": "abc"}
OF_THE_MODEL = {"backbone": "tiny/1", "method": "head"}


@pytest.fixture
def tags(request: pytest.FixtureRequest) -> dict[str, str]:
    """An adaptation's tags, of another store for each test, since tests share their database."""
    return TAGS | OF_THE_MODEL | {"store_digest": request.node.name}


def read(run_id: str):
    return MlflowClient(tracking_uri=tracking_uri()).get_run(run_id)


def started(kind: str = "adapt") -> TrackedRun:
    return TrackedRun.start("run", kind=kind, config={}, tags={})


def kept(run_id: str, name: str) -> Path:
    return Path(download_artifacts(run_id=run_id, artifact_path=name, tracking_uri=tracking_uri()))


def test_a_run_keeps_its_headline_rows_comparisons_and_figure():
    scores, run = planted_scores(SYSTEMS), started()
    log_scores(run, scores)
    assert read(run.id).data.metrics == pytest.approx(headline(scores))
    assert json.loads(kept(run.id, "scores.json").read_text()) == [row.to_json() for row in scores.rows]
    assert len(json.loads(kept(run.id, "comparisons.json").read_text())) == len(scores.comparisons)
    assert kept(run.id, "scores.png").read_bytes().startswith(b"\x89PNG")


def test_each_baseline_is_a_finished_run_with_a_models_metric_names(tags):
    scores, parent = planted_scores(SYSTEMS), started()
    log_scores(parent, scores)
    run_ids = log_baselines(scores, tags=tags, parent=parent.id)
    ours = read(parent.id).data.metrics
    assert len(run_ids) == 2
    for run_id, name in zip(run_ids, ("ridge", "spatial"), strict=True):
        run = read(run_id)
        assert run.info.status == "FINISHED"
        assert run.info.run_name == f"{name}-subj05-3s"
        assert run.data.metrics["test/voxel_r"] == ours[f"test/voxel_r_{name}"]
        assert set(run.data.metrics) == {key for key in ours if "ridge" not in key and "spatial" not in key}
        found = {k.removeprefix("manybrains."): v for k, v in run.data.tags.items() if k.startswith("manybrains.")}
        assert found == {key: tags[key] for key in TAGS} | {"kind": "baseline", "baseline": name}
        assert run.data.tags["mlflow.parentRunId"] == parent.id


def test_a_baselines_run_says_nothing_of_the_model_it_was_scored_beside(tags):
    (run_id,) = log_baselines(planted_scores({"manybrains": 0.7, "ridge": 1.0}), tags=tags)
    assert {row["system"] for row in json.loads(kept(run_id, "scores.json").read_text())} == {
        "ridge",
        "zero",
        "mean",
        "ceiling",
    }
    assert {c["versus"] for c in json.loads(kept(run_id, "comparisons.json").read_text())} == {"zero", "mean"}


def test_a_baseline_is_logged_once_for_the_same_data_whatever_the_model(tags):
    scores = planted_scores(SYSTEMS)
    first = log_baselines(scores, tags=tags)
    assert log_baselines(scores, tags=tags | {"backbone": "other/7", "method": "lora"}) == first


@pytest.mark.parametrize("key", ["sessions", "seed", "store_digest", "split_digest", "code_version"])
def test_a_baseline_of_other_data_split_seed_or_code_is_another_run(tags, key):
    scores = planted_scores({"ridge": 1.0})
    first = log_baselines(scores, tags=tags)
    assert log_baselines(scores, tags=tags | {key: f"other {tags[key]}"}) != first
    assert log_baselines(scores, tags={k: v for k, v in tags.items() if k != key}) != first


def test_a_baseline_whose_logging_failed_is_marked_so_and_logged_again(tags, monkeypatch):
    scores = planted_scores({"ridge": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr("foundation.tracking.scores.bars_per_roi", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            log_baselines(scores, tags=tags)
    where = f"tags.`manybrains.store_digest` = '{tags['store_digest']}'"
    (failed,) = find_runs(where)
    assert failed.info.status == "FAILED"
    (run_id,) = log_baselines(scores, tags=tags)
    assert run_id != failed.info.run_id
    assert read(run_id).info.status == "FINISHED"


def test_a_path_with_an_apostrophe_is_found_again(tags):
    scores, odd = planted_scores({"ridge": 1.0}), tags | {"store": "/home/o'neil/a.zarr"}
    assert log_baselines(scores, tags=odd) == log_baselines(scores, tags=odd)


def test_the_baseline_of_a_pretraining_is_of_all_its_subjects(tags):
    names = ("subj01", "subj02")
    scores = merge_scores(planted_scores({"manybrains": 0.7, "ridge": 1.0}, subject=name) for name in names)
    of_pretraining = {"subjects": "subj01 subj02", "seed": "0", "store_digest": tags["store_digest"]}
    (run_id,) = log_baselines(scores, tags=of_pretraining)
    run = read(run_id)
    assert run.info.run_name == "ridge-2-subjects"
    assert run.data.metrics["test/voxel_r"] == pytest.approx(headline(scores)["test/voxel_r_ridge"])


def test_a_curve_has_sessions_as_its_steps_and_its_rows_as_files():
    points = [(n, planted_scores({"manybrains": 2.0 / n, "ridge": 3.0 / n})) for n in (1, 3)]
    run = started("curve")
    log_curve(run, points, n_train={1: 160, 3: 431})
    history = MlflowClient(tracking_uri=tracking_uri()).get_metric_history(run.id, "test/voxel_r")
    assert {m.step: m.value for m in history} == pytest.approx(
        {n: headline(scores)["test/voxel_r"] for n, scores in points}
    )
    rows = json.loads(kept(run.id, "curve.json").read_text())
    assert {(row["sessions"], row["n_train"]) for row in rows} == {(1, 160), (3, 431)}
    assert kept(run.id, "curve.csv").read_text().startswith("subject,sessions,n_train,system,")
    assert kept(run.id, "curve.png").read_bytes().startswith(b"\x89PNG")


def test_maps_are_kept_by_their_subject():
    measured, signal = planted_measured("subj07")
    run = started()
    log_maps(run, signal.astype(np.float32), measured, images=[f"image{i}" for i in range(N_IMAGES)], place=None)
    assert kept(run.id, "maps-subj07.png").read_bytes().startswith(b"\x89PNG")

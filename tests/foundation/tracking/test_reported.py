"""A name on a report's command line stands for what its run made, or for what its run keeps."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from foundation.evaluation.area_losses import Ablation, AblationRow
from foundation.evaluation.curve import curve_rows
from foundation.evaluation.partition import PartitionRow
from foundation.evaluation.protocols import ProtocolStep
from foundation.evaluation.report.runs import AblationRun, CurveRun, ScoresRun, StepsRun
from foundation.tracking.reported import Reported, found_beside, reported
from foundation.tracking.runs import TrackedRun
from foundation.tracking.scores import log_curve, log_scores
from tests.planted_scores import planted_scores

STEP = ProtocolStep(
    subject="subj01", system="tiny/1", step="over images", protocol="strict", axis="voxel", target="trial",
    r=0.4, change=None, floor=None,
)  # fmt: skip
LOSS = AblationRow(
    subject="subj01", branch="cls", intervention="zero", roi="all", intact=0.4, loss=0.1, low=0.05, high=0.15,
    share_of_intact=0.25, n_images=8, n_voxels=14,
)  # fmt: skip

PART = PartitionRow(subject="subj01", roi="all", part="both", value=0.2, low=0.1, high=0.3, n_images=8, n_voxels=14)


def tracked(name: str, kind: str, *, parent: str | None = None, **tags: str) -> TrackedRun:
    run = TrackedRun.start(name, kind=kind, config={}, tags=tags, parent=parent)
    run.finish()
    return run


def keep(run: TrackedRun, name: str, content: object, directory: Path) -> None:
    path = directory / name
    path.write_text(json.dumps(content))
    run.artifact(path)


@pytest.mark.parametrize(
    ("kind", "tags", "system"),
    [
        ("pretrain", {"backbone": "tiny/1"}, "tiny/1"),
        ("adapt", {"backbone": "tiny/1", "adapter": "tiny.subj05/2"}, "tiny.subj05/2"),
        ("baseline", {"baseline": "banded-ridge"}, "banded-ridge"),
    ],
    ids=["pretrain", "adapt", "baseline"],
)
def test_a_run_that_made_a_model_stands_for_it_by_name_and_by_id(kind, tags, system):
    run = tracked(f"a {kind}", kind, **tags)
    assert reported(f"a {kind}") == reported(run.id) == Reported(systems=(system,))


def test_a_baselines_run_tells_the_data_that_it_learned_from():
    tracked("ridge-3s", "baseline", baseline="ridge", store="x.zarr", subject="subj04", sessions="3")
    assert reported("ridge-3s") == Reported(systems=("ridge",), store="x.zarr", subjects=("subj04",), sessions=3)


def test_a_comparison_keeps_its_own_scores_and_is_about_its_baselines():
    scores = planted_scores({"gru": 1.0, "ridge": 1.2})
    run = TrackedRun.start("compared", kind="comparison", config={}, tags={"store": "x.zarr", "subjects": "subj05"})
    log_scores(run, scores, system="gru")
    found = reported("compared")
    assert found.about == ("ridge",)
    (kept,) = found.kept
    assert isinstance(kept, ScoresRun)
    assert kept.scores.rows == scores.rows


def test_of_runs_with_one_name_the_newest_counts():
    for version in (1, 2):
        tracked("twice", "adapt", adapter=f"tiny/{version}")
    assert reported("twice").systems == ("tiny/2",)


def test_what_is_no_run_is_taken_for_a_model(tmp_path):
    for name in ("ridge", "tiny@champion", str(tmp_path), "it's none", 'nor "this"', "0" * 32):
        assert reported(name) == Reported(systems=(name,))


def test_a_pretraining_that_registered_nothing_stands_for_its_own_directory():
    tracked("tiny-20260101-000000-aaaa", "pretrain")
    assert reported("tiny-20260101-000000-aaaa").systems == ("tiny-20260101-000000-aaaa",)


def test_an_adaptation_that_failed_is_refused():
    TrackedRun.start("failed", kind="adapt", config={}, tags={"backbone": "tiny/1"}).finish("FAILED")
    with pytest.raises(ValueError, match=r"run failed \(FAILED\) registered no adapter"):
        reported("failed")


def test_a_curve_is_about_the_adapter_of_the_most_sessions():
    run = tracked("curve", "curve", backbone="tiny/1")
    for sessions in ("2", "10", "1"):
        tracked("adapt", "adapt", parent=run.id, adapter=f"tiny.subj05/{sessions}", sessions=sessions)
    points = [(1, planted_scores({"manybrains": 1.0, "ridge": 1.2})), (10, planted_scores({"manybrains": 0.5}))]
    log_curve(run, points, n_train={1: 20, 10: 100})
    found = reported("curve")
    assert found.systems == ()
    assert found.about == ("tiny.subj05/10",)
    assert found.kept == (CurveRun(run="curve", rows=tuple(curve_rows(points, n_train={1: 20, 10: 100}))),)


def test_an_ablation_and_the_steps_of_an_evaluation_come_back_as_they_were(tmp_path):
    ablation = Ablation(rows=(LOSS,), notes=("subj01: a note",))
    run = tracked("ablate", "ablation", model="other/1")
    keep(run, "ablation.json", asdict(ablation) | {"sentences": ["It says so."], "model": "other/1"}, tmp_path)
    found = reported("ablate")
    assert found.about == ("other/1",)
    assert found.kept == (AblationRun(run="ablate", model="other/1", ablation=ablation, sentences=("It says so.",)),)
    run = tracked("evaluate", "evaluation", models="other/1 ridge")
    keep(run, "protocol-steps.json", [STEP.to_json()], tmp_path)
    found = reported("evaluate")
    assert found.about == ("other/1", "ridge")
    assert found.kept == (StepsRun(run="evaluate", steps=(STEP,)),)
    assert {type(of) for of in found_beside(["other/1"])} == {AblationRun, StepsRun}
    assert found_beside(["nobody/1"]) == []


def test_what_cls_and_patch_features_explain_comes_back_with_each_voxels_preference(tmp_path):
    ablation = Ablation(rows=(LOSS,))
    about = {"sentences": [], "model": "other/2", "partition": [asdict(PART)]}
    run = tracked("partitioned", "ablation", model="other/2")
    keep(run, "ablation.json", asdict(ablation) | about, tmp_path)
    np.save(tmp_path / "ablation-preference-subj01.npy", np.arange(14.0))
    run.artifact(tmp_path / "ablation-preference-subj01.npy")
    (found,) = reported("partitioned").kept
    assert isinstance(found, AblationRun)
    assert found.partition == (PART,)
    np.testing.assert_array_equal(found.preference["subj01"], np.arange(14.0))


def test_what_a_run_keeps_damaged_is_told_with_the_runs_name(tmp_path):
    run = tracked("damaged", "curve")
    keep(run, "curve.json", [{"subject": "subj01"}], tmp_path)
    with pytest.raises(ValueError, match=r"curve\.json of run damaged is damaged or from another version"):
        reported("damaged")


def test_a_run_that_keeps_nothing_to_show_is_refused():
    tracked("sweep", "sweep")
    with pytest.raises(ValueError, match=r"run sweep is of kind 'sweep' and keeps no curve\.json"):
        reported("sweep")

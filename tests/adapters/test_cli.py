"""The command `adapt`, in this process: what it refuses, what it leaves in MLflow, and that this predicts as scored."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from adapters import cli
from data.splits import split_of
from data.store import PooledStore
from foundation.checkpoint import load_model, read_description
from foundation.evaluation.compare import headline, score_subject
from foundation.evaluation.score import merge_scores
from foundation.tracking.packaging import adapter_in, backbone_in, load_packaged
from foundation.tracking.publish import publish
from foundation.tracking.registry import Registered, aliases, find_backbone, find_version, versions
from foundation.tracking.runs import TrackedRun, find_runs, tracking_uri
from foundation.training.course import FINAL, finish_run
from tests.ended import Ended
from tests.tiny_runs import plan as planned
from tests.tiny_runs import run_once
from tests.tiny_store import ENCODER, SPEC, make_tiny_store, tiny_recipe

SUBJECT, BACKBONE, ADAPTER = "subj05", "tiny", "tiny.subj05"


@pytest.fixture(scope="module")
def shared_home(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of this module's commands, where a backbone of subj01 and subj02 is registered."""
    home, directory = tmp_path_factory.mktemp("adapt-home"), tmp_path_factory.mktemp("run")
    recipe = tiny_recipe(tiny_store, epochs=1)
    recipe = replace(recipe, data=replace(recipe.data, subjects=("subj01", "subj02")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANYBRAINS_HOME", str(home))
        run_once(recipe, directory)
        finish_run(planned(recipe, directory))
        model, made_from = load_model(directory / FINAL)
        scores = merge_scores(scored(model, tiny_store, name) for name in model.subjects)
        with TrackedRun.start("tiny", kind="pretrain", config={}, tags={}).ending() as tracked:
            publish(
                tracked,
                name=BACKBONE,
                kind="backbone",
                backbone=directory / FINAL,
                adapter=None,
                lineage=made_from,
                scores=scores,
            )
    return home


def scored(model: Any, store_path: Path, subject: str, **options):
    store = PooledStore.open(store_path)
    return score_subject(
        {"manybrains": model}, store.subject(subject), store.tokens(ENCODER), split_of(store),
        pictures={}, n_bootstraps=20, **options,
    )  # fmt: skip


@pytest.fixture
def adapt(home, shared_home, monkeypatch, capsys) -> Callable[[str], Ended]:
    """Call the command as the shell would."""
    monkeypatch.setenv("MANYBRAINS_HOME", str(shared_home))

    def run(words: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["adapt", *words.split()])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        told = capsys.readouterr()
        return Ended(code, told.out, told.err)

    return run


def read(run_id: str):
    return MlflowClient(tracking_uri=tracking_uri()).get_run(run_id)


def artifacts(run_id: str) -> set[str]:
    return {file.path for file in MlflowClient(tracking_uri=tracking_uri()).list_artifacts(run_id)}


def runs_since(before: list, kind: str | None = None) -> list:
    """Runs that weren't there before, oldest first."""
    known = {run.info.run_id for run in before}
    new = [run for run in reversed(find_runs()) if run.info.run_id not in known]
    return [run for run in new if kind in (None, run.data.tags["manybrains.kind"])]


def newest() -> Registered:
    return max(versions(ADAPTER), key=lambda version: version.version)


# -- a single adapter --------------------------------------------------------------------------------------------------


def test_a_version_names_backbone_subject_sessions_seed_method_and_data(adapt, tiny_store):
    ended = adapt("--subject 5 --sessions 2 --seed 4")
    assert (ended.code, ended.err) == (0, "")
    version, backbone = newest(), find_backbone(BACKBONE)
    assert f"registered adapter {version.label} as {aliases(version)[0]}" in " ".join(ended.out.split())
    description = read_description(adapter_in(version.directory()))
    made_from, of_backbone = description["made_from"], read_description(backbone_in(backbone.directory()))
    wanted = {
        "backbone": backbone.label,
        "backbone_name": BACKBONE,
        "backbone_version": "1",
        "backbone_digest": of_backbone["weights"],
        "subject": SUBJECT,
        "sessions": "2",
        "seed": "4",
        "method": "head",
        "store": str(tiny_store),
        "preprocessing": "session-standardised",
    }
    assert wanted.items() <= made_from.items()
    assert wanted.items() <= version.tags.items()
    for key in ("store_digest", "split_digest", "preprocessing_digest"):
        assert made_from[key].startswith("sha256:")
        assert version.tags[key] == made_from[key]
    assert read_description(backbone_in(version.directory()))["weights"] == of_backbone["weights"]


def test_a_run_has_scores_beside_ridge_figures_and_the_version(adapt):
    before = find_runs()
    assert adapt("--subject subj05 --sessions 2 --seed 4").code == 0
    (run,) = runs_since(before, "adapt")
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "adapt-subj05-2s-tiny"
    assert run.data.tags["manybrains.adapter"] == newest().label
    assert "mlflow.parentRunId" not in run.data.tags
    assert {"validation/voxel_r", "test/voxel_r", "test/voxel_r_ridge"} <= run.data.metrics.keys()
    assert artifacts(run.info.run_id) == {
        "comparisons.json",
        "config.json",
        "maps-subj05.png",
        "model",
        "scores.json",
        "scores.png",
    }


@pytest.mark.parametrize("method", ["ridge", "head", "lora"])
def test_what_is_registered_predicts_what_was_scored(adapt, tiny_store, method):
    ended = adapt(f"--subject 5 --sessions 2 --method {method} --backbone tiny/1")
    assert (ended.code, ended.err) == (0, "")
    version = newest()
    model, made_from = load_packaged(version.directory())
    assert model.subjects == ["subj01", "subj02", SUBJECT]
    assert model.adapter(SUBJECT).population is not None
    assert (model.adapter(SUBJECT).lora is not None) == (method == "lora" and made_from["kept_epoch"] != "0")
    metrics = read(version.run_id).data.metrics
    for name, value in headline(scored(model, tiny_store, SUBJECT, n_sessions=2)).items():
        assert metrics[name] == pytest.approx(value, abs=1e-5), name


def test_what_a_prediction_is_made_of_is_saved_and_told(adapt):
    ended = adapt("--subject 5 --sessions 2 --method ridge")
    composition = read_description(adapter_in(newest().directory()))["made_from"]["composition"]
    assert composition.keys() == {"shares", "validation_voxel_r"}
    for numbers in composition.values():
        assert list(numbers) == ["whole", "field", "population", "network"]
    told = ", ".join(f"{name} {share:.2f}" for name, share in composition["shares"].items())
    assert f"a prediction is made of: {told}" in " ".join(ended.out.split())


def test_the_same_command_again_gives_the_same_weights_from_outputs_that_are_kept(adapt, shared_home):
    weights = []
    for _ in range(2):
        assert adapt("--subject 5 --sessions 1 --seed 2").code == 0
        weights.append(read_description(adapter_in(newest().directory()))["weights"])
    assert weights[0] == weights[1]
    assert list((shared_home / "cache" / "backbone-outputs").iterdir())


def test_a_seen_subject_may_be_adapted_to_if_one_asks_for_it(adapt):
    ended = adapt("--subject 1 --sessions 1 --allow-seen --method ridge")
    assert (ended.code, ended.err) == (0, "")
    model, _ = load_packaged(find_version("tiny.subj01").directory())
    assert model.subjects == ["subj01", "subj02"]
    population = model.adapter("subj01").population
    assert population is not None
    assert population.landmark[:, 0].unique().tolist() == [1]  # the other's voxels, none of its own


def test_test_trials_may_be_standardised_by_the_first_sessions(adapt):
    assert adapt("--subject 5 --sessions 1 --method ridge --standardise first-n").code == 0
    assert newest().tags["preprocessing"] == "standardised by the first N sessions"


# -- baselines ---------------------------------------------------------------------------------------------------------


def test_ridge_on_the_same_data_is_logged_once(adapt):
    assert adapt("--subject 5 --sessions 3 --method ridge --seed 7").code == 0
    before = find_runs()
    assert adapt("--subject 5 --sessions 3 --method head --seed 7").code == 0
    assert runs_since(before, "baseline") == []
    assert adapt("--subject 5 --sessions 2 --method ridge --seed 7").code == 0
    (baseline,) = runs_since(before, "baseline")
    assert (baseline.data.tags["manybrains.baseline"], baseline.info.run_name) == ("ridge", "ridge-subj05-2s")


def test_baselines_that_are_named_are_fitted_scored_and_logged(adapt):
    before = find_runs()
    ended = adapt("--subject 5 --sessions 2 --method ridge --seed 8 --baselines ridge cls-probe")
    assert ended.code == 0
    assert {run.data.tags["manybrains.baseline"] for run in runs_since(before, "baseline")} == {"ridge", "cls-probe"}
    (run,) = runs_since(before, "adapt")
    assert {"test/voxel_r_ridge", "test/voxel_r_cls-probe"} <= run.data.metrics.keys()


# -- a curve -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def curve(adapt) -> tuple[Ended, list]:
    """A curve that was asked for out of order and with a number twice, and the runs that it left."""
    before = find_runs()
    ended = adapt("--subject 5 --curve 3,1,3 --method ridge --seed 11")
    return ended, runs_since(before)


def test_a_curve_is_a_run_with_an_adapter_and_its_baseline_under_it_for_each_number(curve):
    ended, runs = curve
    assert (ended.code, ended.err) == (0, "")
    (parent,) = [run for run in runs if run.data.tags["manybrains.kind"] == "curve"]
    children = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    kinds = [(run.data.tags["manybrains.kind"], run.data.tags["manybrains.sessions"]) for run in children]
    assert kinds == [("adapt", "1"), ("baseline", "1"), ("adapt", "3"), ("baseline", "3")]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert parent.data.tags["manybrains.curve"] == "1,3"
    sessions = [version.tags["sessions"] for version in versions(ADAPTER)[:2]]
    assert sessions == ["3", "1"]  # the newest first


def test_a_curves_points_are_its_childrens_scores(curve):
    _, runs = curve
    (parent,) = [run for run in runs if run.data.tags["manybrains.kind"] == "curve"]
    assert artifacts(parent.info.run_id) == {"config.json", "curve.csv", "curve.json", "curve.png"}
    history = MlflowClient(tracking_uri=tracking_uri()).get_metric_history(parent.info.run_id, "test/voxel_r")
    children = {int(run.data.tags["manybrains.sessions"]): run for run in runs if "manybrains.adapter" in run.data.tags}
    assert {metric.step: metric.value for metric in history} == pytest.approx(
        {n: run.data.metrics["test/voxel_r"] for n, run in children.items()}
    )
    path = download_artifacts(artifact_uri=f"{parent.info.artifact_uri}/curve.json")
    assert {(row["sessions"], row["system"]) for row in json.loads(Path(path).read_text())} >= {
        (n, system) for n in (1, 3) for system in ("manybrains", "ridge")
    }


# -- what ends before its end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("step", ["adapt_subject", "score_subject", "publish"])
def test_a_run_that_is_cut_off_says_so_and_registers_nothing(adapt, monkeypatch, step, cause):
    def cut_off(*_, **__):
        raise cause("cut off")

    monkeypatch.setattr(cli, step, cut_off)
    before, registered = find_runs(), versions()
    ended = adapt("--subject 5 --sessions 1 --method ridge")
    code, err, status = {
        KeyboardInterrupt: (130, "interrupted\n", "KILLED"),
        ValueError: (1, "error: cut off\n", "FAILED"),
    }[cause]
    assert (ended.code, ended.err) == (code, err)
    (run,) = runs_since(before, "adapt")
    assert run.info.status == status
    assert versions() == registered


def test_a_curve_that_is_interrupted_keeps_the_points_that_are_whole(adapt, monkeypatch):
    publish, calls = cli.publish, []

    def interrupted(*args, **options):
        calls.append("publish")
        if len(calls) == 2:
            raise KeyboardInterrupt
        return publish(*args, **options)

    monkeypatch.setattr(cli, "publish", interrupted)
    before, registered = find_runs(), len(versions())
    assert adapt("--subject 5 --curve 1,2,3 --method ridge --seed 12").code == 130
    runs = [run for run in runs_since(before) if run.data.tags["manybrains.kind"] != "baseline"]
    assert [(run.data.tags["manybrains.kind"], run.info.status) for run in runs] == [
        ("curve", "KILLED"),
        ("adapt", "FINISHED"),
        ("adapt", "KILLED"),
    ]
    assert len(versions()) == registered + 1


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = {
    "an unknown subject": ("--subject 9 --sessions 1", "subject '9' is not in .*; it has subj01, subj02, subj05"),
    "too many sessions": ("--subject 5 --sessions 99", "subj05 has 3 sessions; --sessions 99 must be 1 to 3"),
    "a curve that is too long": ("--subject 5 --curve 1,2,9", "subj05 has 3 sessions; --sessions 9 must be 1 to 3"),
    "no session": ("--subject 5 --sessions 0", "0 sessions are none to learn from; ask for 1 or more"),
    "a curve from no session": ("--subject 5 --curve 0,1", "0 sessions are none to learn from; ask for 1 or more"),
    "neither number nor curve": ("--subject 5", "say how much to learn from: --sessions N, or --curve 1,2,3"),
    "number and curve": ("--subject 5 --sessions 1 --curve 1,2", "say how much to learn from: --sessions N, or"),
    "a curve of words": ("--subject 5 --curve one,2", "--curve 'one,2' must be numbers of sessions, such as 1,2,3"),
    "a seen subject": ("--subject 1 --sessions 1", "tiny/1 was trained on subj01; pass --allow-seen"),
    "an unknown backbone": ("--subject 5 --sessions 1 --backbone other", "backbone 'other' is not in the registry"),
    "an unknown version": ("--subject 5 --sessions 1 --backbone tiny/9", "backbone 'tiny/9' is not in the registry"),
    "an adapter as backbone": ("--subject 5 --sessions 1 --backbone tiny.subj05", "is no backbone but a registered"),
    "an unknown baseline": ("--subject 5 --sessions 1 --baselines ridge svm", "there is no baseline 'svm'; there are"),
    "an absent store": ("--subject 5 --sessions 1 --store {tmp}/none.zarr", "no store at .*none.zarr"),
    "another encoder": ("--subject 5 --sessions 1 --store {tmp}/other.zarr", "tokens of .* come from another encoder"),
    "no such method": ("--subject 5 --sessions 1 --method magic", "magic"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_adapted_is_one_line_and_leaves_no_run_and_no_version(adapt, tmp_path, words, message):
    if "other.zarr" in words:
        make_tiny_store(tmp_path / "other.zarr", spec=SPEC | {"seed": 1})
    if "tiny.subj05" in words and not versions(ADAPTER):
        assert adapt("--subject 5 --sessions 1 --method ridge").code == 0
    before = (versions(), len(find_runs()))
    ended = adapt(words.format(tmp=tmp_path))
    assert ended.code == (2 if "--method magic" in words else 1)
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert pytest.RaisesExc(ValueError, match=message).matches(ValueError(ended.err)), ended.err
    assert (versions(), len(find_runs())) == before


def test_without_a_backbone_the_next_step_is_named(adapt, tmp_path, monkeypatch):
    monkeypatch.setenv("MANYBRAINS_HOME", str(tmp_path))
    ended = adapt("--subject 5 --sessions 3")
    assert ended.code == 1
    assert "no backbone is registered in" in ended.err
    assert "run `python -m foundation.pretrain` first" in ended.err

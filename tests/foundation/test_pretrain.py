"""The command `foundation.pretrain`, whole: from a command line to a registered version, which `adapt` goes on from."""

import json
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

import adapters.cli
from data.store import PooledStore
from foundation import pretrain
from foundation.checkpoint import load_model
from foundation.config import DataConfig
from foundation.recipes import RECIPES
from foundation.tracking import registry
from foundation.tracking.packaging import load_packaged
from foundation.tracking.registry import Registered, aliases, find_backbone, find_version
from foundation.tracking.runs import TrackedRun, TrackingError, find_runs, tracking_uri
from foundation.training import course
from foundation.training.reporter import Reporter
from foundation.training.run import describe_run, runs_dir
from tests.ended import Ended
from tests.tiny_store import ENCODER

SETTINGS = (
    f"phantom-tiny --encoder {ENCODER} --subjects 1 2 --parcels auto:4 --cluster.engine local "
    "--optim.epochs 3 --optim.batch-size 20 --checkpoint-every 4 "
    "--backbone.width 8 --backbone.n-cls-layer 1 --backbone.n-patch-layer 2 --backbone.n-query 2 --backbone.latent 3 "
    "--backbone.n-component 4 --backbone.n-local 3 --backbone.mamba.headdim 8"
).split()


@pytest.fixture(scope="module")
def shared_home(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of this module's commands."""
    home = tmp_path_factory.mktemp("pretrain-home")
    shutil.copy(empty_database, home)
    return home


@pytest.fixture
def call(home, shared_home, monkeypatch, capsys) -> Callable[..., Ended]:
    """Call a command's `main` as the shell would, but on the tests' one thread."""
    monkeypatch.setenv("MANYBRAINS_HOME", str(shared_home))
    monkeypatch.setattr(pretrain, "set_threads", lambda n_workers_here: None)

    def run(main: Callable[[], None], *words: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["command", *words])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        told = capsys.readouterr()
        return Ended(code, told.out, told.err)

    return run


@pytest.fixture
def pretrained(call, tiny_store) -> str:
    """The label of a backbone that `foundation.pretrain` registered; it is trained once."""
    try:
        return find_backbone("tiny/1").label
    except ValueError:
        ended = call(pretrain.main, *SETTINGS, "--store", str(tiny_store))
        assert (ended.code, ended.err) == (0, "")
        assert "registered backbone tiny/1 as champion" in " ".join(ended.out.split())
        assert "next: adapt --subject subj05 --sessions 3" in ended.out
        return find_backbone(None).label


def read(run_id: str):
    return MlflowClient(tracking_uri=tracking_uri()).get_run(run_id)


def artifacts(run_id: str, folder: str | None = None) -> set[str]:
    return {file.path for file in MlflowClient(tracking_uri=tracking_uri()).list_artifacts(run_id, folder)}


def versions() -> list[str]:
    found = MlflowClient(tracking_uri=tracking_uri()).search_model_versions()
    return sorted(f"{version.name}/{version.version}" for version in found)


def newest_of(name: str) -> Registered:
    return max(registry.versions(name), key=lambda found: found.version)


def test_pretraining_leaves_a_finished_run_with_its_config_metrics_and_scores(pretrained, tiny_store):
    run = read(find_backbone(pretrained).run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["backbone.width"] == "8"
    assert run.data.params["data.store"] == str(tiny_store)
    metrics = run.data.metrics
    assert {"train/loss", "train/lr", "validation/voxel_r", "validation/voxel_r/subj01"} <= metrics.keys()
    assert {
        "test/voxel_r",
        "test/voxel_r/subject/subj02",
        "test/voxel_r/roi/early",
        "test/voxel_r_ridge",
    } <= metrics.keys()
    history = MlflowClient(tracking_uri=tracking_uri()).get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in history] == list(range(1, 13))
    kept = {"comparisons.json", "config.json", "model", "scores.json", "scores.png"}
    assert artifacts(run.info.run_id) == kept
    (directory,) = runs_dir().glob("phantom-tiny-*")
    path = download_artifacts(artifact_uri=f"{run.info.artifact_uri}/scores.json")
    assert {(r["subject"], r["system"]) for r in json.loads(Path(path).read_text())} == {
        (subject, system)
        for subject in ("subj01", "subj02")
        for system in ("manybrains", "ridge", "zero", "mean", "ceiling")
    }
    assert describe_run(directory)["status"] == "finished"


SETTLED = ("network_share", "noise_sd")
"""What `finish_run` sets."""


def test_the_registered_backbone_is_the_finished_best_checkpoint_and_names_its_origin(pretrained, tiny_store):
    backbone = find_backbone(pretrained)
    model, made_from = load_packaged(backbone.directory())
    (directory,) = runs_dir().glob("phantom-tiny-*")
    best, final = (dict(load_model(directory / name)[0].state_dict()) for name in ("best", "final"))
    torch.testing.assert_close(dict(model.state_dict()), final, rtol=0, atol=0)
    settled = {key for key in final if key.endswith(SETTLED)}
    assert len(settled) == 2 * len(SETTLED)
    for key, value in final.items():
        assert torch.equal(value, best[key]) == (key not in settled), key
    assert model.subjects == ["subj01", "subj02"]
    assert aliases(backbone) == ["champion"]
    assert backbone.tags["kind"] == "backbone"
    assert backbone.tags["store"] == made_from["store"] == str(tiny_store)
    assert backbone.tags["subjects"] == "subj01 subj02"
    assert made_from["subject_digests"].keys() == {"subj01", "subj02"}
    for key in ("store_digest", "encoder_digest", "split_digest"):
        assert backbone.tags[key] == made_from[key]
        assert made_from[key].startswith("sha256:")
    tokens = PooledStore.open(tiny_store).tokens(ENCODER)
    assert made_from["encoder"].items() >= {"name": ENCODER, "digest": tokens.digest, "spec": tokens.spec}.items()


def test_the_next_command_that_is_told_adapts_to_the_subject_that_was_left_out(call, pretrained):
    ended = call(adapters.cli.main, "--subject", "subj05", "--sessions", "3")
    assert (ended.code, ended.err) == (0, "")
    adapter = find_version("tiny.subj05", kind="adapter")
    assert adapter.tags["backbone"] == pretrained
    model, made_from = load_packaged(adapter.directory())
    assert model.subjects == ["subj01", "subj02", "subj05"]
    assert made_from["encoder"] == load_packaged(find_backbone(pretrained).directory())[1]["encoder"]


def test_an_interrupted_run_goes_on_from_where_it_was_and_ends_as_if_nothing_had_been(
    call, pretrained, tiny_store, monkeypatch
):
    settings = [*SETTINGS, "--store", str(tiny_store), "--seed", "1"]
    whole = call(pretrain.main, *settings)
    assert whole.code == 0
    expected = newest_of("tiny")
    tell = Reporter.__call__

    def interrupt(self, metrics, step):
        tell(self, metrics, step)
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "__call__", interrupt)
        ended = call(pretrain.main, *settings)
    assert ended.code == 130
    assert "stopping after this step; a checkpoint is written" in ended.err
    run = find_runs()[0]
    assert run.info.status == "KILLED"
    assert f"interrupted; go on with: python -m foundation.pretrain --resume {run.info.run_name}" in (
        " ".join(ended.out.split())
    )
    other = call(pretrain.main, "--resume", run.info.run_name, "--optim.lr", "0.5")
    assert other.code == 1
    assert (
        f"run '{run.info.run_name}' has other settings than those given: optim.lr 0.5 for the run's 0.002" in other.err
    )
    resumed = call(pretrain.main, "--resume", run.info.run_name)  # with its own settings, the engine included
    assert (resumed.code, resumed.err) == (0, "")
    assert "going on from step 5" in resumed.out
    assert read(run.info.run_id).info.status == "FINISHED"
    found = newest_of("tiny")
    assert found.version == expected.version + 1
    assert found.run_id == run.info.run_id
    one, other = (dict(load_packaged(registered.directory())[0].state_dict()) for registered in (found, expected))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    again = call(pretrain.main, *settings, "--resume")
    assert again.code == 1
    assert "no unfinished run of this recipe, these options and data" in again.err


def test_a_server_that_is_down_when_training_ends_costs_nothing_that_was_trained(
    call, pretrained, tiny_store, monkeypatch
):
    settings = [*SETTINGS, "--store", str(tiny_store), "--seed", "4"]

    def nobody_answers(*_, **__):
        raise TrackingError("the tracking server doesn't do what it is asked")

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "log_scores", nobody_answers)
        patch.setattr(TrackedRun, "finish", nobody_answers)
        ended = call(pretrain.main, *settings)
    assert ended.code == 1
    assert ended.err == "error: the tracking server doesn't do what it is asked\n"
    assert "the run's status in MLflow stays as it was" in ended.out
    name = ended.out.split("--resume ")[1].split()[0]
    resumed = call(pretrain.main, "--resume", name)
    assert (resumed.code, resumed.err) == (0, "")
    assert "step" not in resumed.out.split("going on from step")[1]  # scored and registered, and not trained again
    assert "registered backbone tiny/" in resumed.out
    (run,) = find_runs(f"attributes.run_name = '{name}'")
    assert run.info.status == "FINISHED"


def test_an_unfinished_run_of_the_same_settings_is_mentioned_when_a_new_one_starts(
    call, pretrained, tiny_store, monkeypatch
):
    settings = [*SETTINGS, "--store", str(tiny_store), "--seed", "3"]

    def refuse(*_, **__):
        raise ValueError("not today")

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "start_run", refuse)
        first, second = call(pretrain.main, *settings), call(pretrain.main, *settings)
    assert (first.code, second.code) == (1, 1)
    name = first.out.split("run ")[1].split(":")[0]
    assert f"failed; once the cause is gone, go on with: {pretrain.PROGRAM} --resume {name}" in first.out
    assert f"a new run; {name} of the same settings is not finished: failed (`--resume {name}` goes on" in second.out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("during", ["linear_start", "finish_adapter"], ids=["start", "finish"])
def test_a_signal_outside_of_training_interrupts_at_once_and_what_it_cut_off_is_started_over(
    call, pretrained, tiny_store, monkeypatch, number, during
):
    """At the first of two subjects, whose work is then thrown away; the scores end as those of an uninterrupted run."""
    settings, called = [*SETTINGS, "--store", str(tiny_store)], []
    real = getattr(course, during)

    def interrupt(*args, **options):
        called.append(during)
        real(*args, **options)
        signal.raise_signal(number)

    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    before = versions()
    with monkeypatch.context() as patch:
        patch.setattr(course, during, interrupt)
        ended = call(pretrain.main, *settings)
    assert (ended.code, ended.err, len(called)) == (130, "", 1)
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    run = find_runs()[0]
    directory = runs_dir() / run.info.run_name
    assert (run.info.status, describe_run(directory)["status"]) == ("KILLED", "interrupted")
    assert f"interrupted; go on with: {pretrain.PROGRAM} --resume {directory.name}" in (" ".join(ended.out.split()))
    cut_off = directory / {"linear_start": course.START, "finish_adapter": course.FINAL}[during]
    assert not cut_off.exists()
    assert versions() == before

    resumed = call(pretrain.main, *settings, "--resume")
    assert (resumed.code, resumed.err) == (0, "")
    assert read(run.info.run_id).info.status == "FINISHED"
    assert describe_run(directory)["status"] == "finished"
    expected = dict(load_packaged(find_backbone(pretrained).directory())[0].state_dict())
    torch.testing.assert_close(dict(load_model(directory / course.FINAL)[0].state_dict()), expected, rtol=0, atol=0)


def test_a_run_that_fails_is_marked_so_and_registers_nothing(call, pretrained, tiny_store):
    before = versions()
    ended = call(pretrain.main, *SETTINGS, "--store", str(tiny_store), "--optim.batch-size", "5000")
    assert ended.code == 1
    assert ended.err.startswith("error: batch size 5000 is more than the 88 training samples")
    assert ended.err.count("\n") == 1
    assert find_runs()[0].info.status == "FAILED"
    assert versions() == before


WRONG = {
    "unknown subject": ("--subjects 1 9", "subject '9' is not in"),
    "subject twice": ("--subjects 1 subj01", "must name at least one, each once"),
    "unknown encoder": ("--encoder vit", "vit"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_setting_is_one_line_and_starts_no_run(call, pretrained, tiny_store, words, message):
    before = (len(find_runs()), len(list(runs_dir().iterdir())))
    ended = call(pretrain.main, *SETTINGS, "--store", str(tiny_store), *words.split())
    assert ended.code == 1
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert message in ended.err
    assert (len(find_runs()), len(list(runs_dir().iterdir()))) == before


def test_data_config_names_what_stands_in_for_a_store():
    assert DataConfig().store is None
    assert DataConfig().phantom == "tiny"


def test_a_run_killed_before_it_was_scored_is_scored_and_registered_by_resume(call, pretrained, tiny_store):
    directory = runs_dir() / load_packaged(find_backbone(pretrained).directory())[1]["run"]
    describe_run(directory, status="trained")
    ended = call(pretrain.main, *SETTINGS, "--store", str(tiny_store), "--resume", directory.name)
    assert (ended.code, ended.err) == (0, "")
    assert "registered backbone tiny/" in " ".join(ended.out.split())
    assert describe_run(directory)["status"] == "finished"


def test_a_run_of_the_first_sessions_says_so_wherever_runs_and_versions_are_compared(
    call, pretrained, tiny_store, monkeypatch
):
    recipe = RECIPES["phantom-tiny"]
    monkeypatch.setitem(RECIPES, "phantom-tiny", replace(recipe, data=replace(recipe.data, sessions=2)))
    ended = call(pretrain.main, *SETTINGS, "--store", str(tiny_store), "--seed", "6")
    assert (ended.code, ended.err) == (0, "")
    version = newest_of("tiny")
    run = read(version.run_id)
    assert run.data.params["data.sessions"] == "2"
    assert run.data.tags["manybrains.sessions"] == "2"
    (ridge,) = [
        r
        for r in find_runs("tags.`manybrains.kind` = 'baseline'")
        if r.data.tags.get("mlflow.parentRunId") == run.info.run_id
    ]
    assert ridge.data.tags["manybrains.sessions"] == "2"
    assert load_packaged(version.directory())[1]["recipe"]["data"]["sessions"] == 2

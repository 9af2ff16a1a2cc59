"""The command: the planted specialisation is found, the planted absence isn't, and what can't be said is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from foundation import ablate
from foundation.ablate import Ablate, ablate_model
from foundation.tracking.runs import client, find_runs
from tests.tiny_runs import run_once
from tests.tiny_store import make_tiny_store, tiny_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a model that was trained on the tiny store, whose labels know early areas only."""
    directory = tmp_path_factory.mktemp("ablate")
    make_tiny_store(directory / "tiny.zarr")
    run_once(tiny_recipe(directory / "tiny.zarr", epochs=1), directory / "run")
    return directory / "run" / "best"


def test_everything_is_printed_written_and_tracked(trained, tmp_path, capsys):
    path = tmp_path / "ablation.json"
    ablate_model(Ablate(model=str(trained), json=path, partition=True, bootstraps=250, draws=2))
    printed = " ".join(capsys.readouterr().out.split())
    assert "What disabling a stream costs" in printed
    assert "subj02: early against higher n/a" in printed
    assert "Whether streams serve different areas: n/a, see the notes." in printed
    kept = json.loads(path.read_text())
    assert {row["subject"] for row in kept["rows"]} == {"subj01", "subj02", "subj05"}
    assert {row["part"] for row in kept["partition"]} >= {"unique cls", "unique patch", "shared"}
    assert np.load(tmp_path / "ablation-preference-subj01.npy").shape == (14,)
    (run,) = find_runs("tags.`manybrains.kind` = 'ablation'")
    assert run.info.status == "FINISHED"
    files = {file.path for file in client().list_artifacts(run.info.run_id)}
    assert {"ablation.json", "ablation.png", "ablation-preference-subj01.npy"} <= files


def test_too_few_resamples_for_so_many_tests_are_refused(trained):
    with pytest.raises(ValueError, match="--bootstraps 50 can't tell 6 tests from chance; at least 239 are needed"):
        ablate_model(Ablate(model=str(trained), bootstraps=50))


def test_a_model_that_has_the_stream_is_none_that_was_trained_without_it(trained):
    with pytest.raises(ValueError, match="this model has a cls stream"):
        ablate_model(Ablate(model=str(trained), without_cls=str(trained)))


def test_a_joint_stream_reads_the_tokens_of_both_and_is_trained_without_neither(trained, tmp_path):
    recipe = tiny_recipe(trained.parents[1] / "tiny.zarr", epochs=1)
    joint = replace(recipe, backbone=replace(recipe.backbone, streams=("joint",), gate="image"))
    run_once(joint, tmp_path / "run")
    both = str(tmp_path / "run" / "best")
    with pytest.raises(ValueError, match="this model has a joint stream, which reads cls tokens"):
        ablate_model(Ablate(model=str(trained), without_cls=both))
    with pytest.raises(ValueError, match="this model has a joint stream, which reads patch tokens"):
        ablate_model(Ablate(model=str(trained), without_patch=both))


def test_a_missing_directory_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="there is no directory"):
        ablate_model(Ablate(model=str(tmp_path / "no-model"), json=tmp_path / "gone" / "ablation.json"))


def test_a_server_that_goes_away_does_not_cost_the_files(trained, tmp_path, monkeypatch, capsys):
    def away(*_args, **_options):
        raise ValueError("the server went away")

    monkeypatch.setattr(ablate.TrackedRun, "start", away)
    command = Ablate(model=str(trained), json=tmp_path / "ablation.json", bootstraps=250, draws=1, subjects=("1",))
    with pytest.raises(ValueError, match="the server went away"):
        ablate_model(command)
    assert (tmp_path / "ablation.json").exists()
    assert "1 of the model's 3 subjects was looked at." in capsys.readouterr().out


def test_help_names_every_option(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ablate", "--help"])
    with pytest.raises(SystemExit):
        ablate.main()
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--without-cls", "--without-patch", "--partition", "--json"))

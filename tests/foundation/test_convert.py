"""A run as one file: the model that was trained, whichever checkpoint is asked for, and nothing that isn't whole."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from foundation import convert
from foundation.bundle import METADATA, load_bundle, write_bundle
from foundation.checkpoint import load_model, save_model
from foundation.config import Recipe
from foundation.training.checkpoints import newest_checkpoint
from foundation.training.course import finish_run, train_run
from foundation.training.engine import LocalEngine
from foundation.training.run import Plan, describe_run, new_run
from tests.tiny_store import tiny_recipe


@pytest.fixture(scope="module")
def recipe(tiny_store: Path) -> Recipe:
    return tiny_recipe(tiny_store, epochs=1)


@pytest.fixture(scope="module")
def trained(recipe: Recipe, session_home: Path) -> Path:
    directory = new_run(recipe)
    assert recipe.data.store is not None
    plan = Plan(recipe=recipe, store=recipe.data.store, directory=directory, tracking_uri="", tracking_run="")
    train_run(plan, LocalEngine, lambda metrics, step: None)
    describe_run(directory, status="trained")
    finish_run(plan)
    return directory


@pytest.fixture
def home(session_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of the module's run."""
    monkeypatch.setenv("MANYBRAINS_HOME", str(session_home))
    return session_home


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["convert", *words])
    try:
        convert.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def assert_same(one, other) -> None:
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("which", [None, "best", "final"])
def test_the_file_is_the_model_that_is_asked_for_and_trains_on_in_the_local_engine(
    trained, recipe, home, monkeypatch, tmp_path, which
):
    out = tmp_path / "new" / "model.safetensors"
    assert call(monkeypatch, trained.name, "--out", str(out), *(["--which", which] if which else [])) == 0
    model, made_from = load_bundle(out)
    source = trained / which if which else newest_checkpoint(trained)
    assert source is not None
    expected, lineage = load_model(source)
    assert_same(model, expected)
    assert made_from == lineage
    torch.testing.assert_close(load_file(out), load_file(source / "model.safetensors"), equal_nan=True)
    assert LocalEngine(model, recipe).weights().keys() == model.state_dict().keys()
    assert [path.name for path in out.parent.iterdir()] == ["model.safetensors"]
    (out.parent / "plain").touch()
    assert out.stat().st_mode == (out.parent / "plain").stat().st_mode


def test_an_adapter_alone_is_refused(trained, tmp_path):
    model, _ = load_model(trained / "best")
    (tmp_path / "adapter").mkdir()
    save_model(model, tmp_path / "adapter", made_from={}, only="subj01")
    with pytest.raises(ValueError, match="holds an adapter only; name a run"):
        write_bundle(tmp_path / "adapter", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_path_of_a_checkpoint_will_do(trained, home, monkeypatch, tmp_path):
    checkpoint = newest_checkpoint(trained)
    assert call(monkeypatch, str(checkpoint), "--out", str(tmp_path / "a.safetensors")) == 0
    assert_same(load_bundle(tmp_path / "a.safetensors")[0], load_model(checkpoint)[0])


def test_a_run_that_is_not_there_and_a_model_that_is_not_yet_are_one_line(
    trained, recipe, home, monkeypatch, tmp_path, capsys
):
    begun = new_run(recipe)
    describe_run(begun, status="running")
    for words, said in (
        (["nothing"], "run 'nothing' is not in"),
        ([begun.name], "has no whole checkpoint yet"),
        ([begun.name, "--which", "best"], "has no best model yet"),
    ):
        assert call(monkeypatch, *words, "--out", str(tmp_path / "x.safetensors")) == 1
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
    (tmp_path / "dir.safetensors").mkdir()
    (tmp_path / "there.safetensors").write_text("mine")
    for out, said in (
        ("dir.safetensors", "is a directory; name a file"),
        ("there.safetensors", "exists already; name another file"),
        ("model.pt", "must end in .safetensors"),
    ):
        assert call(monkeypatch, trained.name, "--out", str(tmp_path / out)) == 1
        assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dir.safetensors", "there.safetensors"]
    assert (tmp_path / "there.safetensors").read_text() == "mine"


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 255
    path.write_bytes(data)


def bare(path: Path) -> None:
    save_file(load_file(path), path)


def renumbered(path: Path) -> None:
    save_file(
        load_file(path), path, metadata={METADATA: json.dumps({"format": "manybrains-model", "format_version": 99})}
    )


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncated, "can't be read"),
        (flipped, "is damaged: its tensors aren't those described"),
        (bare, "holds tensors only, no manybrains model"),
        (renumbered, "model format 99; this manybrains reads up to"),
        (Path.unlink, "can't be read"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(trained, tmp_path, damage, said):
    path = tmp_path / "model.safetensors"
    write_bundle(trained / "best", path)
    damage(path)
    with pytest.raises(ValueError, match=said):
        load_bundle(path)

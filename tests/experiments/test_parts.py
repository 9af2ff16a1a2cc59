"""The queue of experiments: what is finished isn't trained again, variants share a closed form, systems are paired."""

from pathlib import Path

import numpy as np
import pytest

from foundation.checkpoint import load_model
from foundation.recipes import RECIPES
from foundation.training.course import START
from tests.experiments import parts
from tests.tiny_store import ENCODER, make_tiny_store, tiny_recipe

VARIANTS = ("full", "without residual decoder")


@pytest.fixture
def command(tmp_path, monkeypatch) -> parts.Train:
    path = tmp_path / "tiny.zarr"
    make_tiny_store(path)
    recipe = tiny_recipe(path, epochs=1)
    monkeypatch.setitem(RECIPES, recipe.name, recipe)
    return parts.Train(
        directory=tmp_path / "runs",
        store=str(path),
        encoder=ENCODER,
        subjects=recipe.data.subjects,
        recipe=recipe.name,
        variants=VARIANTS,
        baselines=("ridge",),
    )


def adapters(directory: Path) -> dict[str, np.ndarray]:
    state = load_model(directory / START)[0].state_dict()
    return {name: value.numpy() for name, value in state.items() if ".linear." in name or "_field." in name}


def test_the_queue_pairs_what_it_trained_and_trains_nothing_twice(command, monkeypatch, capsys):
    parts.train(command)
    full, without = (adapters(command.directory / variant.replace(" ", "-")) for variant in VARIANTS)
    assert any(value.any() for value in full.values())
    for name, value in full.items():
        np.testing.assert_array_equal(without[name], value)

    scores = parts.scores_of(command.directory)
    for found in scores.values():
        systems = {row.system for row in found.rows}
        assert {
            "ridge",
            "full",
            "without-residual-decoder",
            "full, network alone",
            "full, closed form alone",
        } <= systems
        assert any((c.system, c.versus) == ("without-residual-decoder", "full") for c in found.comparisons)
    parts.tabulate(parts.Tabulate(directory=command.directory))
    assert "without-residual-decoder" in capsys.readouterr().out

    def never(*_, **__):
        raise AssertionError("trained again")

    for name in ("train_run", "start_run", "predict"):
        monkeypatch.setattr(parts, name, never)
    parts.train(command)


def test_another_recipe_in_the_same_directory_is_refused(command):
    parts.train(parts.dataclasses.replace(command, variants=()))
    with pytest.raises(ValueError, match="holds another recipe's runs; name another directory"):
        parts.train(parts.dataclasses.replace(command, variants=(), epochs=2))

"""From words on the command line to a recipe and a cluster's settings."""

import sys
from dataclasses import replace

import pytest

from cluster.config import PRESETS
from foundation import pretrain
from foundation.config import Recipe
from foundation.pretrain import Pretrain, arguments
from foundation.recipe_options import NEWEST
from foundation.recipes import RECIPES, recipe_named


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_without_options_is_itself(recipe):
    assert Pretrain.of(recipe).resolved() == recipe


def test_every_recipe_is_found_by_its_name():
    assert all(recipe_named(name).name == name for name in RECIPES)
    with pytest.raises(ValueError, match="recipe 'phantom' is unknown; there are phantom-tiny, phantom-standard"):
        recipe_named("phantom")


def parsed(monkeypatch: pytest.MonkeyPatch, *words: str) -> Recipe:
    """The recipe that a command line resolves to, by way of the real parser."""
    found: list[Recipe] = []
    monkeypatch.setattr(pretrain, "pretrain", lambda command: found.append(command.resolved()))
    monkeypatch.setattr(sys, "argv", ["pretrain", *words])
    pretrain.main()
    return found[0]


def test_no_words_at_all_are_the_embedded_phantom(monkeypatch):
    assert parsed(monkeypatch) == RECIPES["phantom-tiny"]


def test_an_option_changes_what_it_names_and_nothing_else(monkeypatch):
    found = parsed(monkeypatch, "v4", "--backbone.n-patch-layer", "1", "--optim.lr", "0.5", "--seed", "3")
    expected = RECIPES["v4"].to_json()
    assert found.to_json() != expected
    expected["backbone"]["n_patch_layer"], expected["optim"]["lr"], expected["seed"] = 1, 0.5, 3
    assert found.to_json() == expected


def test_a_local_store_is_absolute_and_a_url_as_it_was_given(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert parsed(monkeypatch, "--store", "a.zarr").data.store == str(tmp_path / "a.zarr")
    assert parsed(monkeypatch, "--store", "s3://bucket/a.zarr").data.store == "s3://bucket/a.zarr"


@pytest.mark.parametrize(
    ("words", "recipe", "completed"),
    [
        ([], "phantom-tiny", []),
        (["v4"], "v4", ["v4"]),
        (["--seed", "1", "v4"], "v4", ["--seed", "1", "v4"]),
        (["--resume"], "phantom-tiny", ["--resume", NEWEST]),
        (["v4", "--resume"], "v4", ["v4", "--resume", NEWEST]),
        (["--resume", "v4"], "v4", ["--resume", NEWEST, "v4"]),
        (["--resume", "--seed", "1"], "phantom-tiny", ["--resume", NEWEST, "--seed", "1"]),
        (["--help"], "phantom-tiny", ["--help"]),
    ],
    ids=" ".join,
)
def test_a_bare_resume_means_the_newest_run_and_no_recipe_the_phantom(words, recipe, completed):
    assert arguments(words) == (Pretrain.of(RECIPES[recipe]), completed)


def test_a_run_that_is_not_there_cannot_be_resumed():
    with pytest.raises(ValueError, match=r"run 'v4-2026' is not in .*; there are: none"):
        arguments(["v4", "--resume", "v4-2026"])


def test_a_preset_is_what_the_clusters_options_are_where_they_are_not_given(monkeypatch):
    found: list[Pretrain] = []
    monkeypatch.setattr(pretrain, "pretrain", found.append)
    for words in (["--cluster.preset", "one-node-8gpu"], ["--cluster.preset=one-node-8gpu", "--cluster.workers", "4"]):
        monkeypatch.setattr(sys, "argv", ["pretrain", *words])
        pretrain.main()
    assert found[0].cluster == PRESETS["one-node-8gpu"]
    assert found[1].cluster == replace(PRESETS["one-node-8gpu"], workers=4)
    assert [name for name, preset in PRESETS.items() if preset.preset != name] == []


def test_an_unknown_preset_is_named_with_those_there_are(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain", "--cluster.preset", "two-nodes"])
    with pytest.raises(SystemExit) as stop:
        pretrain.main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "two-nodes" in err
    assert "one-node-8gpu" in err


def test_an_unknown_recipe_is_one_line_and_a_failing_exit(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain", "v5"])
    with pytest.raises(SystemExit) as stop:
        pretrain.main()
    assert stop.value.code == 1
    assert capsys.readouterr().err == f"error: recipe 'v5' is unknown; there are {', '.join(RECIPES)}\n"

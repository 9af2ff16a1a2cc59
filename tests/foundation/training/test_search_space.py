"""Search spaces and the draws of trials: what is refused, and that a trial depends on space, seed and number only."""

import math

import numpy as np
import pytest

from foundation.recipes import RECIPES
from foundation.training.search_space import DEFAULT_SPACE, draws, parse_space, with_settings

RECIPE = RECIPES["phantom-tiny"]
SPACE = (
    "optim.lr=log:1e-4:1e-2",
    "backbone.dropout=uniform:0:0.3",
    "backbone.mamba.d-state=8,16",
    "backbone.n-query=uniform:1:3",
    "backbone.latent=none,8",
    "backbone.readout=mean,gaussian",
    "backbone.amplitude=true,false",
)


def drawn(n_trials: int, *, seed: int = 0, space: tuple[str, ...] = SPACE) -> list[dict]:
    return draws(parse_space(space, RECIPE), RECIPE, seed=seed, n_trials=n_trials)


def test_the_first_trial_is_the_recipe_as_it_stands():
    first = drawn(1)[0]
    assert first["optim.lr"] == RECIPE.optim.lr
    assert with_settings(RECIPE, first) == RECIPE


def test_a_larger_sweep_starts_with_the_trials_of_a_smaller_one():
    assert drawn(20)[:7] == drawn(7)
    assert drawn(7, seed=1)[1:] != drawn(7)[1:]


def test_no_two_trials_are_the_same_even_in_a_small_space():
    found = drawn(4, space=("optim.lr=0.001,0.003,0.01",))
    assert sorted(settings["optim.lr"] for settings in found) == [0.001, 0.002, 0.003, 0.01]
    with pytest.raises(ValueError, match=r"--trials 5: the space seems to have no more than 4 different settings"):
        drawn(5, space=("optim.lr=0.001,0.003,0.01",))


def test_every_draw_lies_in_its_range_and_choices_and_ends_all_come_up():
    found = drawn(400)
    assert all(1e-4 <= s["optim.lr"] <= 1e-2 and 0 <= s["backbone.dropout"] <= 0.3 for s in found)
    assert {s["backbone.n_query"] for s in found[1:]} == {1, 2, 3}
    assert {s["backbone.mamba.d_state"] for s in found[1:]} == {8, 16}
    assert {s["backbone.latent"] for s in found[1:]} == {None, 8}
    assert {s["backbone.readout"] for s in found[1:]} == {"mean", "gaussian"}
    assert {s["backbone.amplitude"] for s in found[1:]} == {True, False}


def test_a_logarithmic_range_has_its_median_at_the_geometric_mean_and_a_uniform_one_in_the_middle():
    found = drawn(2000, space=("optim.lr=log:1e-4:1e-2", "backbone.dropout=uniform:0:0.3"))[1:]
    logs = np.log10([s["optim.lr"] for s in found])
    dropouts = np.array([s["backbone.dropout"] for s in found])
    # Standard error of a uniform sample's mean: range / sqrt(12 n); four of them.
    assert abs(logs.mean() + 3) < 4 * 2 / math.sqrt(12 * len(found))
    assert abs(dropouts.mean() - 0.15) < 4 * 0.3 / math.sqrt(12 * len(found))


def test_settings_change_what_they_name_and_nothing_else():
    changed = with_settings(RECIPE, {"backbone.mamba.d_state": 8, "optim.lr": 0.5}).to_json()
    expected = RECIPE.to_json()
    expected["backbone"]["mamba"]["d_state"], expected["optim"]["lr"] = 8, 0.5
    assert changed == expected


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_default_space_suits_every_recipe(recipe):
    assert len(draws(parse_space(DEFAULT_SPACE, recipe), recipe, seed=0, n_trials=8)) == 8


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.rl=1,2", "the recipe has no setting 'optim.rl'; did you mean optim.lr"),
        ("lr=1,2", "the recipe has no setting 'lr'"),
        ("data.encoder=gabor,hub", "there are backbone, loss, optim"),
        ("optim.lr", "has no range"),
        ("optim.lr=", "has no range"),
        ("optim.lr=a,b", "'a' is not a number"),
        ("optim.lr=0.1,nan", "'nan' is not a number"),
        ("optim.lr=0.1,", "'' is not a number"),
        ("optim.lr=log:0.1", "'log:0.1' is no range"),
        ("optim.lr=normal:0:1", "'normal:0:1' is no range"),
        ("optim.lr=log:0.1:0.01", "0.1 must be below 0.01"),
        ("optim.lr=log:0:0.1", "starts above 0, not at 0"),
        ("optim.epochs=log:1:4", "the setting is a whole number"),
        ("optim.epochs=uniform:0:4", "optim.epochs is 0; it must be 1 at least"),
        ("optim.epochs=2.5,3", "'2.5' is not a whole number"),
        ("backbone.dropout=uniform:0:1.5", "backbone.dropout is 1.5"),
        ("backbone.width=30,64", "no multiple"),
        ("backbone.readout=uniform:0:1", "the setting is no number"),
        ("backbone.readout=mean,gauss", "'gauss' is not mean or factorised or gaussian"),
        ("backbone.streams=cls,patch", "is a list"),
    ],
    ids=lambda text: text.partition(" ")[0],
)
def test_a_wrong_setting_range_or_value_is_named(word, message):
    with pytest.raises(ValueError, match=f"^--space {word}.*{message}"):
        parse_space([word], RECIPE)


def test_settings_that_contradict_each_other_only_together_are_refused():
    with pytest.raises(ValueError, match=r"backbone\.width .* no multiple of backbone\.mamba\.headdim"):
        drawn(20, space=("backbone.width=16,128", "backbone.mamba.headdim=32,256"))


def test_a_setting_named_twice_and_an_empty_space_are_refused():
    with pytest.raises(ValueError, match=r"names optim\.lr twice"):
        parse_space(["optim.lr=1,2", "optim.lr=3,4"], RECIPE)
    with pytest.raises(ValueError, match="--space names nothing"):
        parse_space([], RECIPE)

"""The command `foundation.sweep`: its words, trials and directories; Ray Tune is in tests/cluster/test_tune.py."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from foundation import pretrain, sweep
from foundation.config import Recipe
from foundation.recipes import RECIPES, recipe_named
from foundation.sweep import NEWEST, Sweep, arguments
from foundation.tracking.runs import TrackedRun, client
from foundation.training.run import describe_run
from foundation.training.search_space import DEFAULT_SPACE, draws, parse_space, with_settings
from foundation.training.sweep_table import best_of, recipe_options, tell_outcomes
from foundation.training.sweeps import new_sweep, sweep_to_resume, sweeps_dir, trials_of
from foundation.training.trials import BEST, SCORE, Outcome, Trial, train_trial
from tests.tiny_store import make_tiny_store, tiny_recipe

SPACE = ("optim.lr=log:1e-3:1e-1", "backbone.dropout=uniform:0:0.3")


# -- words to settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_without_options_is_itself(recipe):
    assert Sweep.of(recipe).resolved() == recipe


def test_a_bare_resume_means_the_newest_sweep_and_no_recipe_the_phantom():
    assert arguments(["v4", "--resume"])[1] == ["v4", "--resume", NEWEST]
    assert arguments(["--resume", "v4"])[1] == ["--resume", NEWEST, "v4"]
    assert arguments(["v4", "--trials", "3"])[0].recipe == "v4"
    assert arguments([])[0].recipe == "phantom-tiny"


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_command_of_the_best_trial_makes_foundation_pretrain_train_that_very_recipe(recipe, monkeypatch):
    words = ("loss.roi-target=top-p", "optim.stage1-share=none,0.25", "backbone.amplitude=true,false")
    words += ("backbone.latent=none,8", "backbone.mamba.d-state=8,32")
    space = parse_space((*DEFAULT_SPACE, *words), recipe)
    base = replace(recipe, data=replace(recipe.data, store="/a store.zarr", subjects=("2", "subj07")), seed=3)
    for settings in draws(space, base, seed=0, n_trials=4):
        wanted, found = with_settings(base, settings), []
        monkeypatch.setattr(pretrain, "pretrain", lambda command, found=found: found.append(command.resolved()))
        monkeypatch.setattr(sys, "argv", ["pretrain", recipe.name, *recipe_options(wanted)])
        pretrain.main()
        assert found == [wanted]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--space optim.rl=1,2", "--space optim.rl=1,2: the recipe has no setting 'optim.rl'; did you mean optim.lr"),
        ("--space backbone.dropout=uniform:0:2", "backbone.dropout is 2.0"),
        ("--trials 0", "--trials 0 must be at least 1"),
        ("--at-once 0", "--at-once 0 must be at least 1"),
        ("--trials 9 --space optim.lr=0.1,0.2", "no more than 3 different settings"),
        ("--resume nothing", "sweep 'nothing' is not in"),
    ],
    ids=["setting", "value", "trials", "at-once", "small", "unknown"],
)
def test_what_is_wrong_is_one_line_and_nothing_is_made(words, message, home, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep", "phantom-tiny", *words.split()])
    with pytest.raises(SystemExit) as stop:
        sweep.main()
    assert stop.value.code == 1
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("\n") == 1
    assert not list(home.iterdir())


# -- what is told ----------------------------------------------------------------------------------------------------


def outcome(trial: int, best: float | None, status: str = "finished") -> Outcome:
    return Outcome(trial=trial, settings={"optim.lr": 0.1}, status=status, epochs=3, best=best, best_epoch=2)


def test_the_best_is_the_best_of_those_that_finished():
    found = [outcome(0, 0.1), outcome(1, 0.3), outcome(2, 0.4, "stopped at epoch 3"), outcome(3, None, "failed: x")]
    assert best_of(found).trial == 1
    with pytest.raises(ValueError, match="no trial has finished; trial 3 failed: x"):
        best_of(found[3:])


def test_the_table_has_the_best_first_and_the_spread_of_those_that_finished(capsys):
    tell_outcomes([outcome(0, 0.1), outcome(1, 0.3), outcome(2, 0.2, "stopped at epoch 3"), outcome(3, None, "failed")])
    told = capsys.readouterr().out
    at = [told.index(text) for text in ("0.3000", "0.2000", "0.1000", "failed")]
    assert at == sorted(at)
    assert "2 finished trials: validation r 0.1000 to 0.3000, median 0.2000, standard deviation 0.1414" in told


# -- trials ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_home(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a database."""
    home = tmp_path_factory.mktemp("sweep-home")
    shutil.copy(empty_database, home)
    return home


@pytest.fixture
def made(tiny_store: Path, shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Trial]]:
    """Make a sweep's trials."""
    monkeypatch.setenv("MANYBRAINS_HOME", str(shared_home))
    monkeypatch.setattr("foundation.training.reporter.FLUSH_S", 0.05)

    def make(store: Path = tiny_store, *, n_trials: int = 2) -> list[Trial]:
        recipe = tiny_recipe(store, epochs=3)
        directory = new_sweep(recipe)
        tracked = TrackedRun.start(directory.name, kind="sweep", config={}, tags={})
        describe_run(directory, store=str(store), tracking_run=tracked.id, tracking_uri=tracked.uri)
        trials = trials_of(directory, recipe, draws(parse_space(SPACE, recipe), recipe, seed=0, n_trials=n_trials))
        for trial in trials:
            trial.directory.mkdir()
        return trials

    return make


class Ended(Exception):
    """Stands for a kill in the middle of a trial."""


def told(trial: Trial, *, end_at: int | None = None) -> list[tuple[int, float]]:
    found: list[tuple[int, float]] = []

    def report(epoch: int, score: float) -> None:
        found.append((epoch, score))
        if epoch == end_at:
            raise Ended

    try:
        train_trial(trial, report)
    except Ended:
        assert end_at is not None
    return found


def test_a_trial_that_was_cut_off_goes_on_and_ends_with_the_scores_of_one_that_was_not(made):
    whole, cut = made()[1], made()[1]
    expected = told(whole)
    assert [epoch for epoch, _ in expected] == [1, 2, 3]
    assert told(cut, end_at=2) == expected[:2]
    assert not cut.is_trained
    assert told(cut) == expected
    assert cut.is_trained
    assert replace(cut.settle(), trial=0) == replace(whole.settle(), trial=0)


def test_a_settled_trial_tells_its_scores_again_and_trains_no_more(made):
    trial = made()[0]
    expected = told(trial, end_at=2)
    settled = trial.settle()
    assert settled.status == "stopped at epoch 2"
    assert settled.best == max(score for _, score in expected)
    assert (trial.directory / "best" / "model.safetensors").exists()
    assert not (trial.directory / "checkpoints").exists()
    assert told(trial) == expected
    assert trial.outcome() == settled


def test_a_trial_that_is_asked_to_stop_before_its_start_does_nothing(made):
    trial = made()[0]
    trial.stop.touch()
    assert told(trial) == []
    assert list(trial.directory.iterdir()) == [trial.stop]
    assert trial.outcome().status == "not started"


def test_a_trial_in_mlflow_is_a_child_with_its_settings_and_curve_and_no_test_score(made):
    trial = made()[1]
    expected = told(trial, end_at=2) + told(trial)[2:]
    outcome = trial.settle()
    mlflow = client(trial.tracking_uri)
    found = mlflow.get_run(trial.known["tracking_run"])
    assert found.data.tags["mlflow.parentRunId"] == trial.parent
    assert found.data.tags["manybrains.kind"] == "trial"
    assert found.data.tags["manybrains.status"] == "finished"
    assert found.data.params["optim.lr"] == str(trial.settings["optim.lr"]) != str(tiny_recipe(Path()).optim.lr)
    assert found.data.metrics[BEST] == pytest.approx(outcome.best)
    assert not [name for name in found.data.metrics if name.startswith("test/")]
    curve = mlflow.get_metric_history(trial.known["tracking_run"], SCORE)
    assert [point.value for point in sorted(curve, key=lambda point: point.step)] == [score for _, score in expected]
    assert found.info.status == "FINISHED"


def test_nothing_is_learnt_or_measured_from_test_images(made, tmp_path):
    make_tiny_store(tmp_path / "spoilt.zarr", spoilt=("test",))
    np.testing.assert_array_equal(told(made()[1]), told(made(tmp_path / "spoilt.zarr")[1]))


# -- sweeps as directories -------------------------------------------------------------------------------------------


@pytest.fixture
def two_trials(home: Path) -> Path:
    """A sweep with two trials, the first settled."""
    recipe = recipe_named("phantom-tiny")
    directory = new_sweep(recipe)
    described = {"recipe": json.loads(json.dumps(recipe.to_json())), "space": list(SPACE), "early_stop": True}
    describe_run(directory, created=1.0, trials=2, data_digest="d", store="a.zarr", status="interrupted", **described)
    for trial in ("trial-000", "trial-001"):
        (directory / trial).mkdir()
    (directory / "trial-000" / "result.json").touch()
    return directory


def resume(
    recipe: Recipe = RECIPES["phantom-tiny"],
    space: tuple[str, ...] = SPACE,
    data_digest: str = "d",
    *,
    early_stop: bool = True,
    name: str | None = None,
    n_trials: int | None = None,
) -> Path:
    return sweep_to_resume(recipe, space, data_digest, early_stop=early_stop, name=name, n_trials=n_trials)


def test_a_sweep_is_resumed_where_something_is_left_or_to_be_added(two_trials):
    assert resume() == resume(name=two_trials.name) == resume(n_trials=2) == two_trials
    (two_trials / "trial-001" / "result.json").touch()
    with pytest.raises(ValueError, match=r"has anything left to do; name one .*enlarge it with --trials"):
        resume()
    with pytest.raises(ValueError, match="is finished; --trials above 2 enlarges it"):
        resume(name=two_trials.name)
    assert resume(n_trials=3) == resume(n_trials=3, name=two_trials.name) == two_trials


def test_a_sweep_is_not_resumed_with_other_settings_data_or_fewer_trials(two_trials):
    name = two_trials.name
    recipe = recipe_named("phantom-tiny")
    with pytest.raises(
        ValueError, match=r"has other settings than those given: optim\.lr 0\.5 for the run's 0\.002; leave them"
    ):
        resume(replace(recipe, optim=replace(recipe.optim, lr=0.5)), name=name)
    with pytest.raises(ValueError, match=r"has other settings than those given: --space optim\.lr=log:1e-3:1e-1"):
        resume(space=SPACE[:1], name=name)
    with pytest.raises(ValueError, match="has other settings than those given: --early-stop"):
        resume(early_stop=False, name=name)
    with pytest.raises(ValueError, match=r"the data in a\.zarr have changed"):
        resume(data_digest="e", name=name)
    with pytest.raises(ValueError, match="has 2 trials; --trials 1 can only enlarge it"):
        resume(n_trials=1, name=name)
    with pytest.raises(ValueError, match="no sweep of this recipe, space and data"):
        resume(space=SPACE[:1])


def test_a_sweep_resumed_by_name_has_its_own_settings(two_trials):
    defaults, _ = arguments(["--resume", two_trials.name])
    assert defaults.space == SPACE
    assert defaults.resolved() == RECIPES["phantom-tiny"]
    assert sweeps_dir() == two_trials.parent

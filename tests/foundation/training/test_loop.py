"""Training on the tiny store: it learns, from training images alone, and interruptions leave no trace."""

import json
import math
import resource
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.preprocess import Samples, samples
from data.splits import split_of
from data.store import PooledStore
from foundation.checkpoint import StorageError, load_model
from foundation.config import ComputeConfig, Recipe
from foundation.evaluation.metrics import voxelwise_r
from foundation.training.checkpoints import checkpoints, newest_checkpoint
from foundation.training.course import train_run
from foundation.training.engine import LocalEngine
from foundation.training.run import Plan
from foundation.training.validation import predict_samples, validation_scores
from tests.tiny_store import ENCODER, N_VOXELS, make_tiny_store, tiny_recipe

N_STEPS = 20


@dataclass
class Told:
    """What a run logs; it may ask for a stop, or fail, at given steps."""

    directory: Path
    stop_at: tuple[int, ...] = ()
    die_at: tuple[int, ...] = ()
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        self.metrics[step] = dict(metrics)
        if step in self.stop_at:
            (self.directory / "stop").touch()
        if step in self.die_at:
            raise KeyboardInterrupt


def plan(recipe: Recipe, directory: Path) -> Plan:
    directory.mkdir(parents=True, exist_ok=True)
    assert recipe.data.store is not None
    return Plan(recipe=recipe, store=recipe.data.store, directory=directory, tracking_uri="", tracking_run="")


def run_once(recipe: Recipe, directory: Path, **options) -> tuple[str, Told]:
    told = Told(directory, **options)
    (directory / "stop").unlink(missing_ok=True)
    return train_run(plan(recipe, directory), LocalEngine, told), told


def result(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor], dict]:
    """Weights, best weights, optimiser and progress at the end of a run."""
    newest = newest_checkpoint(directory)
    assert newest is not None
    return (
        load_file(newest / "model.safetensors"),
        load_file(directory / "best" / "model.safetensors"),
        load_file(newest / "optimiser.safetensors"),
        json.loads((newest / "training.json").read_text())["progress"],
    )


def assert_same(one: Path, other: Path) -> None:
    *mine, my_progress = result(one)
    *theirs, their_progress = result(other)
    assert my_progress == their_progress
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="module")
def whole(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Told]:
    """An uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole")
    status, told = run_once(tiny_recipe(tiny_store), directory)
    assert status == "trained"
    return directory, told


def test_training_lowers_the_loss_and_finds_the_planted_tuning(whole):
    _, told = whole
    assert list(told.metrics) == list(range(1, N_STEPS + 1))
    loss = [told.metrics[step]["train/loss"] for step in told.metrics]
    assert np.mean(loss[-5:]) < 0.9 * np.mean(loss[:5])
    scores = [m["validation/voxel_r"] for m in told.metrics.values() if "validation/voxel_r" in m]
    assert len(scores) == 4
    assert scores[-1] > max(0.1, scores[0])


def test_what_is_logged_adds_up_to_the_objective(whole, tiny_store):
    weights = tiny_recipe(tiny_store).loss
    for m in whole[1].metrics.values():
        total = m["train/voxel"] + weights.roi * m["train/roi"] + weights.pearson * m["train/pearson"]
        assert m["train/loss"] == pytest.approx(total + weights.kl * m["train/kl"], rel=1e-4)


def test_checkpoints_are_left_as_often_as_asked_and_the_newest_are_kept(whole):
    directory, _ = whole
    assert [path.name for path in checkpoints(directory)] == ["step-0000018", "step-0000020"]
    assert {path.name for path in directory.iterdir()} == {"start", "best", "checkpoints"}
    assert {path.name for path in (directory / "checkpoints").iterdir()} == {"step-0000018", "step-0000020"}


def test_the_best_model_is_the_one_with_the_best_validation_score(whole, tiny_store):
    directory, told = whole
    scores = {step: m["validation/voxel_r"] for step, m in told.metrics.items() if "validation/voxel_r" in m}
    progress = result(directory)[-1]
    assert progress["best_score"] == max(scores.values())
    assert scores[progress["best_step"]] == progress["best_score"]
    model, made_from = load_model(directory / "best")
    assert made_from["step"] == progress["best_step"]
    store = PooledStore.open(tiny_store)
    found = [
        np.nan_to_num(voxelwise_r(predict_samples(model, store.tokens(ENCODER), held_out), held_out.responses)).mean()
        for held_out in (samples(store.subject(name), split_of(store), "validation") for name in N_VOXELS)
    ]
    assert np.mean(found) == pytest.approx(progress["best_score"], abs=1e-6)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(whole, tiny_store, tmp_path):
    run_once(tiny_recipe(tiny_store), tmp_path / "again")
    assert_same(whole[0], tmp_path / "again")
    run_once(tiny_recipe(tiny_store, seed=1), tmp_path / "other")
    with pytest.raises(AssertionError):
        assert_same(whole[0], tmp_path / "other")


@pytest.mark.parametrize(
    "stops", [(3,), (5, 6, 19), *np.random.default_rng(0).integers(1, N_STEPS, (2, 2)).tolist()], ids=str
)
def test_stopped_and_resumed_equals_uninterrupted(whole, tiny_store, tmp_path, stops):
    recipe = tiny_recipe(tiny_store)
    for step in sorted(set(stops)):
        status, told = run_once(recipe, tmp_path, stop_at=(step,))
        assert status == "interrupted"
        assert max(told.metrics) == step
        newest = newest_checkpoint(tmp_path)
        assert newest is not None
        assert newest.name == f"step-{step:07d}"
    status, told = run_once(recipe, tmp_path)
    assert status == "trained"
    assert min(told.metrics) == max(stops) + 1
    assert_same(whole[0], tmp_path)
    assert all(path.name.startswith("step-") for path in (tmp_path / "checkpoints").iterdir())


def test_stages_one_after_the_other_are_resumed_as_they_would_have_gone_on(tiny_store, tmp_path):
    recipe = tiny_recipe(tiny_store)
    recipe = replace(recipe, optim=replace(recipe.optim, stage1_share=0.5))
    run_once(recipe, tmp_path / "whole")
    for step in (8, 13):
        run_once(recipe, tmp_path / "resumed", stop_at=(step,))
    run_once(recipe, tmp_path / "resumed")
    assert_same(tmp_path / "whole", tmp_path / "resumed")


def test_losses_of_one_stage_say_nothing_of_the_next_ones(tiny_store, tmp_path):
    recipe = tiny_recipe(tiny_store, epochs=8)
    recipe = replace(recipe, loss=replace(recipe.loss, pearson=0.0, roi=1e-3))  # Stage 2's is a thousand times higher
    recipe = replace(recipe, optim=replace(recipe.optim, stage1_share=0.5))
    lines = []
    assert train_run(plan(recipe, tmp_path), LocalEngine, Told(tmp_path), tell=lines.append) == "trained"
    assert lines == []


def test_all_checkpoints_damaged_the_run_begins_anew_and_keeps_what_it_then_writes(whole, tiny_store, tmp_path):
    recipe = tiny_recipe(tiny_store, keep_checkpoints=1)
    run_once(recipe, tmp_path, stop_at=(9,))
    for path in checkpoints(tmp_path):
        (path / "model.safetensors").unlink()
    run_once(recipe, tmp_path, stop_at=(4,))
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "step-0000004"
    run_once(recipe, tmp_path)
    assert_same(whole[0], tmp_path)


def test_a_best_model_of_after_the_checkpoint_is_not_taken_for_that_of_before(whole, tiny_store, tmp_path):
    recipe = tiny_recipe(tiny_store, checkpoint_every=7)
    told = Told(tmp_path, die_at=(13,))  # the best so far is of step 10, the newest checkpoint of step 7
    with pytest.raises(KeyboardInterrupt):
        train_run(plan(recipe, tmp_path), LocalEngine, told)
    made_from = json.loads((tmp_path / "best" / "model.json").read_text())
    made_from["made_from"]["validation_voxel_r"] = 2.0  # as if those steps had gone another way
    (tmp_path / "best" / "model.json").write_text(json.dumps(made_from))
    run_once(recipe, tmp_path)
    progress = result(tmp_path)[-1]
    assert load_model(tmp_path / "best")[1]["step"] == progress["best_step"]
    torch.testing.assert_close(result(tmp_path)[1], result(whole[0])[1], rtol=0, atol=0, equal_nan=True)


def test_a_disk_that_fills_up_while_training_stops_it_with_the_step_to_go_on_from(whole, tiny_store, tmp_path):
    recipe = tiny_recipe(tiny_store)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Filling(Told):
        def __call__(self, metrics, step):
            super().__call__(metrics, step)
            if step == 8:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # the kernel refuses, as on a full disk

    try:
        with pytest.raises(StorageError, match=r"step 9 can't be written .*; the newest whole one is step-0000006"):
            train_run(plan(recipe, tmp_path), LocalEngine, Filling(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run_once(recipe, tmp_path)
    assert_same(whole[0], tmp_path)


@pytest.mark.slow
def test_a_hundred_runs_interrupted_at_random_are_all_the_uninterrupted_one(whole, tiny_store, tmp_path):
    """Up to three times each, by a stop, which leaves a checkpoint, or by what leaves none."""
    rng = np.random.default_rng(20261126)
    recipe = tiny_recipe(tiny_store)
    for number in range(100):
        directory = tmp_path / str(number)
        shutil.copytree(whole[0] / "start", directory / "start")  # which takes longer to solve than the run to train
        for step in np.sort(rng.choice(np.arange(1, N_STEPS), rng.integers(1, 4), replace=False)).tolist():
            if rng.random() < 0.5:
                assert run_once(recipe, directory, stop_at=(step,))[0] == "interrupted"
            else:
                with pytest.raises(KeyboardInterrupt):
                    run_once(recipe, directory, die_at=(step,))
        assert run_once(recipe, directory)[0] == "trained"
        assert_same(whole[0], directory)
        shutil.rmtree(directory)


@pytest.mark.parametrize("step", [2, 11])
def test_killed_and_resumed_from_an_older_checkpoint_equals_uninterrupted(whole, tiny_store, tmp_path, step):
    with pytest.raises(KeyboardInterrupt):
        run_once(tiny_recipe(tiny_store), tmp_path, die_at=(step,))
    status, told = run_once(tiny_recipe(tiny_store), tmp_path)
    assert status == "trained"
    assert min(told.metrics) == 3 * ((step - 1) // 3) + 1  # checkpoints are every 3 steps, after the log
    assert_same(whole[0], tmp_path)


def test_a_damaged_newest_checkpoint_is_passed_over_and_written_anew(whole, tiny_store, tmp_path):
    recipe = tiny_recipe(tiny_store)
    run_once(recipe, tmp_path, stop_at=(9,))
    damaged = newest_checkpoint(tmp_path)
    assert damaged is not None
    (damaged / "model.safetensors").write_bytes(b"")
    run_once(recipe, tmp_path, stop_at=(9,))
    assert newest_checkpoint(tmp_path) == damaged
    run_once(recipe, tmp_path)
    assert_same(whole[0], tmp_path)


def test_resuming_a_finished_run_trains_no_further(whole, tiny_store):
    before = result(whole[0])[-1]
    status, told = run_once(tiny_recipe(tiny_store), whole[0])
    assert status == "trained"
    assert told.metrics == {}
    assert result(whole[0])[-1] == before


def test_a_stop_before_the_first_step_leaves_a_checkpoint_to_go_on_from(whole, tiny_store, tmp_path):
    recipe, told = tiny_recipe(tiny_store), Told(tmp_path)
    (tmp_path / "stop").touch()
    assert train_run(plan(recipe, tmp_path), LocalEngine, told) == "interrupted"
    assert told.metrics == {}
    run_once(recipe, tmp_path)
    assert_same(whole[0], tmp_path)


class Spoiling(LocalEngine):
    """An engine whose loss comes out wrong in some of its steps."""

    factor = math.nan
    at: tuple[int, ...] = ()
    calls = 0

    def forward(self, batch, *, stage=None):
        losses = super().forward(batch, stage=stage)
        type(self).calls += 1
        return replace(losses, total=losses.total * (self.factor if self.calls in self.at else 1.0))


def spoiling(factor: float, *at: int) -> type[Spoiling]:
    return type("Spoilt", (Spoiling,), {"factor": factor, "at": at})


@pytest.mark.parametrize(
    ("factor", "said"),
    [(math.nan, "the loss is nan"), (math.inf, "the loss is inf"), (50.0, "more than 10 times the usual")],
)
def test_a_bad_step_is_skipped_and_said_so_and_the_run_goes_on(whole, tiny_store, tmp_path, factor, said):
    told, lines = Told(tmp_path), []
    made = plan(tiny_recipe(tiny_store), tmp_path)
    assert train_run(made, spoiling(factor, 18), told, tell=lines.append) == "trained"
    (line,) = lines
    assert line.startswith("step 17 is skipped: ")
    assert said in line
    assert [m.get("train/skipped") for m in told.metrics.values()] == [None] * 17 + [1] * 3
    expected = whole[1].metrics
    assert all(told.metrics[step]["train/loss"] == expected[step]["train/loss"] for step in range(1, 18))
    assert told.metrics[19]["train/loss"] != expected[19]["train/loss"]  # a step fewer was taken
    weights = load_file(tmp_path / "checkpoints" / "step-0000018" / "model.safetensors")
    assert all(w.isfinite().all() for name, w in weights.items() if not name.endswith("noise_sd"))


def test_a_skipped_step_moves_nothing(tiny_store, tmp_path):
    recipe = tiny_recipe(tiny_store, epochs=1, checkpoint_every=1, keep_checkpoints=5)
    made = plan(recipe, tmp_path)
    train_run(made, spoiling(math.nan, 4), Told(tmp_path))
    before, after = (tmp_path / "checkpoints" / f"step-000000{step}" for step in (3, 4))
    for name in ("model.safetensors", "optimiser.safetensors"):
        torch.testing.assert_close(load_file(before / name), load_file(after / name), rtol=0, atol=0, equal_nan=True)


def test_by_policy_the_first_bad_step_stops_the_run_and_names_checkpoint_and_remedy(tiny_store, tmp_path):
    recipe = tiny_recipe(tiny_store)
    recipe = replace(recipe, optim=replace(recipe.optim, bad_step="stop"))
    with pytest.raises(ValueError, match=r"step 7: the loss is nan; .*--optim.lr below 0.01, .*step-0000006"):
        train_run(plan(recipe, tmp_path), spoiling(math.nan, 8), Told(tmp_path))


def test_ten_bad_steps_in_a_row_stop_the_run(tiny_store, tmp_path):
    lines = []
    with pytest.raises(ValueError, match=r"step 10: the loss is nan, the 10th bad step in a row; .*step-0000009"):
        train_run(
            plan(tiny_recipe(tiny_store), tmp_path),
            spoiling(math.nan, *range(2, 30)),
            Told(tmp_path),
            tell=lines.append,
        )
    assert len(lines) == 9


def test_a_run_resumed_after_a_skipped_step_equals_one_that_was_not_stopped(tiny_store, tmp_path):
    recipe = tiny_recipe(tiny_store)
    train_run(plan(recipe, tmp_path / "whole"), spoiling(math.nan, 4), Told(tmp_path / "whole"))
    told = Told(tmp_path / "resumed", stop_at=(9,))
    train_run(plan(recipe, tmp_path / "resumed"), spoiling(math.nan, 4), told)
    run_once(recipe, tmp_path / "resumed")
    assert_same(tmp_path / "whole", tmp_path / "resumed")


def test_training_stops_when_validation_has_not_improved_for_as_long_as_it_is_waited_for(tiny_store, tmp_path):
    recipe = tiny_recipe(tiny_store, epochs=9)
    recipe = replace(recipe, optim=replace(recipe.optim, lr=1e-12, patience=2))  # scores hardly move
    status, _ = run_once(recipe, tmp_path / "whole")
    assert status == "trained"
    progress = result(tmp_path / "whole")[-1]
    assert progress["step"] == progress["best_step"] + 10 < 45
    run_once(recipe, tmp_path / "resumed", stop_at=(progress["step"] - 3,))
    run_once(recipe, tmp_path / "resumed")
    assert_same(tmp_path / "whole", tmp_path / "resumed")


def test_a_step_in_parts_is_the_step_of_as_many_workers_rows_and_all_but_the_step_as_a_whole(
    whole, tiny_store, tmp_path
):
    recipe = tiny_recipe(tiny_store)
    recipe = replace(recipe, backbone=replace(recipe.backbone, dropout=0.0, latent=None))
    told = []
    for parts in (1, 2):
        made = plan(recipe, tmp_path / str(parts))
        told.append(Told(made.directory))
        train_run(made, lambda model, of, n=parts: LocalEngine(model, of, ComputeConfig(accumulate=n)), told[-1])
    losses = [[m["train/loss"] for m in of.metrics.values()] for of in told]
    # The objective is a mean over images but for InfoNCE, which is off: parts change the order of sums alone.
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-5)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("part", ["validation", "test"])
def test_no_gradient_step_sees_a_validation_or_test_response(tiny_store, whole, tmp_path, part):
    make_tiny_store(tmp_path / "spoilt.zarr", spoilt=(part,))
    spoilt = PooledStore.open(tmp_path / "spoilt.zarr")
    assert np.abs(spoilt.subject("subj01").responses()).max() > 1e5
    run_once(tiny_recipe(tmp_path / "spoilt.zarr"), tmp_path / "run")
    weights, best, optimiser, progress = result(tmp_path / "run")
    expected_weights, expected_best, expected_optimiser, expected_progress = result(whole[0])
    found, expected = (weights, optimiser), (expected_weights, expected_optimiser)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    if part == "test":  # test responses don't pick the best model either; validation responses do
        assert progress == expected_progress
        torch.testing.assert_close(best, expected_best, rtol=0, atol=0, equal_nan=True)
    else:
        assert progress["best_score"] != expected_progress["best_score"]


def poisoned(validation: dict[str, Samples], change: Callable[[Samples], Samples]) -> dict[str, Samples]:
    return {name: change(s) for name, s in validation.items()}


def test_validation_scores_are_of_the_validation_images_and_leave_the_model_training(whole, tiny_store):
    model, _ = load_model(whole[0] / "best")
    store = PooledStore.open(tiny_store)
    split = split_of(store)
    tokens = store.tokens(ENCODER)
    validation = {name: samples(store.subject(name), split, "validation") for name in N_VOXELS}
    model.train()
    scores = validation_scores(model, tokens, validation)
    assert model.training
    assert scores.keys() == {"validation/voxel_r", *(f"validation/voxel_r/{name}" for name in N_VOXELS)}
    assert scores["validation/voxel_r"] == np.mean([scores[f"validation/voxel_r/{name}"] for name in N_VOXELS])
    backwards = poisoned(validation, lambda s: replace(s, responses=-s.responses))
    turned = validation_scores(model, tokens, backwards)["validation/voxel_r"]
    assert turned == pytest.approx(-scores["validation/voxel_r"], abs=1e-6)

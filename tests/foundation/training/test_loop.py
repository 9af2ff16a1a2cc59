"""Training on the tiny store: it learns, from training images alone."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.preprocess import Samples, samples
from data.splits import split_of
from data.store import PooledStore
from foundation.checkpoint import load_model
from foundation.config import ComputeConfig
from foundation.evaluation.metrics import voxelwise_r
from foundation.training.checkpoints import checkpoints
from foundation.training.course import train_run
from foundation.training.engine import LocalEngine
from foundation.training.validation import predict_samples, validation_scores
from tests.tiny_runs import N_STEPS, Told, assert_same, plan, result, run_once
from tests.tiny_store import ENCODER, N_VOXELS, make_tiny_store, tiny_recipe


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

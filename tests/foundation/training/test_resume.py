"""Interruptions leave no trace: what is stopped, killed or damaged ends as the run that nothing happened to."""

import json
import resource
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from foundation.checkpoint import StorageError, load_model
from foundation.training.checkpoints import checkpoints, newest_checkpoint
from foundation.training.course import train_run
from foundation.training.engine import LocalEngine
from tests.tiny_runs import N_STEPS, Told, assert_same, plan, result, run_once
from tests.tiny_store import tiny_recipe


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

"""What makes a step bad, and what is done about it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from foundation.config import OptimConfig
from foundation.training.bad_steps import FEWEST, refuse, what_is_bad
from foundation.training.course import train_run
from foundation.training.engine import LocalEngine
from tests.tiny_runs import Told, assert_same, plan, run_once
from tests.tiny_store import tiny_recipe


def never() -> Path | None:
    raise AssertionError("looked for a checkpoint")


USUAL = [1.0, 1.2, 0.9, 1.1] * 5


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_bad_from_the_first_step(loss):
    assert what_is_bad(loss, [], OptimConfig()) == f"the loss is {loss}"


def test_a_loss_has_exploded_above_a_multiple_of_the_usual_one_once_that_is_known():
    assert what_is_bad(10.4, USUAL, OptimConfig()) is None
    assert what_is_bad(10.6, USUAL, OptimConfig()) == "the loss is 10.6, more than 10 times the usual 1.05"
    assert what_is_bad(10.6, USUAL, OptimConfig(explosion=None)) is None
    assert what_is_bad(3.2, USUAL, OptimConfig(explosion=3.0)) is not None
    assert what_is_bad(1e9, USUAL[: FEWEST - 1], OptimConfig()) is None


def test_a_policy_to_stop_refuses_the_first_and_a_policy_to_skip_the_tenth_in_a_row():
    refuse("bad", 5, 9, OptimConfig(), newest=never)
    for n, policy, said in (
        (1, "stop", "step 5: bad; start .*step-0000003"),
        (10, "skip", "the 10th bad step in a row"),
    ):
        with pytest.raises(ValueError, match=said):
            refuse("bad", 5, n, OptimConfig(bad_step=policy), newest=lambda: Path("step-0000003"))


def test_losses_of_one_stage_say_nothing_of_the_next_ones(tiny_store, tmp_path):
    recipe = tiny_recipe(tiny_store, epochs=8)
    recipe = replace(recipe, loss=replace(recipe.loss, pearson=0.0, roi=1e-3))  # Stage 2's is a thousand times higher
    recipe = replace(recipe, optim=replace(recipe.optim, stage1_share=0.5))
    lines = []
    assert train_run(plan(recipe, tmp_path), LocalEngine, Told(tmp_path), tell=lines.append) == "trained"
    assert lines == []


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

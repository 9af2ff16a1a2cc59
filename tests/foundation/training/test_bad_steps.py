"""What makes a step bad, and what is done about it."""

import math
from pathlib import Path

import pytest

from foundation.config import OptimConfig
from foundation.training.bad_steps import FEWEST, refuse, what_is_bad


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

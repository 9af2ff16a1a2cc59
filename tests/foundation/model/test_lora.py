"""Low-rank updates: which weights they touch, their equation, and their size."""

import pytest
import torch

from foundation.model.lora import LowRankUpdate
from foundation.model.mamba import MambaStack
from tests.tiny_store import TINY_BACKBONE


@pytest.fixture
def stack() -> MambaStack:
    torch.manual_seed(0)
    return MambaStack(8, 2, TINY_BACKBONE.mamba)


def test_an_updated_weight_is_the_frozen_one_plus_up_times_down(stack):
    update = LowRankUpdate(stack, 3)
    for up in update.up.values():
        torch.nn.init.normal_(up)
    for name, weight in update.updated(stack).items():
        key = name.replace(".", "-")
        torch.testing.assert_close(weight, stack.get_parameter(name) + update.up[key] @ update.down[key])
        assert torch.linalg.matrix_rank(weight - stack.get_parameter(name), rtol=1e-3) == 3


def test_the_projections_of_every_block_are_updated_and_nothing_else(stack):
    expected = {f"mixers.{i}.{kind}_proj.weight" for i in (0, 1) for kind in ("in", "out")}
    assert LowRankUpdate(stack, 1).updated(stack).keys() == expected


def test_an_update_changes_nothing_at_first_but_can_learn(stack):
    update = LowRankUpdate(stack, 2)
    weights = update.updated(stack)
    for name, weight in weights.items():
        assert torch.equal(weight, stack.get_parameter(name))
    sum(weight.sum() for weight in weights.values()).backward()
    assert all(up.grad.any() for up in update.up.values())


@pytest.mark.parametrize("rank", [1, 4])
def test_a_rank_costs_one_row_and_one_column_of_each_projection(stack, rank):
    update = LowRankUpdate(stack, rank)
    sides = sum(sum(stack.get_parameter(name).shape) for name in update.updated(stack))
    assert sum(parameter.numel() for parameter in update.parameters()) == rank * sides
    assert update.rank == rank


def test_a_rank_below_one_is_an_error(stack):
    with pytest.raises(ValueError, match="rank 1 at least, got 0"):
        LowRankUpdate(stack, 0)

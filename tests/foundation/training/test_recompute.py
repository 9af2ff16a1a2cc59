"""Recomputed activations: the same training, for less memory."""

import copy

import pytest
import torch
from torch import nn

from foundation.config import LossConfig, MambaConfig
from foundation.model.mamba import MambaStack
from foundation.training.recompute import recompute_blocks
from foundation.training.step import TrainingStep
from tests.cluster.zero_ranks import make_batch, make_model


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("early_stop", [True, False])
def test_losses_and_gradients_are_the_same_bit_for_bit(early_stop):
    plain = make_model()
    recomputed = copy.deepcopy(plain)
    recompute_blocks(recomputed, early_stop=early_stop)
    totals = []
    for model in (plain, recomputed):
        torch.manual_seed(3)
        total, _ = TrainingStep(model, LossConfig()).train()(make_batch(1, 1), None)
        total.backward()
        totals.append(total.detach())
    assert torch.equal(*totals)
    ours, theirs = gradients(plain), gradients(recomputed)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert torch.equal(gradient, theirs[name]), name


def test_names_of_parameters_stay():
    model = make_model()
    names = list(model.state_dict())
    recompute_blocks(model)
    assert list(model.state_dict()) == names


def kept_bytes(stack: MambaStack, tokens: torch.Tensor) -> int:
    """Return the bytes that autograd keeps for the backward pass, parameters left out."""
    storages = {}
    own = {parameter.data_ptr() for parameter in stack.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = stack(tokens)
    result.sum().backward()
    return sum(size for size, _ in storages.values())


def test_a_stack_of_blocks_keeps_a_fraction_of_its_activations():
    torch.manual_seed(0)
    stack = MambaStack(32, 4, MambaConfig(d_state=8, headdim=16))
    tokens = torch.randn(4, 64, 32, requires_grad=True)
    everything = kept_bytes(stack, tokens)
    recompute_blocks(stack)
    assert kept_bytes(stack, tokens) < 0.2 * everything

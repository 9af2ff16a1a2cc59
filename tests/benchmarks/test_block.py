"""One Mamba-2 block, forward and backward on the CPU: ours beside `transformers`' of the same sizes."""

import pytest
import torch
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from foundation.config import MambaConfig
from foundation.model.mamba import Mamba2

BATCH, LENGTH, WIDTH = 16, 64, 128


def ours() -> torch.nn.Module:
    return Mamba2(WIDTH, MambaConfig())


def theirs() -> torch.nn.Module:
    config = Mamba2Config(
        hidden_size=WIDTH, state_size=16, expand=2, head_dim=32, num_heads=8, n_groups=1, conv_kernel=4, chunk_size=64
    )
    return Mamba2Mixer(config, layer_idx=0)


@pytest.mark.parametrize("make", [ours, theirs])
@pytest.mark.benchmark(group=f"mamba-2 block, batch {BATCH}, length {LENGTH}, width {WIDTH}")
def test_a_block_forward_and_backward(benchmark, make):
    torch.manual_seed(0)
    block = make()
    tokens = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)

    def step() -> torch.Tensor:
        out = block(tokens)
        out.sum().backward()
        return out

    assert benchmark(step).shape == tokens.shape

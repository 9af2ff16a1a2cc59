"""The Mamba-2 block against the one of `transformers`, and padding, orders and errors."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from foundation.config import MambaConfig
from foundation.model.dual_stream import scan_order
from foundation.model.mamba import Mamba2, MambaStack

CONFIG = MambaConfig(d_state=6, d_conv=4, expand=2, headdim=8, chunk_size=4)
WIDTH = 16


def block(*, width: int = WIDTH, config: MambaConfig = CONFIG, seed: int = 0) -> Mamba2:
    torch.manual_seed(seed)
    mixer = Mamba2(width, config)
    with torch.no_grad():  # values that differ, so that no mix-up of two of them goes unseen
        mixer.D.normal_()
        mixer.norm.weight.normal_(1, 0.3)
        mixer.conv1d.bias.normal_()
    return mixer


@pytest.fixture
def twins() -> tuple[Mamba2, torch.nn.Module]:
    """Our block and the one of `transformers`, with the same weights by the same names."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    inner = CONFIG.expand * WIDTH
    theirs = Mamba2Mixer(
        Mamba2Config(
            hidden_size=WIDTH,
            state_size=CONFIG.d_state,
            conv_kernel=CONFIG.d_conv,
            expand=CONFIG.expand,
            head_dim=CONFIG.headdim,
            num_heads=inner // CONFIG.headdim,
            n_groups=1,
            chunk_size=CONFIG.chunk_size,
            use_bias=False,
            use_conv_bias=True,
            layer_norm_epsilon=1e-5,
            num_hidden_layers=1,
        ),
        layer_idx=0,
    )
    ours = block()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("length", [1, 3, 4, 11])
def test_a_block_has_the_values_and_gradients_of_the_one_of_transformers(twins, length):
    results = []
    tokens = torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(1))
    for mixer in twins:
        fed = tokens.clone().requires_grad_()
        out = mixer(fed)
        leaves = {"tokens": fed, **dict(mixer.named_parameters())}
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        gradients = torch.autograd.grad((out * weights).sum(), list(leaves.values()))
        results.append({"out": out, **dict(zip(leaves, gradients, strict=True))})
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@settings(max_examples=10, deadline=None)
@given(padding=st.integers(1, 9), length=st.integers(1, 7), seed=st.integers(0, 99))
def test_padding_on_the_left_leaves_the_outputs_of_real_tokens_as_they_are(padding, length, seed):
    torch.manual_seed(seed)
    stack = MambaStack(WIDTH, 3, CONFIG).double()
    tokens = torch.randn(2, length, WIDTH, dtype=torch.float64)
    padded = F.pad(tokens, (0, 0, padding, 0))
    real = torch.arange(length + padding).expand(2, -1) >= padding
    out = stack(padded, real=real)
    torch.testing.assert_close(out[:, padding:], stack(tokens), rtol=1e-10, atol=1e-10)
    assert (out[:, :padding] == 0).all()


def test_a_block_is_causal():
    mixer = block()
    tokens = torch.randn(1, 9, WIDTH)
    changed = tokens.clone()
    changed[:, 5] += 1
    torch.testing.assert_close(mixer(tokens)[:, :5], mixer(changed)[:, :5], rtol=1e-5, atol=1e-6)
    assert (mixer(tokens)[:, 5:] - mixer(changed)[:, 5:]).abs().amax(-1).gt(1e-6).all()


def test_the_chunk_size_changes_no_number():
    tokens = torch.randn(2, 13, WIDTH)
    outs = [block(config=replace(CONFIG, chunk_size=size))(tokens) for size in (1, 5, 64)]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["raster", "reversed", "column", "column-reversed"])
def test_a_scan_order_visits_every_place_once(order):
    path = scan_order(order, 5)
    assert sorted(path.tolist()) == list(range(25))


def test_scan_orders_go_where_their_names_say():
    assert scan_order("raster", 2).tolist() == [0, 1, 2, 3]
    assert scan_order("reversed", 2).tolist() == [3, 2, 1, 0]
    assert scan_order("column", 2).tolist() == [0, 2, 1, 3]
    assert scan_order("column-reversed", 2).tolist() == [3, 1, 2, 0]


def test_a_reversed_stack_is_a_flip_of_the_stack_on_flipped_tokens():
    torch.manual_seed(0)
    stack = MambaStack(WIDTH, 2, CONFIG)
    tokens = torch.randn(2, 9, WIDTH)
    backwards = scan_order("reversed", 3)[None]
    torch.testing.assert_close(stack(tokens, orders=backwards), stack(tokens.flip(1)).flip(1))


def test_blocks_take_the_orders_in_turn():
    torch.manual_seed(0)
    stack = MambaStack(WIDTH, 3, CONFIG)
    tokens = torch.randn(2, 9, WIDTH)
    orders = torch.stack([scan_order("raster", 3), scan_order("column-reversed", 3)])
    expected = tokens
    for i, order in enumerate([orders[0], orders[1], orders[0]]):
        mixed = torch.empty_like(tokens)
        mixed[:, order] = stack.mixers[i](stack.norms[i](expected)[:, order])
        expected = expected + mixed
    torch.testing.assert_close(stack(tokens, orders=orders), stack.last_norm(expected))


def test_with_both_directions_every_token_hears_of_every_other():
    torch.manual_seed(0)
    stack = MambaStack(WIDTH, 2, CONFIG)
    orders = torch.stack([scan_order("raster", 3), scan_order("reversed", 3)])
    tokens = torch.randn(1, 9, WIDTH, requires_grad=True)
    for at in (0, 4, 8):
        (heard,) = torch.autograd.grad(stack(tokens, orders=orders)[0, at].sum(), tokens)
        assert (heard[0].abs().sum(-1) > 0).all()


def test_a_width_that_heads_do_not_divide_is_an_error_with_the_numbers():
    with pytest.raises(ValueError, match=r"expand x width = 20 is not a multiple of headdim 8"):
        Mamba2(10, CONFIG)

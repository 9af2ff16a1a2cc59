"""The Mamba-2 block against the one of `transformers`, and padding, orders and errors."""

from collections.abc import Iterator
from dataclasses import replace

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from foundation.config import MambaConfig
from foundation.model.dual_stream import scan_order
from foundation.model.mamba import Mamba2, MambaStack, causal_conv

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


def test_the_convolution_has_the_values_and_gradients_of_torchs():
    given = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    conv = torch.nn.Conv1d(5, 5, 4, groups=5, padding=3).double()
    results = []
    for out in (causal_conv(given, conv.weight, conv.bias), conv(given.mT)[..., :9].mT):
        results.append([out, *torch.autograd.grad(out.square().sum(), [given, conv.weight, conv.bias])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


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


def test_a_checkpoint_passes_between_backends():
    reference = block(config=replace(CONFIG, backend="reference"), seed=1)
    chunked = block(config=replace(CONFIG, backend="chunked"), seed=2)
    chunked.load_state_dict(reference.state_dict())
    tokens = torch.randn(2, 13, WIDTH)
    torch.testing.assert_close(chunked(tokens), reference(tokens), rtol=1e-4, atol=1e-5)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Shapes aren't checked: torch.compile can't trace the checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile warns of its own code
def test_a_compiled_stack_has_the_values_and_gradients_of_the_stack(unchecked):
    torch.manual_seed(0)
    stack = MambaStack(WIDTH, 1, CONFIG)
    tokens = torch.randn(2, 10, WIDTH)
    real = torch.arange(10).expand(2, -1) >= torch.tensor([[0], [3]])
    results = []
    for run in (stack, torch.compile(stack, fullgraph=True)):
        out = run(tokens * real[..., None], real=real)
        results.append([out, *torch.autograd.grad(out.square().mean(), list(stack.parameters()))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n_padding", [0, 4])
def test_a_bidirectional_block_turned_around_gives_the_same_turned_around(n_padding):
    torch.manual_seed(0)
    stack = MambaStack(WIDTH, 2, CONFIG, bidirectional=True).double()
    real = (torch.arange(9) >= n_padding).expand(2, -1)
    tokens = torch.randn(2, 9, WIDTH, dtype=torch.float64) * real[..., None]
    out = stack(tokens, real=real)
    torch.testing.assert_close(stack(tokens.flip(1), real=real.flip(1)).flip(1), out, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out[:, n_padding:], stack(tokens[:, n_padding:]), rtol=1e-10, atol=1e-10)
    assert (out[:, :n_padding] == 0).all()


def test_in_a_bidirectional_block_every_token_hears_of_every_other():
    torch.manual_seed(0)
    stack = MambaStack(WIDTH, 1, CONFIG, bidirectional=True)
    tokens = torch.randn(1, 9, WIDTH, requires_grad=True)
    (heard,) = torch.autograd.grad(stack(tokens)[0, 4].sum(), tokens)
    assert (heard[0].abs().sum(-1) > 0).all()


def test_padding_and_an_order_go_together():
    torch.manual_seed(0)
    stack = MambaStack(WIDTH, 1, CONFIG).double()
    order = scan_order("column", 3)
    real = torch.ones(1, 9, dtype=torch.bool)
    real[0, order[:2]] = False  # first on the path
    tokens = torch.randn(1, 9, WIDTH, dtype=torch.float64) * real[..., None]
    out = stack(tokens, real=real, orders=order[None])
    torch.testing.assert_close(out[:, order[2:]], stack(tokens[:, order[2:]]), rtol=1e-10, atol=1e-10)


def dropping(drop_path: float, *, n_layer: int = 2) -> MambaStack:
    torch.manual_seed(0)
    return MambaStack(WIDTH, n_layer, CONFIG, drop_path=drop_path)


def test_stochastic_depth_leaves_whole_branches_out_image_by_image_and_scales_up_the_others():
    stack = dropping(0.5, n_layer=1).train()
    tokens = torch.randn(64, 5, WIDTH)
    branch = stack.mixers[0](stack.norms[0](tokens))
    torch.manual_seed(1)
    out = stack(tokens)
    without, with_branch = stack.last_norm(tokens), stack.last_norm(tokens + 2 * branch)
    left_out = (out - without).abs().amax((1, 2)) < 1e-5
    kept = (out - with_branch).abs().amax((1, 2)) < 1e-5
    assert (left_out ^ kept).all()
    assert 16 < left_out.sum() < 48


def test_stochastic_depth_rises_linearly_over_the_blocks_and_counts_in_training_only():
    assert dropping(0.4, n_layer=4).drop_rates == pytest.approx([0.1, 0.2, 0.3, 0.4])
    tokens = torch.randn(8, 5, WIDTH)
    torch.testing.assert_close(dropping(0.9).eval()(tokens), dropping(0.0).eval()(tokens), rtol=0, atol=0)
    torch.testing.assert_close(dropping(0.0).train()(tokens), dropping(0.0).eval()(tokens), rtol=0, atol=0)

"""What is measured beside our Mamba-2 block: others of its width, its own matrix products, and its pieces."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.config import MambaConfig
from foundation.model.mamba import Mamba2, causal_conv
from foundation.model.scan import selective_scan

Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of a block's input, and how the block's own functions are compiled."""

    batch: int = 16
    length: int = 256
    width: int = 192
    compiler: str = "inductor"

    def compiled(self, function: Callable) -> Callable:
        """Return `function` compiled for this size: code for any length is 2 to 4 times slower here."""
        return torch.compile(function, backend=self.compiler, dynamic=False)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, self.length, *shape, requires_grad=True)


def forward_and_backward(function: Callable[..., Tensor], *inputs: Tensor) -> Step:
    """Return one training step's worth of work: the outputs, and gradients of the inputs and the parameters."""
    leaves = [*inputs, *(function.parameters() if isinstance(function, nn.Module) else ())]
    weights = torch.randn_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), leaves, weights)


# -- whole blocks ------------------------------------------------------------------------------------------------------


def ours(size: Size) -> Step:
    return forward_and_backward(Mamba2(size.width, MambaConfig()), size.normal(size.width))


def ours_compiled(size: Size) -> Step:
    return forward_and_backward(size.compiled(Mamba2(size.width, MambaConfig())), size.normal(size.width))


def transformers_of_chunks(chunk_size: int) -> Callable[[Size], Step]:
    """Return the maker of the block of `transformers`, on its path in plain PyTorch."""

    def make(size: Size) -> Step:
        from transformers import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        ours = MambaConfig()
        config = Mamba2Config(
            hidden_size=size.width,
            state_size=ours.d_state,
            expand=ours.expand,
            head_dim=ours.headdim,
            num_heads=ours.expand * size.width // ours.headdim,
            n_groups=1,
            conv_kernel=ours.d_conv,
            chunk_size=chunk_size,
        )
        return forward_and_backward(Mamba2Mixer(config, layer_idx=0), size.normal(size.width))

    return make


class Attention(nn.Module):
    """Causal self-attention by `scaled_dot_product_attention`, its heads as wide as ours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(-1, (3, -1, MambaConfig().headdim)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def attention(size: Size) -> Step:
    return forward_and_backward(Attention(size.width), size.normal(size.width))


# -- our block taken apart ---------------------------------------------------------------------------------------------


def projections(size: Size) -> Step:
    """Both projections: the product, and those for the gradients of its input and its weight."""
    block = Mamba2(size.width, MambaConfig())
    n_token = size.batch * size.length
    products = []
    for weight in (block.in_proj.weight.detach(), block.out_proj.weight.detach()):
        n_out, n_in = weight.shape
        tokens, gradient = torch.randn(n_token, n_in), torch.randn(n_token, n_out)
        products += [(tokens, weight.T), (gradient, weight), (gradient.T, tokens)]
    return lambda: [one @ other for one, other in products]


def products_of_the_scan(size: Size) -> Step:
    """All products of `chunked_scan` and of its backward pass, with the shapes that they have there."""
    config = MambaConfig()
    n, p, q = config.d_state, config.headdim, min(config.chunk_size, size.length)
    h = config.expand * size.width // p
    n_chunk = size.batch * -(-size.length // q)
    B, flat, states = torch.randn(n_chunk, q, n), torch.randn(n_chunk, q, h * p), torch.randn(n_chunk, n, h * p)
    weights, by_head = torch.randn(n_chunk * h, q, q), torch.randn(n_chunk * h, q, p)
    one_head = torch.randn(n_chunk, q, q)
    forward = [(B, B.mT), (weights, by_head), (B.mT, flat), (B, states)]
    backward = [(B, B.mT), (B.mT, flat), (weights.mT, by_head), (B, states), (by_head, by_head.mT)]
    backward += [(one_head.mT, B), (flat, states.mT), (one_head, B), (flat, states.mT)]
    return lambda: [one @ other for one, other in forward + backward]


def convolution(size: Size) -> Step:
    """The convolution and its SiLU, compiled alone."""
    block = Mamba2(size.width, MambaConfig())

    def mixed(channels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(causal_conv(channels, weight, bias))

    weight, bias = block.conv1d.weight, block.conv1d.bias
    assert bias is not None
    return forward_and_backward(size.compiled(mixed), size.normal(len(bias)), weight, bias)


def scan(size: Size) -> Step:
    """The scan with its products, compiled alone."""
    config = MambaConfig()
    heads = config.expand * size.width // config.headdim

    def outputs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return selective_scan(x, F.softplus(dt), A, B, C, chunk_size=config.chunk_size)[0]

    A = (-torch.linspace(1, 16, heads)).requires_grad_()
    x, B, C = size.normal(heads, config.headdim), size.normal(config.d_state), size.normal(config.d_state)
    return forward_and_backward(size.compiled(outputs), x, size.normal(heads), A, B, C)


def gate_and_norm(size: Size) -> Step:
    """The skip by D, the gate and the norm, compiled alone."""
    inner = MambaConfig().expand * size.width
    heads = inner // MambaConfig().headdim

    def normed(y: Tensor, x: Tensor, z: Tensor, D: Tensor, weight: Tensor) -> Tensor:
        skipped = y + (D[:, None] * x.unflatten(-1, (heads, -1))).flatten(-2)
        return F.rms_norm(skipped * F.silu(z), (inner,), weight, 1e-5)

    D, weight = torch.ones(heads, requires_grad=True), torch.ones(inner, requires_grad=True)
    return forward_and_backward(size.compiled(normed), *(size.normal(inner) for _ in range(3)), D, weight)

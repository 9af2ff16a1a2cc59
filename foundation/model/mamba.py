"""Mamba-2 blocks with the parameter names and shapes of mamba-ssm's ``Mamba2`` (one group, gated RMS norm).

A token that is all zero and masked as padding stays zero through every block and leaves no trace in the tokens after
it, so sequences of different lengths share a batch by padding on the left.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from foundation.config import MambaConfig
from foundation.model.scan import selective_scan


def causal_conv(
    channels: Float[Tensor, "b l channel"], weight: Float[Tensor, "channel 1 tap"], bias: Float[Tensor, " channel"]
) -> Float[Tensor, "b l channel"]:
    """Return the depthwise convolution of each token with those before it.

    As shifted multiply-adds, forward and backward: on a CPU torch's own is slower, and wants the channels first. The
    product with the identity stores the taps side by side, where compiled loops would gather a transposed view.
    """
    taps = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device) @ weight.squeeze(1).T
    return _CausalConv.apply(channels, taps, bias)


class _CausalConv(torch.autograd.Function):
    """channels (b l channel), taps (tap channel), oldest token first, bias (channel) -> mixed channels."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, channels: Tensor, taps: Tensor, bias: Tensor
    ) -> Tensor:
        n_tap, length = len(taps), channels.shape[1]
        padded = F.pad(channels, (0, 0, n_tap - 1, 0))
        ctx.save_for_backward(padded, taps)
        mixed = bias
        for i in range(n_tap):
            mixed = torch.addcmul(mixed, padded[:, i : i + length], taps[i])
        return mixed

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dmixed: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        padded, taps = ctx.saved_tensors
        n_tap, length = len(taps), dmixed.shape[1]
        later = F.pad(dmixed, (0, 0, 0, n_tap - 1))
        dchannels = dmixed * taps[-1]
        for i in range(1, n_tap):
            dchannels = torch.addcmul(dchannels, later[:, i : i + length], taps[-1 - i])
        # By sequence first: a compiled sum over all tokens at once would go through memory by columns.
        dtaps = torch.stack([(padded[:, i : i + length] * dmixed).sum(1).sum(0) for i in range(n_tap)])
        return dchannels, dtaps, dmixed.sum(1).sum(0)


class Mamba2(nn.Module):
    """The sequence mixer: projection, short causal convolution, scan, gated norm, projection."""

    def __init__(self, width: int, config: MambaConfig) -> None:
        super().__init__()
        inner = config.expand * width
        if inner % config.headdim:
            raise ValueError(f"expand x width = {inner} is not a multiple of headdim {config.headdim}")
        heads = inner // config.headdim
        self.config, self.inner, self.heads = config, inner, heads
        mixed = inner + 2 * config.d_state
        self.in_proj = nn.Linear(width, inner + mixed + heads, bias=False)
        self.conv1d = nn.Conv1d(mixed, mixed, config.d_conv, groups=mixed, padding=config.d_conv - 1)
        dt = torch.exp(torch.rand(heads) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(
        self, tokens: Float[Tensor, "b l width"], real: Bool[Tensor, "b l"] | None = None
    ) -> Float[Tensor, "b l width"]:
        """Mix along the sequence; `real` is False where a token is padding."""
        projected = self.in_proj(tokens)
        with torch.autocast(tokens.device.type, enabled=False):  # between projections: single precision, as mamba-ssm
            mixed = self._scanned(projected, real)
        return self.out_proj(mixed)

    def _scanned(
        self, projected: Float[Tensor, "b l projected"], real: Bool[Tensor, "b l"] | None
    ) -> Float[Tensor, "b l inner"]:
        n, bias = self.config.d_state, self.conv1d.bias
        assert bias is not None
        z, xBC, dt = projected.split([self.inner, self.inner + 2 * n, self.heads], dim=-1)
        xBC = F.silu(causal_conv(xBC, self.conv1d.weight, bias))
        if real is not None:
            xBC = xBC * real[..., None]
        x, B, C = xBC.split([self.inner, n, n], dim=-1)
        x = x.unflatten(-1, (self.heads, self.config.headdim))
        dt = F.softplus(dt + self.dt_bias)
        y, _ = selective_scan(
            x, dt, -self.A_log.exp(), B, C, backend=self.config.backend, chunk_size=self.config.chunk_size
        )
        y = (y + self.D[:, None] * x).flatten(-2)
        return self.norm(y * F.silu(z))


class MambaStack(nn.Module):
    """Pre-norm residual blocks and a last norm.

    Parameters
    ----------
    make : makes the mixer of a block (`foundation.model.mixers`); None: Mamba-2, the only one that knows of padding.
    bidirectional : scan each sequence in both directions with one set of weights, and average.
    drop_path : in training, the share of images for which the last block is left out, and its branch scaled up for the
        others; rises linearly over the blocks (stochastic depth, Huang et al. 2016).
    """

    def __init__(
        self,
        width: int,
        n_layer: int,
        config: MambaConfig,
        *,
        make: Callable[[], nn.Module] | None = None,
        bidirectional: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        mixers = [Mamba2(width, config) if make is None else make() for _ in range(n_layer)]
        with torch.no_grad():  # residual branches start small, as in GPT-2
            for mixer in mixers:
                mixer.get_parameter("out_proj.weight").div_(math.sqrt(n_layer))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(n_layer))
        self.mixers = nn.ModuleList(mixers)
        self.last_norm = nn.RMSNorm(width)
        self.bidirectional = bidirectional
        self.drop_rates = [drop_path * (i + 1) / n_layer for i in range(n_layer)]

    def forward(
        self,
        tokens: Float[Tensor, "b l width"],
        *,
        real: Bool[Tensor, "b l"] | None = None,
        orders: Tensor | None = None,
    ) -> Float[Tensor, "b l width"]:
        """Run the blocks; block i scans the tokens in the order ``orders[i % len(orders)]`` (permutations of l)."""
        for i, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            order = None if orders is None else orders[i % len(orders)]
            branch = self._mixed(mixer, norm(tokens), real, order)
            kept = F.dropout(branch.new_ones(len(branch), 1, 1), self.drop_rates[i], self.training)
            tokens = tokens + branch * kept
        return self.last_norm(tokens)

    def _mixed(self, mixer: nn.Module, tokens: Tensor, real: Tensor | None, order: Tensor | None) -> Tensor:
        if order is not None:
            tokens, real = tokens[:, order], None if real is None else real[:, order]
        padding = () if real is None else (real,)
        mixed = mixer(tokens, *padding)
        if self.bidirectional:
            back = mixer(tokens.flip(1), *(of_token.flip(1) for of_token in padding))
            mixed = (mixed + back.flip(1)) / 2
        return mixed if order is None else mixed[:, order.argsort()]

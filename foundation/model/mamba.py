"""Mamba-2 blocks with the parameter names and shapes of mamba-ssm's ``Mamba2`` (one group, gated RMS norm).

A token that is all zero and masked as padding stays zero through every block and leaves no trace in the tokens after
it, so sequences of different lengths share a batch by padding on the left.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.config import MambaConfig
from foundation.model.scan import chunked_scan


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
        n, length = self.config.d_state, tokens.shape[1]
        z, xBC, dt = self.in_proj(tokens).split([self.inner, self.inner + 2 * n, self.heads], dim=-1)
        xBC = F.silu(self.conv1d(xBC.mT)[..., :length].mT)
        if real is not None:
            xBC = xBC * real[..., None]
        x, B, C = xBC.split([self.inner, n, n], dim=-1)
        x = x.unflatten(-1, (self.heads, self.config.headdim))
        dt = F.softplus(dt + self.dt_bias)
        y, _ = chunked_scan(x, dt, -self.A_log.exp(), B, C, chunk_size=self.config.chunk_size)
        y = (y + self.D[:, None] * x).flatten(-2)
        return self.out_proj(self.norm(y * F.silu(z)))


class MambaStack(nn.Module):
    """Pre-norm residual blocks and a last norm."""

    def __init__(self, width: int, n_layer: int, config: MambaConfig) -> None:
        super().__init__()
        mixers = [Mamba2(width, config) for _ in range(n_layer)]
        with torch.no_grad():  # residual branches start small, as in GPT-2
            for mixer in mixers:
                mixer.out_proj.weight /= math.sqrt(n_layer)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(n_layer))
        self.mixers = nn.ModuleList(mixers)
        self.last_norm = nn.RMSNorm(width)

    def forward(
        self,
        tokens: Float[Tensor, "b l width"],
        *,
        real: Bool[Tensor, "b l"] | None = None,
        orders: Tensor | None = None,
    ) -> Float[Tensor, "b l width"]:
        """Run the blocks; block i scans the tokens in the order ``orders[i % len(orders)]`` (permutations of l)."""
        for i, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            normed = norm(tokens)
            if orders is None:
                tokens = tokens + mixer(normed, real)
            else:
                order = orders[i % len(orders)]
                tokens = tokens + mixer(normed[:, order])[:, order.argsort()]
        return self.last_norm(tokens)

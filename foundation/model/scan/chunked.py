"""The scan as matrix products (Dao & Gu 2024, section 6), in plain torch: any device, forward and backward.

Within a chunk of q tokens, the scan is masked attention without softmax; between chunks it is a recurrence over their
states. With `g = dt A`, `a` its sum since the chunk's start, `u = dt x`, and S a chunk's entering state::

    y_i = (C_i . B_i) u_i + sum_{j<i} exp(a_i - a_j) (C_i . B_j) u_j + exp(a_i) S C_i
    S'  = exp(a_q) S + sum_j exp(a_q - a_j) u_j B_j^T

The backward pass is written out, because autograd would keep several arrays of q numbers per token and head: only the
states are kept, the decays are computed anew. The gradient of `g_t` is the flow from tokens before t to t and later
ones. It needs no array of that size either: the flow into token i is `dy_i . y_i`, that out of token j `u_j . du_j`.
What a token does to itself doesn't decay; it is left out of both, or rounding errors of it would remain.

Shapes: b batch, c chunks, q tokens of a chunk, h heads, p head width, n state size. States are (n, h, p), so that the
products with `B` and `C`, which the heads share, are one for all heads.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from foundation.model.scan.reference import Scanned


def chunked_scan(
    x: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    *,
    initial: Float[Tensor, "b h p n"] | None = None,
    chunk_size: int = 32,
) -> Scanned:
    """Return what `reference_scan` does; decays and states are in single precision or better, whatever the inputs."""
    given, length = x.dtype, x.shape[1]
    dtype = torch.promote_types(given, torch.float32)
    x, dt, A, B, C = (value.to(dtype) for value in (x, dt, A, B, C))
    q = min(chunk_size, length)
    u, log_decay = x * dt[..., None], dt * A
    if pad := -length % q:  # u = 0 and no decay leave the state as it is
        u, log_decay = F.pad(u, (0, 0, 0, 0, 0, pad)), F.pad(log_decay, (0, 0, 0, pad))
        B, C = F.pad(B, (0, 0, 0, pad)), F.pad(C, (0, 0, 0, pad))
    u, log_decay, B, C = (value.unflatten(1, (-1, q)) for value in (u, log_decay, B, C))
    if initial is None:
        state = x.new_zeros(x.shape[0], B.shape[-1], *x.shape[2:])
    else:
        state = initial.to(dtype).permute(0, 3, 1, 2)
    y, state = _ChunkedScan.apply(u, log_decay, B, C, state)
    return y.flatten(1, 2)[:, :length].to(given), state.permute(0, 2, 3, 1)


class _ChunkedScan(torch.autograd.Function):
    """u (b c q h p), g (b c q h), B and C (b c q n), state (b n h p) -> y (b c q h p), state."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, u: Tensor, g: Tensor, B: Tensor, C: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        since_start, to_end, kept, between = _decays(g)
        weights = (C @ B.mT)[:, :, None] * between
        within = (weights @ u.transpose(2, 3)).transpose(2, 3)
        gained = _by_head(B.mT @ (u * to_end).flatten(3), like=u)
        states = [state]
        for chunk in range(u.shape[1]):
            states.append(kept[:, chunk] * states[-1] + gained[:, chunk])
        entering = torch.stack(states[:-1], dim=1)
        from_others = within + _by_head(C @ entering.flatten(3), like=u) * since_start
        ctx.save_for_backward(u, g, B, C, from_others, entering)
        return from_others + _dot(B, C)[..., None] * u, states[-1]

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor, dstate: Tensor
    ) -> tuple[Tensor, ...]:
        u, g, B, C, from_others, entering = ctx.saved_tensors
        since_start, to_end, kept, between = _decays(g)
        dcarried = (dy * since_start).flatten(3)
        heard = _by_head(C.mT @ dcarried, like=u)
        dstates = [dstate]  # of the leaving states, last chunk first
        for chunk in reversed(range(u.shape[1])):
            dstates.append(kept[:, chunk] * dstates[-1] + heard[:, chunk])
        dleaving = torch.stack(dstates[-2::-1], dim=1)

        weights = (C @ B.mT)[:, :, None] * between
        dy_by_head, dleaving_flat = dy.transpose(2, 3).contiguous(), dleaving.flatten(3)
        du_within = (weights.mT @ dy_by_head).transpose(2, 3)
        du_later = _by_head(B @ dleaving_flat, like=u) * to_end
        du = du_within + du_later + _dot(B, C)[..., None] * dy
        dproduct = ((dy_by_head @ u.transpose(2, 3).mT) * between).sum(2)
        down = (dy * u).sum((3, 4))[..., None]
        dB = dproduct.mT @ C + (u * to_end).flatten(3) @ dleaving_flat.mT + down * C
        dC = dproduct @ B + dcarried @ entering.flatten(3).mT + down * B

        flow = (dy * from_others).sum(4) - (u * du_within).sum(4)
        out = (u * du_later).sum(4)
        through = (dleaving * entering * kept).sum((2, 4))
        dg = flow.flip(2).cumsum(2).flip(2) + (out.cumsum(2) - out) + through[:, :, None]
        return du, dg, dB, dC, dstates[-1]


def _decays(g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the decays from a chunk's start to a token and from a token to the end (b c q h 1), over a whole chunk
    (b c 1 h 1), and from an earlier token of a chunk, last axis, to a later one (b c h q q), zero elsewhere.

    The exponential is taken of differences: of `a_i` and `-a_j` alone it would overflow where decays are strong.
    """
    by_head = g.mT.contiguous().cumsum(3)  # tokens last, so that compiled loops run over tokens and not over heads
    a = by_head.mT
    end = a[:, :, -1:]
    earlier = torch.ones(a.shape[2], a.shape[2], dtype=torch.bool, device=a.device).tril(-1)
    between = torch.where(earlier, by_head[..., :, None] - by_head[..., None, :], -torch.inf).exp()
    return a.exp()[..., None], (end - a).exp()[..., None], end.exp()[..., None], between


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(-1, keepdim=True)


def _by_head(flat: Tensor, *, like: Tensor) -> Tensor:
    return flat.unflatten(-1, like.shape[-2:])

"""The selective state-space scan of Mamba-2 (Dao & Gu 2024, "Transformers are SSMs", eqs. 1 and 16).

For each head, with a scalar decay::

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T          y_t = h_t C_t

Legend: b batch, l length, h heads, p head width, n state size, c chunks, q tokens of a chunk. `A` is negative, `dt`
positive (after softplus). One group: `B` and `C` are shared by the heads. `reference_scan` is the definition,
`chunked_scan` the same numbers as matrix products.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Scanned = tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]


def reference_scan(
    x: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    *,
    initial: Float[Tensor, "b h p n"] | None = None,
) -> Scanned:
    """Return outputs and the final state, one token after the other."""
    state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1]) if initial is None else initial
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, None, None, :]
        outputs.append((state * C[:, t, None, None, :]).sum(-1))
    return torch.stack(outputs, dim=1), state


def chunked_scan(
    x: Float[Tensor, "b l h p"],
    dt: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    *,
    initial: Float[Tensor, "b h p n"] | None = None,
    chunk_size: int = 64,
) -> Scanned:
    """Return what `reference_scan` does: quadratic within a chunk, a recurrence over the chunks' states."""
    length, heads, width = x.shape[1:]
    q = min(chunk_size, length)
    pad = -length % q
    if pad:  # dt = 0 leaves the state as it is
        x, B, C = F.pad(x, (0, 0, 0, 0, 0, pad)), F.pad(B, (0, 0, 0, pad)), F.pad(C, (0, 0, 0, pad))
        dt = F.pad(dt, (0, 0, 0, pad))
    c = x.shape[1] // q
    B, C = B.unflatten(1, (c, q)), C.unflatten(1, (c, q))
    log_decay = (dt * A).unflatten(1, (c, q)).permute(0, 1, 3, 2).cumsum(-1)  # b c h q
    dtx = (x * dt[..., None]).unflatten(1, (c, q)).transpose(2, 3)  # b c h q p

    since = log_decay[..., :, None] - log_decay[..., None, :]  # from key token to query token
    causal = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
    weights = (C @ B.mT)[:, :, None] * since.masked_fill(~causal, -torch.inf).exp()
    y = weights @ dtx

    to_end = (log_decay[..., -1:] - log_decay).exp()
    gained = (dtx * to_end[..., None]).mT @ B[:, :, None]  # b c h p n
    kept = log_decay[..., -1].exp()[..., None, None]
    state = x.new_zeros(x.shape[0], heads, width, B.shape[-1]) if initial is None else initial
    entering = []
    for chunk in range(c):
        entering.append(state)
        state = kept[:, chunk] * state + gained[:, chunk]
    carried = C[:, :, None] @ torch.stack(entering, dim=1).mT  # b c h q p
    y = y + carried * log_decay.exp()[..., None]
    return y.transpose(2, 3).flatten(1, 2)[:, :length], state

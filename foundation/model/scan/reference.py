"""The scan as its definition reads, one token after the other: what the fast ones are tested against."""

import torch
from jaxtyping import Float
from torch import Tensor

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
    """Return outputs, in the dtype of `x`, and the final state, in single precision or better."""
    given = x.dtype
    dtype = torch.promote_types(given, torch.float32)
    x, dt, A, B, C = (value.to(dtype) for value in (x, dt, A, B, C))
    state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1]) if initial is None else initial.to(dtype)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, None, None, :]
        outputs.append((state * C[:, t, None, None, :]).sum(-1))
    return torch.stack(outputs, dim=1).to(given), state

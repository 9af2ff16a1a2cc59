"""What a scan is given in tests, and all that comes of it: outputs, final state, every gradient."""

from typing import Any

import torch
from torch import Tensor

RECIPES = {  # batch, length, heads, width of a head, size of a state
    "phantom-tiny": (1, 64, 8, 32, 16),
    "v4": (1, 256, 4, 32, 16),
}


def scan_inputs(
    length: int,
    seed: int,
    *,
    batch: int = 2,
    heads: int = 3,
    headdim: int = 2,
    d_state: int = 4,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Return arguments of a scan; decays go from almost none to almost all."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64).to(dtype)

    return {
        "x": normal(batch, length, heads, headdim),
        "dt": torch.nn.functional.softplus(2 * normal(batch, length, heads)),
        "A": -normal(heads).exp(),
        "B": normal(batch, length, d_state),
        "C": normal(batch, length, d_state),
        "initial": normal(batch, heads, headdim, d_state),
    }


def recipe_inputs(recipe: str, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return arguments as large as a block of `recipe` has them, with the decays of a fresh one."""
    batch, length, heads, headdim, d_state = RECIPES[recipe]
    given = scan_inputs(length, 5, batch=batch, heads=heads, headdim=headdim, d_state=d_state)
    given["dt"] = 10 ** -torch.linspace(1, 3, heads, dtype=torch.float64) * given["dt"]
    given["A"] = -torch.linspace(1, 16, heads, dtype=torch.float64)
    return {name: value.to(dtype) for name, value in given.items()}


def differentiated(scan: Any, given: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Return outputs, final state and the gradients of a fixed function of both with respect to every input."""
    leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
    y, state = scan(**leaves, **options)
    weighted = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + state.square().sum()
    gradients = torch.autograd.grad(weighted, list(leaves.values()))
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"y": y.detach(), "state": state.detach(), **named}


def largest_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return for each array its largest error, in units of the largest number that is expected in it."""
    assert found.keys() == expected.keys()
    return {
        name: float((found[name].double() - value.double()).abs().max() / value.abs().max().double().clamp_min(1e-300))
        for name, value in expected.items()
    }

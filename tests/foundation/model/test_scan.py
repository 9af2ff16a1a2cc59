"""The chunked scan against its definition, and what any selective state-space scan must do."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.model.scan import chunked_scan, reference_scan

SHAPES = {"length": st.integers(1, 19), "chunk_size": st.integers(1, 24), "seed": st.integers(0, 2**16)}
FEW = settings(max_examples=25, deadline=None)


def inputs(length: int, seed: int, *, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Two sequences, three heads of width 2, states of size 4; decays from almost none to almost all."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64).to(dtype)

    return {
        "x": normal(2, length, 3, 2),
        "dt": torch.nn.functional.softplus(2 * normal(2, length, 3)),
        "A": -normal(3).exp(),
        "B": normal(2, length, 4),
        "C": normal(2, length, 4),
        "initial": normal(2, 3, 2, 4),
    }


def differentiated(scan, given: dict[str, torch.Tensor], **options) -> list[torch.Tensor]:
    """Outputs, final state and the gradients of a fixed function of both with respect to every input."""
    leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
    y, state = scan(**leaves, **options)
    weighted = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + state.square().sum()
    return [y.detach(), state.detach(), *torch.autograd.grad(weighted, list(leaves.values()))]


@FEW
@given(**SHAPES)
def test_chunks_of_any_size_give_the_values_and_gradients_of_the_definition(length, chunk_size, seed):
    given = inputs(length, seed)
    expected = differentiated(reference_scan, given)
    for one, other in zip(differentiated(chunked_scan, given, chunk_size=chunk_size), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("length", "chunk_size"), [(17, 8), (64, 64), (50, 16)])
def test_in_single_precision_chunks_agree_with_the_definition(length, chunk_size):
    given = inputs(length, seed=1, dtype=torch.float32)
    expected = differentiated(reference_scan, given)
    for one, other in zip(differentiated(chunked_scan, given, chunk_size=chunk_size), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_without_an_initial_state_the_scan_starts_from_zero():
    given = inputs(11, seed=2)
    started = given | {"initial": torch.zeros_like(given["initial"])}
    without = {name: value for name, value in given.items() if name != "initial"}
    for scan in (reference_scan, chunked_scan):
        for one, other in zip(scan(**without), scan(**started), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_one_token_is_the_recurrence_by_hand():
    given = inputs(1, seed=3)
    x, dt, B, C = (given[name][:, 0].numpy() for name in ("x", "dt", "B", "C"))
    decay = np.exp(dt * given["A"].numpy())
    state = decay[..., None, None] * given["initial"].numpy() + np.einsum("bh,bhp,bn->bhpn", dt, x, B)
    y, final = chunked_scan(**given)
    np.testing.assert_allclose(final.numpy(), state, rtol=1e-12)
    np.testing.assert_allclose(y[:, 0].numpy(), np.einsum("bhpn,bn->bhp", state, C), rtol=1e-12)


@FEW
@given(cut=st.integers(1, 18), **SHAPES)
def test_a_sequence_in_two_parts_with_the_state_carried_over_equals_the_whole(cut, length, chunk_size, seed):
    length = max(length, cut + 1)
    given = inputs(length, seed)
    along = ("x", "dt", "B", "C")
    first = given | {name: given[name][:, :cut] for name in along}
    y1, state = chunked_scan(**first, chunk_size=chunk_size)
    second = given | {name: given[name][:, cut:] for name in along} | {"initial": state}
    y2, final = chunked_scan(**second, chunk_size=chunk_size)
    whole, expected = chunked_scan(**given, chunk_size=chunk_size)
    torch.testing.assert_close(torch.cat([y1, y2], dim=1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(final, expected, rtol=1e-10, atol=1e-10)


@FEW
@given(at=st.integers(0, 18), **SHAPES)
def test_no_output_depends_on_a_later_token(at, length, chunk_size, seed):
    at = min(at, length - 1)
    given = inputs(length, seed)
    before, _ = chunked_scan(**given, chunk_size=chunk_size)
    changed = {name: given[name].clone() for name in ("x", "dt", "B", "C")}
    for value in changed.values():
        value[:, at] += 1.0
    after, _ = chunked_scan(**(given | changed), chunk_size=chunk_size)
    torch.testing.assert_close(after[:, :at], before[:, :at], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(after[:, at], before[:, at])


def test_strong_decays_over_a_long_sequence_neither_overflow_nor_give_nan():
    given = inputs(300, seed=4, dtype=torch.float32)
    given["dt"] = 50 * given["dt"]
    for found in differentiated(chunked_scan, given, chunk_size=64):
        assert torch.isfinite(found).all()

"""The chunked scan against its definition, and what any selective state-space scan must do."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.model.scan import chunked_scan, reference_scan
from tests.foundation.model.scan_cases import RECIPES, differentiated, largest_errors, recipe_inputs, scan_inputs

SHAPES = {"length": st.integers(1, 19), "chunk_size": st.integers(1, 24), "seed": st.integers(0, 2**16)}
FEW = settings(max_examples=25, deadline=None)


@FEW
@given(**SHAPES)
def test_chunks_of_any_size_give_the_values_and_gradients_of_the_definition(length, chunk_size, seed):
    given = scan_inputs(length, seed)
    found = differentiated(chunked_scan, given, chunk_size=chunk_size)
    for name, value in differentiated(reference_scan, given).items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


@FEW
@given(**SHAPES)
def test_in_single_precision_chunks_agree_with_the_definition_in_double(length, chunk_size, seed):
    given = scan_inputs(length, seed)
    single = {name: value.float() for name, value in given.items()}
    found = differentiated(chunked_scan, single, chunk_size=chunk_size)
    expected = differentiated(reference_scan, {name: value.double() for name, value in single.items()})
    errors = largest_errors(found, expected)
    assert max(errors.values()) < 5e-5, errors


@pytest.mark.parametrize("chunk_size", [16, 32, 64])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_at_the_sizes_of_the_recipes_chunks_agree_with_the_definition(recipe, chunk_size, dtype, tolerance):
    given = recipe_inputs(recipe, dtype=dtype)
    found = differentiated(chunked_scan, given, chunk_size=chunk_size)
    expected = differentiated(reference_scan, {name: value.double() for name, value in given.items()})
    errors = largest_errors(found, expected)
    assert max(errors.values()) < tolerance, errors


def test_the_written_out_gradient_is_the_one_of_finite_differences():
    given = {name: value.requires_grad_() for name, value in scan_inputs(7, seed=6).items()}
    names, values = zip(*given.items(), strict=True)

    def scan(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return chunked_scan(**dict(zip(names, arguments, strict=True)), chunk_size=3)

    assert torch.autograd.gradcheck(scan, values)


@pytest.mark.parametrize("scan", [reference_scan, chunked_scan])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_scanned_in_single_precision(scan, dtype):
    given = {name: value.to(dtype) for name, value in scan_inputs(300, seed=7).items()}
    y, state = scan(**given)
    expected, final = scan(**{name: value.float() for name, value in given.items()})
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(y, expected.to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(state, final, rtol=0, atol=0)


def test_where_nearly_all_decays_the_gradient_of_the_decay_keeps_its_digits():
    """What a token does to itself is hundreds of times the rest, and no part of it; plain autograd errs by 1 %."""
    given = scan_inputs(64, seed=8) | {"dt": torch.full((2, 64, 3), 6.0, dtype=torch.float64)}
    given["A"] = -torch.ones(3, dtype=torch.float64)
    expected = differentiated(reference_scan, given)["dA"]
    single = {name: value.float() for name, value in given.items()}
    found = differentiated(chunked_scan, single)["dA"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)


def test_without_an_initial_state_the_scan_starts_from_zero():
    given = scan_inputs(11, seed=2)
    started = given | {"initial": torch.zeros_like(given["initial"])}
    without = {name: value for name, value in given.items() if name != "initial"}
    for scan in (reference_scan, chunked_scan):
        for one, other in zip(scan(**without), scan(**started), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_one_token_is_the_recurrence_by_hand():
    given = scan_inputs(1, seed=3)
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
    given = scan_inputs(length, seed)
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
    given = scan_inputs(length, seed)
    before, _ = chunked_scan(**given, chunk_size=chunk_size)
    changed = {name: given[name].clone() for name in ("x", "dt", "B", "C")}
    for value in changed.values():
        value[:, at] += 1.0
    after, _ = chunked_scan(**(given | changed), chunk_size=chunk_size)
    torch.testing.assert_close(after[:, :at], before[:, :at], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(after[:, at], before[:, at])


def test_strong_decays_over_a_long_sequence_neither_overflow_nor_give_nan():
    given = scan_inputs(300, seed=4, dtype=torch.float32)
    given["dt"] = 50 * given["dt"]
    for found in differentiated(chunked_scan, given, chunk_size=64).values():
        assert torch.isfinite(found).all()


def test_a_second_derivative_is_an_error_and_not_a_wrong_number():
    given = {name: value.requires_grad_() for name, value in scan_inputs(5, seed=9).items()}
    (first,) = torch.autograd.grad(chunked_scan(**given)[0].square().sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()

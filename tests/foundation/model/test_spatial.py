"""Three ways to weigh the places of a grid: Gaussian fields against their closed form, free maps, and the mean."""

import numpy as np
import pytest
import torch

from foundation.model.spatial import (
    BLUR,
    COARSE_PYRAMID,
    PYRAMID,
    GaussianField,
    field_pyramid,
    gaussian_field,
    make_field,
)

READOUTS = ("mean", "factorised", "gaussian")


def grid(side: int) -> np.ndarray:
    """(x, y) of every place of a row-major grid."""
    y, x = np.mgrid[:side, :side]
    return np.stack([x.ravel(), y.ravel()], axis=-1) / side + 0.5 / side


def test_a_receptive_field_is_a_gaussian_over_the_row_major_grid():
    place, size = torch.tensor([[0.3, 0.8], [0.5, 0.1]]), torch.tensor([0.1, 0.4])
    found = gaussian_field(place, size.log(), 7).numpy()
    distance = ((grid(7)[None] - place.numpy()[:, None]) ** 2).sum(-1)
    expected = np.exp(-distance / (2 * size.numpy()[:, None] ** 2))
    np.testing.assert_allclose(found, expected / expected.sum(-1, keepdims=True), rtol=1e-4, atol=1e-7)


def test_a_receptive_field_sums_to_one_lies_where_it_is_placed_and_is_as_wide_as_it_says():
    place = torch.tensor([[0.5, 0.5], [0.4, 0.6], [0.3, 0.5]])
    size = torch.tensor([0.05, 0.08, 0.1])
    field = gaussian_field(place, size.log(), 41).numpy()
    np.testing.assert_allclose(field.sum(-1), 1, rtol=1e-5)
    centre = field @ grid(41)
    np.testing.assert_allclose(centre, place, atol=2e-3)
    spread = np.sqrt(np.einsum("up,upc->uc", field, (grid(41)[None] - centre[:, None]) ** 2))
    np.testing.assert_allclose(spread, np.repeat(size.numpy()[:, None], 2, axis=1), rtol=0.05)


def test_a_field_far_smaller_than_a_patch_is_its_nearest_patch():
    field = gaussian_field(torch.tensor([[0.9, 0.1]]), torch.tensor([-12.0]), 4)
    assert field.argmax() == 3
    torch.testing.assert_close(field.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("side", [1, 4])
def test_every_readout_starts_as_an_average_of_places_that_is_the_same_for_all_units(readout, side):
    weight = make_field(readout, 3, side)()
    assert weight.shape == (3, side**2)
    torch.testing.assert_close(weight.sum(-1), torch.ones(3))
    torch.testing.assert_close(weight, weight[:1].expand(3, -1))


@pytest.mark.parametrize(("readout", "numbers"), [("mean", 0), ("factorised", 16), ("gaussian", 3)])
def test_a_unit_costs_what_its_readout_learns_and_saves_no_more(readout, numbers):
    field = make_field(readout, 5, 4)
    assert sum(parameter.numel() for parameter in field.parameters()) == 5 * numbers
    assert sum(tensor.numel() for tensor in field.state_dict().values()) == 5 * numbers


def test_candidates_of_each_size_cover_the_image_row_by_row_and_the_last_is_all_of_it():
    candidates = field_pyramid(COARSE_PYRAMID)
    field = gaussian_field(candidates.place, candidates.log_size, 4)
    assert len(candidates) == len(field) == 33
    assert field[:-1].argmax(-1).tolist() == [*range(16), *range(16)]
    assert (field[:16].amax(-1) > field[16:32].amax(-1)).all()  # the small ones first
    assert field[-1].max() / field[-1].min() < 2


@pytest.mark.parametrize("pyramid", [PYRAMID, COARSE_PYRAMID], ids=["fine", "coarse"])
def test_candidates_differ_and_those_of_a_size_are_spread_evenly(pyramid):
    candidates = field_pyramid(pyramid)
    each = torch.column_stack([candidates.place, candidates.log_size])
    assert len(each.unique(dim=0)) == len(candidates) == sum(n**2 for _, n in pyramid) + 1
    for sd, n in pyramid:
        places = candidates.place[torch.isclose(candidates.log_size.exp(), torch.tensor(sd))]
        x, y = np.meshgrid(*2 * [(np.arange(n) + 0.5) / n])
        np.testing.assert_allclose(places, np.stack([x.ravel(), y.ravel()], axis=1), rtol=1e-6)


@pytest.mark.parametrize(("readout", "blur"), [("factorised", 0), ("gaussian", BLUR / 6)])
def test_a_unit_sees_through_the_candidate_that_is_chosen_for_it(readout, blur):
    candidates, choice = field_pyramid(COARSE_PYRAMID), torch.tensor([32, 0, 17, 0])
    field = make_field(readout, 4, 6)
    field.choose(candidates, choice)
    size = torch.hypot(candidates.log_size[choice].exp(), torch.tensor(blur))
    torch.testing.assert_close(field(), gaussian_field(candidates.place[choice], size.log(), 6))


def single_field(size: float, *, place: tuple[float, float] = (0.4, 0.55), side: int = 8) -> GaussianField:
    """One unit's field, in double precision; the place is where cells 3 and 4 of both axes are in sight."""
    field = GaussianField(1, side).double()
    with torch.no_grad():
        field.place.copy_(torch.tensor([place]))
        field.log_size.fill_(size).log_()
    return field


@pytest.mark.parametrize("size", [0.01, 0.06, 0.3])
def test_fields_have_a_gradient_to_learn_from_even_far_below_a_cell(size):
    field, target = single_field(size), torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (field() @ target).sum().backward()
    for parameter in (field.place, field.log_size):
        assert parameter.grad is not None
        flat, step = parameter.data.view(-1), 1e-5
        for i, found in enumerate(parameter.grad.view(-1).tolist()):
            seen = []
            for sign in (1, -1):
                flat[i] += sign * step
                seen.append(float((field() @ target).sum().detach()))
                flat[i] -= sign * step
            assert found == pytest.approx((seen[0] - seen[1]) / (2 * step), rel=1e-4, abs=1e-8)
            assert abs(found) > 1e-3


def test_without_its_blur_a_field_far_below_a_cell_would_have_no_gradient():
    field = single_field(0.01)
    gaussian_field(field.place, field.log_size, 8)[:, ::2].sum().backward()
    for parameter in (field.place, field.log_size):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() < 1e-6


def test_a_field_far_below_a_cell_is_as_wide_as_a_quarter_of_one_and_a_large_one_as_it_says():
    small = single_field(1e-4, side=32)
    quarter = torch.full_like(small.log_size, BLUR / 32).log()
    torch.testing.assert_close(small(), gaussian_field(small.place, quarter, 32), rtol=0.01, atol=1e-12)
    large = single_field(0.3, side=32)
    torch.testing.assert_close(large(), gaussian_field(large.place, large.log_size, 32), rtol=0.02, atol=0)


def test_the_mean_has_no_choice():
    field = make_field("mean", 2, 4)
    field.choose(field_pyramid(COARSE_PYRAMID), torch.tensor([0, 5]))
    torch.testing.assert_close(field(), torch.full((2, 16), 1 / 16), rtol=0, atol=0)

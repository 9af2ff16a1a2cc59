"""Three ways to weigh the places of a grid: Gaussian fields against their closed form, free maps, and the mean."""

import numpy as np
import pytest
import torch

from foundation.model.spatial import candidate_fields, gaussian_field, make_field

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
    candidates = candidate_fields()
    field = gaussian_field(candidates.place, candidates.log_size, 4)
    assert len(candidates) == len(field) == 33
    assert field[:-1].argmax(-1).tolist() == [*range(16), *range(16)]
    assert (field[:16].amax(-1) > field[16:32].amax(-1)).all()  # the small ones first
    assert field[-1].max() / field[-1].min() < 2


@pytest.mark.parametrize("readout", ["factorised", "gaussian"])
def test_a_unit_sees_through_the_candidate_that_is_chosen_for_it(readout):
    candidates, choice = candidate_fields(), torch.tensor([32, 0, 17, 0])
    field = make_field(readout, 4, 6)
    field.choose(candidates, choice)
    expected = gaussian_field(candidates.place[choice], candidates.log_size[choice], 6)
    torch.testing.assert_close(field(), expected)


def test_the_mean_has_no_choice():
    field = make_field("mean", 2, 4)
    field.choose(candidate_fields(), torch.tensor([0, 5]))
    torch.testing.assert_close(field(), torch.full((2, 16), 1 / 16), rtol=0, atol=0)

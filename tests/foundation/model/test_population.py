"""The population path by itself: a linear map of deviations from the mean, zero until it is solved."""

import numpy as np
import pytest
import torch

from foundation.model.population import PopulationPath


@pytest.fixture
def path() -> PopulationPath:
    """A path of 5 voxels whose every number is set; 4 landmarks of the subjects 0, 2 and 0 again."""
    torch.manual_seed(0)
    made = PopulationPath(5, 4, 2)
    made.landmark.copy_(torch.tensor([[0, 7], [2, 1], [2, 3], [0, 4]]))
    for buffer in (made.mean, made.basis, made.weight):
        buffer.normal_()
    return made


def test_until_it_is_solved_it_gives_zeros():
    assert (PopulationPath(5, 4, 2)(torch.randn(3, 4)) == 0).all()


def test_a_voxel_is_its_weights_times_the_factors_of_what_differs_from_the_mean(path):
    predicted = torch.randn(3, 4)
    found = path(predicted)
    for b in range(3):
        for v in range(5):
            expected = path.weight[v] @ path.basis.T @ (predicted[b] - path.mean)
            torch.testing.assert_close(found[b, v], expected)


def test_the_average_image_gives_zeros(path):
    torch.testing.assert_close(path(path.mean[None]), torch.zeros(1, 5), rtol=0, atol=0)


def test_landmarks_of_a_subject_are_its_voxels_in_the_order_of_the_predictions(path):
    assert path.of_subject(0).tolist() == [7, 4]
    assert path.of_subject(2).tolist() == [1, 3]
    assert path.of_subject(1).tolist() == []


def test_it_is_solved_never_trained_and_all_of_it_is_saved(path):
    assert not list(path.parameters())
    assert {key: tuple(value.shape) for key, value in path.state_dict().items()} == {
        "landmark": (4, 2),
        "mean": (4,),
        "basis": (4, 2),
        "weight": (5, 2),
    }
    other = PopulationPath(5, 4, 2)
    other.load_state_dict(path.state_dict())
    predicted = torch.randn(3, 4)
    np.testing.assert_array_equal(other(predicted), path(predicted))

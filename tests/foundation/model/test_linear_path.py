"""The closed-form path: what it sees of an image, and its equation written out."""

import numpy as np
import pytest
import torch

from foundation.model.dual_stream import TokenShape
from foundation.model.linear_path import LinearFeatures, LinearPath, LinearShape, linear_features

SHAPE = TokenShape(depth=2, patch=16, width=5)
SIZES = LinearShape.of(SHAPE, grid=2, rank_whole=4, rank_field=3)
N_VOXEL = 7


@pytest.fixture
def features() -> LinearFeatures:
    made = torch.Generator().manual_seed(0)
    cls, patch = torch.randn(6, 2, 5, generator=made), torch.randn(6, 2, 16, 5, generator=made)
    return linear_features(cls, patch, grid=2)


@pytest.fixture
def path() -> LinearPath:
    """A path with no part left at zero."""
    made, path = torch.Generator().manual_seed(1), LinearPath(N_VOXEL, SIZES)
    for name, buffer in path.named_buffers():
        buffer.copy_(torch.rand(buffer.shape, generator=made) - (1.5 if name == "log_size" else 0))
    return path


@pytest.mark.parametrize("grid", [1, 2, 3, 4, 9])
def test_the_whole_image_is_the_cls_tokens_of_all_depths_then_the_coarse_cells_of_all_depths(grid):
    cls, patch = torch.randn(3, 2, 5), torch.randn(3, 2, 16, 5)
    found = linear_features(cls, patch, grid=grid)
    sizes = LinearShape.of(SHAPE, grid=grid, rank_whole=4, rank_field=3)
    assert found.whole.shape == (3, sizes.whole) == (3, 10 * (1 + min(grid, 4) ** 2))
    torch.testing.assert_close(found.whole[:, :10], cls.flatten(1), rtol=0, atol=0)
    cells = found.whole[:, 10:].view(3, 2, -1, 5)
    if 4 % min(grid, 4) == 0:
        torch.testing.assert_close(cells.mean(2), patch.mean(2))


def test_a_place_shows_its_patches_of_all_depths_side_by_side():
    patch = torch.randn(3, 2, 16, 5)
    found = linear_features(torch.randn(3, 2, 5), patch, grid=2)
    assert found.patch.shape == (3, 16, SIZES.channel)
    torch.testing.assert_close(found.patch[1, 6], torch.cat([patch[1, 0, 6], patch[1, 1, 6]]), rtol=0, atol=0)


def test_a_voxel_is_a_linear_map_of_the_whole_and_of_what_its_gaussian_field_sees(path, features):
    centre = (np.arange(4) + 0.5) / 4
    y, x = (axis.ravel() for axis in np.meshgrid(centre, centre, indexing="ij"))
    part = {name: buffer.double().numpy() for name, buffer in path.named_buffers()}
    whole, patch = features.whole.double().numpy(), features.patch.double().numpy()
    expected = np.empty((6, N_VOXEL))
    for v in range(N_VOXEL):
        squared = (x - part["place"][v, 0]) ** 2 + (y - part["place"][v, 1]) ** 2
        field = np.exp(-squared / (2 * np.exp(part["log_size"][v]) ** 2))
        seen = np.einsum("bpc,p->bc", patch, field / field.sum())
        expected[:, v] = (
            np.einsum("bf,fr,r->b", whole, part["basis_whole"], part["weight_whole"][v])
            + np.einsum("bc,cr,r->b", seen, part["basis_field"], part["weight_field"][v])
            + part["bias"][v]
        )
    np.testing.assert_allclose(path(features), expected, rtol=1e-4, atol=1e-4)


def test_some_of_the_images_are_predicted_as_among_all(path, features):
    torch.testing.assert_close(path(features[2:4]), path(features)[2:4])
    chosen = torch.tensor([5, 0])
    torch.testing.assert_close(path(features[chosen]), path(features)[chosen])


@pytest.mark.parametrize("part", ["weight_whole", "weight_field", "bias"])
def test_a_path_gives_zeros_until_it_is_solved(features, part):
    fresh = LinearPath(N_VOXEL, SIZES)
    assert not fresh.solved
    assert not fresh(features).any()
    fresh.get_buffer(part)[2] = 1.0
    assert fresh.solved


def test_ranks_are_at_most_the_number_of_voxels():
    path = LinearPath(2, SIZES)
    assert path.basis_whole.shape == (SIZES.whole, 2)
    assert path.basis_field.shape == (SIZES.channel, 2)


def test_nothing_in_it_is_trained_by_gradient(path):
    assert list(path.parameters()) == []

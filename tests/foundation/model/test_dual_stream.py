"""Token statistics, receptive fields, and that either stream hears of what it should."""

import numpy as np
import pytest
import torch

from foundation.model.dual_stream import DualStream, TokenShape, gaussian_field
from tests.tiny_store import TINY_BACKBONE

SHAPE = TokenShape(depth=2, patch=16, width=5)


@pytest.fixture
def streams() -> DualStream:
    torch.manual_seed(0)
    return DualStream(SHAPE, TINY_BACKBONE).eval()


def tokens(n: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 5, generator=made), torch.randn(n, 2, 16, 5, generator=made)


def test_statistics_are_per_depth_and_channel_and_over_images_and_places(streams):
    cls, patch = tokens(50)
    streams.set_statistics(3 * cls + 1, patch - 2)
    np.testing.assert_allclose(streams.cls_mean, (3 * cls + 1).numpy().mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(streams.cls_sd, 3 * cls.numpy().std(0), rtol=1e-5)
    np.testing.assert_allclose(streams.patch_mean, (patch - 2).numpy().mean((0, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(streams.patch_sd, patch.numpy().std((0, 2)), rtol=1e-5)


def test_with_statistics_of_the_tokens_their_scale_and_offset_do_not_matter(streams):
    cls, patch = tokens(50)
    streams.set_statistics(cls, patch)
    expected = streams(cls, patch)
    streams.set_statistics(7 * cls - 3, 0.2 * patch + 5)
    found = streams(7 * cls - 3, 0.2 * patch + 5)
    for name in ("cls", "patch", "gate"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-4)


def test_a_channel_that_never_varies_stays_finite(streams):
    cls, patch = tokens()
    cls[:, 0, 2], patch[:, 1, :, 3] = 4.0, -1.0
    streams.set_statistics(cls, patch)
    found = streams(cls, patch)
    assert torch.isfinite(found.cls).all()
    assert torch.isfinite(found.patch).all()


def test_the_cls_stream_reads_every_depth_and_no_patch_and_the_patch_stream_every_place_and_no_cls(streams):
    cls, patch = (t.requires_grad_() for t in tokens(1))
    found = streams(cls, patch)
    of_cls, of_patch = torch.autograd.grad(found.cls.sum(), [cls, patch], retain_graph=True, allow_unused=True)
    assert of_patch is None
    assert (of_cls.abs().sum(-1) > 0).all()
    of_cls, of_patch = torch.autograd.grad(found.patch[0, 5].sum(), [cls, patch], allow_unused=True)
    assert of_cls is None
    assert (of_patch.abs().sum(-1) > 0).all()


def test_images_do_not_see_each_other(streams):
    cls, patch = tokens()
    whole, alone = streams(cls, patch), streams(cls[3:4], patch[3:4])
    for name in ("cls", "patch", "gate", "summary"):
        torch.testing.assert_close(getattr(whole[3:4], name), getattr(alone, name), rtol=1e-4, atol=1e-5)
    assert len(whole[torch.tensor([0, 2])]) == 2


def test_a_grid_that_is_not_square_is_an_error():
    with pytest.raises(ValueError, match="15 patches are not a square grid"):
        DualStream(TokenShape(depth=1, patch=15, width=5), TINY_BACKBONE)


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

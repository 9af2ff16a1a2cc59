"""The built-in encoder: a deterministic filter bank whose tokens mean what its docstring says."""

import numpy as np
import pytest

from data.encoders.gabor import GaborEncoder

N_ORIENTATIONS = 6
FREQUENCIES = {1: (32, 21), 2: (14, 9), 3: (5,)}


def grating(frequency: float, angle_deg: float, phase: float = 0.0, *, side: int = 128) -> np.ndarray:
    """One RGB image of a grating; angle 0 has vertical stripes."""
    y, x = np.mgrid[:side, :side] / side
    angle = np.deg2rad(angle_deg)
    wave = np.cos(2 * np.pi * frequency * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    return np.repeat(np.uint8(np.rint(127.5 + 80 * wave))[..., None], 3, axis=-1)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 128, 128, 3), dtype=np.uint8)


def energies(images: np.ndarray, depth: int) -> np.ndarray:
    """Mean amplitude over the image, (image, frequency, orientation)."""
    cls = GaborEncoder(depths=(depth,)).encode(images).cls[:, 0]
    n = len(FREQUENCIES[depth]) * N_ORIENTATIONS
    return cls[:, :n].reshape(len(images), -1, N_ORIENTATIONS)


def test_tokens_have_the_declared_shape_and_survive_half_precision(pictures):
    encoder = GaborEncoder()
    tokens = encoder.encode(pictures)
    n_patches = encoder.grid[0] * encoder.grid[1]
    assert tokens.cls.shape == (5, len(encoder.depths), encoder.width)
    assert tokens.patch.shape == (5, len(encoder.depths), n_patches, encoder.width)
    assert tokens.cls.dtype == tokens.patch.dtype == np.float32
    np.testing.assert_allclose(tokens.patch.astype(np.float16), tokens.patch, rtol=1e-3, atol=1e-4)
    assert np.abs(tokens.patch).max() < 20


def test_tokens_are_the_same_every_time_and_in_any_batch(pictures):
    encoder = GaborEncoder()
    many = np.concatenate([pictures] * 8)
    again = encoder.encode(many)
    np.testing.assert_array_equal(again.patch[:5], again.patch[35:])
    one = GaborEncoder().encode(pictures[3:4])
    np.testing.assert_allclose(one.patch[0], again.patch[3], rtol=1e-5, atol=1e-6)


def test_chosen_depths_are_those_of_the_whole(pictures):
    whole, some = GaborEncoder().encode(pictures), GaborEncoder(depths=(2, 4)).encode(pictures)
    np.testing.assert_array_equal(some.cls, whole.cls[:, [1, 3]])
    np.testing.assert_array_equal(some.patch, whole.patch[:, [1, 3]])


@pytest.mark.parametrize("depth", FREQUENCIES)
@pytest.mark.parametrize("orientation", range(N_ORIENTATIONS))
def test_a_grating_excites_the_filter_of_its_frequency_and_orientation_most(depth, orientation):
    for index, frequency in enumerate(FREQUENCIES[depth]):
        found = energies(grating(frequency, 30 * orientation)[None], depth)[0]
        assert np.unravel_index(found.argmax(), found.shape) == (index, orientation)


def test_energies_do_not_depend_on_the_phase():
    images = np.stack([grating(9, 60, phase) for phase in np.linspace(0, 2 * np.pi, 8, endpoint=False)])
    found = energies(images, 2)[:, 1, 2]
    assert found.std() < 0.01 * found.mean()


def test_a_patch_sees_its_own_place():
    image = np.full((1, 128, 128, 3), 128, np.uint8)
    image[0, 16 * 2 : 16 * 3, 16 * 5 : 16 * 6] = grating(14, 0)[:16, :16]
    patch = GaborEncoder(depths=(2,)).encode(image).patch[0, 0].reshape(8, 8, -1)
    assert np.unravel_index(patch.sum(-1).argmax(), (8, 8)) == (2, 5)


def test_colour_reaches_depth_3_only_and_4(pictures):
    swapped = pictures[..., [2, 1, 0]]
    ours, theirs = GaborEncoder().encode(pictures).patch, GaborEncoder().encode(swapped).patch
    np.testing.assert_allclose(ours[:, :2], theirs[:, :2], atol=1e-4)
    assert np.abs(ours[:, 2] - theirs[:, 2]).max() > 0.1


def test_images_of_any_size_are_resized_first():
    small, large = (GaborEncoder().encode(grating(9, 30, side=side)[None]) for side in (128, 425))
    correlation = np.corrcoef(small.patch[0, 1].ravel(), large.patch[0, 1].ravel())[0, 1]
    assert correlation > 0.99


def test_spec_tells_encoders_apart():
    assert GaborEncoder().spec() == GaborEncoder().spec()
    assert GaborEncoder().spec() != GaborEncoder(depths=(1, 2)).spec()


@pytest.mark.parametrize("depths", [(), (0, 1), (1, 5), (2, 1), (1, 1)])
def test_impossible_depths_are_refused(depths):
    with pytest.raises(ValueError, match="gabor encoder has depths"):
        GaborEncoder(depths=depths)

"""The network's share against its own definition and at its ends; the noise that is left, planted and found."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from foundation.closed_form.mixture import NOISE_PRIOR_TRIALS, PRIOR_IMAGES, network_share, noise_sd


def predictions(n_images: int, n_voxels: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Of a path and a network, by two laws: (2, image, voxel)."""
    path, network = np.random.default_rng(0).standard_normal((2, n_images, n_voxels)).astype(np.float32)
    return path, network


@pytest.mark.parametrize("n_images", [3, 400])
def test_the_network_has_all_of_what_it_is_right_about_and_nothing_where_the_path_is(n_images):
    path, network = predictions(n_images)
    assert (network_share(path, network, network) == 1).all()
    assert (network_share(path, network, path) == 0).all()
    assert (network_share(path, network, 2 * network - path) == 1).all()  # beyond it: no share above 1
    assert (network_share(path, network, 2 * path - network) == 0).all()


def test_with_many_images_each_voxel_finds_its_own_share():
    path, network = predictions(20_000)
    share = np.linspace(0.05, 0.95, 20)
    noise = 0.5 * np.random.default_rng(1).standard_normal(path.shape)
    found = network_share(path, network, (share * network + (1 - share) * path + noise).astype(np.float32))
    np.testing.assert_allclose(found, share, atol=0.02)


def test_with_few_images_a_voxel_takes_the_share_of_all():
    path, network = predictions(2, n_voxels=500)
    share = np.random.default_rng(1).choice([0.2, 0.6], 500)
    responses = (share * network + (1 - share) * path).astype(np.float32)
    found = network_share(path, network, responses)
    apart, left = (network - path).ravel(), (responses - path).ravel()
    pooled = apart @ left / (apart @ apart)
    np.testing.assert_allclose(found, pooled, atol=0.06)
    assert found.std() < 0.1 * share.std()


def test_the_share_minimises_the_squared_error_and_the_pull_towards_all_voxels():
    path, network = predictions(80, n_voxels=5)
    rng = np.random.default_rng(2)
    responses = (0.4 * network + 0.6 * path + rng.standard_normal(path.shape)).astype(np.float32)
    weight = rng.integers(1, 4, 80).astype(np.float64)
    w = weight / weight.mean()

    def error(share: float, voxels: slice) -> float:
        left = responses[:, voxels] - path[:, voxels] - share * (network - path)[:, voxels]
        return float((w[:, None] * np.square(left, dtype=np.float64)).sum())

    of_all = minimize_scalar(error, bounds=(0, 1), args=(slice(None),)).x
    pull = PRIOR_IMAGES * (w[:, None] * np.square(network - path)).mean()
    for v, found in enumerate(network_share(path, network, responses, weight=weight)):
        own = minimize_scalar(
            lambda s, v=v: error(s, slice(v, v + 1)) + pull * (s - of_all) ** 2, bounds=(0, 1), method="bounded"
        ).x
        assert found == pytest.approx(own, abs=1e-4)


def test_planted_noise_is_found_whatever_the_draws_of_the_latent_vary_already():
    rng = np.random.default_rng(0)
    sd, drawn = np.linspace(0.3, 1.5, 25), rng.uniform(0, 0.05, 25)
    prediction = rng.standard_normal((300, 25)).astype(np.float32)
    image = rng.integers(0, 300, 4000)
    scatter = np.sqrt(sd**2 + drawn) * rng.standard_normal((4000, 25))
    found = noise_sd(prediction, (prediction[image] + scatter).astype(np.float32), image, drawn_variance=drawn)
    np.testing.assert_allclose(found, sd, rtol=0.05)


def test_noise_of_few_trials_is_drawn_towards_that_of_all_voxels():
    scatter = np.random.default_rng(0).standard_normal((5, 400)).astype(np.float32)
    nothing = np.zeros((1, 400), np.float32)
    found = noise_sd(nothing, scatter, np.zeros(5, np.int64), drawn_variance=np.zeros(400))
    alone = np.square(scatter).mean(0)
    share = 5 / (5 + NOISE_PRIOR_TRIALS)
    np.testing.assert_allclose(np.square(found), share * alone + (1 - share) * alone.mean(), rtol=1e-4)


@pytest.mark.parametrize("n_images", [1, 2])
@pytest.mark.parametrize("apart", [0, 1], ids=["alike", "apart"])
def test_one_or_two_images_give_a_share_and_a_noise_of_their_own(n_images, apart):
    path, network = predictions(n_images)
    network = path + apart * (network - path)
    responses = (path + 0.3 * (network - path) + 0.5).astype(np.float32)
    share = network_share(path, network, responses, weight=np.arange(1.0, n_images + 1))
    assert ((share >= 0) & (share <= 1)).all()
    found = noise_sd(path, responses, np.arange(n_images), drawn_variance=np.zeros(20))
    assert ((found > 0.1) & (found < 3)).all()


def test_draws_that_vary_more_than_trials_leave_little_noise_but_some():
    scatter = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    found = noise_sd(np.zeros((1, 3), np.float32), scatter, np.zeros(50, np.int64), drawn_variance=np.full(3, 9.0))
    assert ((found > 0) & (found < 0.02)).all()

"""Where nothing is to be found, each test finds something as often as its level says, and no oftener.

A simulated null: 200 times one subject, whose two systems are equally good, or whose system knows nothing. A count of
false alarms among them has a binomial distribution; its central 99 % at the nominal level is the band.
"""

import numpy as np
import pytest
from scipy import stats

from foundation.evaluation.metrics import squared_error, voxelwise_r
from foundation.evaluation.permutation import draw_orders, permutation_test
from foundation.evaluation.statistics import (
    benjamini_hochberg,
    bootstrap_mean,
    bootstrap_p,
    bootstrap_voxelwise,
    centre,
    paired_wilcoxon,
    percentile_interval,
    resample_counts,
    voxel_moments,
    voxelwise_p,
)

LEVEL, N_SIMULATIONS, N_BOOTSTRAPS, N_VOXELS = 0.05, 200, 400, 20


def assert_nominal(alarms: list[bool]) -> None:
    low, high = stats.binom.interval(0.99, len(alarms), LEVEL)
    assert low <= sum(alarms) <= high, f"{sum(alarms)} of {len(alarms)} false alarms, expected {low:.0f} to {high:.0f}"


def world(rng: np.random.Generator, n_images: int, *, noise: tuple[float, float]) -> tuple[np.ndarray, ...]:
    """Responses whose noise voxels share, and two systems' predictions, off by `noise`."""
    signal = rng.standard_normal((n_images, N_VOXELS))
    shared = rng.standard_normal((n_images, 1))
    y = signal + 0.7 * rng.standard_normal((n_images, N_VOXELS)) + 0.7 * shared
    systems = [signal + sd * rng.standard_normal((n_images, N_VOXELS)) for sd in noise]
    return tuple(x.astype(np.float32) for x in (y, *systems))


def mean_r_difference(rng: np.random.Generator, n_images: int, noise: tuple[float, float]) -> tuple[float, np.ndarray]:
    """The difference of the mean voxel r, and its resamples as the score table makes them."""
    y, a, b = world(rng, n_images, noise=noise)
    counts = resample_counts(n_images, N_BOOTSTRAPS, rng=rng)
    values, samples = [], []
    for x in (a, b):
        drawn = bootstrap_voxelwise(lambda r: r.mean(axis=1, dtype=np.float64), voxel_moments(x, y), counts)
        values.append(voxelwise_r(x, y).mean())
        samples.append(centre(drawn, values[-1]))
    return values[0] - values[1], samples[0] - samples[1]


@pytest.mark.parametrize("n_images", [40, 120, 515])
def test_the_paired_bootstrap_of_equal_systems(n_images):
    rng = np.random.default_rng(n_images)
    found = [mean_r_difference(rng, n_images, (0.8, 0.8))[1] for _ in range(N_SIMULATIONS)]
    assert_nominal([bootstrap_p(samples) <= LEVEL for samples in found])


@pytest.mark.parametrize("n_images", [40, 120, 515])
def test_the_interval_of_a_true_difference_of_mean_r_misses_it(n_images):
    rng = np.random.default_rng(1000 + n_images)
    noise = (0.6, 1.0)
    truth = float(np.subtract(*(1 / np.sqrt((1 + sd**2) * (1 + 0.98)) for sd in noise)))
    intervals = [percentile_interval(mean_r_difference(rng, n_images, noise)[1]) for _ in range(N_SIMULATIONS)]
    assert_nominal([not low <= truth <= high for low, high in intervals])


@pytest.mark.parametrize("n_images", [40, 515])
def test_the_interval_of_a_true_difference_of_squared_errors_misses_it(n_images):
    rng = np.random.default_rng(2000 + n_images)
    noise = (0.6, 1.0)
    missed = []
    for _ in range(N_SIMULATIONS):
        y, a, b = world(rng, n_images, noise=noise)
        counts = resample_counts(n_images, N_BOOTSTRAPS, rng=rng)
        low, high = percentile_interval(bootstrap_mean(squared_error(a, y) - squared_error(b, y), counts))
        missed.append(not low <= noise[0] ** 2 - noise[1] ** 2 <= high)
    assert_nominal(missed)


def test_few_images_need_the_expanded_interval():
    """Twelve images: the plain percentile interval misses too often, the one that is told their number does not."""
    rng = np.random.default_rng(2500)
    n_images, n_simulations = 12, 2000
    values = rng.standard_normal((n_simulations, n_images))
    missed = {None: [], n_images: []}
    for of_images in values:
        samples = bootstrap_mean(of_images, resample_counts(n_images, N_BOOTSTRAPS, rng=rng))
        for told, found in missed.items():
            low, high = percentile_interval(samples, n_images=told)
            found.append(not low <= 0 <= high)
    assert_nominal(missed[n_images])
    assert np.mean(missed[None]) > 0.07


@pytest.mark.parametrize("n_images", [12, 40, 515])
def test_wilcoxon_of_equal_systems(n_images):
    rng = np.random.default_rng(3000 + n_images)
    alarms = []
    for _ in range(N_SIMULATIONS):
        y, a, b = world(rng, n_images, noise=(0.8, 0.8))
        alarms.append(paired_wilcoxon(squared_error(a, y), squared_error(b, y)) <= LEVEL)
    assert_nominal(alarms)


def unrelated(rng: np.random.Generator, n_images: int, n_voxels: int) -> tuple[np.ndarray, np.ndarray]:
    return tuple(rng.standard_normal((n_images, n_voxels)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize("n_images", [12, 120])
def test_the_p_of_a_voxels_correlation(n_images):
    x, y = unrelated(np.random.default_rng(4000 + n_images), n_images, N_SIMULATIONS)
    assert_nominal(list(voxelwise_p(voxelwise_r(x, y), n_images=n_images) <= LEVEL))


@pytest.mark.parametrize("n_repeats", [1, 3])
def test_permutation_p_of_a_voxel_and_of_the_mean(n_repeats):
    """Responses are skewed and voxels share noise, which a permutation takes along; repeats are of unequal number."""
    rng = np.random.default_rng(5000 + n_repeats)
    n_images = 30
    of_voxel, of_mean = [], []
    for _ in range(N_SIMULATIONS):
        image = np.repeat(np.arange(n_images), rng.integers(1, n_repeats + 1, size=n_images))
        signal = rng.exponential(size=(n_images, N_VOXELS)) + rng.exponential(size=(n_images, 1))
        y = (signal[image] + rng.standard_normal((len(image), N_VOXELS))).astype(np.float32)
        x = rng.exponential(size=(n_images, N_VOXELS)).astype(np.float32)
        found = permutation_test(x, y, draw_orders(n_images, 199, rng=rng), image=image)
        of_voxel.append(found.p[0] <= LEVEL)
        of_mean.append(found.mean_r["all"].p_value <= LEVEL)
    assert_nominal(of_voxel)
    assert_nominal(of_mean)


@pytest.mark.parametrize("test", ["voxelwise", "permutation"])
def test_any_discovery_among_voxels_that_all_know_nothing(test):
    rng = np.random.default_rng(6000)
    n_images, n_voxels = 30, 10
    alarms = []
    for _ in range(N_SIMULATIONS):
        x, y = unrelated(rng, n_images, n_voxels)
        if test == "voxelwise":
            q = benjamini_hochberg(voxelwise_p(voxelwise_r(x, y), n_images=n_images))
        else:
            q = permutation_test(x, y, draw_orders(n_images, 999, rng=rng)).q
        alarms.append(bool((q <= LEVEL).any()))
    assert_nominal(alarms)


def test_the_false_share_of_discoveries_where_some_voxels_are_predicted():
    """Benjamini-Hochberg promises the level times the share of voxels without signal."""
    rng = np.random.default_rng(7000)
    n_images, n_voxels, n_null = 60, 100, 50
    shares = []
    for _ in range(N_SIMULATIONS):
        x, y = unrelated(rng, n_images, n_voxels)
        y[:, n_null:] += 0.7 * x[:, n_null:]
        found = benjamini_hochberg(voxelwise_p(voxelwise_r(x, y), n_images=n_images)) <= LEVEL
        shares.append(found[:n_null].sum() / max(found.sum(), 1))
    error = np.std(shares) / np.sqrt(N_SIMULATIONS)
    assert np.mean(shares) == pytest.approx(LEVEL * n_null / n_voxels, abs=2.58 * error)

"""Scores of samples against closed forms, the double sum, and calibration by construction."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from foundation.evaluation.sampling import calibration, coverage, crps, energy_score, samples_needed


def normal_crps(y, mean, sd):
    """Closed form of a normal prediction (Gneiting & Raftery 2007, section 4.2, with their sign turned)."""
    z = (y - mean) / sd
    return sd * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi))


def test_a_normal_ensemble_has_the_normal_crps():
    rng = np.random.default_rng(0)
    mean, sd, y = np.array([[0.0, 1.0, -2.0]]), np.array([[1.0, 0.3, 2.0]]), np.array([[0.4, 2.0, -2.0]])
    found = crps(mean + sd * rng.standard_normal((200_000, 1, 3)), y)
    np.testing.assert_allclose(found, normal_crps(y, mean, sd), rtol=0.01)


@pytest.mark.parametrize("m", [2, 5, 40])
def test_the_crps_is_unbiased_for_any_number_of_samples(m):
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((m, 400, 500)), 1.5 * rng.standard_normal((400, 500))
    # E|X - y| - E|X - X'| / 2 over y ~ N(0, 1.5^2): absolute moments of two normals.
    expected = np.sqrt(2 / np.pi) * np.sqrt(1 + 1.5**2) - 1 / np.sqrt(np.pi)
    assert crps(x, y).mean() == pytest.approx(expected, abs=0.01)


@settings(deadline=None)
@given(m=st.integers(2, 9), seed=st.integers(0, 99))
def test_sorting_gives_the_double_sum_over_pairs(m, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(m, 3, 4)), rng.normal(size=(3, 4))
    pairs = np.abs(x[:, None] - x[None]).sum((0, 1)) / (2 * m * (m - 1))
    np.testing.assert_allclose(crps(x, y), np.abs(x - y).mean(0) - pairs, atol=1e-12)


def test_without_spread_the_crps_is_the_absolute_error():
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((4, 5)), rng.standard_normal((4, 5))
    np.testing.assert_allclose(crps(np.stack([x] * 3), y), np.abs(x - y), atol=1e-12)


def test_the_true_distribution_has_the_lowest_crps():
    rng = np.random.default_rng(3)
    signal = rng.standard_normal((300, 50))
    y = signal + rng.standard_normal((300, 50))
    scored = {sd: crps(signal + sd * rng.standard_normal((30, 300, 50)), y).mean() for sd in (0.01, 0.5, 1, 2)}
    assert min(scored, key=lambda sd: scored[sd]) == 1


def test_trials_are_compared_with_their_images_samples():
    rng = np.random.default_rng(4)
    x, image = rng.standard_normal((19, 3, 4)), np.array([2, 0, 2, 1, 1])
    y = rng.standard_normal((5, 4))
    np.testing.assert_array_equal(crps(x, y, image=image), crps(x[:, image], y))
    np.testing.assert_array_equal(coverage(x, y, level=0.9, image=image), coverage(x[:, image], y, level=0.9))


@pytest.mark.parametrize(("level", "m"), [(0.9, 19), (0.9, 20), (0.9, 57), (0.5, 3), (0.5, 6)])
@pytest.mark.parametrize("draw", ["standard_normal", "standard_exponential"])
def test_samples_of_the_truth_cover_nominally_whatever_their_number(level, m, draw):
    sample = getattr(np.random.default_rng(5), draw)
    assert coverage(sample((m, 300, 400)), sample((300, 400)), level=level).mean() == pytest.approx(level, abs=0.005)


def test_where_samples_end_the_interval_coverage_is_whether_it_holds_the_target():
    rng = np.random.default_rng(6)
    x, y = rng.standard_normal((19, 40, 50)), 2 * rng.standard_normal((40, 50))
    np.testing.assert_allclose(coverage(x, y, level=0.9), (y > x.min(0)) & (y < x.max(0)), atol=1e-12)
    ordered = np.sort(x[:7], axis=0)
    np.testing.assert_allclose(coverage(x[:7], y, level=0.5), (y > ordered[1]) & (y < ordered[5]), atol=1e-12)


def test_quantiles_between_samples_would_cover_too_little():
    rng = np.random.default_rng(7)
    x, y = rng.standard_normal((20, 300, 400)), rng.standard_normal((300, 400))
    low, high = np.quantile(x, [0.05, 0.95], axis=0)
    assert ((low < y) & (y < high)).mean() == pytest.approx(0.82, abs=0.01)


@pytest.mark.parametrize("sd", [0.5, 2.0])
def test_spread_that_is_too_small_or_large_shows_in_the_coverage(sd):
    rng = np.random.default_rng(8)
    found = coverage(sd * rng.standard_normal((999, 100, 20)), rng.standard_normal((100, 20)), level=0.9).mean()
    assert found == pytest.approx(2 * stats.norm.cdf(sd * stats.norm.ppf(0.95)) - 1, abs=0.03)


def test_a_target_that_equals_every_sample_is_covered_nominally():
    assert coverage(np.zeros((19, 1, 1)), np.zeros((1, 1)), level=0.9).item() == pytest.approx(0.9)
    assert coverage(np.zeros((19, 1, 1)), np.ones((1, 1)), level=0.9).item() == 0


def test_too_few_samples_are_refused():
    assert [samples_needed(level) for level in (0.5, 0.8, 0.9, 0.95)] == [3, 9, 19, 39]
    with pytest.raises(ValueError, match="90% needs at least 19 samples, got 18"):
        coverage(np.zeros((18, 1, 1)), np.zeros((1, 1)), level=0.9)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        crps(np.zeros((1, 1, 1)), np.zeros((1, 1)))


# -- calibration over levels -------------------------------------------------------------------------------------------

LEVELS = np.arange(1, 10) / 10


def test_calibration_is_the_mean_coverage_of_each_level_across_blocks_of_voxels():
    rng = np.random.default_rng(10)
    x, y, image = rng.standard_normal((25, 6, 300)), rng.standard_normal((11, 300)), rng.integers(0, 6, size=11)
    expected = [coverage(x, y, level=level, image=image).mean() for level in LEVELS]
    np.testing.assert_allclose(calibration(x, y, LEVELS, image=image), expected, rtol=1e-12)
    np.testing.assert_allclose(calibration(x, y[:6], LEVELS), calibration(x, y[:6], LEVELS, image=np.arange(6)))


def test_samples_of_the_truth_lie_on_the_diagonal_and_others_off_it():
    rng = np.random.default_rng(11)
    y = rng.standard_normal((200, 200))
    found = {sd: calibration(sd * rng.standard_normal((20, 200, 200)), y, LEVELS) for sd in (0.6, 1, 1.6)}
    np.testing.assert_allclose(found[1], LEVELS, atol=0.01)
    assert (found[0.6] < LEVELS - 0.02).all()
    assert (found[1.6] > LEVELS + 0.02).all()


def test_levels_that_so_few_samples_cannot_tell_are_undefined():
    x, y = np.random.default_rng(12).standard_normal((9, 3, 4)), np.zeros((3, 4))
    assert np.isnan(calibration(x, y, LEVELS)).tolist() == [False] * 8 + [True]
    assert np.isnan(calibration(x[:, :, :0], y[:, :0], LEVELS)).all()


# -- the energy score of patterns --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(m=st.integers(2, 7), n_voxels=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_energy_score_is_the_double_sum_over_pairs_of_samples(m, n_voxels, seed):
    rng = np.random.default_rng(seed)
    x, y, image = rng.normal(size=(m, 3, n_voxels)), rng.normal(size=(5, n_voxels)), np.array([2, 0, 2, 1, 2])
    expected = []
    for of_image, row in zip(image, y, strict=True):
        to_target = sum(np.linalg.norm(x[i, of_image] - row) for i in range(m)) / m
        pairs = sum(np.linalg.norm(x[i, of_image] - x[j, of_image]) for i in range(m) for j in range(m))
        expected.append(to_target - pairs / (2 * m * (m - 1)))
    np.testing.assert_allclose(energy_score(x, y, image=image), expected, atol=1e-12)


def test_of_one_voxel_the_energy_score_is_the_crps():
    rng = np.random.default_rng(13)
    x, y = rng.standard_normal((12, 30, 1)), rng.standard_normal((30, 1))
    np.testing.assert_allclose(energy_score(x, y), crps(x, y)[:, 0], atol=1e-12)


@pytest.mark.parametrize("m", [2, 5, 40])
def test_the_energy_score_is_unbiased_for_any_number_of_samples(m):
    """Of the true distribution, ``E|X - X'| / 2``; the norm of a normal vector is chi distributed."""
    rng = np.random.default_rng(14)
    n_voxels = 4
    expected = np.sqrt(2) * stats.chi(n_voxels).mean() / 2
    x, y = rng.standard_normal((m, 20_000, n_voxels)), rng.standard_normal((20_000, n_voxels))
    assert energy_score(x, y).mean() == pytest.approx(expected, abs=0.02)


def test_the_energy_score_sees_how_voxels_vary_together_and_the_crps_does_not():
    rng = np.random.default_rng(15)

    def trials(*shape: int, shared: float) -> np.ndarray:
        own, common = rng.standard_normal((*shape, 30)), rng.standard_normal((*shape, 1))
        return np.sqrt(shared) * common + np.sqrt(1 - shared) * own

    y = trials(2000, shared=0.8)
    together, apart = trials(30, 2000, shared=0.8), trials(30, 2000, shared=0.0)
    assert energy_score(apart, y).mean() > 1.05 * energy_score(together, y).mean()
    assert crps(apart, y).mean() == pytest.approx(crps(together, y).mean(), rel=0.02)


def test_single_precision_far_from_zero_keeps_the_energy_score():
    rng = np.random.default_rng(16)
    x, y = rng.standard_normal((6, 4, 50)).astype(np.float32), rng.standard_normal((4, 50)).astype(np.float32)
    far = energy_score(x + np.float32(1000), y + np.float32(1000))
    np.testing.assert_allclose(far, energy_score(x, y), rtol=1e-3)


def test_the_energy_score_of_no_voxel_is_zero_and_of_one_sample_refused():
    np.testing.assert_array_equal(energy_score(np.zeros((3, 2, 0)), np.zeros((2, 0))), 0)
    with pytest.raises(ValueError, match="energy score needs at least 2 samples, got 1"):
        energy_score(np.zeros((1, 1, 1)), np.zeros((1, 1)))

"""Resampling and tests against naive loops, scipy and simulated coverage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from foundation.evaluation.metrics import mse, patternwise_r, squared_error, voxelwise_r
from foundation.evaluation.statistics import (
    benjamini_hochberg,
    bootstrap,
    bootstrap_mean,
    bootstrap_p,
    bootstrap_voxelwise,
    centre,
    paired_wilcoxon,
    percentile_interval,
    resample_counts,
    voxel_moments,
    voxelwise_p,
    weighted_voxelwise_r,
)


def pair(rng: np.random.Generator, n_images: int, n_voxels: int) -> tuple[np.ndarray, np.ndarray]:
    prediction = rng.standard_normal((n_images, n_voxels)).astype(np.float32)
    return prediction, (prediction + 2 * rng.standard_normal((n_images, n_voxels))).astype(np.float32)


def test_resamples_draw_as_many_images_as_there_are():
    counts = resample_counts(20, 50, rng=np.random.default_rng(0))
    assert counts.shape == (50, 20)
    assert (counts.sum(axis=1) == 20).all()


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 50.0, -3000.0]))
def test_weighted_r_is_the_r_of_the_repeated_rows(seed, offset):
    rng = np.random.default_rng(seed)
    x, y = pair(rng, 40, 6)
    y += np.float32(offset)
    counts = resample_counts(40, 70, rng=rng)
    naive = bootstrap(voxelwise_r, x, y, counts)
    np.testing.assert_allclose(weighted_voxelwise_r(voxel_moments(x, y), counts), naive, atol=2e-5)


def test_an_image_takes_its_trials_along():
    rng = np.random.default_rng(1)
    x, _ = pair(rng, 15, 5)
    image = rng.permutation(np.repeat(np.arange(15), rng.integers(1, 4, size=15)))
    trials = (x[image] + rng.standard_normal((len(image), 5))).astype(np.float32)
    counts = resample_counts(15, 40, rng=rng)
    fast = weighted_voxelwise_r(voxel_moments(x, trials, image=image), counts)
    for row, count in zip(fast, counts, strict=True):
        drawn = np.concatenate([np.flatnonzero(image == i) for i in range(15) for _ in range(int(count[i]))])
        np.testing.assert_allclose(row, voxelwise_r(x[image[drawn]], trials[drawn]), atol=1e-5)


def test_blocks_of_resamples_change_nothing():
    rng = np.random.default_rng(2)
    moments = voxel_moments(*pair(rng, 30, 7))
    counts = resample_counts(30, 150, rng=rng)
    blocked = bootstrap_voxelwise(lambda r: r.mean(axis=1), moments, counts)
    np.testing.assert_allclose(blocked, weighted_voxelwise_r(moments, counts).mean(axis=1), rtol=1e-5)


def test_a_voxel_without_variance_in_a_resample_is_undefined_there():
    rng = np.random.default_rng(3)
    x, y = pair(rng, 6, 3)
    y[:, 1] = 0.3
    counts = np.array([[1, 1, 1, 1, 1, 1], [6, 0, 0, 0, 0, 0]], dtype=np.float32)
    r = weighted_voxelwise_r(voxel_moments(x, y), counts)
    assert np.isnan(r).tolist() == [[False, True, False], [True, True, True]]


def test_bootstrap_of_a_mean_over_images_is_the_naive_loop():
    rng = np.random.default_rng(4)
    x, y = pair(rng, 25, 9)
    counts = resample_counts(25, 60, rng=rng)
    np.testing.assert_allclose(bootstrap_mean(squared_error(x, y), counts), bootstrap(mse, x, y, counts), rtol=1e-6)
    naive = bootstrap(lambda a, b: patternwise_r(a, b).mean(), x, y, counts)
    np.testing.assert_allclose(bootstrap_mean(patternwise_r(x, y), counts), naive, rtol=1e-6)


def test_bootstrap_mean_leaves_out_undefined_images_and_weighs_the_rest():
    values, weights = np.array([1.0, np.nan, 4.0]), np.array([1, 5, 3])
    counts = np.array([[1, 1, 1], [2, 0, 1], [0, 3, 0]], dtype=np.float32)
    np.testing.assert_allclose(bootstrap_mean(values, counts, weights=weights), [13 / 4, 14 / 5, np.nan])


def test_interval_covers_the_true_correlation_at_its_level():
    rng = np.random.default_rng(5)
    n_images, truth, n_worlds = 120, 0.5, 2000
    x = rng.standard_normal((n_images, n_worlds)).astype(np.float32)
    y = (truth * x + np.sqrt(1 - truth**2) * rng.standard_normal((n_images, n_worlds))).astype(np.float32)
    r = voxelwise_r(x, y)
    samples = weighted_voxelwise_r(voxel_moments(x, y), resample_counts(n_images, 500, rng=rng))
    for shift in (False, True):
        drawn = [centre(s, v) if shift else s for s, v in zip(samples.T, r, strict=True)]
        low, high = np.transpose([percentile_interval(s) for s in drawn])
        assert np.mean((low <= truth) & (truth <= high)) == pytest.approx(0.94, abs=0.02)


def test_centred_samples_keep_their_spread_and_hold_their_estimate():
    samples = np.array([1.0, 2.0, np.nan, 6.0])
    np.testing.assert_allclose(centre(samples, 10.0), [8, 9, np.nan, 13])


def test_interval_of_nothing_is_undefined():
    assert np.isnan(percentile_interval(np.empty(0))).all()
    assert np.isnan(percentile_interval(np.array([np.nan]))).all()
    assert percentile_interval(np.array([np.nan, 1.0, 3.0]), level=0.5) == (1.5, 2.5)


def test_bootstrap_p_is_two_sided_and_never_zero():
    assert bootstrap_p(np.full(999, 0.2)) == pytest.approx(2 / 1000)
    assert bootstrap_p(np.r_[np.full(500, -1.0), np.full(500, 1.0)]) == 1.0
    assert bootstrap_p(np.r_[np.full(49, -1.0), np.full(950, 1.0)]) == pytest.approx(0.1)
    assert np.isnan(bootstrap_p(np.empty(0)))


def test_wilcoxon_is_scipys_on_complete_pairs():
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal(40), rng.standard_normal(40) + 0.3
    assert paired_wilcoxon(a, b) == pytest.approx(stats.wilcoxon(a, b).pvalue)
    a[3], b[7] = np.nan, np.nan
    kept = np.isfinite(a - b)
    assert paired_wilcoxon(a, b) == pytest.approx(stats.wilcoxon(a[kept], b[kept]).pvalue)
    assert paired_wilcoxon(a[kept], a[kept]) == 1.0
    assert np.isnan(paired_wilcoxon(np.full(3, np.nan), np.ones(3)))


def test_voxelwise_p_is_pearsonrs():
    rng = np.random.default_rng(7)
    x, y = rng.standard_normal((25, 30)), rng.standard_normal((25, 30))
    x[:, 4] = 1.0
    r = voxelwise_r(x, y)
    expected = [np.nan if v == 4 else stats.pearsonr(x[:, v], y[:, v]).pvalue for v in range(30)]
    np.testing.assert_allclose(voxelwise_p(r, n_images=25), expected, rtol=1e-7)
    assert np.isnan(voxelwise_p(r, n_images=2)).all()


def test_false_discovery_rate_is_scipys_without_the_undefined():
    p = np.random.default_rng(8).uniform(size=50) ** 3
    with_gaps = np.insert(p, [0, 20, 50], np.nan)
    adjusted = benjamini_hochberg(with_gaps)
    np.testing.assert_allclose(adjusted[np.isfinite(with_gaps)], stats.false_discovery_control(p))
    assert np.isnan(adjusted[np.isnan(with_gaps)]).all()
    assert np.isnan(benjamini_hochberg(np.full(3, np.nan))).all()


def test_false_discovery_rate_is_statsmodels():
    p = np.r_[np.random.default_rng(9).uniform(size=80) ** 2, 0.0, 1.0, 0.03, 0.03]
    rejected, adjusted, *_ = multipletests(p, alpha=0.05, method="fdr_bh")
    np.testing.assert_allclose(benjamini_hochberg(p), adjusted, atol=1e-15)
    np.testing.assert_array_equal(benjamini_hochberg(p) <= 0.05, rejected)


def test_the_interval_of_a_mean_is_scipys_percentile_bootstrap():
    rng = np.random.default_rng(10)
    values = rng.exponential(size=60)
    ours = percentile_interval(bootstrap_mean(values, resample_counts(60, 20_000, rng=rng)))
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=rng).confidence_interval
    np.testing.assert_allclose(ours, theirs, atol=0.01)


def test_the_paired_bootstrap_of_two_systems_is_scipys():
    """The difference of two voxels' correlations with one target, images drawn together."""
    rng = np.random.default_rng(11)
    y = rng.standard_normal((50, 1)).astype(np.float32)
    a, b = (y + s * rng.standard_normal((50, 1)).astype(np.float32) for s in (1.0, 1.3))
    counts = resample_counts(50, 8000, rng=rng)
    ours = np.subtract(*(weighted_voxelwise_r(voxel_moments(x, y), counts)[:, 0] for x in (a, b)))

    def difference(y, a, b):
        return stats.pearsonr(y, a).statistic - stats.pearsonr(y, b).statistic

    theirs = stats.bootstrap(
        (y[:, 0], a[:, 0], b[:, 0]),
        difference,
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=8000,
        rng=rng,
    )
    np.testing.assert_allclose(percentile_interval(ours), theirs.confidence_interval, atol=0.012)
    tail = np.mean(theirs.bootstrap_distribution <= 0)
    error = np.sqrt(2 * tail * (1 - tail) / 8000)
    assert bootstrap_p(ours) == pytest.approx(2 * min(tail, 1 - tail), abs=3.5 * 2 * error)


def test_the_expanded_interval_of_a_normal_mean_is_students():
    """The bootstrap of a mean is about normal with the variance of the sample over n; t's interval is wider by both."""
    values = np.random.default_rng(12).standard_normal(15)
    normal = values.mean() + values.std() / np.sqrt(15) * stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose(percentile_interval(normal, n_images=15), expected, rtol=1e-3)
    low, high = percentile_interval(normal)
    assert expected.low < low < high < expected.high
    assert percentile_interval(normal, n_images=1) == (low, high)


@pytest.mark.parametrize("n_images", [10, 20, 60])
def test_p_is_below_five_per_cent_where_the_interval_of_few_images_leaves_out_zero(n_images):
    """For any place of zero; up to the one that is added to both counts."""
    rng = np.random.default_rng(3)
    samples = rng.standard_normal(20_000)
    for shift in np.linspace(1.5, 3.5, 41):
        low, _ = percentile_interval(samples + shift, n_images=n_images)
        p = bootstrap_p(samples + shift, n_images=n_images)
        assert (low > 0) == (p < 0.05) or abs(p - 0.05) < 2e-3
    assert bootstrap_p(samples + 2.2, n_images=n_images) > bootstrap_p(samples + 2.2)

"""Metrics against scipy and their invariants."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from foundation.evaluation.metrics import mse, patternwise_r, r2_ceiling, squared_error, voxelwise_r

seeds = st.integers(0, 2**32 - 1)


def pair(seed: int, n_images: int, n_voxels: int, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    prediction = rng.standard_normal((n_images, n_voxels)).astype(dtype)
    return prediction, (prediction + rng.standard_normal((n_images, n_voxels)) + 3).astype(dtype)


@given(seeds, st.integers(2, 30), st.integers(2, 20), st.sampled_from(["float32", "float64"]))
def test_r_is_pearsons_along_either_axis(seed, n_images, n_voxels, dtype):
    x, y = pair(seed, n_images, n_voxels, dtype)
    x64, y64 = x.astype(float), y.astype(float)
    np.testing.assert_allclose(voxelwise_r(x, y), stats.pearsonr(x64, y64, axis=0).statistic, atol=1e-9)
    np.testing.assert_allclose(patternwise_r(x, y), stats.pearsonr(x64, y64, axis=1).statistic, atol=1e-9)


@given(seeds)
def test_permuting_voxels_permutes_voxelwise_r_and_leaves_patternwise_r(seed):
    x, y = pair(seed, 12, 9)
    order = np.random.default_rng(seed).permutation(9)
    np.testing.assert_allclose(voxelwise_r(x[:, order], y[:, order]), voxelwise_r(x, y)[order], atol=1e-12)
    np.testing.assert_allclose(patternwise_r(x[:, order], y[:, order]), patternwise_r(x, y), atol=1e-12)


def test_blocks_change_nothing(monkeypatch):
    x, y = pair(0, 40, 30)
    whole = voxelwise_r(x, y), patternwise_r(x, y), squared_error(x, y)
    monkeypatch.setattr("foundation.evaluation.metrics.BLOCK_ELEMENTS", 64)
    for blocked, expected in zip((voxelwise_r(x, y), patternwise_r(x, y), squared_error(x, y)), whole, strict=True):
        np.testing.assert_allclose(blocked, expected, rtol=1e-12)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
def test_a_constant_has_no_correlation_rather_than_none(constant):
    x, y = pair(1, 7, 5)
    x[:, 2], y[:, 3] = constant, constant
    assert np.isnan(voxelwise_r(x, y)).tolist() == [False, False, True, True, False]
    x, y = pair(1, 5, 7)
    x[2], y[3] = constant, constant
    assert np.isnan(patternwise_r(x, y)).tolist() == [False, False, True, True, False]


def test_a_nan_stays_in_its_voxel_and_image():
    x, y = pair(2, 6, 4)
    x[1, 2] = np.nan
    assert np.isnan(voxelwise_r(x, y)).tolist() == [False, False, True, False]
    assert np.isnan(patternwise_r(x, y)).tolist() == [False, True, False, False, False, False]


def test_one_image_or_one_voxel_has_no_correlation():
    assert np.isnan(voxelwise_r(*pair(3, 1, 4))).all()
    assert np.isnan(patternwise_r(*pair(3, 4, 1))).all()


def test_small_variations_on_a_large_offset_survive_single_precision():
    rng = np.random.default_rng(4)
    x = (1000 + rng.standard_normal((300, 4))).astype(np.float32)
    y = (-500 + rng.standard_normal((300, 4))).astype(np.float32)
    np.testing.assert_allclose(voxelwise_r(x, y), stats.pearsonr(x.astype(float), y.astype(float)).statistic, atol=1e-9)


@given(seeds)
def test_mse_is_the_same_voxelwise_and_patternwise(seed):
    x, y = pair(seed, 8, 6)
    per_voxel = np.mean((x.astype(float) - y) ** 2, axis=0)
    assert mse(x, y) == pytest.approx(per_voxel.mean())
    assert mse(x, y) == pytest.approx(squared_error(x, y).mean())


def test_mse_of_nothing_is_undefined():
    assert np.isnan(mse(np.zeros((0, 3)), np.zeros((0, 3))))
    assert np.isnan(mse(np.zeros((3, 0)), np.zeros((3, 0))))


def test_ceiling_ratio_keeps_the_sign_clips_and_counts():
    r = np.array([0.5, -0.5, 0.8, 0.3, np.nan, 0.2])
    ceiling = np.array([0.5, 0.5, 0.4, 0.001, 0.5, np.nan])
    ratio = r2_ceiling(r, ceiling)
    np.testing.assert_allclose(ratio.unclipped, [0.5, -0.5, 1.6, np.nan, np.nan, np.nan])
    np.testing.assert_allclose(ratio.clipped, [0.5, 0, 1, np.nan, np.nan, np.nan])
    assert ratio.counted.tolist() == [True, True, True, False, False, False]
    assert ratio.n_too_low == 2


def test_chance_averages_to_zero_over_the_ceiling():
    rng = np.random.default_rng(5)
    r = voxelwise_r(rng.standard_normal((30, 20_000)), rng.standard_normal((30, 20_000)))
    assert r2_ceiling(r, np.full(20_000, 0.3)).unclipped.mean() == pytest.approx(0, abs=0.005)

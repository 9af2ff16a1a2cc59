"""The permutation null against loops, scipy's exact enumeration and its own invariants."""

from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from foundation.evaluation.metrics import voxelwise_r
from foundation.evaluation.permutation import draw_orders, permutation_test, permuted_r
from foundation.evaluation.statistics import benjamini_hochberg, voxel_moments


def measured(seed: int, *, n_images: int = 30, n_voxels: int = 6, signal: float = 0.5, repeats=(1, 4)):
    """A prediction, trials of unequal number shuffled in time, and the image of each."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_images, n_voxels)).astype(np.float32)
    image = rng.permutation(np.repeat(np.arange(n_images), rng.integers(*repeats, size=n_images)))
    y = (signal * x[image] + rng.standard_normal((len(image), n_voxels))).astype(np.float32)
    return x, y, image


@pytest.mark.parametrize("offset", [0, 300])
def test_an_image_takes_its_trials_along_to_another_images_prediction(offset):
    x, y, image = measured(0)
    orders = draw_orders(30, 40, rng=np.random.default_rng(1))
    fast = permuted_r(voxel_moments(x, y + np.float32(offset), image=image), orders)
    for found, order in zip(fast, orders, strict=True):
        np.testing.assert_allclose(found, voxelwise_r(x[order][image], y), atol=2e-5)


def test_p_values_are_those_of_the_loop_across_blocks_of_voxels():
    x, y, image = measured(2, n_voxels=300, signal=0.2)
    orders = draw_orders(30, 60, rng=np.random.default_rng(3))
    early = np.arange(300) % 2 == 0
    found = permutation_test(x, y, orders, image=image, rois={"all": np.ones(300, bool), "early": early})
    r = voxelwise_r(x[image], y)
    null = np.stack([voxelwise_r(x[order][image], y) for order in orders])
    np.testing.assert_allclose(found.r, r, atol=2e-5)
    np.testing.assert_allclose(found.p, (1 + (null >= r).sum(axis=0)) / 61)
    np.testing.assert_array_equal(found.q, benjamini_hochberg(found.p))
    for roi, mask in (("all", slice(None)), ("early", early)):
        test = found.mean_r[roi]
        assert test.value == pytest.approx(r[mask].mean(), abs=1e-5)
        np.testing.assert_allclose(test.null, null[:, mask].mean(axis=1), atol=1e-5)
        assert test.p_value == (1 + (null[:, mask].mean(axis=1) >= r[mask].mean()).sum()) / 61
        assert test.n_voxels == len(r[mask])


@pytest.mark.parametrize("signal", [0.0, 1.0])
def test_all_orders_give_scipys_exact_p(signal):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((6, 3)).astype(np.float32)
    y = (signal * x + rng.standard_normal((6, 3))).astype(np.float32)
    orders = np.array(list(permutations(range(6))))[1:]  # the first is the data's own, which p counts as the 1
    expected = [
        stats.permutation_test(
            (x[:, v],),
            lambda one, v=v: stats.pearsonr(one, y[:, v]).statistic,
            permutation_type="pairings",
            alternative="greater",
            vectorized=False,
            n_resamples=np.inf,
        ).pvalue
        for v in range(3)
    ]
    np.testing.assert_allclose(permutation_test(x, y, orders).p, expected, atol=1e-12)


def test_random_orders_agree_with_scipys():
    rng = np.random.default_rng(5)
    x = rng.standard_normal((40, 1)).astype(np.float32)
    y = (0.25 * x + rng.standard_normal((40, 1))).astype(np.float32)
    theirs = stats.permutation_test(
        (x[:, 0],),
        lambda one: stats.pearsonr(one, y[:, 0]).statistic,
        permutation_type="pairings",
        alternative="greater",
        vectorized=False,
        n_resamples=3000,
        rng=np.random.default_rng(7),
    )
    ours = permutation_test(x, y, draw_orders(40, 3000, rng=np.random.default_rng(8)))
    p = float(theirs.pvalue)
    assert 0.005 < p < 0.5  # where the two could differ
    assert ours.p[0] == pytest.approx(p, abs=3.5 * np.sqrt(2 * p * (1 - p) / 3000))
    assert ours.mean_r["all"].p_value == ours.p[0]


def test_a_signal_has_the_smallest_p_and_one_predicted_backwards_has_none():
    x, y, image = measured(9, n_images=80, signal=1.0)
    x[:, 3] *= -1
    found = permutation_test(x, y, draw_orders(80, 199, rng=np.random.default_rng(10)), image=image)
    assert found.p.tolist() == pytest.approx([1 / 200] * 3 + [1.0] + [1 / 200] * 2)


def test_permuting_voxels_permutes_their_p():
    x, y, image = measured(11, n_voxels=20)
    orders, voxels = draw_orders(30, 50, rng=np.random.default_rng(12)), np.random.default_rng(13).permutation(20)
    one, other = (permutation_test(x[:, v], y[:, v], orders, image=image) for v in (voxels, np.arange(20)))
    np.testing.assert_array_equal(one.p, other.p[voxels])


def test_voxels_without_variance_are_undefined_and_left_out_of_the_mean():
    x, y, image = measured(14)
    x[:, 1], y[:, 4] = 0.3, -2.0
    orders = draw_orders(30, 20, rng=np.random.default_rng(15))
    rois = {"all": np.ones(6, bool), "constant": np.arange(6) == 1, "empty": np.zeros(6, bool)}
    found = permutation_test(x, y, orders, image=image, rois=rois)
    undefined = [False, True, False, False, True, False]
    for values in (found.r, found.p, found.q):
        assert np.isnan(values).tolist() == undefined
    assert found.mean_r["all"].n_voxels == 4
    assert found.mean_r["all"].value == pytest.approx(np.nanmean(found.r))
    for roi in ("constant", "empty"):
        assert np.isnan(found.mean_r[roi].p_value)
        assert found.mean_r[roi].n_voxels == 0


def test_orders_are_permutations_and_the_generators():
    orders = draw_orders(12, 500, rng=np.random.default_rng(16))
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(12), (500, 1)))
    np.testing.assert_array_equal(orders, draw_orders(12, 500, rng=np.random.default_rng(16)))
    assert len(np.unique(orders, axis=0)) == 500


def test_orders_that_do_not_fit_are_refused():
    x, y, image = measured(17)
    with pytest.raises(ValueError, match=r"orders are \(0, 30\), expected \(permutation, image\) with at least one"):
        permutation_test(x, y, np.zeros((0, 30), int), image=image)

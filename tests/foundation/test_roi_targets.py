"""ROI targets against closed forms, a loop over ROIs, and what noise does to them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.phantom import PhantomConfig, read_truth, write_phantom
from data.preprocess import samples, training_reliability
from data.splits import split_of
from data.store import PooledStore
from foundation.roi_targets import (
    low_rank_weights,
    mean_weights,
    reliability_weights,
    roi_targets,
    top_p_targets,
    voxel_weights,
)

PARCEL = torch.tensor([1, 0, 1, 2, 1, 0])


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_mean_is_each_rois_mean():
    y = torch.tensor([[1.0, 2, 3, 4, 5, 6]])
    torch.testing.assert_close(roi_targets(y, PARCEL, mean_weights(PARCEL), n_roi=3), torch.tensor([[4.0, 3, 4]]))


def test_reliability_weights_have_their_closed_form():
    reliability = torch.tensor([0.3, 0.0, 0.1, 0.5, math.nan, -0.2])
    expected = torch.tensor([0.75, 0.5, 0.25, 1.0, 0.0, 0.5])  # ROI 0 has no reliable voxel: equal weights
    torch.testing.assert_close(reliability_weights(PARCEL, reliability), expected)


def test_without_reliability_the_weights_are_equal_and_the_log_says_so(caplog):
    torch.testing.assert_close(voxel_weights("reliability-weighted", PARCEL), mean_weights(PARCEL))
    assert "weigh the same" in caplog.text


@pytest.mark.parametrize("p", [0.1, 0.5, 0.7, 1.0])
def test_top_p_is_the_mean_of_the_highest_values_of_a_loop(p):
    parcel = torch.randint(0, 5, (60,), generator=torch.Generator().manual_seed(1))
    y = noise(7, 60)
    found = top_p_targets(y, parcel, n_roi=5, p=p)
    for k in range(5):
        inside = y[:, parcel == k]
        kept = max(1, round(p * inside.shape[1]))
        torch.testing.assert_close(found[:, k], inside.sort(dim=1, descending=True).values[:, :kept].mean(1))


def test_top_p_of_everything_is_the_mean():
    y = noise(9, 6)
    torch.testing.assert_close(
        top_p_targets(y, PARCEL, n_roi=3, p=1.0), roi_targets(y, PARCEL, mean_weights(PARCEL), n_roi=3)
    )


def test_pure_noise_lifts_top_p_and_leaves_the_mean_at_zero():
    parcel = torch.arange(30_000) // 1000
    y = noise(20, 30_000)
    assert roi_targets(y, parcel, mean_weights(parcel), n_roi=30).mean().abs() < 0.01
    normal = torch.distributions.Normal(0.0, 1.0)
    threshold = normal.icdf(torch.tensor(0.3))
    bias = float(normal.log_prob(threshold).exp() / 0.7)  # the mean of a normal above its 30th percentile
    assert bias == pytest.approx(0.497, abs=0.001)
    assert float(top_p_targets(y, parcel, n_roi=30).mean()) == pytest.approx(bias, abs=0.01)


def test_linear_targets_of_repeat_means_are_means_of_trial_targets_and_top_p_is_not():
    parcel = torch.arange(60) // 20
    trials = noise(3, 8, 60)
    weights = reliability_weights(parcel, torch.rand(60, generator=torch.Generator().manual_seed(2)))
    of_means = roi_targets(trials.mean(0), parcel, weights, n_roi=3)
    of_trials = torch.stack([roi_targets(y, parcel, weights, n_roi=3) for y in trials]).mean(0)
    torch.testing.assert_close(of_means, of_trials)
    of_trials = torch.stack([top_p_targets(y, parcel, n_roi=3) for y in trials]).mean(0)
    assert (of_trials > top_p_targets(trials.mean(0), parcel, n_roi=3)).all()


# -- low rank ----------------------------------------------------------------------------------------------------------


def test_low_rank_weights_average_what_the_leading_axes_rebuild():
    parcel = torch.arange(24).remainder(2)
    train, other = noise(50, 24), noise(5, 24, seed=1)
    weights = low_rank_weights(parcel, train, rank=3)
    for k in (0, 1):
        _, _, axes = torch.linalg.svd(train[:, parcel == k], full_matrices=False)
        rebuilt = other[:, parcel == k] @ axes[:3].T @ axes[:3]
        torch.testing.assert_close(roi_targets(other, parcel, weights, n_roi=2)[:, k], rebuilt.mean(1))


@pytest.mark.parametrize("chosen", [{"rank": 6}, {"rank": 99}, {"explained": 1.0}])
def test_low_rank_with_every_axis_is_the_mean(chosen):
    parcel = torch.arange(18) // 6
    torch.testing.assert_close(low_rank_weights(parcel, noise(40, 18), **chosen), mean_weights(parcel))


@settings(deadline=None, max_examples=20)
@given(n_axis=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_explained_share_finds_the_rank_of_the_signal(n_axis, seed):
    signal = noise(200, n_axis, seed=seed) @ noise(n_axis, 10, seed=seed + 100)
    parcel = torch.zeros(10, dtype=torch.int64)
    found = low_rank_weights(parcel, signal + 1e-4 * noise(200, 10, seed=1), explained=0.999_99)
    torch.testing.assert_close(found, low_rank_weights(parcel, signal, rank=n_axis), atol=1e-3, rtol=0)


def test_an_roi_with_more_voxels_than_images_keeps_its_images():
    train, parcel = noise(4, 30), torch.zeros(30, dtype=torch.int64)
    weights = low_rank_weights(parcel, train, rank=4)
    torch.testing.assert_close(roi_targets(train, parcel, weights, n_roi=1)[:, 0], train.mean(1))


def test_each_linear_choice_ignores_the_other_rois_and_the_order_of_voxels():
    train, order = noise(40, 30), torch.randperm(30, generator=torch.Generator().manual_seed(3))
    parcel, reliability = torch.arange(30) // 10, torch.linspace(0.1, 0.9, 30)
    for target in ("mean", "reliability-weighted", "low-rank"):
        weights = voxel_weights(target, parcel, responses=train, reliability=reliability)
        moved = voxel_weights(target, parcel[order], responses=train[:, order], reliability=reliability[order])
        torch.testing.assert_close(moved, weights[order])
        alone = voxel_weights(target, parcel[:10], responses=train[:, :10], reliability=reliability[:10])
        torch.testing.assert_close(alone, weights[:10])


# -- on simulated subjects ---------------------------------------------------------------------------------------------


def test_weights_from_training_trials_bring_targets_nearer_to_the_signal(tmp_path):
    """The denoised targets of training images, against the same weighting of the true signal."""
    write_phantom(tmp_path / "p.zarr", PhantomConfig(subjects=1, sessions=6, trials_per_session=200, voxels=240))
    store = PooledStore.open(tmp_path / "p.zarr")
    subject, split, truth = store.subject(1), split_of(store), read_truth(tmp_path / "p.zarr").subjects["subj01"]
    train = samples(subject, split, "train")
    reliability, reason = training_reliability(subject, split)
    assert reliability is not None, reason
    signal = truth.signal * truth.ncsnr / np.sqrt(truth.ncsnr**2 + 1)  # in units of a trial's standard deviation
    signal = torch.from_numpy(signal[np.searchsorted(truth.image, train.image)]).float()
    parcel, responses = torch.arange(240) // 30, torch.from_numpy(train.responses)
    found = {}
    for target in ("mean", "reliability-weighted", "low-rank"):
        weights = voxel_weights(target, parcel, responses=responses, reliability=torch.from_numpy(reliability))
        t, s = (roi_targets(y, parcel, weights, n_roi=8).numpy() for y in (responses, signal))
        found[target] = np.mean([np.corrcoef(t[:, k], s[:, k])[0, 1] for k in range(8)])
    assert found["reliability-weighted"] > found["low-rank"] > found["mean"]


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match="'top-p' aren't a weighting"):
        voxel_weights("top-p", PARCEL)
    with pytest.raises(ValueError, match="fitted on training responses"):
        voxel_weights("low-rank", PARCEL)
    with pytest.raises(ValueError, match="at least one axis, got rank 0"):
        low_rank_weights(PARCEL, noise(4, 6), rank=0)
    with pytest.raises(ValueError, match=r"got 1\.5"):
        top_p_targets(noise(2, 6), PARCEL, n_roi=3, p=1.5)

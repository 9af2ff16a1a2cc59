"""The noise ceiling against simulated truth, closed forms and split halves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.noise_ceiling import ncsnr, noise_ceiling, pattern_ceiling, single_trial_ceiling, split_half_reliability
from data.phantom import PhantomConfig, read_truth, write_phantom
from data.preprocess import standardise
from data.store import PooledStore


def simulate(rng: np.random.Generator, *, n_repeats: np.ndarray, snr: np.ndarray, noise: float = 1.7):
    """Trials "trial voxel", the image of each (shuffled in time), and the signal "image voxel"."""
    image = rng.permutation(np.repeat(np.arange(len(n_repeats)), n_repeats))
    signal = noise * snr * rng.standard_normal((len(n_repeats), len(snr)))
    return signal[image] + noise * rng.standard_normal((len(image), len(snr))), image, signal


def test_ncsnr_recovers_the_simulated_ratio_with_unequal_repeats():
    rng = np.random.default_rng(0)
    truth = np.repeat([0.3, 0.5, 1.0, 2.0], 50)
    trials, image, _ = simulate(rng, n_repeats=rng.integers(1, 5, size=2000), snr=truth)
    estimate = ncsnr(trials + 40, 7 * image + 3)
    np.testing.assert_allclose(estimate.reshape(4, 50).mean(axis=1), [0.3, 0.5, 1.0, 2.0], atol=0.02)


def test_signal_variance_is_unbiased_where_repeats_are_unequal():
    rng = np.random.default_rng(1)
    n_repeats = np.array([1] * 10 + [2] * 10 + [6] * 5)
    trials, image, _ = simulate(rng, n_repeats=n_repeats, snr=np.full(20_000, 1.0))
    assert np.median(ncsnr(trials, image) ** 2) == pytest.approx(1.0, abs=0.1)


def test_equal_repeats_give_nsds_estimate():
    rng = np.random.default_rng(2)
    trials, image, _ = simulate(rng, n_repeats=np.full(80, 3), snr=np.linspace(0, 1, 30))
    grouped = np.stack([trials[image == i] for i in range(80)])
    noise = grouped.var(axis=1, ddof=1).mean(axis=0)
    signal = np.clip(grouped.mean(axis=1).var(axis=0, ddof=1) - noise / 3, 0, None)
    np.testing.assert_allclose(ncsnr(trials, image), np.sqrt(signal / noise), rtol=1e-10)


def test_without_repeats_or_variance_the_ratio_is_undefined_not_zero():
    rng = np.random.default_rng(3)
    trials = rng.standard_normal((6, 4)).astype(np.float32)
    assert np.isnan(ncsnr(trials, np.arange(6))).all()
    assert np.isnan(ncsnr(trials, np.zeros(6, dtype=int))).all()
    trials[:, 1], trials[2, 2] = 0.1, np.nan
    assert np.isnan(ncsnr(trials, np.array([0, 0, 1, 1, 2, 2]))).tolist() == [False, True, True, False]


def test_perfect_repeats_have_a_ceiling_of_one_and_no_signal_a_ceiling_of_zero():
    image = np.repeat(np.arange(5), 2)
    ratio = ncsnr(np.stack([image * 1.0, [0.0, 1.0] * 5], axis=1), image)
    np.testing.assert_array_equal(noise_ceiling(ratio, np.full(5, 2)), [1.0, 0.0])


@given(st.floats(0.01, 10), st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_ceiling_has_its_closed_form_and_inverts_to_the_single_trial_ceiling(snr, repeats):
    n_repeats, ratio = np.array(repeats), np.array([snr])
    ceiling = noise_ceiling(ratio, n_repeats)
    assert ceiling[0] == pytest.approx(snr**2 / (snr**2 + np.mean([1 / n for n in repeats])))
    single = single_trial_ceiling(ceiling, n_repeats)
    np.testing.assert_allclose(single, noise_ceiling(ratio, np.ones(1, dtype=int)), rtol=1e-9)


def test_single_trial_ceiling_keeps_the_ends_and_nan():
    np.testing.assert_array_equal(single_trial_ceiling(np.array([0.0, 1.0, np.nan]), np.array([3, 3])), [0, 1, np.nan])


def test_an_image_without_repeats_has_no_ceiling():
    with pytest.raises(ValueError, match="at least one repeat"):
        noise_ceiling(np.ones(2), np.array([3, 0]))


def test_squared_correlation_of_the_signal_reaches_the_ceiling():
    rng = np.random.default_rng(4)
    trials, image, signal = simulate(rng, n_repeats=rng.integers(1, 4, size=4000), snr=np.full(40, 0.6))
    means = np.stack([trials[image == i].mean(axis=0) for i in range(4000)])
    r = [np.corrcoef(means[:, v], signal[:, v])[0, 1] for v in range(40)]
    assert np.mean(np.square(r)) == pytest.approx(
        noise_ceiling(ncsnr(trials, image), np.bincount(image)).mean(), abs=0.01
    )


def test_split_half_reliability_estimates_the_ceiling():
    rng = np.random.default_rng(5)
    trials, image, _ = simulate(rng, n_repeats=np.r_[np.full(600, 4), np.full(200, 1)], snr=np.full(60, 0.7))
    four = split_half_reliability(trials, image, rng=rng, n_splits=10)
    assert four.mean() == pytest.approx(0.49 / (0.49 + 1 / 4), abs=0.015)
    one = split_half_reliability(trials, image, rng=rng, n_splits=10, n_repeats=1)
    assert one.mean() == pytest.approx(0.49 / 1.49, abs=0.02)


def test_split_half_reliability_is_undefined_without_repeats():
    rng = np.random.default_rng(6)
    trials = rng.standard_normal((5, 3))
    assert np.isnan(split_half_reliability(trials, np.array([0, 0, 1, 2, 3]), rng=rng)).all()
    trials = np.c_[rng.standard_normal(6), np.full(6, 0.3)]
    assert np.isnan(split_half_reliability(trials, np.repeat(np.arange(3), 2), rng=rng)).tolist() == [False, True]


def test_pattern_ceiling_is_what_the_signal_reaches_over_voxels():
    rng = np.random.default_rng(7)
    trials, image, signal = simulate(rng, n_repeats=np.r_[np.full(40, 3), [1]], snr=np.full(5000, 0.5))
    of_mean, of_trial = pattern_ceiling(trials, image)
    means = np.stack([trials[image == i].mean(axis=0) for i in range(40)])
    reached = [np.corrcoef(means[i], signal[i])[0, 1] for i in range(40)]
    assert of_mean[:40].mean() == pytest.approx(np.mean(reached), abs=0.01)
    reached = [np.corrcoef(y, signal[i])[0, 1] for y, i in zip(trials, image, strict=True) if i < 40]
    assert of_trial[:40].mean() == pytest.approx(np.mean(reached), abs=0.01)
    assert np.isnan(of_mean[40])
    assert np.isnan(of_trial[40])


def test_permuting_voxels_permutes_the_ratio_across_blocks():
    rng = np.random.default_rng(8)
    trials, image, _ = simulate(rng, n_repeats=np.full(10, 2), snr=np.full(1500, 0.5))
    order = rng.permutation(1500)
    np.testing.assert_allclose(ncsnr(trials[:, order], image), ncsnr(trials, image)[order], rtol=1e-12)


# -- the phantom's truth -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One subject with the sessions and repeats of the standard phantom: true NCSNR, raw and standardised trials."""
    path = tmp_path_factory.mktemp("phantom") / "p.zarr"
    write_phantom(path, PhantomConfig(subjects=1, sessions=10, trials_per_session=200, voxels=150))
    subject = PooledStore.open(path).subject(1)
    raw = subject.responses()
    trials = standardise(raw, subject.session, np.ones(len(raw), bool))
    return read_truth(path).subjects["subj01"].ncsnr, raw, trials, subject.image


def test_the_phantoms_ncsnr_and_ceiling_are_estimated_within_two_percent(measured):
    truth, _, trials, image = measured
    estimate = ncsnr(trials, image)
    assert estimate.mean() == pytest.approx(truth.mean(), rel=0.02)
    assert np.corrcoef(estimate, truth)[0, 1] > 0.97
    for repeats in (1, 3):
        ceiling = noise_ceiling(estimate, np.array([repeats]))
        assert ceiling.mean() == pytest.approx((truth**2 / (truth**2 + 1 / repeats)).mean(), rel=0.02)


def test_sessions_that_are_not_standardised_pass_for_noise(measured):
    """Gain and offset differ between sessions, so raw trials underestimate: what is reported is standardised first."""
    truth, raw, _, image = measured
    assert ncsnr(raw, image).mean() < 0.95 * truth.mean()


def test_split_halves_of_the_phantom_stepped_up_agree_with_its_ceiling(measured):
    _, _, trials, image = measured
    for repeats in (1, 3):
        halves = split_half_reliability(trials, image, rng=np.random.default_rng(0), n_splits=5, n_repeats=repeats)
        ceiling = noise_ceiling(ncsnr(trials, image), np.array([repeats]))
        assert halves.mean() == pytest.approx(ceiling.mean(), rel=0.03)
        assert np.corrcoef(halves, ceiling)[0, 1] > 0.99


@given(st.floats(0.01, 10), st.integers(1, 9))
def test_spearman_brown_steps_a_trials_ceiling_up_to_that_of_a_mean(snr, repeats):
    ratio = np.array([snr])
    one = noise_ceiling(ratio, np.array([1]))[0]
    stepped = repeats * one / (1 + (repeats - 1) * one)
    assert noise_ceiling(ratio, np.array([repeats]))[0] == pytest.approx(stepped, rel=1e-9)

"""RDMs and their comparison are rsatoolbox's and scipy's."""

import numpy as np
import pytest
from rsatoolbox.data import Dataset
from rsatoolbox.inference.noise_ceiling import boot_noise_ceiling
from rsatoolbox.rdm import RDMs, calc_rdm, compare
from scipy.spatial.distance import pdist, squareform
from scipy.stats import pearsonr, spearmanr

from foundation.evaluation.rsa import compare_rdms, rdm, repeats_for_rdms, rsa
from foundation.evaluation.score import Measured
from foundation.evaluation.statistics import centre, percentile_interval, resample_counts

N_IMAGE, N_VOXEL, N_REPEAT = 20, 30, 3
METHODS = {"spearman": spearmanr, "corr": pearsonr}


@pytest.fixture
def signal() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((N_IMAGE, N_VOXEL))


@pytest.fixture
def measured_rdms(signal) -> np.ndarray:
    noise = np.random.default_rng(1).standard_normal((N_REPEAT, *signal.shape))
    return np.stack([squareform(pdist(signal + one, "correlation")) for one in noise])


def compared(predicted, measured, **options):
    options = {"n_bootstraps": 20, "rng": np.random.default_rng(0), "subject": "subj01", "roi": "all"} | options
    return compare_rdms(predicted, measured, **options)


def test_distances_are_scipys_and_rsatoolboxs(signal):
    np.testing.assert_allclose(rdm(signal), squareform(pdist(signal, "correlation")), atol=1e-12)
    theirs = calc_rdm(Dataset(signal), method="correlation")
    np.testing.assert_allclose(rdm(signal), theirs.get_matrices()[0])


@pytest.mark.parametrize("method", METHODS)
def test_score_and_ceiling_are_rsatoolboxs_and_scipys(signal, measured_rdms, method):
    found = compared(rdm(signal), measured_rdms, method=method)
    condensed = [squareform(one, checks=False) for one in measured_rdms]
    predicted = pdist(signal, "correlation")
    assert found.value == pytest.approx(np.mean([METHODS[method](predicted, one)[0] for one in condensed]))
    theirs = RDMs(np.stack(condensed))
    assert found.value == pytest.approx(compare(RDMs(predicted[None]), theirs, method).mean())
    low, high = boot_noise_ceiling(theirs, method)
    assert (found.ceiling_low, found.ceiling_high) == pytest.approx((low, high))
    assert found.ceiling_low < found.ceiling_high
    assert found.low < found.value < found.high


@pytest.mark.parametrize("method", METHODS)
def test_a_resample_is_the_repeated_images_without_pairs_of_one_image(signal, measured_rdms, method):
    predicted = np.round(rdm(signal), 1)  # with ties
    found = compared(predicted, measured_rdms, method=method, rng=np.random.default_rng(5))
    samples = []
    for count in resample_counts(N_IMAGE, 20, rng=np.random.default_rng(5)):
        drawn = np.repeat(np.arange(N_IMAGE), count.astype(int))
        i, j = np.triu_indices(len(drawn), k=1)
        other = drawn[i] != drawn[j]
        i, j = drawn[i[other]], drawn[j[other]]
        samples.append(np.mean([METHODS[method](predicted[i, j], one[i, j])[0] for one in measured_rdms]))
    expected = percentile_interval(centre(np.array(samples), found.value), n_images=N_IMAGE)
    assert (found.low, found.high) == pytest.approx(expected)


def measured_of(signal: np.ndarray, image: np.ndarray, *, noise: float = 1.0) -> Measured:
    drawn = np.random.default_rng(2).standard_normal((len(image), signal.shape[1]))
    return Measured(
        subject="subj01",
        trials=(signal[image] + noise * drawn).astype(np.float32),
        image=image,
        ceiling=None,
        ceiling_reason="not asked for",
        families={"early": np.arange(signal.shape[1]) < 10, "mid": np.arange(signal.shape[1]) < 2},
    )


def test_the_true_signal_reaches_the_ceiling_and_noise_is_at_zero(signal):
    measured = measured_of(signal, np.tile(np.arange(N_IMAGE), N_REPEAT))
    true, early = rsa(signal, measured, n_bootstraps=200, rng=np.random.default_rng(0))
    assert (true.roi, early.roi) == ("all", "early")  # two voxels have no pattern
    assert true.value > true.ceiling_low
    assert early.n_voxels == 10
    chance = rsa(np.random.default_rng(9).standard_normal(signal.shape), measured, rng=np.random.default_rng(0))[0]
    assert chance.low < 0 < chance.high


def test_images_with_a_missing_repeat_are_left_out_and_each_rdm_is_of_single_trials(signal):
    image = np.concatenate([np.arange(N_IMAGE), np.arange(N_IMAGE), np.arange(N_IMAGE - 4)])
    order = np.random.default_rng(3).permutation(len(image))
    measured = measured_of(signal, image[order], noise=0)
    images, rows = repeats_for_rdms(measured)
    assert images.tolist() == list(range(N_IMAGE - 4))
    assert rows.shape == (3, N_IMAGE - 4)
    assert (measured.image[rows] == images).all()
    assert len(np.unique(rows)) == rows.size


def test_one_rdm_has_no_ceiling_and_says_why(signal, measured_rdms):
    found = compared(rdm(signal), measured_rdms[:1])
    assert found.ceiling_low is None
    assert found.ceiling_reason == "one measured RDM can't be held against another"


def test_what_is_no_rdm_is_refused(signal, measured_rdms):
    with pytest.raises(ValueError, match="shapes"):
        compared(rdm(signal[1:]), measured_rdms)
    with pytest.raises(ValueError, match="finite and symmetric"):
        compared(np.triu(rdm(signal)), measured_rdms)
    with pytest.raises(ValueError, match="2 voxels; at least 3"):
        rdm(signal[:, :2])
    with pytest.raises(ValueError, match="correlates with nothing"):
        rdm(np.ones((5, 4)))

"""How well any prediction can do, estimated from repeated presentations.

A trial's response is taken as signal plus noise, ``y_it = s_i + e_it`` for image ``i`` and repeat ``t``, with noise
that is independent between repeats. Then, per voxel,

- ``ncsnr = sigma_signal / sigma_noise`` (Allen et al. 2022, Natural Scenes Dataset), and
- the noise ceiling of the mean of ``n_i`` repeats is the share of its variance that is signal,
  ``ncsnr^2 / (ncsnr^2 + mean_i(1 / n_i))``, between 0 and 1. Its square root bounds the correlation.

Responses may be in any unit (percent signal change, z-scores): both quantities have none.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

VOXEL_BLOCK = 1024


def ncsnr(responses: Float[np.ndarray, "trial voxel"], image: Int[np.ndarray, " trial"]) -> Float[np.ndarray, " voxel"]:
    """Ratio of the signal's to the noise's standard deviation, per voxel.

    The noise variance pools the images that have at least two repeats, weighted by their degrees of freedom:
    ``sum_i sum_t (y_it - mean_i)^2 / sum_i (n_i - 1)``. The signal variance is the variance of *all* images' means less
    the noise that is left in them, ``var_i(mean_i) - noise * mean_i(1 / n_i)``, clipped at 0. Both are unbiased before
    the clip for unequal numbers of repeats; with equal numbers this is NSD's estimate.

    Parameters
    ----------
    responses
        One row per trial that was really measured; a missing repeat is an absent row.
    image
        Which image each trial showed; any integers.

    Returns
    -------
    ncsnr
        0 where repeats agree no better than chance; inf where they agree exactly. NaN everywhere if no image has two
        repeats (noise can't be told from signal) or fewer than two images were shown; NaN for a voxel that is constant
        or holds a NaN.
    """
    membership, n_repeats = _membership(image)
    n_images, degrees = len(n_repeats), int((n_repeats - 1).sum())
    if n_images < 2 or degrees == 0:
        return np.full(responses.shape[1], np.nan)
    ratio = np.empty(responses.shape[1])
    for block in _voxel_blocks(responses.shape[1]):
        y = responses[:, block].astype(np.float64)
        y -= y.mean(axis=0)
        means = (membership @ y) / n_repeats[:, None]
        within = y - membership.T @ means
        noise = (within**2).sum(axis=0) / degrees
        signal = np.clip(means.var(axis=0, ddof=1) - noise * np.mean(1 / n_repeats), 0, None)
        # A voxel that never changes leaves rounding errors, whose ratio means nothing.
        constant = np.ptp(responses[:, block], axis=0) == 0
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio[block] = np.where(constant, np.nan, np.sqrt(signal / noise))
    return ratio


def noise_ceiling(
    ncsnr: Float[np.ndarray, " voxel"], n_repeats: Int[np.ndarray, " image"]
) -> Float[np.ndarray, " voxel"]:
    """Share of repeat means' variance that a perfect model explains: ``ncsnr^2 / (ncsnr^2 + mean(1 / n_repeats))``.

    Parameters
    ----------
    ncsnr
        From :func:`ncsnr`, not negative.
    n_repeats
        The repeats really averaged for each scored image; all ones give the ceiling of single trials.

    Returns
    -------
    ceiling
        Fraction of variance, 0 to 1. NaN where ``ncsnr`` is.

    Raises
    ------
    ValueError
        If an image has no repeat, or there is no image.
    """
    if n_repeats.size == 0 or n_repeats.min() < 1:
        raise ValueError(f"every scored image needs at least one repeat, got n_repeats {np.unique(n_repeats).tolist()}")
    with np.errstate(divide="ignore"):
        return 1 / (1 + np.mean(1 / n_repeats) / np.square(ncsnr, dtype=np.float64))


def single_trial_ceiling(
    ceiling: Float[np.ndarray, " voxel"], n_repeats: Int[np.ndarray, " image"]
) -> Float[np.ndarray, " voxel"]:
    """The ceiling of single trials that belongs to a ceiling of repeat means.

    Inverts :func:`noise_ceiling` and applies it with one repeat: ``1 / (1 + (1 / c - 1) / mean(1 / n_repeats))``. NaN
    where the ceiling is.
    """
    with np.errstate(divide="ignore"):
        return 1 / (1 + (1 / np.asarray(ceiling, dtype=np.float64) - 1) / np.mean(1 / n_repeats))


def split_half_reliability(
    responses: Float[np.ndarray, "trial voxel"],
    image: Int[np.ndarray, " trial"],
    *,
    rng: np.random.Generator,
    n_splits: int = 20,
    n_repeats: int | float | None = None,
) -> Float[np.ndarray, " voxel"]:
    """Correlation over images between halves of the repeats, stepped up by Spearman-Brown.

    Every image with two repeats or more gives two disjoint random halves of ``h`` trials, where ``h`` is half of the
    smallest such count, rounded down; further trials sit a split out. The halves' correlation ``r``, averaged over
    splits, becomes ``k r / (1 + (k - 1) r)`` with ``k = n_repeats / h``.

    Parameters
    ----------
    n_repeats
        The number of averaged trials whose reliability is asked for. None: ``2 h``, the two halves together.

    Returns
    -------
    reliability
        Estimates the same fraction of variance as :func:`noise_ceiling`, without its clip: noise can make it negative.
        NaN everywhere with fewer than two images that have repeats; NaN for a voxel that is constant in a half or
        holds a NaN.
    """
    ids, counts = np.unique(image, return_counts=True)
    repeated = ids[counts >= 2]
    if len(repeated) < 2:
        return np.full(responses.shape[1], np.nan)
    half = int(counts[counts >= 2].min()) // 2
    rows_of = [np.flatnonzero(image == i) for i in repeated]
    total = np.zeros(responses.shape[1])
    for _ in range(n_splits):
        drawn = np.stack([rng.permutation(rows)[: 2 * half] for rows in rows_of])
        for block in _voxel_blocks(responses.shape[1]):
            y = responses[:, block]
            first = y[drawn[:, :half]].mean(axis=1, dtype=np.float64)
            second = y[drawn[:, half:]].mean(axis=1, dtype=np.float64)
            total[block] += _columnwise_r(first, second)
    r = total / n_splits
    k = (2 * half if n_repeats is None else n_repeats) / half
    return k * r / (1 + (k - 1) * r)


def pattern_ceiling(
    responses: Float[np.ndarray, "trial voxel"], image: Int[np.ndarray, " trial"]
) -> tuple[Float[np.ndarray, " image"], Float[np.ndarray, " image"]]:
    """Highest correlation over voxels that a prediction can reach, per image: with its repeats' mean, with one trial.

    The pattern's signal variance is the covariance over voxels between different repeats of the image, averaged over
    pairs: ``(n^2 var(mean) - sum_t var(y_t)) / (n (n - 1))``. The ceilings are the square roots of its share in
    ``var(mean)`` and in the average ``var(y_t)``. Whatever noise the repeats share, such as a session's drift, counts
    as signal here, which the voxelwise ceiling escapes no more than this one.

    Returns
    -------
    of_mean, of_trial
        Correlations, 0 to 1, in the order of the sorted image numbers; NaN for an image shown once and for a pattern
        that is constant.
    """
    membership, n_repeats = _membership(image)
    n_images = len(n_repeats)
    of_mean, of_trial = np.full(n_images, np.nan), np.full(n_images, np.nan)
    for i in np.flatnonzero(n_repeats >= 2):
        y = responses[membership.indices[membership.indptr[i] : membership.indptr[i + 1]]].astype(np.float64)
        n, trial_variance, mean_variance = len(y), y.var(axis=1).mean(), y.mean(axis=0).var()
        signal = max((n * mean_variance - trial_variance) / (n - 1), 0.0)
        if mean_variance > 0:
            of_mean[i], of_trial[i] = np.sqrt(signal / mean_variance), np.sqrt(signal / trial_variance)
    return of_mean, of_trial


def _membership(image: np.ndarray) -> tuple[sparse.csr_array, np.ndarray]:
    """Sums trials by image: a 0/1 matrix "image trial", images in sorted order, and the trials of each."""
    _, index, n_repeats = np.unique(image, return_inverse=True, return_counts=True)
    rows = np.arange(len(image))
    matrix = sparse.csr_array((np.ones(len(image)), (index, rows)), shape=(len(n_repeats), len(image)))
    return matrix, n_repeats


def _voxel_blocks(n_voxels: int) -> list[slice]:
    """Few enough voxels at a time that a whole subject is never held in double precision."""
    return [slice(start, start + VOXEL_BLOCK) for start in range(0, n_voxels, VOXEL_BLOCK)]


def _columnwise_r(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    flat = (np.ptp(x, axis=0) == 0) | (np.ptp(y, axis=0) == 0)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        r = (x * y).sum(axis=0) / np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0))
    return np.where(flat, np.nan, r)

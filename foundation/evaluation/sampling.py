"""Scores of samples from a predictive distribution, against the single trials that it is a distribution of.

Legend: ``x_1 .. x_m`` are a system's samples for one image and voxel, ``y`` is a trial's response. The scores take the
samples for exchangeable draws and correct for their number: an ensemble drawn from the truth has the same expected
score whatever ``m`` is. Values are finite by contract (:func:`foundation.evaluation.score.score` checks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial.distance import cdist, pdist

MIN_CRPS_SAMPLES = 2
VOXEL_BLOCK = 128


def crps(
    samples: Float[np.ndarray, "sample image voxel"],
    target: Float[np.ndarray, "row voxel"],
    *,
    image: Int[np.ndarray, " row"] | None = None,
) -> Float[np.ndarray, "row voxel"]:
    """Fair continuous ranked probability score, in the responses' unit; lower is better.

    ``CRPS(F, y) = E|X - y| - E|X - X'| / 2`` (Gneiting & Raftery 2007, section 4.2), with the unbiased estimate from
    ``m`` samples (Ferro 2014)::

        sum_i |x_i - y| / m  -  sum_i (2 i - m - 1) x_(i) / (m (m - 1))

    where ``x_(i)`` are sorted, so that the second term costs ``m log m`` instead of ``m^2``. A prediction without
    spread scores its absolute error. A single value may be negative; only its expectation is proper.

    Parameters
    ----------
    image
        Row of the samples that each row of ``target`` is compared with; None: one target row per image, in order.

    Raises
    ------
    ValueError
        With fewer than two samples, whose spread is undefined.
    """
    m = len(samples)
    if m < MIN_CRPS_SAMPLES:
        raise ValueError(f"the CRPS needs at least {MIN_CRPS_SAMPLES} samples, got {m}")
    of_row = slice(None) if image is None else image
    signs = (2 * np.arange(1, m + 1) - m - 1) / (m * (m - 1))
    half_spread = np.tensordot(signs, np.sort(samples, axis=0), axes=1)
    error = np.zeros(target.shape)
    for x in samples:
        error += np.abs(x[of_row] - target)
    return error / m - half_spread[of_row]


def samples_needed(level: float) -> int:
    """Samples from which a central interval of ``level`` has both its ends among them: ``2 / (1 - level) - 1``."""
    return math.ceil(2 / (1 - level) - 1 - 1e-9)


def coverage(
    samples: Float[np.ndarray, "sample image voxel"],
    target: Float[np.ndarray, "row voxel"],
    *,
    level: float,
    image: Int[np.ndarray, " row"] | None = None,
) -> Float[np.ndarray, "row voxel"]:
    """Whether the central interval of the samples holds the target; averages to ``level`` if they are calibrated.

    If ``y`` and the samples are exchangeable, ``y``'s rank among them, ``R = 0 .. m``, is uniform, and so is
    ``(R + U) / (m + 1)`` with ``U`` uniform (the randomised probability integral transform; Czado et al. 2009). What is
    returned is the probability over ``U`` that it lies between ``(1 - level) / 2`` and ``(1 + level) / 2``: 0 or 1
    where both ends of the interval are samples (19 of them, 90 %: from the lowest to the highest), a fraction in the
    gap that an end falls into. Quantiles interpolated between samples would cover too little: with 20 of them, numpy's
    cover 82 %. A target equal to several samples shares their ranks.

    Parameters
    ----------
    level
        Nominal coverage, such as 0.9.
    image
        As in :func:`crps`.

    Raises
    ------
    ValueError
        With fewer samples than :func:`samples_needed`, when the interval's ends lie beyond them.
    """
    m = len(samples)
    if m < samples_needed(level):
        raise ValueError(f"an interval of {level:.0%} needs at least {samples_needed(level)} samples, got {m}")
    return _inside(*_ranks(samples, target, image), n_samples=m, level=level)


def calibration(
    samples: Float[np.ndarray, "sample image voxel"],
    target: Float[np.ndarray, "row voxel"],
    levels: Sequence[float] | Float[np.ndarray, " level"],
    *,
    image: Int[np.ndarray, " row"] | None = None,
) -> Float[np.ndarray, " level"]:
    """Share of targets inside the central interval of each level: the points of a calibration plot.

    Parameters
    ----------
    levels
        Nominal coverages, such as .1 to .9.
    image
        As in :func:`crps`.

    Returns
    -------
    covered
        Mean of :func:`coverage` over rows and voxels, equal to the levels if the samples are calibrated, above them if
        they spread too much. NaN for a level that needs more samples (:func:`samples_needed`), and without targets.
    """
    m, n_voxels = len(samples), target.shape[1]
    possible = [m >= samples_needed(level) for level in levels]
    sums = np.zeros(len(levels))
    for start in range(0, n_voxels, VOXEL_BLOCK):
        block = slice(start, start + VOXEL_BLOCK)
        below, equal = _ranks(samples[:, :, block], target[:, block], image)
        sums += [
            _inside(below, equal, n_samples=m, level=level).sum() if ok else 0
            for level, ok in zip(levels, possible, strict=True)
        ]
    return np.where(possible, sums, np.nan) / (target.size or np.nan)


def energy_score(
    samples: Float[np.ndarray, "sample image voxel"],
    target: Float[np.ndarray, "row voxel"],
    *,
    image: Int[np.ndarray, " row"] | None = None,
) -> Float[np.ndarray, " row"]:
    """Fair energy score of whole patterns, in the responses' unit; lower is better.

    ``ES(F, y) = E|X - y| - E|X - X'| / 2`` with Euclidean norms over voxels (Gneiting & Raftery 2007, section 4.3), the
    second term over the ``m (m - 1)`` pairs of different samples, as in :func:`crps`, which this is for one voxel.
    Unlike a mean of CRPS, it sees whether voxels vary together as they should. It grows with the square root of the
    number of voxels, so only scores of the same voxels compare. 0 without voxels.

    Parameters
    ----------
    image
        As in :func:`crps`.

    Raises
    ------
    ValueError
        With fewer than two samples, whose spread is undefined.
    """
    m = len(samples)
    if m < MIN_CRPS_SAMPLES:
        raise ValueError(f"the energy score needs at least {MIN_CRPS_SAMPLES} samples, got {m}")
    of_row = np.arange(len(target)) if image is None else image
    score = np.zeros(len(target))
    if target.shape[1] == 0:
        return score
    for i in np.unique(of_row):
        drawn, rows = samples[:, i].astype(np.float64), np.flatnonzero(of_row == i)
        half_spread = pdist(drawn).sum() / (m * (m - 1))
        score[rows] = cdist(target[rows].astype(np.float64), drawn).mean(axis=1) - half_spread
    return score


def _ranks(samples: np.ndarray, target: np.ndarray, image: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """How many samples lie below each target, and how many equal it."""
    of_row = slice(None) if image is None else image
    below, equal = np.zeros(target.shape, np.int32), np.zeros(target.shape, np.int32)
    for x in samples:
        drawn = x[of_row]
        below += drawn < target
        equal += drawn == target
    return below, equal


def _inside(below: np.ndarray, equal: np.ndarray, *, n_samples: int, level: float) -> np.ndarray:
    """Probability that a target of this rank lies in the central interval."""
    low, high = (n_samples + 1) * (1 - level) / 2, (n_samples + 1) * (1 + level) / 2
    inside = np.minimum(below + equal + 1, high) - np.maximum(below, low)
    return np.clip(inside, 0, None) / (equal + 1)

"""Representational similarity: are images that a model predicts alike measured alike?

A representational dissimilarity matrix (RDM) holds, for each pair of images, the correlation distance ``1 - r`` of
their patterns over an ROI's voxels. A score is the correlation of a predicted RDM with each measured one over all
pairs, averaged over measured RDMs; one RDM is measured per repeat of the images, or published per subject. The noise
ceiling is rsatoolbox's (Nili et al. 2014): how well the measured RDMs' average does, the one compared left out (lower)
or not (upper).

Images are resampled, pairs of one image with itself left out, as rsatoolbox does: with counts ``c``, the pair of images
``i`` and ``j`` has weight ``c_i c_j``. Ranks of a resample are mid-ranks of the repeated pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from rsatoolbox.data.dataset import Dataset
from rsatoolbox.inference.noise_ceiling import boot_noise_ceiling
from rsatoolbox.rdm.calc import calc_rdm
from rsatoolbox.rdm.rdms import RDMs
from rsatoolbox.util.rdm_utils import batch_to_vectors

from foundation.evaluation.score import FAMILIES, Measured
from foundation.evaluation.statistics import centre, percentile_interval, resample_counts

Method = Literal["spearman", "corr"]
MIN_VOXELS = 3
"""Fewest voxels over which patterns are correlated."""
MIN_IMAGES = 4


@dataclass(frozen=True, kw_only=True)
class RsaScore:
    """How well a predicted RDM matches measured ones; None is undefined."""

    subject: str
    roi: str
    method: Method
    value: float
    low: float | None
    high: float | None
    """95 % bootstrap interval over images."""
    ceiling_low: float | None
    ceiling_high: float | None
    ceiling_reason: str | None
    """Why there is no ceiling."""
    n_images: int
    n_rdms: int
    n_voxels: int | None
    """None where only RDMs are known."""


def rdm(patterns: Float[np.ndarray, "image voxel"]) -> Float[np.ndarray, "image image"]:
    """Return the correlation distances between images' patterns.

    Raises
    ------
    ValueError
        If there are too few voxels, or a pattern is constant, so that it correlates with nothing.
    """
    if patterns.shape[1] < MIN_VOXELS:
        raise ValueError(
            f"patterns have {patterns.shape[1]} voxels; at least {MIN_VOXELS} are needed to correlate them"
        )
    if (patterns == patterns[:, :1]).all(1).any():
        raise ValueError("an image has the same value in all voxels, which correlates with nothing; leave it out")
    found = calc_rdm(Dataset(patterns.astype(np.float64)), method="correlation")
    assert isinstance(found, RDMs)
    return found.get_matrices()[0]


def compare_rdms(
    predicted: Float[np.ndarray, "image image"],
    measured: Float[np.ndarray, "rdm measured_image measured_image"],
    *,
    subject: str,
    roi: str,
    method: Method = "spearman",
    n_voxels: int | None = None,
    n_bootstraps: int = 1000,
    rng: np.random.Generator,
) -> RsaScore:
    """Compare a predicted RDM with measured ones, of repeats or of subjects.

    Raises
    ------
    ValueError
        If RDMs differ in shape, are no symmetric distances, or there are too few images.
    """
    n_images = len(predicted)
    if measured.shape[1:] != predicted.shape or predicted.shape != (n_images, n_images):
        raise ValueError(
            f"RDMs have shapes {predicted.shape} and {measured.shape[1:]}; expected images by images in both"
        )
    if n_images < MIN_IMAGES:
        raise ValueError(f"RDMs of {n_images} images are too few to correlate; at least {MIN_IMAGES} are needed")
    both = np.concatenate([predicted[None], measured]).astype(np.float64)
    if not np.isfinite(both).all() or not np.allclose(both, both.transpose(0, 2, 1), atol=1e-6):
        raise ValueError("RDMs must be finite and symmetric; leave out images without a measured distance")
    pairs = np.triu_indices(n_images, k=1)
    vectors = both[:, pairs[0], pairs[1]]
    counts = np.vstack([np.ones((1, n_images)), resample_counts(n_images, n_bootstraps, rng=rng)])
    correlate = _Correlation(vectors, method)
    samples = np.array([correlate(count[pairs[0]] * count[pairs[1]]).mean() for count in counts])
    value = float(samples[0])
    low, high = percentile_interval(centre(samples[1:], value), n_images=n_images)
    ceiling, reason = _ceiling(measured, method)
    return RsaScore(
        subject=subject,
        roi=roi,
        method=method,
        value=value,
        low=low if np.isfinite(low) else None,
        high=high if np.isfinite(high) else None,
        ceiling_low=ceiling[0],
        ceiling_high=ceiling[1],
        ceiling_reason=reason,
        n_images=n_images,
        n_rdms=len(measured),
        n_voxels=n_voxels,
    )


def rsa(
    prediction: Float[np.ndarray, "image voxel"],
    measured: Measured,
    *,
    method: Method = "spearman",
    n_bootstraps: int = 1000,
    rng: np.random.Generator,
) -> tuple[RsaScore, ...]:
    """Compare predicted with measured RDMs, one per repeat, for all voxels and each ROI family of a few voxels.

    Only images with as many repeats as most have (`repeats_for_rdms`) take part.
    """
    images, rows = repeats_for_rdms(measured)
    regions = {"all": np.ones(measured.n_voxels, dtype=bool)}
    regions |= {name: measured.families[name] for name in FAMILIES if name in measured.families}
    return tuple(
        compare_rdms(
            rdm(prediction[images][:, mask]),
            np.stack([rdm(measured.trials[of_repeat][:, mask]) for of_repeat in rows]),
            subject=measured.subject,
            roi=roi,
            method=method,
            n_voxels=int(mask.sum()),
            n_bootstraps=n_bootstraps,
            rng=rng,
        )
        for roi, mask in regions.items()
        if mask.sum() >= MIN_VOXELS
    )


def repeats_for_rdms(
    measured: Measured,
) -> tuple[Int[np.ndarray, " image"], Int[np.ndarray, "repeat image"]]:
    """Return images that were shown as often as at least half of all, and the trials of their first so many repeats."""
    n = int(np.sort(measured.n_repeats)[::-1][(measured.n_images - 1) // 2])
    images = np.flatnonzero(measured.n_repeats >= n)
    order = np.argsort(measured.image, kind="stable")
    first = np.concatenate([[0], np.cumsum(measured.n_repeats)[:-1]])
    return images, np.stack([order[first[images] + k] for k in range(n)])


def _ceiling(measured: np.ndarray, method: Method) -> tuple[tuple[float | None, float | None], str | None]:
    if len(measured) < 2:
        return (None, None), "one measured RDM can't be held against another"
    low, high = boot_noise_ceiling(RDMs(batch_to_vectors(measured)[0]), method=method)
    return (float(low), float(high)), None


class _Correlation:
    """Correlation of the first vector with each other one, under weights of the pairs; values are sorted once."""

    def __init__(self, vectors: Float[np.ndarray, "rdm pair"], method: Method) -> None:
        self._method, self._vectors = method, vectors
        if method == "spearman":
            self._groups = [np.unique(vector, return_inverse=True)[1] for vector in vectors]

    def __call__(self, weight: Float[np.ndarray, " pair"]) -> Float[np.ndarray, " measured"]:
        values = self._vectors
        if self._method == "spearman":
            values = np.stack([_mid_ranks(groups, weight) for groups in self._groups])
        total = weight.sum()
        centred = values - (values @ weight / total)[:, None]
        weighted = centred * weight
        with np.errstate(invalid="ignore", divide="ignore"):
            scale = np.sqrt((weighted * centred).sum(1))
            return weighted[1:] @ centred[0] / (scale[1:] * scale[0])


def _mid_ranks(groups: Int[np.ndarray, " pair"], weight: Float[np.ndarray, " pair"]) -> Float[np.ndarray, " pair"]:
    """Return each pair's mid-rank among the pairs repeated `weight` times; `groups` number the values in order."""
    count = np.bincount(groups, weight)
    return (np.cumsum(count) - (count - 1) / 2)[groups]

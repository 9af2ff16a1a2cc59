"""Uncertainty of scores: the bootstrap over images, paired tests, and the false discovery rate over voxels.

Images are the unit that is resampled: with an image go all of its trials and all of its voxels. A resample is a row of
counts, how often each image was drawn, and the same rows serve every system, which is what makes differences paired.

Nothing is copied for a resample. With counts ``c`` and, per image, the number of trials ``n``, the prediction ``x`` and
sums over trials of the target ``y``, the correlation of a resample needs only the products

    c n,  c (n x),  c (n x^2),  c (sum y),  c (sum y^2),  c (x sum y)

of the matrix of counts with six matrices "image voxel": exactly the correlation of the repeated rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse, stats

RESAMPLE_BLOCK = 64
VOXEL_BLOCK = 1024


def resample_counts(
    n_images: int, n_resamples: int, *, rng: np.random.Generator
) -> Float[np.ndarray, "resample image"]:
    """How often each image is drawn, in resamples of ``n_images`` with replacement."""
    return rng.multinomial(n_images, np.full(n_images, 1 / n_images), size=n_resamples).astype(np.float32)


def bootstrap(
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray | float],
    prediction: Float[np.ndarray, "image voxel"],
    target: Float[np.ndarray, "image voxel"],
    counts: Float[np.ndarray, "resample image"],
) -> Float[np.ndarray, "resample ..."]:
    """Any statistic of (prediction, target) on each resample, by repeating rows.

    The readable twin of the functions below, and the way for a statistic that has no closed form in weighted sums.
    """
    rows = np.arange(len(target))
    drawn = [np.repeat(rows, count.astype(int)) for count in counts]
    return np.stack([np.asarray(statistic(prediction[i], target[i]), dtype=np.float64) for i in drawn])


def bootstrap_mean(
    values: Float[np.ndarray, " image"],
    counts: Float[np.ndarray, "resample image"],
    *,
    weights: Float[np.ndarray, " image"] | Int[np.ndarray, " image"] | None = None,
) -> Float[np.ndarray, " resample"]:
    """Mean of one value per image on each resample.

    Parameters
    ----------
    values
        NaN: the image isn't counted.
    weights
        Of the images, such as their numbers of trials; None weighs them alike.

    Returns
    -------
    means
        NaN for a resample that drew no image with a value.
    """
    defined = np.isfinite(values)
    w = np.where(defined, 1.0 if weights is None else weights, 0.0)
    c = counts.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return (c @ (w * np.where(defined, values, 0.0))) / (c @ w)


@dataclass(frozen=True, eq=False)
class VoxelMoments:
    """Per image, what the correlation of a weighted sample of images is made of; centred, single precision."""

    n: Float[np.ndarray, " image"]
    x: Float[np.ndarray, "image voxel"]
    xx: Float[np.ndarray, "image voxel"]
    y: Float[np.ndarray, "image voxel"]
    yy: Float[np.ndarray, "image voxel"]
    xy: Float[np.ndarray, "image voxel"]


def voxel_moments(
    prediction: Float[np.ndarray, "image voxel"],
    target: Float[np.ndarray, "trial voxel"],
    *,
    image: Int[np.ndarray, " trial"] | None = None,
) -> VoxelMoments:
    """Sums over each image's trials.

    Both sides are centred and scaled per voxel first: without it, one-pass variances in single precision lose their
    digits to the mean.

    Parameters
    ----------
    image
        Row of ``prediction`` that each row of ``target`` is compared with; None: one target row per image, in order.
    """
    n_images = len(prediction)
    if image is None:
        n, y = np.ones(n_images, dtype=np.float32), _standard(target)
        yy = np.square(y)
    else:
        sums = sparse.csr_array(
            (np.ones(len(image), dtype=np.float32), (image, np.arange(len(image)))), shape=(n_images, len(image))
        )
        n = np.bincount(image, minlength=n_images).astype(np.float32)
        rows = _standard(target)
        y, yy = sums @ rows, sums @ np.square(rows)
    x = _standard(prediction)
    return VoxelMoments(n=n, x=n[:, None] * x, xx=n[:, None] * x * x, y=y, yy=yy, xy=x * y)


def weighted_voxelwise_r(
    moments: VoxelMoments, counts: Float[np.ndarray, "resample image"]
) -> Float[np.ndarray, "resample voxel"]:
    """Voxelwise correlation of each resample, accurate to about 1e-6.

    NaN where a resample leaves a voxel's prediction or target without variance.
    """
    n = (counts @ moments.n)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_x, mean_y = counts @ moments.x / n, counts @ moments.y / n
        square_x, square_y = counts @ moments.xx / n, counts @ moments.yy / n
        variance_x, variance_y = square_x - mean_x**2, square_y - mean_y**2
        r = (counts @ moments.xy / n - mean_x * mean_y) / np.sqrt(variance_x * variance_y)
        # What is left of a variance of zero after rounding in single precision.
        constant = ~((variance_x > 1e-5 * square_x) & (variance_y > 1e-5 * square_y))
    r[constant] = np.nan
    return np.clip(r, -1, 1)


def bootstrap_voxelwise(
    statistic: Callable[[np.ndarray], np.ndarray],
    moments: VoxelMoments,
    counts: Float[np.ndarray, "resample image"],
) -> Float[np.ndarray, "resample ..."]:
    """A statistic of the voxelwise correlations on each resample, in bounded memory.

    Parameters
    ----------
    statistic
        From correlations "resample voxel" to values "resample ...". It sees a block of resamples at a time.
    """
    starts = range(0, max(len(counts), 1), RESAMPLE_BLOCK)
    return np.concatenate([statistic(weighted_voxelwise_r(moments, counts[i : i + RESAMPLE_BLOCK])) for i in starts])


def centre(samples: Float[np.ndarray, " resample"], value: float) -> Float[np.ndarray, " resample"]:
    """The bootstrap distribution moved so that its mean is the value of the sample itself.

    The resampled mean of a curved statistic is off: a squared correlation grows by about ``1 / n_images`` per voxel.
    Averaged over thousands of voxels this outgrows the spread, and the plain percentile interval would miss its own
    estimate. The shift takes out that bias of the resampling; the estimate's own bias stays in the estimate.
    """
    defined = np.isfinite(samples)
    return samples + (value - samples[defined].mean()) if defined.any() else samples


def percentile_interval(
    samples: Float[np.ndarray, " resample"], *, level: float = 0.95, n_images: int | None = None
) -> tuple[float, float]:
    """Percentile interval of a bootstrap distribution.

    Resamples of few images spread too little, by ``sqrt((n - 1) / n)``, and with the normal's tails in place of t's:
    12 images miss a mean nine times in a hundred at 95 %. Given their number, the level is raised to make up for both,
    ``1 - 2 Phi(-sqrt(n / (n - 1)) t)`` (the expanded percentile interval; Hesterberg 2015, section 5.2).

    Parameters
    ----------
    n_images
        Images that were resampled; None, or fewer than 2: the level as it is.

    Returns
    -------
    low, high
        Resamples without a value are left out; (NaN, NaN) if none has one.
    """
    defined = samples[np.isfinite(samples)]
    if defined.size == 0:
        return float("nan"), float("nan")
    if n_images is not None and n_images >= 2:
        t = stats.t.ppf((1 + level) / 2, n_images - 1)
        level = 1 - 2 * float(stats.norm.cdf(-np.sqrt(n_images / (n_images - 1)) * t))
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_p(differences: Float[np.ndarray, " resample"], *, n_images: int | None = None) -> float:
    """Two-sided p of a paired difference: twice the smaller share of resamples on either side of 0.

    One is added to both counts, so that ``B`` resamples never claim less than ``2 / (B + 1)``. NaN without resamples.
    Given the number of images that were resampled, the share is corrected as :func:`percentile_interval` is for few of
    them, so that p is below .05 where the 95 % interval leaves out 0: ``2 T(Phi^-1(share) sqrt((n - 1) / n))``.
    """
    defined = differences[np.isfinite(differences)]
    if defined.size == 0:
        return float("nan")
    tail = min(int((defined <= 0).sum()), int((defined >= 0).sum()))
    share = min(0.5, (tail + 1) / (defined.size + 1))
    if n_images is not None and n_images >= 2:
        z = stats.norm.ppf(share) * np.sqrt((n_images - 1) / n_images)
        share = float(stats.t.cdf(z, n_images - 1))
    return 2 * share


def paired_wilcoxon(a: Float[np.ndarray, " image"], b: Float[np.ndarray, " image"]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test on paired values.

    Pairs with a NaN are left out, and pairs without a difference are ranked and dropped by Wilcoxon's own rule. 1 if
    nothing differs; NaN if no pair is complete.
    """
    difference = (a - b)[np.isfinite(a) & np.isfinite(b)]
    if difference.size == 0:
        return float("nan")
    if not difference.any():
        return 1.0
    return float(np.asarray(stats.wilcoxon(difference))[1])


def voxelwise_p(r: Float[np.ndarray, " voxel"], *, n_images: int) -> Float[np.ndarray, " voxel"]:
    """Two-sided p of each voxel's correlation under normality, as :func:`scipy.stats.pearsonr` gives it.

    ``n_images`` counts independent images, never trials. NaN where ``r`` is, and everywhere with fewer than 3 images.
    """
    if n_images < 3:
        return np.full(len(r), np.nan)
    null = stats.beta(n_images / 2 - 1, n_images / 2 - 1, loc=-1, scale=2)
    return 2 * null.sf(np.abs(r))


def benjamini_hochberg(p: Float[np.ndarray, " voxel"]) -> Float[np.ndarray, " voxel"]:
    """P values adjusted for the false discovery rate (Benjamini & Hochberg 1995).

    NaN stays NaN and doesn't count among the tests.
    """
    adjusted = np.full(len(p), np.nan)
    tested = np.isfinite(p)
    if tested.any():
        adjusted[tested] = stats.false_discovery_control(p[tested], method="bh")
    return adjusted


def _standard(values: np.ndarray) -> np.ndarray:
    """Columns with mean 0 and standard deviation 1 in single precision; constant columns become exactly 0."""
    standard = np.zeros(values.shape, dtype=np.float32)
    for start in range(0, values.shape[1], VOXEL_BLOCK):
        block = values[:, start : start + VOXEL_BLOCK].astype(np.float64)
        varies = (block != block[:1]).any(axis=0)
        block = block[:, varies] - block[:, varies].mean(axis=0)
        standard[:, start : start + VOXEL_BLOCK][:, varies] = block / np.sqrt(np.mean(block**2, axis=0))
    return standard

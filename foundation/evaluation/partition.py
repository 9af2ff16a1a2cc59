"""Variance partitioning: what CLS and patch features explain of a voxel alone, and what either would explain.

With ``R2(.)`` the share of a test image's mean response that ridge models on a set of features explain,

    unique CLS   = R2(both) - R2(patch)        shared = R2(CLS) + R2(patch) - R2(both)
    unique patch = R2(both) - R2(CLS)          preference = unique patch - unique CLS

(Lescroart & Gallant 2019; de Heer et al. 2017). ``both`` is a banded ridge of the two sets; penalties and the mixture
are chosen per voxel on training images. Estimates are unbiased by no clipping: unique shares below zero are estimation
noise, and stay.

Each set is one kernel: CLS tokens of all depths; patches of all depths, coarse, and of middle depths, fine, each band
with an equal part (`foundation.evaluation.baselines.banded.bands`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from data.preprocess import Samples
from data.store import TokenReader
from foundation.closed_form.kernel_ridge import Candidate, best_of, candidate_of_kernel, standardised_pair
from foundation.evaluation.baselines.banded import bands
from foundation.evaluation.score import FAMILIES, Measured
from foundation.evaluation.statistics import RESAMPLE_BLOCK, centre, percentile_interval, resample_counts

SETS = ("cls", "patch", "both")
PARTS = ("unique cls", "unique patch", "shared", "both", "preference")
_MIXTURES = np.linspace(0, 1, 11)


@dataclass(frozen=True, eq=False)
class Kernels:
    """A set of features as its linear kernel of mean diagonal 1."""

    train: Float32[np.ndarray, "image image"]
    new: Float32[np.ndarray, "new image"]


@dataclass(frozen=True, kw_only=True)
class PartitionRow:
    """One part of the variance, averaged over a family's voxels."""

    subject: str
    roi: str
    part: str
    """One of `PARTS`; ``both`` is all that is explained."""
    value: float
    low: float | None
    high: float | None
    n_images: int
    n_voxels: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Partition:
    """A subject's parts per family, and each voxel's."""

    rows: tuple[PartitionRow, ...]
    voxelwise: dict[str, Float[np.ndarray, " voxel"]]
    """By part."""

    @property
    def preference(self) -> Float[np.ndarray, " voxel"]:
        """Unique patch less unique CLS variance; NaN for a voxel whose test responses never vary."""
        return self.voxelwise["preference"]


def kernels_of(sets: list[Float32[np.ndarray, "_row _feature"]], *, n_train: int) -> Kernels:
    """Return the even mixture of the bands' linear kernels; the first `n_train` rows are training images."""
    pairs = [standardised_pair(band[:n_train], band[n_train:]) for band in sets]
    train = sum((x @ x.T for x, _ in pairs), np.zeros((), np.float32)) / len(pairs)
    new = sum((y @ x.T for x, y in pairs), np.zeros((), np.float32)) / len(pairs)
    return Kernels(np.asarray(train, np.float32), np.asarray(new, np.float32))


def predictions(
    cls: Kernels, patch: Kernels, responses: Float32[np.ndarray, "image voxel"]
) -> dict[str, Float32[np.ndarray, "new voxel"]]:
    """Return what CLS, patches and both predict for the new images, fitted on the training images' `responses`."""

    def mixed(shares: np.ndarray) -> Iterator[Candidate]:
        for share in shares:
            of_patch, of_cls = np.float32(share), np.float32(1 - share)
            yield candidate_of_kernel(
                of_cls * cls.train + of_patch * patch.train, of_cls * cls.new + of_patch * patch.new
            )

    shares = {"cls": np.zeros(1), "patch": np.ones(1), "both": _MIXTURES}
    return {name: best_of(mixed(of_set), responses).prediction for name, of_set in shares.items()}


def partition(
    predicted: Mapping[str, Float32[np.ndarray, "image voxel"]],
    measured: Measured,
    *,
    n_bootstraps: int = 1000,
    rng: np.random.Generator,
) -> Partition:
    """Partition the variance of test images' mean responses.

    Parameters
    ----------
    predicted
        By `SETS`.
    """
    counts = np.vstack([np.ones(measured.n_images), resample_counts(measured.n_images, n_bootstraps, rng=rng)])
    regions = {"all": np.ones(measured.n_voxels, dtype=bool)}
    regions |= {name: measured.families[name] for name in FAMILIES if name in measured.families}
    voxelwise, means = _resampled_parts(predicted, measured.mean, counts, regions)
    rows = []
    for part, by_region in means.items():
        for k, (roi, mask) in enumerate(regions.items()):
            value = float(by_region[0, k])
            low, high = percentile_interval(centre(by_region[1:, k], value), n_images=measured.n_images)
            rows.append(
                PartitionRow(
                    subject=measured.subject,
                    roi=roi,
                    part=part,
                    value=value,
                    low=low if np.isfinite(low) else None,
                    high=high if np.isfinite(high) else None,
                    n_images=measured.n_images,
                    n_voxels=int(mask.sum()),
                )
            )
    return Partition(rows=tuple(rows), voxelwise=voxelwise)


def partition_subject(
    tokens: TokenReader,
    train: Samples,
    measured: Measured,
    rows: Int[np.ndarray, " image"],
    *,
    n_bootstraps: int = 1000,
    rng: np.random.Generator,
) -> Partition:
    """Fit on a subject's training images and partition the variance of its test images, the store's `rows`."""
    cls, *patch = bands(tokens, np.concatenate([train.image, rows]))
    n_train = len(train.image)
    fitted = predictions(kernels_of([cls], n_train=n_train), kernels_of(list(patch), n_train=n_train), train.responses)
    return partition(fitted, measured, n_bootstraps=n_bootstraps, rng=rng)


def explained(
    prediction: Float[np.ndarray, "image voxel"],
    target: Float[np.ndarray, "image voxel"],
    counts: Float[np.ndarray, "resample image"],
) -> Float[np.ndarray, "resample voxel"]:
    """Return ``R2 = 1 - sum (y - y_hat)^2 / sum (y - mean y)^2`` on each resample; NaN where ``y`` never varies."""
    y = target.astype(np.float64) - target.mean(0)
    error = counts @ np.square(target - prediction, dtype=np.float64)
    total = counts @ np.square(y) - np.square(counts @ y) / counts.sum(1, keepdims=True)
    varies = total > 1e-9 * len(target)
    return 1 - np.divide(error, total, out=np.full_like(total, np.nan), where=varies)


def parts_of(r2: Mapping[str, Float[np.ndarray, "*any"]]) -> dict[str, Float[np.ndarray, "*any"]]:
    """Return `PARTS` from the R2 of each of `SETS`."""
    cls, patch, both = (r2[name] for name in SETS)
    return {
        "unique cls": both - patch,
        "unique patch": both - cls,
        "shared": cls + patch - both,
        "both": both,
        "preference": patch - cls,
    }


def _resampled_parts(
    predicted: Mapping[str, np.ndarray],
    target: np.ndarray,
    counts: np.ndarray,
    regions: dict[str, Bool[np.ndarray, " voxel"]],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return parts by voxel, and by resample and region; a voxel that never varies in a resample has no part in it."""
    voxelwise: dict[str, np.ndarray] = {}
    blocks: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}
    for start in range(0, len(counts), RESAMPLE_BLOCK):
        some = counts[start : start + RESAMPLE_BLOCK]
        parts = parts_of({name: explained(predicted[name], target, some) for name in SETS})
        if start == 0:
            voxelwise = {part: values[0] for part, values in parts.items()}
        for part, values in parts.items():
            blocks[part].append(np.stack([_mean(values[:, mask]) for mask in regions.values()], axis=1))
    return voxelwise, {part: np.concatenate(several) for part, several in blocks.items()}


def _mean(values: Float[np.ndarray, "resample voxel"]) -> Float[np.ndarray, " resample"]:
    defined = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(defined, values, 0).sum(1) / defined.sum(1)

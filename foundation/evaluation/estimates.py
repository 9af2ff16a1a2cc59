"""Estimates against one target: values, their resampled distributions and paired differences, per ROI.

A target is rows of measured responses, single trials or repeat means; a row knows its image. What needs voxels or
images together is computed once per system and kept as numbers per voxel, per image and per resample, from which every
ROI's estimates and every pair's differences follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from foundation.evaluation.metrics import LOWEST_CEILING, patternwise_r, r2_ceiling, squared_error, voxelwise_r
from foundation.evaluation.sampling import MIN_CRPS_SAMPLES, coverage, crps, energy_score, samples_needed
from foundation.evaluation.statistics import (
    bootstrap_mean,
    bootstrap_p,
    bootstrap_voxelwise,
    centre,
    paired_wilcoxon,
    voxel_moments,
)

ROW_BLOCK = 128
VOXEL_BLOCK = 1024
SAMPLED_VOXEL_BLOCK = 128
"""Fewer, since every sample of a block is sorted at once."""
COVERED = 0.9
"""Level of the intervals whose coverage is ``coverage90``."""


class Key(NamedTuple):
    roi: str
    axis: str
    metric: str


@dataclass(frozen=True, eq=False)
class Estimate:
    value: float
    samples: Float[np.ndarray, " resample"] = field(default_factory=lambda: np.empty(0))
    n_voxels: int = 0
    n_images: int | None = None
    """Images with a value; None: all."""
    p_value: float = float("nan")


UNDEFINED = Estimate(float("nan"))


@dataclass(frozen=True, eq=False)
class Target:
    rows: Float[np.ndarray, "row voxel"]
    image: Int[np.ndarray, " row"]
    """Image of each row, 0 to n_images - 1."""
    rois: dict[str, Bool[np.ndarray, " voxel"]]
    ceiling: Float[np.ndarray, " voxel"] | None
    """Share of these rows' variance that is signal."""
    counts: Float[np.ndarray, "resample image"]

    @property
    def n_rows(self) -> Int[np.ndarray, " image"]:
        return np.bincount(self.image)


@dataclass(frozen=True, eq=False)
class SystemEstimates:
    """One system against one target."""

    estimates: dict[Key, Estimate]
    r: Float[np.ndarray, " voxel"]
    mean_r: dict[tuple[str, bytes], Estimate]
    """Mean r of an ROI over the voxels that are defined for this system and for another one, by ROI and mask."""
    per_image: dict[str, tuple[Float[np.ndarray, " image"], Float[np.ndarray, " image"]]]
    """By ROI: patternwise r and squared error, averaged over the image's rows."""


def estimate_systems(
    predictions: Mapping[str, Float[np.ndarray, "image voxel"]], target: Target
) -> dict[str, SystemEstimates]:
    """Every metric of every system, with its distribution over the target's resamples."""
    voxelwise = {name: _voxelwise_r(x, target) for name, x in predictions.items()}
    found = {}
    for name, prediction in predictions.items():
        per_image = {roi: _per_image(prediction, target, mask) for roi, mask in target.rois.items()}
        estimates, mean_r = _voxel_estimates(prediction, target, voxelwise[name], list(voxelwise.values()))
        for roi, (r, error) in per_image.items():
            n_voxels = int(target.rois[roi].sum())
            estimates[Key(roi, "pattern", "r")] = mean_over_images(r, target, n_voxels=n_voxels)
            mse = mean_over_images(error, target, n_voxels=n_voxels)
            estimates[Key(roi, "voxel", "mse")] = estimates[Key(roi, "pattern", "mse")] = mse
        found[name] = SystemEstimates(estimates, voxelwise[name], mean_r, per_image)
    return found


def estimate_differences(a: SystemEstimates, b: SystemEstimates, target: Target) -> dict[Key, Estimate]:
    """``a`` less ``b`` on the same resamples, voxels and images; only what is defined for both."""
    found = {}
    for roi, mask in target.rois.items():
        n_voxels = int(mask.sum())
        common = (mask & np.isfinite(a.r) & np.isfinite(b.r)).tobytes()
        if (roi, common) in a.mean_r and (roi, common) in b.mean_r:
            one, other = a.mean_r[roi, common], b.mean_r[roi, common]
            samples = one.samples - other.samples
            found[Key(roi, "voxel", "r")] = Estimate(
                one.value - other.value,
                samples,
                one.n_voxels,
                p_value=bootstrap_p(samples, n_images=target.counts.shape[1]),
            )
        (r_a, error_a), (r_b, error_b) = a.per_image[roi], b.per_image[roi]
        if np.isfinite(r_a - r_b).any():
            p_value = paired_wilcoxon(r_a, r_b)
            found[Key(roi, "pattern", "r")] = mean_over_images(r_a - r_b, target, n_voxels=n_voxels, p_value=p_value)
        if n_voxels:
            p_value = paired_wilcoxon(error_a, error_b)
            mse = mean_over_images(error_a - error_b, target, n_voxels=n_voxels, p_value=p_value)
            found[Key(roi, "voxel", "mse")] = found[Key(roi, "pattern", "mse")] = mse
    return found


def estimate_ceiling(target: Target) -> dict[Key, Estimate]:
    """What a prediction equal to the signal would score voxelwise; without intervals, since the ceiling is given."""
    found: dict[Key, Estimate] = {}
    if target.ceiling is None:
        return found
    enough = len(target.rows) > 1
    variance = target.rows.var(axis=0, ddof=1, dtype=np.float64) if enough else np.full(len(target.ceiling), np.nan)
    for roi, mask in target.rois.items():
        known = mask & np.isfinite(target.ceiling)
        n_voxels = int(known.sum())
        if n_voxels == 0:
            continue
        c = target.ceiling[known]
        noise = Estimate(float(((1 - c) * variance[known]).mean()), n_voxels=n_voxels)
        found[Key(roi, "voxel", "r")] = Estimate(float(np.sqrt(c).mean()), n_voxels=n_voxels)
        found[Key(roi, "voxel", "r_median")] = Estimate(float(np.median(np.sqrt(c))), n_voxels=n_voxels)
        found[Key(roi, "voxel", "mse")] = found[Key(roi, "pattern", "mse")] = noise
        n_counted = int((c >= LOWEST_CEILING).sum())
        if n_counted:
            for metric in ("r2_ceiling", "r2_ceiling_unclipped"):
                found[Key(roi, "voxel", metric)] = Estimate(1.0, n_voxels=n_counted)
    return found


def estimate_sampling(samples: Float[np.ndarray, "sample image voxel"], target: Target) -> dict[Key, Estimate]:
    """CRPS, energy score and coverage of one system's samples; without what so few samples don't allow."""
    found: dict[Key, Estimate] = {}
    if len(samples) >= MIN_CRPS_SAMPLES:
        found |= _mean_per_roi(
            "crps", lambda block: crps(samples[:, :, block], target.rows[:, block], image=target.image), target
        )
        found |= _energy(samples, target)
    if len(samples) >= samples_needed(COVERED):
        found |= _mean_per_roi(
            "coverage90",
            lambda block: coverage(samples[:, :, block], target.rows[:, block], level=COVERED, image=target.image),
            target,
        )
    return found


def estimate_point_mass(prediction: Float[np.ndarray, "image voxel"], target: Target) -> dict[Key, Estimate]:
    """CRPS and energy score of a prediction without spread: its error. It has no interval that could cover."""
    errors = _mean_per_roi(
        "crps", lambda block: np.abs(prediction[:, block][target.image] - target.rows[:, block]), target
    )
    return errors | _energy_of(
        lambda voxels: np.linalg.norm(
            prediction[:, voxels].astype(np.float64)[target.image] - target.rows[:, voxels], axis=1
        ),
        target,
    )


def _energy(samples: np.ndarray, target: Target) -> dict[Key, Estimate]:
    return _energy_of(
        lambda voxels: energy_score(samples[:, :, voxels], target.rows[:, voxels], image=target.image), target
    )


def _energy_of(of_voxels: Callable[[slice | np.ndarray], np.ndarray], target: Target) -> dict[Key, Estimate]:
    """The mean over images of a score that a row has for an ROI's voxels together."""
    found = {}
    for roi, mask in target.rois.items():
        if mask.any():
            of_rows = of_voxels(slice(None) if mask.all() else np.flatnonzero(mask))
            per_image = np.bincount(target.image, of_rows) / target.n_rows
            found[Key(roi, "pattern", "energy")] = mean_over_images(per_image, target, n_voxels=int(mask.sum()))
    return found


def mean_over_images(
    values: Float[np.ndarray, " image"], target: Target, *, n_voxels: int, p_value: float = float("nan")
) -> Estimate:
    """Mean of one value per image, an image weighted by its rows; images with NaN aren't counted."""
    defined = np.isfinite(values)
    if not defined.any():
        return UNDEFINED
    value = float(np.average(values[defined], weights=target.n_rows[defined]))
    samples = bootstrap_mean(values, target.counts, weights=target.n_rows)
    return Estimate(value, samples, n_voxels, int(defined.sum()), p_value)


def _mean_per_roi(metric: str, of_block: Callable[[slice], np.ndarray], target: Target) -> dict[Key, Estimate]:
    """Mean over an ROI's voxels and over images of values "row voxel" that are made a block of voxels at a time."""
    inside = np.stack(list(target.rois.values()), axis=1).astype(np.float64)
    sums = np.zeros((len(target.rows), len(target.rois)))
    for start in range(0, len(inside), SAMPLED_VOXEL_BLOCK):
        block = slice(start, start + SAMPLED_VOXEL_BLOCK)
        sums += of_block(block) @ inside[block]
    found = {}
    for roi, of_rows, n_voxels in zip(target.rois, sums.T, inside.sum(axis=0).astype(int), strict=True):
        if n_voxels:
            per_image = np.bincount(target.image, of_rows) / (n_voxels * target.n_rows)
            found[Key(roi, "voxel", metric)] = mean_over_images(per_image, target, n_voxels=int(n_voxels))
    return found


def _voxelwise_r(prediction: np.ndarray, target: Target) -> np.ndarray:
    n_voxels = prediction.shape[1]
    blocks = [slice(i, i + VOXEL_BLOCK) for i in range(0, n_voxels, VOXEL_BLOCK)]
    return np.concatenate(
        [np.empty(0), *(voxelwise_r(prediction[:, b][target.image], target.rows[:, b]) for b in blocks)]
    )


def _per_image(prediction: np.ndarray, target: Target, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    inside = slice(None) if mask.all() else np.flatnonzero(mask)
    r, error = np.empty(len(target.rows)), np.empty(len(target.rows))
    for start in range(0, len(target.rows), ROW_BLOCK):
        block = slice(start, start + ROW_BLOCK)
        x, y = prediction[target.image[block]][:, inside], target.rows[block][:, inside]
        r[block], error[block] = patternwise_r(x, y), squared_error(x, y)
    n_rows = target.n_rows
    return np.bincount(target.image, r) / n_rows, np.bincount(target.image, error) / n_rows


class _Reduction(NamedTuple):
    """A statistic of the correlations of some voxels."""

    roi: str
    metric: str
    voxels: np.ndarray
    value: float
    common: bytes = b""


def _voxel_estimates(
    prediction: np.ndarray, target: Target, r: np.ndarray, all_r: list[np.ndarray]
) -> tuple[dict[Key, Estimate], dict[tuple[str, bytes], Estimate]]:
    """The metrics made of voxelwise correlations, and the mean r on the voxels shared with each other system."""
    reductions = _reductions(target, r, all_r)
    if not reductions:
        return {}, {}

    def reduce(resampled: np.ndarray) -> np.ndarray:
        return np.stack([_reduce(resampled, wanted, target.ceiling) for wanted in reductions], axis=1)

    samples = np.empty((0, len(reductions)))
    if len(target.counts):
        samples = bootstrap_voxelwise(reduce, voxel_moments(prediction, target.rows, image=target.image), target.counts)
    estimates: dict[Key, Estimate] = {}
    mean_r: dict[tuple[str, bytes], Estimate] = {}
    for wanted, drawn in zip(reductions, samples.T, strict=True):
        estimate = Estimate(wanted.value, centre(drawn, wanted.value), len(wanted.voxels))
        if wanted.metric == "r":
            mean_r[wanted.roi, wanted.common] = estimate
            if wanted.common != (target.rois[wanted.roi] & np.isfinite(r)).tobytes():
                continue
        estimates[Key(wanted.roi, "voxel", wanted.metric)] = estimate
    return estimates, mean_r


def _reductions(target: Target, r: np.ndarray, all_r: list[np.ndarray]) -> list[_Reduction]:
    found: list[_Reduction] = []
    ratio = None if target.ceiling is None else r2_ceiling(r, target.ceiling)
    for roi, mask in target.rois.items():
        own = mask & np.isfinite(r)
        if not own.any():
            continue
        found.append(_Reduction(roi, "r_median", np.flatnonzero(own), float(np.median(r[own]))))
        for common in {(own & np.isfinite(other)).tobytes() for other in all_r}:
            voxels = np.flatnonzero(np.frombuffer(common, dtype=bool))
            if voxels.size:
                found.append(_Reduction(roi, "r", voxels, float(r[voxels].mean()), common))
        if ratio is not None and (mask & ratio.counted).any():
            voxels = np.flatnonzero(mask & ratio.counted)
            for metric, values in (("r2_ceiling", ratio.clipped), ("r2_ceiling_unclipped", ratio.unclipped)):
                found.append(_Reduction(roi, metric, voxels, float(values[voxels].mean())))
    return found


def _reduce(resampled: np.ndarray, wanted: _Reduction, ceiling: np.ndarray | None) -> np.ndarray:
    """One number per resample; a voxel that a resample leaves without variance isn't counted in it."""
    voxels = wanted.voxels
    r = resampled if len(voxels) == resampled.shape[1] else resampled[:, voxels]
    if wanted.metric.startswith("r2"):
        assert ceiling is not None
        r = r * np.abs(r) / ceiling[voxels].astype(np.float32)
        if wanted.metric == "r2_ceiling":
            r = np.clip(r, 0, 1)
    if not np.isnan(r).any():
        return np.median(r, axis=1) if wanted.metric == "r_median" else r.mean(axis=1, dtype=np.float64)
    value = np.full(len(r), np.nan)
    left = ~np.isnan(r).all(axis=1)
    value[left] = np.nanmedian(r[left], axis=1) if wanted.metric == "r_median" else np.nanmean(r[left], axis=1)
    return value

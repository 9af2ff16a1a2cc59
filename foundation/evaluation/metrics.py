"""Scores of predicted against measured responses, along the two axes of the protocol.

Voxelwise: one value per voxel, over images. Patternwise: one value per image, over voxels. They answer different
questions and differ widely in size, so a score is never printed without its axis.

What has no variance has no correlation: a constant prediction or a constant target gives NaN, never 0. A NaN in the
input makes NaN of the voxel or image that it is in. Sums run in double precision, whatever the input's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

LOWEST_CEILING = 0.01
"""Below one per cent of explainable variance, dividing by the ceiling multiplies noise by more than 100."""

BLOCK_ELEMENTS = 1 << 20


def voxelwise_r(
    prediction: Float[np.ndarray, "image voxel"], target: Float[np.ndarray, "image voxel"]
) -> Float[np.ndarray, " voxel"]:
    """Pearson correlation over images, per voxel.

    Returns
    -------
    r
        -1 to 1. NaN where the prediction or the target is the same for all images.
    """
    n_images, n_voxels = target.shape
    step = max(1, BLOCK_ELEMENTS // max(n_images, 1))
    r = np.empty(n_voxels)
    for start in range(0, n_voxels, step):
        block = slice(start, start + step)
        r[block] = _r(prediction[:, block].T, target[:, block].T)
    return r


def patternwise_r(
    prediction: Float[np.ndarray, "image voxel"], target: Float[np.ndarray, "image voxel"]
) -> Float[np.ndarray, " image"]:
    """Pearson correlation over voxels, per image.

    Returns
    -------
    r
        -1 to 1. NaN where the prediction or the target is the same in all voxels.
    """
    n_images, n_voxels = target.shape
    step = max(1, BLOCK_ELEMENTS // max(n_voxels, 1))
    r = np.empty(n_images)
    for start in range(0, n_images, step):
        block = slice(start, start + step)
        r[block] = _r(prediction[block], target[block])
    return r


def squared_error(
    prediction: Float[np.ndarray, "image voxel"], target: Float[np.ndarray, "image voxel"]
) -> Float[np.ndarray, " image"]:
    """Squared error averaged over voxels, per image, in the responses' unit squared; NaN without voxels."""
    n_images, n_voxels = target.shape
    if n_voxels == 0:
        return np.full(n_images, np.nan)
    step = max(1, BLOCK_ELEMENTS // n_voxels)
    error = np.empty(n_images)
    for start in range(0, n_images, step):
        block = slice(start, start + step)
        error[block] = np.mean((prediction[block].astype(np.float64) - target[block]) ** 2, axis=1)
    return error


def mse(prediction: Float[np.ndarray, "image voxel"], target: Float[np.ndarray, "image voxel"]) -> float:
    """Mean squared error over images and voxels, in the responses' unit squared.

    The order of averaging doesn't matter, so that the voxelwise and the patternwise MSE are one number. NaN if empty.
    """
    return float(squared_error(prediction, target).mean()) if len(target) else float("nan")


@dataclass(frozen=True, eq=False)
class CeilingRatio:
    """Squared correlation over the noise ceiling, per voxel; NaN where it isn't counted."""

    unclipped: Float[np.ndarray, " voxel"]
    clipped: Float[np.ndarray, " voxel"]
    counted: Bool[np.ndarray, " voxel"]
    n_too_low: int
    """Voxels whose correlation is defined but whose ceiling is too low, or undefined, to divide by."""


def r2_ceiling(
    r: Float[np.ndarray, " voxel"], ceiling: Float[np.ndarray, " voxel"], *, lowest: float = LOWEST_CEILING
) -> CeilingRatio:
    """Share of the explainable variance that is explained: ``r |r| / ceiling``, unclipped and clipped to 0 to 1.

    The square keeps its sign. A plain square would credit a voxel that is predicted backwards, and would lift
    unpredictable voxels by ``1 / n_images`` on average; with the sign, chance averages to 0.

    Parameters
    ----------
    r
        Voxelwise correlation.
    ceiling
        Fraction of the same target's variance that is signal.
    lowest
        Voxels with a lower or NaN ceiling aren't divided; they are counted in ``n_too_low``.
    """
    defined = np.isfinite(r)
    counted = defined & (ceiling >= lowest)
    unclipped = np.full(len(r), np.nan)
    unclipped[counted] = r[counted] * np.abs(r[counted]) / ceiling[counted]
    return CeilingRatio(unclipped, np.clip(unclipped, 0, 1), counted, int((defined & ~counted).sum()))


def _r(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation along the last axis."""
    if x.shape[1] < 2:
        return np.full(len(x), np.nan)
    constant = (x == x[:, :1]).all(axis=1) | (y == y[:, :1]).all(axis=1)
    x = x - x.mean(axis=1, keepdims=True, dtype=np.float64)
    y = y - y.mean(axis=1, keepdims=True, dtype=np.float64)
    covariance = np.einsum("ij,ij->i", x, y)
    scale = np.sqrt(np.einsum("ij,ij->i", x, x) * np.einsum("ij,ij->i", y, y))
    with np.errstate(divide="ignore", invalid="ignore"):
        r = np.clip(covariance / scale, -1, 1)
    return np.where(constant, np.nan, r)

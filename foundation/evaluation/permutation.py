"""The permutation null: how well predictions do that belong to other images.

A permutation gives every image another image's prediction; an image keeps its trials and its voxels, so that what
voxels and trials share is in the null as it is in the data. Under the hypothesis that a prediction tells nothing about
its image, all assignments are alike, and

    p = (1 + #{permutations with r >= observed}) / (1 + n)

is valid for any ``n`` (Phipson & Smyth 2010): it never is 0. The tests are one-sided; a voxel that is predicted
backwards isn't predicted.

Legend: with ``n_i`` trials of image ``i``, prediction ``x`` and sums over an image's trials of the target ``y``, only

    sum_i x[order[i]] y[i],  sum_i n_i x[order[i]],  sum_i n_i x[order[i]]^2

change with the order. The last two are matrix products, and constant where all images have as many trials.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from foundation.evaluation.statistics import VoxelMoments, benjamini_hochberg, voxel_moments

VOXEL_BLOCK = 256
"""A block's predictions stay in the processor's cache while their rows are gathered for each permutation."""
TIE = 1e-5
"""Correlations in single precision that are nearer than this count as equal."""


@dataclass(frozen=True, eq=False)
class MeanTest:
    """The mean voxelwise r of an ROI against its null."""

    value: float
    null: Float[np.ndarray, " permutation"]
    p_value: float
    n_voxels: int


@dataclass(frozen=True, eq=False)
class PermutationTest:
    """What :func:`permutation_test` finds."""

    mean_r: dict[str, MeanTest]
    """By ROI."""
    r: Float[np.ndarray, " voxel"]
    """Correlation over the target's rows; NaN where the prediction or the target doesn't vary, and so its p values."""
    p: Float[np.ndarray, " voxel"]
    q: Float[np.ndarray, " voxel"]
    """``p`` adjusted over all voxels for the false discovery rate (Benjamini-Hochberg)."""


def draw_orders(
    n_images: int, n_permutations: int, *, rng: np.random.Generator
) -> Int[np.ndarray, "permutation image"]:
    """Random orders: whose prediction each image is given."""
    return rng.permuted(np.tile(np.arange(n_images), (n_permutations, 1)), axis=1)


def permutation_test(
    prediction: Float[np.ndarray, "image voxel"],
    target: Float[np.ndarray, "row voxel"],
    orders: Int[np.ndarray, "permutation image"],
    *,
    image: Int[np.ndarray, " row"] | None = None,
    rois: Mapping[str, Bool[np.ndarray, " voxel"]] | None = None,
) -> PermutationTest:
    """Test whether predictions belong to their images: per voxel, and their mean r per ROI.

    Parameters
    ----------
    target
        Single trials or repeat means.
    orders
        From :func:`draw_orders`; ``n`` of them can't give a p below ``1 / (n + 1)``, which bounds what
        Benjamini-Hochberg over many voxels can find.
    image
        Row of ``prediction`` that each row of ``target`` is compared with; None: one target row per image, in order.
    rois
        Voxels of each ROI; None: ``all``. The mean leaves out voxels without a correlation.

    Raises
    ------
    ValueError
        If there is no order, or the orders are of another number of images.
    """
    n_images, n_voxels = prediction.shape
    if len(orders) == 0 or orders.shape[1] != n_images:
        raise ValueError(
            f"orders are {orders.shape}, expected (permutation, image) with at least one permutation and image "
            f"{n_images}; draw them with draw_orders"
        )
    rois = {"all": np.ones(n_voxels, dtype=bool)} if rois is None else dict(rois)
    moments = voxel_moments(prediction, target, image=image)
    whole = np.arange(n_images)[None]
    r = np.empty(n_voxels)
    reached = np.empty(n_voxels)
    sums = {roi: np.zeros(len(orders)) for roi in rois}
    for start in range(0, n_voxels, VOXEL_BLOCK):
        block = slice(start, start + VOXEL_BLOCK)
        r[block] = permuted_r(moments, whole, voxels=block)[0]
        null = permuted_r(moments, orders, voxels=block)
        reached[block] = (null >= r[block] - TIE).sum(axis=0)
        for roi, mask in rois.items():
            sums[roi] += null[:, mask[block] & np.isfinite(r[block])].sum(axis=1, dtype=np.float64)
    defined = np.isfinite(r)
    p = np.where(defined, (1 + reached) / (1 + len(orders)), np.nan)
    mean_r = {roi: _mean_test(r[mask & defined], sums[roi]) for roi, mask in rois.items()}
    return PermutationTest(mean_r, r, p, benjamini_hochberg(p))


def permuted_r(
    moments: VoxelMoments, orders: Int[np.ndarray, "permutation image"], *, voxels: slice = slice(None)
) -> Float[np.ndarray, "permutation voxel"]:
    """Voxelwise correlation with each order of the predictions, accurate to about 1e-6; NaN without variance."""
    n = moments.n
    x = moments.x[:, voxels] / n[:, None]
    y = np.ascontiguousarray(moments.y[:, voxels])
    products = np.empty((len(orders), x.shape[1]), dtype=np.float32)
    for product, order in zip(products, orders, strict=True):
        np.einsum("iv,iv->v", x[order], y, out=product)
    # The trials that come with each prediction: those of the image that it is given to.
    trials = np.empty((len(orders), len(n)), dtype=np.float32)
    np.put_along_axis(trials, orders, np.broadcast_to(n, orders.shape), axis=1)
    total = n.sum()
    mean_x, square_x = trials @ x / total, trials @ (x * x) / total
    mean_y, square_y = y.sum(axis=0) / total, moments.yy[:, voxels].sum(axis=0) / total
    variance_x, variance_y = square_x - mean_x**2, square_y - mean_y**2
    with np.errstate(divide="ignore", invalid="ignore"):
        r = (products / total - mean_x * mean_y) / np.sqrt(variance_x * variance_y)
        r[~((variance_x > TIE * square_x) & (variance_y > TIE * square_y))] = np.nan
    return np.clip(r, -1, 1)


def _mean_test(r: np.ndarray, null_sum: np.ndarray) -> MeanTest:
    if r.size == 0:
        return MeanTest(float("nan"), np.full(len(null_sum), np.nan), float("nan"), 0)
    value, null = float(r.mean()), null_sum / r.size
    return MeanTest(value, null, float((1 + (null >= value - TIE).sum()) / (1 + len(null))), r.size)

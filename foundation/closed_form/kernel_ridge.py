"""Kernel ridge whose kernel and penalty are chosen per voxel, among many candidates and from one decomposition each.

With ``K = U diag(s) U'`` the centred kernel of the training images and ``y`` a voxel's centred responses, the residuals
under penalty ``a`` are ``U diag(a / (s + a)) U' y`` and the model has ``1 + sum s / (s + a)`` degrees of freedom. A
candidate's error is generalised cross-validation (Golub, Heath & Wahba 1979), which is leaving one image out at a time
with the mean leverage in place of each image's own:

    GCV(a) = n ||y - y_hat||^2 / (n - degrees of freedom)^2.

All penalties of all voxels follow from ``U' y``, so a candidate costs one eigendecomposition and one product.
(himalaya's random search decomposes every fold and multiplies an (image, image) matrix out for every penalty.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from himalaya.kernel_ridge import generate_dirichlet_samples
from jaxtyping import Float, Float32, Int
from scipy.linalg import eigh

ALPHAS: tuple[float, ...] = tuple(np.logspace(-2, 3.5, 12).tolist())
"""Half decades, for kernels of mean diagonal 1 (and so for any number of features)."""
VOXEL_BLOCK = 4096
N_MIXTURES = 80


@dataclass(frozen=True, eq=False)
class Candidate:
    """A centred kernel of the training images by its spectrum, and its rows for new images."""

    values: Float[np.ndarray, " rank"]
    vectors: Float[np.ndarray, "image rank"]
    new: Float[np.ndarray, "new rank"]
    """Kernel between new and training images, times `vectors`."""


def candidate_of_kernel(kernel: Float32[np.ndarray, "image image"], new: Float32[np.ndarray, "new image"]) -> Candidate:
    """Decompose a centred `kernel`; `new` is the one between new and training images."""
    values, vectors = eigh(kernel, driver="evd", check_finite=False)
    return Candidate(np.maximum(values, 0), vectors, new @ vectors)


def candidate_of_features(
    features: Float32[np.ndarray, "image feature"], new: Float32[np.ndarray, "new feature"]
) -> Candidate:
    """Decompose the linear kernel of centred `features`, through ``X'X`` where that is the smaller matrix."""
    n_images, n_features = features.shape
    if n_images <= n_features:
        return candidate_of_kernel(features @ features.T, new @ features.T)
    values, basis = eigh(features.T @ features, driver="evd", check_finite=False)
    real = values > values[-1] * n_features * np.finfo(np.float32).eps
    values, basis = values[real], basis[:, real]
    root = np.sqrt(values)
    return Candidate(values, features @ (basis / root), new @ (basis * root))


def standardised_pair(
    features: Float32[np.ndarray, "image feature"], new: Float32[np.ndarray, "new feature"]
) -> tuple[Float32[np.ndarray, "image feature"], Float32[np.ndarray, "new feature"]]:
    """Standardise both by the training images' `features`, scaled to a linear kernel of mean diagonal 1.

    Features that never vary become 0.
    """
    mean, scale = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    constant = (features == features[:1]).all(0) | (scale == 0)
    scale[constant] = np.inf
    scale *= np.sqrt(max(1, np.count_nonzero(~constant)))
    return tuple(((x - mean.astype(np.float32)) / scale.astype(np.float32)) for x in (features, new))  # pyright: ignore[reportReturnType]


def gcv(
    candidate: Candidate,
    projected: Float[np.ndarray, "rank voxel"],
    total: Float[np.ndarray, " voxel"],
    *,
    alphas: Float[np.ndarray, " alpha"],
) -> Float[np.ndarray, "alpha voxel"]:
    """Return each penalty's generalised cross-validation error.

    Parameters
    ----------
    projected
        ``U' y``.
    total
        Sum of squares of the centred responses.
    """
    n_images = len(candidate.vectors)
    power = np.square(projected)
    outside = np.maximum(total - power.sum(0), 0)  # what no feature reaches
    left = alphas[:, None] / (candidate.values + alphas[:, None])
    freedom = n_images - 1 - (1 - left).sum(1, dtype=np.float64)
    return n_images * (np.square(left) @ power + outside) / np.square(freedom)[:, None]


@dataclass(frozen=True, eq=False)
class Best:
    """What each voxel's best candidate predicts."""

    prediction: Float32[np.ndarray, "new voxel"]
    candidate: Int[np.ndarray, " voxel"]
    """Its number, by voxel."""
    alpha: Float32[np.ndarray, " voxel"]
    error: Float[np.ndarray, " voxel"]
    """Its generalised cross-validation error."""
    mean: Float32[np.ndarray, " voxel"]
    """Mean of the training responses."""
    dual: Float32[np.ndarray, "image voxel"]
    """``(K + a)^-1 y``, of which what no feature reaches is left out: the weights of features ``X`` are ``X' dual``."""
    left_out: Float32[np.ndarray, "image voxel"]
    """Each training image's prediction by a fit without it, at the same candidate and penalty, in closed form."""


def best_of(
    candidates: Iterable[Candidate],
    responses: Float[np.ndarray, "image voxel"],
    *,
    alphas: tuple[float, ...] = ALPHAS,
) -> Best:
    """Choose per voxel among `candidates`, which come and go one at a time, and predict the new images.

    Raises
    ------
    ValueError
        If there are fewer than three images or a response isn't finite.
    """
    n_images, n_voxels = responses.shape
    if n_images < 3:
        raise ValueError(f"{n_images} training images are too few to choose a penalty from; at least 3 are needed")
    if not np.isfinite(responses).all():
        raise ValueError("responses hold NaN or infinite values; drop those rows or voxels before the fit")
    mean = responses.mean(0, dtype=np.float64).astype(np.float32)
    centred = responses.astype(np.float32) - mean
    total = np.square(centred).sum(0, dtype=np.float64)
    grid = np.asarray(alphas, np.float32)
    which, alpha, error = np.zeros(n_voxels, np.int64), np.zeros(n_voxels, np.float32), np.full(n_voxels, np.inf)
    dual, left_out = np.empty_like(centred), np.empty_like(centred)
    prediction: np.ndarray | None = None
    for number, candidate in enumerate(candidates):
        if prediction is None:
            prediction = np.empty((len(candidate.new), n_voxels), np.float32)
        leverage = (
            1 / n_images + np.square(candidate.vectors) @ (candidate.values / (candidate.values + grid[:, None])).T
        )
        for start in range(0, n_voxels, VOXEL_BLOCK):
            block = slice(start, start + VOXEL_BLOCK)
            projected = candidate.vectors.T @ centred[:, block]
            errors = gcv(candidate, projected, total[block], alphas=grid)
            lowest = errors.min(0)
            (better,) = np.nonzero(lowest < error[block])
            if not len(better):
                continue
            choice = errors[:, better].argmin(0)
            voxels = start + better
            which[voxels], alpha[voxels], error[voxels] = number, grid[choice], lowest[better]
            weights = projected[:, better] / (candidate.values[:, None] + grid[choice])
            prediction[:, voxels] = candidate.new @ weights + mean[voxels]
            left = centred[:, voxels] - candidate.vectors @ (candidate.values[:, None] * weights)
            dual[:, voxels] = candidate.vectors @ weights  # not `left / a`, where a small penalty magnifies rounding
            left_out[:, voxels] = responses[:, voxels] - left / (1 - leverage[:, choice])
    assert prediction is not None, "no candidate was given"
    return Best(prediction, which, alpha, error, mean, dual, left_out)


def lowest_errors(
    candidates: Iterable[Candidate],
    responses: Float[np.ndarray, "image voxel"],
    *,
    alphas: tuple[float, ...] = ALPHAS,
) -> Float32[np.ndarray, "candidate voxel"]:
    """Return each candidate's generalised cross-validation error under its best penalty, for every voxel."""
    centred = (responses - responses.mean(0, dtype=np.float64)).astype(np.float32)
    total = np.square(centred).sum(0, dtype=np.float64)
    grid = np.asarray(alphas, np.float32)
    errors = [gcv(candidate, candidate.vectors.T @ centred, total, alphas=grid).min(0) for candidate in candidates]
    return np.asarray(errors, np.float32)


def shortlist(errors: Float32[np.ndarray, "candidate voxel"], size: int) -> Int[np.ndarray, " kept"]:
    """Return `size` candidates, or all, that leave the voxels the least error together: greedily, in their order."""
    left = np.full(errors.shape[1], errors.max())
    kept: list[int] = []
    while len(kept) < min(size, len(errors)):
        gain = np.maximum(left - errors, 0).sum(1, dtype=np.float64)
        gain[kept] = -1
        kept.append(int(gain.argmax()))
        left = np.minimum(left, errors[kept[-1]])
    return np.sort(np.asarray(kept))


def mixtures(n_bands: int, *, n_mixtures: int = N_MIXTURES, seed: int = 0) -> Float32[np.ndarray, "mixture band"]:
    """Return the even mixture, each band alone, and random ones, which sum to 1."""
    fixed = np.concatenate([np.full((1, n_bands), 1 / n_bands), np.eye(n_bands)])
    drawn = generate_dirichlet_samples(n_mixtures, n_bands, concentration=[0.1, 1.0], random_state=seed)
    return np.concatenate([fixed, np.asarray(drawn)])[:n_mixtures].astype(np.float32)

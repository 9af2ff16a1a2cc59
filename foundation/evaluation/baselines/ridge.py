"""Ridge regression with a penalty per voxel.

Per voxel ``v``, with features standardised on the training rows,

    w_v = argmin ||X w - (y_v - mean y_v)||^2 + alpha_v ||w||^2,

where ``alpha_v`` is the one of ``alphas`` with the least cross-validated squared error. himalaya solves it (Dupre la
Tour et al. 2022): through the singular values of ``X`` where there are more images than features, else through the
kernel ``X X'``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from himalaya.kernel_ridge import solve_kernel_ridge_cv_eigenvalues
from himalaya.ridge import solve_ridge_cv_svd
from jaxtyping import Float, Int
from sklearn.model_selection import PredefinedSplit

DEFAULT_ALPHAS: tuple[float, ...] = tuple(np.logspace(1, 7, 13).tolist())
"""Half decades, wide enough for 100 images of 100 features and for 9,000 of 30,000."""

TARGETS_BATCH = 4096
PREDICT_ROWS = 1024


@dataclass(frozen=True, eq=False)
class LinearModel:
    """A fitted linear map from features to voxels: ``((x - mean) / scale) @ basis @ weights + intercept``."""

    mean: Float[np.ndarray, " feature"]
    scale: Float[np.ndarray, " feature"]
    weights: Float[np.ndarray, "feature voxel"] | Float[np.ndarray, "rank voxel"]
    intercept: Float[np.ndarray, " voxel"]
    alphas: Float[np.ndarray, " voxel"]
    """The penalty chosen for each voxel."""
    basis: Float[np.ndarray, "feature rank"] | None = None
    """Left factor of the coefficients, the standardised training rows, where it is smaller than their product; None:
    ``weights`` are the coefficients."""

    @property
    def coefficients(self) -> Float[np.ndarray, "feature voxel"]:
        """Weights of the standardised features, multiplied out."""
        return self.weights if self.basis is None else self.basis @ self.weights

    def predict(self, features: Float[np.ndarray, "image feature"]) -> Float[np.ndarray, "image voxel"]:
        """Responses in the unit of those that were fitted.

        Raises
        ------
        ValueError
            If the number of features isn't the fitted one.
        """
        if features.shape[1] != len(self.mean):
            raise ValueError(f"features have {features.shape[1]} columns; the model was fitted on {len(self.mean)}")
        out = np.empty((len(features), self.weights.shape[1]), dtype=self.weights.dtype)
        for start in range(0, len(features), PREDICT_ROWS):
            x = _standardise(features[start : start + PREDICT_ROWS], self.mean, self.scale)
            if self.basis is not None:
                x = x @ self.basis
            out[start : start + PREDICT_ROWS] = x @ self.weights + self.intercept
        return out


def fit_ridge(
    features: Float[np.ndarray, "image feature"],
    responses: Float[np.ndarray, "image voxel"],
    *,
    alphas: Sequence[float] | Float[np.ndarray, " alpha"] = DEFAULT_ALPHAS,
    n_folds: int = 5,
    seed: int = 0,
    image: Int[np.ndarray, " image"] | None = None,
) -> LinearModel:
    """Ridge with one penalty per voxel, chosen by cross-validation over images and refitted on all rows.

    It computes in the dtype of ``features``. In single precision the smallest eigenvalues of a large kernel drown in
    rounding; himalaya then refuses the penalties below them. Features are standardised on all given rows, folds
    included, which uses no response; features that never vary get no weight.

    Parameters
    ----------
    features, responses
        Training rows only, finite.
    alphas
        Penalties on the squared weights of standardised features, positive.
    n_folds
        Cross-validation folds, at most one per image.
    seed
        Of the assignment of images to folds.
    image
        Identity of each row; rows of one image share a fold. None: every row is an image of its own.

    Raises
    ------
    ValueError
        If the rows don't match, values aren't finite, an alpha isn't positive, or there are fewer images than folds.
    """
    grid = np.unique(np.asarray(alphas, dtype=np.float64))
    folds = image_folds(np.arange(len(features)) if image is None else image, n_folds=n_folds, seed=seed)
    if not len(features) == len(responses) == len(folds):
        raise ValueError(
            f"features have {len(features)} rows, responses {len(responses)}, image {len(folds)}; expected as many"
        )
    if grid.size == 0 or grid[0] <= 0:
        raise ValueError(f"alphas must be positive, got {list(alphas)}")
    for name, values in (("features", features), ("responses", responses)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} hold NaN or infinite values; drop those rows or voxels before the fit")

    dtype = features.dtype if features.dtype in (np.float32, np.float64) else np.dtype(np.float32)
    mean = features.mean(axis=0, dtype=np.float64).astype(dtype)
    scale = features.std(axis=0, dtype=np.float64)
    scale[(features == features[:1]).all(axis=0) | (scale == 0)] = 1
    scale = scale.astype(dtype)
    x, y = _standardise(features, mean, scale), responses.astype(dtype)
    options = {
        "alphas": grid.astype(dtype),
        "cv": PredefinedSplit(folds),
        "fit_intercept": True,
        "n_targets_batch": TARGETS_BATCH,
        "n_alphas_batch": 1,
    }
    n_images, n_features = x.shape
    if n_features < n_images:
        chosen, weights, *_, intercept = solve_ridge_cv_svd(x, y, warn=False, **options)
        return LinearModel(mean, scale, weights, intercept, chosen)
    chosen, dual, *_, intercept = solve_kernel_ridge_cv_eigenvalues(x @ x.T, y, **options)
    model = LinearModel(mean, scale, dual, intercept, chosen, basis=x.T)
    n_voxels = y.shape[1]
    if n_images * (n_features + n_voxels) < n_features * n_voxels:
        return model
    return LinearModel(mean, scale, model.coefficients, intercept, chosen)


def image_folds(image: Int[np.ndarray, " row"], *, n_folds: int, seed: int) -> Int[np.ndarray, " row"]:
    """Return the fold of each row: images shuffled, then dealt out, rows of one image together."""
    ids, index = np.unique(image, return_inverse=True)
    if not 2 <= n_folds <= len(ids):
        raise ValueError(f"n_folds is {n_folds}; {len(ids)} images allow 2 to {len(ids)}")
    return (np.random.default_rng(seed).permutation(len(ids)) % n_folds)[index]


def _standardise(features: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return (features.astype(mean.dtype) - mean) / scale

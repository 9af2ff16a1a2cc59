"""The baselines by name: what each predicts, fitted on one subject's training images alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Float32, Int

from data.preprocess import Samples
from data.store import TokenReader
from foundation.closed_form.stacking import stack
from foundation.closed_form.token_features import global_tokens, ridge_features
from foundation.evaluation.baselines.banded import banded_ridge
from foundation.evaluation.baselines.ridge import fit_ridge, image_folds
from foundation.evaluation.baselines.spatial import spatial


def _ridge(tokens: TokenReader, train: Samples, rows: np.ndarray, *, seed: int) -> np.ndarray:
    model = fit_ridge(ridge_features(tokens, train.image), train.responses, seed=seed)
    return model.predict(ridge_features(tokens, rows))


def _banded_ridge(tokens: TokenReader, train: Samples, rows: np.ndarray, *, seed: int) -> np.ndarray:
    return banded_ridge(tokens, train.image, train.responses, rows, seed=seed).prediction


def _cls_probe(tokens: TokenReader, train: Samples, rows: np.ndarray, *, seed: int) -> np.ndarray:
    model = fit_ridge(global_tokens(tokens, train.image)[:, -1], train.responses, seed=seed)
    return model.predict(global_tokens(tokens, rows)[:, -1])


def _spatial(tokens: TokenReader, train: Samples, rows: np.ndarray, *, seed: int) -> np.ndarray:
    del seed  # nothing about it is random
    return spatial(tokens, train.image, train.responses, rows).prediction


def _stacked(tokens: TokenReader, train: Samples, rows: np.ndarray, *, seed: int) -> np.ndarray:
    whole = banded_ridge(tokens, train.image, train.responses, rows, seed=seed)
    field = spatial(tokens, train.image, train.responses, rows)
    shares = stack([whole.left_out, field.left_out], train.responses)
    members = zip(shares, (whole.prediction, field.prediction), strict=True)
    return whole.mean + sum(share * (prediction - whole.mean) for share, prediction in members)


_SYSTEMS = {
    "ridge": _ridge,
    "banded-ridge": _banded_ridge,
    "cls-probe": _cls_probe,
    "spatial": _spatial,
    "stacked": _stacked,
}
BASELINES = tuple(_SYSTEMS)
"""ridge: global tokens of all depths and coarse patches. banded-ridge: the same in bands, and finer patches.
cls-probe: the last depth's global token. spatial: a receptive field per voxel. stacked: banded ridge and spatial, added
with non-negative weights per voxel (Lin et al. 2024)."""


def predict(
    name: str, tokens: TokenReader, train: Samples, rows: Int[np.ndarray, " image"], *, seed: int
) -> Float32[np.ndarray, "image voxel"]:
    """Return what the baseline `name` predicts for the images in `rows`.

    Parameters
    ----------
    train
        The images and responses that it is fitted on and that its settings are chosen on, voxel by voxel.
    seed
        Of folds and of random mixtures.

    Raises
    ------
    ValueError
        If there is no such baseline, there are too few training images for it, or an image has several rows.
    """
    if name not in _SYSTEMS:
        raise ValueError(f"there is no baseline {name!r}; there are {', '.join(BASELINES)}")
    n_images = len(np.unique(train.image))
    if n_images < len(train.image):  # repeats in other folds would choose too small a penalty
        raise ValueError(
            f"{train.subject}: {len(train.image)} rows show {n_images} images; average the repeats of an image first"
        )
    return _SYSTEMS[name](tokens, train, rows, seed=seed).astype(np.float32)


def predict_out_of_fold(
    name: str, tokens: TokenReader, train: Samples, *, seed: int, n_folds: int = 5
) -> Float32[np.ndarray, "image voxel"]:
    """Return each training image's prediction by a baseline that was fitted, settings included, without its fold."""
    out = np.empty(train.responses.shape, np.float32)
    fold = image_folds(train.image, n_folds=n_folds, seed=seed)
    for k in range(n_folds):
        rest = fold != k
        fitted = replace(
            train, image=train.image[rest], responses=train.responses[rest], n_repeats=train.n_repeats[rest]
        )
        out[~rest] = predict(name, tokens, fitted, train.image[~rest], seed=seed)
    return out

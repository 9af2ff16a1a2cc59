"""The baselines by name: what each predicts, fitted on one subject's training images alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Int, Int64

from data.parcels import sequential
from data.preprocess import Samples
from data.store import TokenReader
from foundation.closed_form.stacking import stack
from foundation.closed_form.token_features import global_tokens, ridge_features
from foundation.evaluation.baselines.banded import banded_ridge
from foundation.evaluation.baselines.ridge import fit_ridge, image_folds
from foundation.evaluation.baselines.roi_transformer import roi_transformer
from foundation.evaluation.baselines.spatial import spatial

VERSION = 1
"""Of what the baselines compute: raised whenever the numbers of one change, so that kept predictions are made anew."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Task:
    """What a baseline is fitted on, and the images that it is to predict."""

    tokens: TokenReader
    train: Samples
    rows: np.ndarray
    roi: np.ndarray
    seed: int


def _ridge(task: _Task) -> np.ndarray:
    model = fit_ridge(ridge_features(task.tokens, task.train.image), task.train.responses, seed=task.seed)
    return model.predict(ridge_features(task.tokens, task.rows))


def _banded_ridge(task: _Task) -> np.ndarray:
    train = task.train
    return banded_ridge(task.tokens, train.image, train.responses, task.rows, seed=task.seed).prediction


def _cls_probe(task: _Task) -> np.ndarray:
    model = fit_ridge(global_tokens(task.tokens, task.train.image)[:, -1], task.train.responses, seed=task.seed)
    return model.predict(global_tokens(task.tokens, task.rows)[:, -1])


def _spatial(task: _Task) -> np.ndarray:
    return spatial(task.tokens, task.train.image, task.train.responses, task.rows).prediction


def _stacked(task: _Task) -> np.ndarray:
    tokens, image, responses = task.tokens, task.train.image, task.train.responses
    whole = banded_ridge(tokens, image, responses, task.rows, seed=task.seed)
    field = spatial(tokens, image, responses, task.rows)
    shares = stack([whole.left_out, field.left_out], responses)
    members = zip(shares, (whole.prediction, field.prediction), strict=True)
    return whole.mean + sum(share * (prediction - whole.mean) for share, prediction in members)


def _roi_transformer(task: _Task) -> np.ndarray:
    return roi_transformer(task.tokens, task.train, task.rows, roi=task.roi, seed=task.seed)


_SYSTEMS = {
    "ridge": _ridge,
    "banded-ridge": _banded_ridge,
    "cls-probe": _cls_probe,
    "spatial": _spatial,
    "stacked": _stacked,
    "roi-transformer": _roi_transformer,
}
BASELINES = tuple(_SYSTEMS)
"""ridge: global tokens of all depths and coarse patches. banded-ridge: the same in bands, and finer patches.
cls-probe: the last depth's global token. spatial: a receptive field per voxel. stacked: banded ridge and spatial, added
with non-negative weights per voxel (Lin et al. 2024). roi-transformer: queries of ROIs attend to the patches (Adeli et
al. 2023)."""


def predict(
    name: str,
    tokens: TokenReader,
    train: Samples,
    rows: Int[np.ndarray, " image"],
    *,
    seed: int,
    roi: Int64[np.ndarray, " voxel"] | None = None,
) -> Float32[np.ndarray, "image voxel"]:
    """Return what the baseline `name` predicts for the images in `rows`.

    Parameters
    ----------
    train
        The images and responses that it is fitted on and that its settings are chosen on, voxel by voxel.
    seed
        Of folds, of random mixtures and of a network's start.
    roi
        The ROI of each voxel, from 0 on (`roi_transformer.rois_of`), for those that look at it; None: runs of 30
        consecutive voxels.

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
    roi = sequential(train.responses.shape[1]) if roi is None else roi
    task = _Task(tokens=tokens, train=train, rows=rows, roi=roi, seed=seed)
    return _SYSTEMS[name](task).astype(np.float32)


def predict_out_of_fold(
    name: str,
    tokens: TokenReader,
    train: Samples,
    *,
    seed: int,
    n_folds: int = 5,
    roi: Int64[np.ndarray, " voxel"] | None = None,
) -> Float32[np.ndarray, "image voxel"]:
    """Return each training image's prediction by a baseline that was fitted, settings included, without its fold."""
    out = np.empty(train.responses.shape, np.float32)
    fold = image_folds(train.image, n_folds=n_folds, seed=seed)
    for k in range(n_folds):
        rest = fold != k
        fitted = replace(
            train, image=train.image[rest], responses=train.responses[rest], n_repeats=train.n_repeats[rest]
        )
        out[~rest] = predict(name, tokens, fitted, train.image[~rest], seed=seed, roi=roi)
    return out

"""Banded ridge: a ridge whose bands of features have penalties of their own (Nunez-Elizalde et al. 2019).

The kernel is a mixture of the bands' kernels, ``sum_b g_b K_b``. Mixtures are drawn as himalaya's random search draws
them (Dupre la Tour et al. 2022); each voxel takes the mixture and penalty of least error.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, Int

from data.store import TokenReader
from foundation.closed_form.kernel_ridge import (
    N_MIXTURES,
    Best,
    Candidate,
    best_of,
    candidate_of_kernel,
    mixtures,
    standardised_pair,
)
from foundation.closed_form.token_features import COARSE, cells, global_tokens, grid_side, patches_under

FINE = 8


def bands(tokens: TokenReader, rows: Int[np.ndarray, " image"]) -> Iterator[Float32[np.ndarray, "image feature"]]:
    """Yield the bands of the images in `rows`: global tokens; each depth's patches, coarse; the middle depths', fine.

    A grid that is smaller than `FINE` has no fine band.
    """
    side, n_depths = grid_side(tokens), tokens.shape[0]
    yield global_tokens(tokens, rows).reshape(len(rows), -1)
    coarse = patches_under(tokens, rows, cells(side, min(COARSE, side)))
    for depth in range(n_depths):
        yield coarse[:, :, depth].transpose(1, 0, 2).reshape(len(rows), -1)
    if side < FINE:
        return
    del coarse
    middle = sorted({(n_depths - 1) // 2, n_depths // 2})
    fine = patches_under(tokens, rows, cells(side, FINE), depths=middle)
    for k in range(len(middle)):
        yield fine[:, :, k].transpose(1, 0, 2).reshape(len(rows), -1)


def banded_ridge(
    tokens: TokenReader,
    image: Int[np.ndarray, " image"],
    responses: Float32[np.ndarray, "image voxel"],
    rows: Int[np.ndarray, " new"],
    *,
    seed: int,
    n_mixtures: int = N_MIXTURES,
) -> Best:
    """Fit on the images `image` and predict the images `rows`."""
    kernels, crossed = [], []
    for band in bands(tokens, np.concatenate([image, rows])):
        x, new = standardised_pair(band[: len(image)], band[len(image) :])
        kernels.append(x @ x.T)
        crossed.append(new @ x.T)
    return best_of(_mixed(kernels, crossed, mixtures(len(kernels), n_mixtures=n_mixtures, seed=seed)), responses)


def _mixed(kernels: list[np.ndarray], crossed: list[np.ndarray], weights: np.ndarray) -> Iterator[Candidate]:
    for mixture in weights:
        kernel, new = (sum(g * k for g, k in zip(mixture, parts, strict=True)) for parts in (kernels, crossed))
        yield candidate_of_kernel(np.asarray(kernel), np.asarray(new))

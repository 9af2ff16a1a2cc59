"""Feature-weighted receptive field (St-Yves & Naselaris 2018): where a voxel looks, and what it looks for there.

Each depth's patches are averaged under a Gaussian over the patch grid; a voxel's response is linear in the averages of
all depths. The field is one of a pyramid of places and sizes, chosen per voxel along with the penalty.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, Int

from data.store import TokenReader
from foundation.closed_form.kernel_ridge import (
    Best,
    Candidate,
    best_of,
    candidate_of_features,
    standardised_pair,
)
from foundation.closed_form.token_features import grid_side, patches_under
from foundation.model.spatial import PYRAMID

FIELDS_BYTES = 2**29
"""Averages that are kept at a time; the tokens are read once for each such group of fields."""


def candidate_fields(
    side: int, *, pyramid: tuple[tuple[float, int], ...] = PYRAMID
) -> Float32[np.ndarray, "field patch"]:
    """Return Gaussians over a `side` x `side` grid, each of sum 1, the whole image last."""
    centre = (np.arange(side) + 0.5) / side
    fields = []
    for size, n_places in pyramid:
        place = (np.arange(n_places) + 0.5) / n_places
        line = np.exp(-np.square(centre - place[:, None]) / (2 * size**2))
        line /= line.sum(1, keepdims=True)
        fields.append(np.kron(line, line))
    return np.concatenate([*fields, np.full((1, side**2), side**-2.0)]).astype(np.float32)


def spatial(
    tokens: TokenReader,
    image: Int[np.ndarray, " image"],
    responses: Float32[np.ndarray, "image voxel"],
    rows: Int[np.ndarray, " new"],
    *,
    pyramid: tuple[tuple[float, int], ...] = PYRAMID,
) -> Best:
    """Fit on the images `image` and predict the images `rows`; `Best.candidate` is the field of `candidate_fields`."""
    fields = candidate_fields(grid_side(tokens), pyramid=pyramid)
    return best_of(_through(tokens, image, rows, fields), responses)


def _through(tokens: TokenReader, image: np.ndarray, rows: np.ndarray, fields: np.ndarray) -> Iterator[Candidate]:
    """Yield what is seen through each of `fields`."""
    everything = np.concatenate([image, rows])
    depth, _, width = tokens.shape
    group = max(1, FIELDS_BYTES // (4 * len(everything) * depth * width))
    for start in range(0, len(fields), group):
        for seen in patches_under(tokens, everything, fields[start : start + group]):
            flat = seen.reshape(len(everything), -1)
            yield candidate_of_features(*standardised_pair(flat[: len(image)], flat[len(image) :]))

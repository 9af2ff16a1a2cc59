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
from foundation.model.spatial import PYRAMID, Pyramid, field_pyramid, gaussian_field

FIELDS_BYTES = 2**29
"""Averages that are kept at a time; the tokens are read once for each such group of fields."""


def pyramid_weights(side: int, *, pyramid: Pyramid = PYRAMID) -> Float32[np.ndarray, "field patch"]:
    """Return the pyramid's Gaussians over a `side` x `side` grid, each of sum 1; the last is the plain mean."""
    fields = field_pyramid(pyramid)
    weights = gaussian_field(fields.place, fields.log_size, side).numpy()
    weights[-1] = side**-2
    return weights


def spatial(
    tokens: TokenReader,
    image: Int[np.ndarray, " image"],
    responses: Float32[np.ndarray, "image voxel"],
    rows: Int[np.ndarray, " new"],
    *,
    pyramid: Pyramid = PYRAMID,
) -> Best:
    """Fit on the images `image` and predict the images `rows`; `Best.candidate` is the row of `pyramid_weights`."""
    fields = pyramid_weights(grid_side(tokens), pyramid=pyramid)
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

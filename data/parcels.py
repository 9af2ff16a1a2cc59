"""Groups of voxels: the ROIs of Stage 1. Those here look at positions only, never at responses."""

from typing import Any, cast

import numpy as np
from jaxtyping import Float32, Int64


def sequential(n_voxels: int, *, size: int = 30) -> Int64[np.ndarray, " voxel"]:
    """Return runs of `size` consecutive voxels of the flattened mask, as the paper groups them."""
    n = max(1, round(n_voxels / size))
    return np.minimum(np.arange(n_voxels) * n // n_voxels, n - 1)


def compact(
    coordinates: Float32[np.ndarray, "voxel 3"], *, size: int = 30, seed: int = 0
) -> Int64[np.ndarray, " voxel"]:
    """Return spatially compact clusters of about `size` voxels: k-means on positions, numbered by first voxel."""
    from sklearn.cluster import KMeans

    n = max(1, round(len(coordinates) / size))
    # A fixed number of starts, as an int: scikit-learn's stubs know only its default, "auto".
    found = KMeans(n_clusters=n, n_init=cast(Any, 1), random_state=seed).fit_predict(coordinates)
    _, first = np.unique(found, return_index=True)
    order = np.empty(len(first), np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return order[np.unique(found, return_inverse=True)[1]]


def parcels(
    n_voxels: int, coordinates: Float32[np.ndarray, "voxel 3"] | None, *, size: int
) -> Int64[np.ndarray, " voxel"]:
    """Return compact clusters where positions are known, sequential runs elsewhere."""
    return sequential(n_voxels, size=size) if coordinates is None else compact(coordinates, size=size)

"""Adding two predictions, fitted on what they say of images that they didn't see (Lin et al. 2024)."""

import numpy as np
from jaxtyping import Float32


def stack(
    members: list[Float32[np.ndarray, "image voxel"]], responses: Float32[np.ndarray, "image voxel"]
) -> Float32[np.ndarray, "member voxel"]:
    """Return the non-negative weights of two predictions, centred, that fit each voxel's responses best."""
    a, b = (m - m.mean(0) for m in members)
    y = responses - responses.mean(0)
    aa, bb, ab, ay, by = ((p * q).sum(0, dtype=np.float64) for p, q in ((a, a), (b, b), (a, b), (a, y), (b, y)))
    determinant = aa * bb - ab**2
    apart = determinant > 1e-9 * aa * bb  # else the two are one prediction
    both = np.stack([bb * ay - ab * by, aa * by - ab * ay]) / np.where(apart, determinant, 1)
    alone = np.maximum(np.stack([ay, by]), 0) / np.maximum(np.stack([aa, bb]), 1e-9)
    first = alone[0] * ay >= alone[1] * by  # what either explains
    single = alone * np.stack([first, ~first])
    return np.where(apart & (both >= 0).all(0), both, single).astype(np.float32)

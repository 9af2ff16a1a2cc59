"""Adding several predictions of a voxel, by shares that images which none of them was fitted on tell.

With the members' centred predictions ``m_k`` and the centred responses ``y``, a voxel's shares minimise

    sum_i (y_i - sum_k s_k m_ki)^2 + p sum_k (s_k - a_k)^2,    s >= 0,

``a`` being the shares that minimise the first sum over all voxels together (empirical Bayes; `p` is worth
`PRIOR_IMAGES` images of an average voxel and member). Stacking (Breiman 1996; Lin et al. 2024), which for few images
leans on all voxels.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Float, Float32

PRIOR_IMAGES = 100


def shares_of(
    members: Sequence[Float32[np.ndarray, "image voxel"]],
    responses: Float32[np.ndarray, "image voxel"],
    *,
    weight: Float[np.ndarray, " image"] | None = None,
) -> Float32[np.ndarray, "member voxel"]:
    """Return the non-negative share of each member in each voxel.

    Parameters
    ----------
    members, responses
        Both less the mean response of the training images.
    weight
        Of each image, such as its number of repeats; None: all the same.
    """
    n_images, n_members = len(responses), len(members)
    w = np.ones(n_images) if weight is None else weight / weight.mean()
    m, y = np.stack(members).astype(np.float64), responses.astype(np.float64)
    squares = np.einsum("i,aiv,biv->vab", w, m, m, optimize=True)
    products = np.einsum("i,aiv,iv->va", w, m, y, optimize=True)
    of_all = nonnegative(squares.sum(0, keepdims=True), products.sum(0, keepdims=True))
    prior = PRIOR_IMAGES / n_images * np.trace(squares.mean(0)) / n_members
    return nonnegative(squares + prior * np.eye(n_members), products + prior * of_all).T.astype(np.float32)


def nonnegative(
    squares: Float[np.ndarray, "voxel member member"], products: Float[np.ndarray, "voxel member"]
) -> Float[np.ndarray, "voxel member"]:
    """Return the minimisers of ``s' A s - 2 b' s`` over ``s >= 0``, by going through which shares are above 0."""
    n_voxels, n_members = products.shape
    best, gained = np.zeros((n_voxels, n_members)), np.zeros(n_voxels)
    ridge = 1e-9 * np.trace(squares, axis1=1, axis2=2)[:, None, None] + 1e-30
    for size in range(1, n_members + 1):
        for chosen in map(list, combinations(range(n_members), size)):
            a = squares[:, chosen][:, :, chosen] + ridge * np.eye(size)
            b = products[:, chosen]
            shares = np.linalg.solve(a, b[..., None])[..., 0]
            gain = (shares * b).sum(1)
            better = (shares >= 0).all(1) & (gain > gained)
            best[better], gained[better] = 0, gain[better]
            best[np.ix_(better, np.isin(np.arange(n_members), chosen))] = shares[better]
    return best

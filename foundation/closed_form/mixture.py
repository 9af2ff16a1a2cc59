"""How much of a voxel's prediction the network is, and what noise single trials have: from validation images.

With the closed-form path's prediction ``l``, the network's ``n`` and the responses ``y``, the share ``s`` of the
network in a voxel minimises

    sum_i (y_i - l_i - s (n_i - l_i))^2 + k (s - s_all)^2,

``s_all`` being the minimiser over all voxels: a voxel where both predict much the same takes the share of the others
(empirical Bayes; ``k`` is worth `PRIOR_IMAGES` images of an average voxel).
"""

import numpy as np
from jaxtyping import Float, Float32, Int

PRIOR_IMAGES = 100
NOISE_PRIOR_TRIALS = 20


def network_share(
    linear: Float32[np.ndarray, "image voxel"],
    network: Float32[np.ndarray, "image voxel"],
    responses: Float32[np.ndarray, "image voxel"],
    *,
    weight: Float[np.ndarray, " image"] | None = None,
) -> Float32[np.ndarray, " voxel"]:
    """Return the share of the network in each voxel, 0 to 1.

    Parameters
    ----------
    weight
        Of each image, such as its number of repeats; None: all the same.
    """
    w = np.ones(len(responses)) if weight is None else weight / weight.mean()
    apart, left = (network - linear).astype(np.float64), (responses - linear).astype(np.float64)
    squares, products = w @ np.square(apart), w @ (apart * left)
    of_all = np.clip(products.sum() / max(squares.sum(), 1e-12), 0, 1)
    prior = PRIOR_IMAGES * squares.mean() / max(1, len(responses))
    return np.clip((products + prior * of_all) / np.maximum(squares + prior, 1e-12), 0, 1).astype(np.float32)


def noise_sd(
    prediction: Float32[np.ndarray, "image voxel"],
    trials: Float32[np.ndarray, "trial voxel"],
    image: Int[np.ndarray, " trial"],
    *,
    drawn_variance: Float[np.ndarray, " voxel"],
) -> Float32[np.ndarray, " voxel"]:
    """Return the standard deviation of what a drawn prediction leaves of single trials, by voxel.

    A voxel's mean square is drawn towards that of all voxels, which is worth `NOISE_PRIOR_TRIALS` trials; what the
    latent's draws vary already is taken off.
    """
    squares = np.square(trials - prediction[image]).mean(0, dtype=np.float64)
    n = len(trials)
    shrunk = (n * squares + NOISE_PRIOR_TRIALS * squares.mean()) / (n + NOISE_PRIOR_TRIALS)
    return np.sqrt(np.maximum(shrunk - drawn_variance, 1e-4 * shrunk)).astype(np.float32)

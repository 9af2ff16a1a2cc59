"""Scores of made-up predictions, by the real scorer, for tests of what becomes of scores."""

import numpy as np

from foundation.evaluation.score import Measured, Scores, merge_scores, score


def tiny_scores(noise: dict[str, float], *, n_images: int = 12, n_voxels: int = 6) -> Scores:
    """Score ``manybrains`` and ``ridge`` on each subject; the more noise, the worse manybrains."""
    return merge_scores(_of_subject(name, sd, n_images, n_voxels) for name, sd in noise.items())


def _of_subject(name: str, sd: float, n_images: int, n_voxels: int) -> Scores:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((n_images, n_voxels)).astype(np.float32)
    trials = np.concatenate([truth + 0.5 * rng.standard_normal(truth.shape) for _ in range(2)]).astype(np.float32)
    measured = Measured(
        subject=name,
        trials=trials,
        image=np.tile(np.arange(n_images), 2),
        ceiling=np.full(n_voxels, 0.8, np.float32),
        families={"early": np.arange(n_voxels) < 3},
    )
    predictions = {
        system: (truth + spread * rng.standard_normal(truth.shape)).astype(np.float32)
        for system, spread in (("manybrains", sd), ("ridge", 0.8))
    }
    return score(predictions, measured, training_mean=np.zeros(n_voxels, np.float32), n_bootstraps=50, rng=rng)

"""Scores of systems that know a planted signal up to some noise, by the real scorer."""

from collections.abc import Mapping

import numpy as np

from foundation.evaluation.score import Measured, Scores, merge_scores, score

N_IMAGES, N_VOXELS, N_REPEATS = 24, 30, 3
SIGNAL_SHARE = 0.7
"""Of the variance of a mean over repeats."""


def planted_measured(subject: str = "subj05", *, seed: int = 0) -> tuple[Measured, np.ndarray]:
    """A subject's trials, and the signal in them, as (image, voxel)."""
    rng = np.random.default_rng(seed)
    signal = rng.standard_normal((N_IMAGES, N_VOXELS)).astype(np.float32)
    noise_sd = np.sqrt(N_REPEATS * (1 - SIGNAL_SHARE) / SIGNAL_SHARE)
    trials = signal + noise_sd * rng.standard_normal((N_REPEATS, N_IMAGES, N_VOXELS))
    measured = Measured(
        subject=subject,
        trials=trials.reshape(-1, N_VOXELS).astype(np.float32),
        image=np.tile(np.arange(N_IMAGES), N_REPEATS),
        ceiling=np.full(N_VOXELS, SIGNAL_SHARE, np.float32),
        families={"early": np.arange(N_VOXELS) < 12, "higher": np.arange(N_VOXELS) >= 20},
        normalisation="session-standardised",
    )
    return measured, signal


def planted_scores(
    systems: Mapping[str, float], *, subject: str = "subj05", seed: int = 0, n_bootstraps: int = 40
) -> Scores:
    """Scores of systems, by name, each of which predicts the signal with so much noise."""
    measured, signal = planted_measured(subject, seed=seed)
    rng = np.random.default_rng(seed + 1)
    noise = rng.standard_normal(signal.shape).astype(np.float32)
    return score(
        {name: signal + np.float32(amount) * noise for name, amount in systems.items()},
        measured,
        training_mean=np.zeros(N_VOXELS, np.float32),
        n_bootstraps=n_bootstraps,
        rng=rng,
    )


def planted_versions(noise: Mapping[str, float]) -> Scores:
    """Scores of ``manybrains`` beside ``ridge`` on each subject; the more noise, the worse manybrains."""
    of_each = (planted_scores({"manybrains": sd, "ridge": 0.8}, subject=name) for name, sd in noise.items())
    return merge_scores(of_each)

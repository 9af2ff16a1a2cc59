"""How published work prepares what it scores, so that its numbers can be audited: z-scored over all trials.

Mean and standard deviation are taken over every trial of a voxel, test trials included, which the strict protocol
forbids (`data.preprocess`). For the named protocol ``chasm-legacy`` alone; nothing is fitted on what comes from here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32

from data.preprocess import VOXEL_BLOCK
from data.splits import Split
from data.store import SubjectStore

_TRIALS = 512


@dataclass(frozen=True, kw_only=True)
class LegacyTrials:
    """Trials z-scored over all trials, and how session-standardised predictions are told in that unit."""

    responses: Float32[np.ndarray, "trial voxel"]
    training_mean: Float32[np.ndarray, " voxel"]
    """Mean over the trials of training images: what a session-standardised 0 is in this unit, sessions averaged."""
    scale: Float32[np.ndarray, " voxel"]
    """What one standard deviation within a session is in this unit, sessions averaged."""

    def converted(self, predicted: Float32[np.ndarray, "image voxel"]) -> Float32[np.ndarray, "image voxel"]:
        """Return predictions of session-standardised responses in this unit."""
        return self.training_mean + self.scale * predicted


def legacy_trials(subject: SubjectStore, split: Split, keep: Bool[np.ndarray, " trial"]) -> LegacyTrials:
    """Return the trials in `keep`, each voxel z-scored over all of its trials; one that doesn't vary becomes 0."""
    n_voxels = subject.n_voxels
    total, squares = np.zeros(n_voxels), np.zeros(n_voxels)
    for _, responses in _blocks(subject, np.arange(subject.n_trials)):
        total += responses.sum(0, dtype=np.float64)
    mean = total / subject.n_trials
    train = split.select(subject.image, "train")
    session = np.ones(subject.n_trials, int) if subject.session is None else subject.session
    names, of_trial = np.unique(session, return_inverse=True)
    sums, within = np.zeros((len(names), n_voxels)), np.zeros((len(names), n_voxels))
    for trials, responses in _blocks(subject, np.arange(subject.n_trials)):
        for block in _voxel_blocks(n_voxels):
            centred = responses[:, block].astype(np.float64) - mean[block]
            squares[block] += (centred**2).sum(0)
            for number in np.unique(of_trial[trials[train[trials]]]):
                here = centred[(of_trial[trials] == number) & train[trials]]
                sums[number, block] += here.sum(0)
                within[number, block] += (here**2).sum(0)
    sd = np.sqrt(squares / subject.n_trials)
    sd[sd <= 1e-6 * np.abs(mean)] = 0
    n_train = np.bincount(of_trial[train], minlength=len(names))
    trained = n_train > 0
    means = sums[trained] / n_train[trained, None]
    of_session = np.sqrt(np.maximum(within[trained] / n_train[trained, None] - means**2, 0))
    unit = np.where(sd > 0, sd, 1)
    kept = np.flatnonzero(keep)
    out, start = np.empty((len(kept), n_voxels), np.float32), 0
    for trials, responses in _blocks(subject, kept):
        for block in _voxel_blocks(n_voxels):
            z = np.where(sd[block] > 0, (responses[:, block] - mean[block]) / unit[block], 0)
            out[start : start + len(trials), block] = z
        start += len(trials)
    return LegacyTrials(
        responses=out,
        training_mean=(sums.sum(0) / max(1, n_train.sum()) / unit).astype(np.float32),
        scale=(of_session.mean(0) / unit).astype(np.float32),
    )


def _blocks(subject: SubjectStore, trials: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(trials), _TRIALS):
        some = trials[start : start + _TRIALS]
        yield some, subject.responses(some)


def _voxel_blocks(n_voxels: int) -> list[slice]:
    return [slice(start, start + VOXEL_BLOCK) for start in range(0, n_voxels, VOXEL_BLOCK)]

"""From raw responses to what is fitted and what is scored; computed anew each time, never baked into a store.

Within the first N sessions, each session is standardised by its own training trials. Test trials of later sessions are
standardised by that session's non-test trials, without regard to which images they show (protocol rule 6).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from data.splits import Part, Split
from data.store import SubjectStore

MIN_TRIALS = 10


@dataclass(frozen=True, kw_only=True)
class Samples:
    """One subject's images with the mean response over the repeats used, standardised (unit: SD of the session)."""

    subject: str
    image: Int[np.ndarray, " image"]
    responses: Float32[np.ndarray, "image voxel"]
    n_repeats: Float32[np.ndarray, " image"]

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True, kw_only=True)
class Trials:
    """One subject's single trials, standardised."""

    subject: str
    image: Int[np.ndarray, " trial"]
    responses: Float32[np.ndarray, "trial voxel"]
    n_averaged: Float32[np.ndarray, " trial"]


def standardise(
    responses: Float[np.ndarray, "trial voxel"], session: Int[np.ndarray, " trial"], use: Bool[np.ndarray, " trial"]
) -> Float32[np.ndarray, "trial voxel"]:
    """Return each session less its mean over the trials in `use`, over their standard deviation.

    A voxel that doesn't vary in a session becomes 0 there.

    Raises
    ------
    ValueError
        If a session has fewer than ten trials in `use`.
    """
    out = np.empty(responses.shape, np.float32)
    for number in np.unique(session):
        here = session == number
        basis = responses[here & use]
        if len(basis) < MIN_TRIALS:
            raise ValueError(
                f"session {number} has {len(basis)} trials to standardise by; at least {MIN_TRIALS} are needed"
            )
        mean, sd = basis.mean(0), basis.std(0)
        out[here] = np.where(sd > 0, (responses[here] - mean) / np.where(sd > 0, sd, 1), 0)
    return out


def average_repeats(
    responses: Float32[np.ndarray, "trial voxel"],
    image: Int[np.ndarray, " trial"],
    weight: Float32[np.ndarray, " trial"],
) -> tuple[Int[np.ndarray, " image"], Float32[np.ndarray, "image voxel"], Float32[np.ndarray, " image"]]:
    """Return the images in order of their rows, the mean response to each and the number of repeats in it."""
    rows, inverse = np.unique(image, return_inverse=True)
    total = np.zeros((len(rows), responses.shape[1]), np.float32)
    count = np.zeros(len(rows), np.float32)
    np.add.at(total, inverse, responses * weight[:, None])
    np.add.at(count, inverse, weight)
    return rows, total / count[:, None], count


def n_sessions_of(subject: SubjectStore) -> int | None:
    """Return how many sessions a subject has, None where the data set has no session index."""
    return None if subject.session is None else len(np.unique(subject.session))


def _first_sessions(subject: SubjectStore, n_sessions: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return each trial's session (1 where there is no index) and whether it is among the first `n_sessions`."""
    have = n_sessions_of(subject)
    if subject.session is None or have is None:
        if n_sessions is not None:
            raise ValueError(
                f"{subject.name} has no session index, so 'the first {n_sessions} sessions' can't be asked of it"
            )
        ones = np.ones(subject.n_trials, np.int16)
        return ones, ones > 0
    if n_sessions is None:
        return subject.session, np.ones(subject.n_trials, bool)
    if not 1 <= n_sessions <= have:
        raise ValueError(f"{subject.name} has {have} sessions; --sessions {n_sessions} must be 1 to {have}")
    return subject.session, np.isin(subject.session, np.unique(subject.session)[:n_sessions])


def standardised_trials(subject: SubjectStore, split: Split, *, n_sessions: int | None = None) -> Trials:
    """Return all of a subject's trials, standardised as the protocol says for a model that had `n_sessions`."""
    session, first = _first_sessions(subject, n_sessions)
    train = split.select(subject.image, "train")
    use = np.where(first, train, ~split.select(subject.image, "test"))
    averaged = subject.trial_column("n_averaged")
    return Trials(
        subject=subject.name,
        image=subject.image,
        responses=standardise(subject.responses(), session, use),
        n_averaged=np.ones(subject.n_trials, np.float32) if averaged is None else averaged,
    )


def samples(subject: SubjectStore, split: Split, part: Part, *, n_sessions: int | None = None) -> Samples:
    """Return the images of `part` that a subject saw in the first `n_sessions` (None: in all) and its mean responses.

    Raises
    ------
    ValueError
        If that many sessions don't exist, or hold no image of `part`.
    """
    _, first = _first_sessions(subject, n_sessions)
    trials = standardised_trials(subject, split, n_sessions=n_sessions)
    keep = first & split.select(subject.image, part)
    if not keep.any():
        within = "" if n_sessions is None else f" in the first {n_sessions} sessions"
        raise ValueError(f"{subject.name} saw no {part} image{within}")
    image, responses, count = average_repeats(trials.responses[keep], trials.image[keep], trials.n_averaged[keep])
    return Samples(subject=subject.name, image=image, responses=responses, n_repeats=count)


def test_trials(subject: SubjectStore, split: Split, *, n_sessions: int | None = None) -> Trials:
    """Return the trials of the test images, wherever they lie, standardised for a model that had `n_sessions`."""
    trials = standardised_trials(subject, split, n_sessions=n_sessions)
    keep = split.select(trials.image, "test")
    if not keep.any():
        raise ValueError(f"{subject.name} saw no test image; it can't be scored on this split")
    return Trials(
        subject=subject.name,
        image=trials.image[keep],
        responses=trials.responses[keep],
        n_averaged=trials.n_averaged[keep],
    )

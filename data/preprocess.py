"""From raw responses to what is fitted and what is scored; computed anew each time, never baked into a store.

Within the first N sessions, each session is standardised by its own training trials. Test trials of later sessions are
standardised by that session's non-test trials, without regard to which images they show (protocol rule 6).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int
from scipy import sparse

from data.splits import Part, Split
from data.store import SubjectStore

MIN_TRIALS = 10


@dataclass(frozen=True, kw_only=True)
class Samples:
    """One subject's images with the mean response over the repeats used, standardised (unit: SD of the session).

    `standardised_by` has the images whose trials gave the means and standard deviations, for the leakage audit.
    """

    subject: str
    image: Int[np.ndarray, " image"]
    responses: Float32[np.ndarray, "image voxel"]
    n_repeats: Float32[np.ndarray, " image"]
    standardised_by: Int[np.ndarray, " used"] | None = None

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

    A voxel that doesn't vary in a session becomes 0 there. Statistics are summed in double precision: in single, the
    mean of equal numbers may not be that number, and the rounding error would pass for variation.

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
                f"session {number} has {len(basis)} trials to standardise by; at least {MIN_TRIALS} are needed, so "
                f"leave that session out"
            )
        mean, sd = basis.mean(0, dtype=np.float64), basis.std(0, dtype=np.float64)
        out[here] = np.where(sd > 0, (responses[here] - mean) / np.where(sd > 0, sd, 1), 0)
    return out


def average_repeats(
    responses: Float32[np.ndarray, "trial voxel"],
    image: Int[np.ndarray, " trial"],
    weight: Float32[np.ndarray, " trial"],
) -> tuple[Int[np.ndarray, " image"], Float32[np.ndarray, "image voxel"], Float32[np.ndarray, " image"]]:
    """Return the images in order of their rows, the mean response to each and the number of repeats in it."""
    rows, inverse = np.unique(image, return_inverse=True)
    count = np.bincount(inverse, weight).astype(np.float32)
    share = sparse.csr_array((weight / count[inverse], (inverse, np.arange(len(image)))), (len(rows), len(image)))
    return rows, (share @ responses).astype(np.float32, copy=False), count


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


def _standardised(
    subject: SubjectStore, split: Split, n_sessions: int | None, wanted: Bool[np.ndarray, " trial"]
) -> tuple[Trials, Int[np.ndarray, " used"]]:
    """Return the trials in `wanted`, standardised, and the images of those that gave the statistics.

    Sessions without a wanted trial are not looked at.
    """
    session, first = _first_sessions(subject, n_sessions)
    train = split.select(subject.image, "train")
    here = np.isin(session, session[wanted])
    use = np.where(first, train, ~split.select(subject.image, "test"))[here]
    try:
        responses = standardise(subject.responses(None if here.all() else np.flatnonzero(here)), session[here], use)
    except ValueError as error:
        raise ValueError(f"{subject.name}: {error}") from error
    averaged = subject.trial_column("n_averaged")
    keep = wanted[here]
    trials = Trials(
        subject=subject.name,
        image=subject.image[wanted],
        responses=responses if keep.all() else responses[keep],
        n_averaged=np.ones(keep.sum(), np.float32) if averaged is None else averaged[wanted],
    )
    return trials, subject.image[here][use]


def standardised_trials(subject: SubjectStore, split: Split, *, n_sessions: int | None = None) -> Trials:
    """Return all of a subject's trials, standardised as the protocol says for a model that had `n_sessions`."""
    return _standardised(subject, split, n_sessions, np.ones(subject.n_trials, bool))[0]


def samples(subject: SubjectStore, split: Split, part: Part, *, n_sessions: int | None = None) -> Samples:
    """Return the images of `part` that a subject saw in the first `n_sessions` (None: in all) and its mean responses.

    Raises
    ------
    ValueError
        If that many sessions don't exist, or hold no image of `part`.
    """
    _, first = _first_sessions(subject, n_sessions)
    keep = first & split.select(subject.image, part)
    if not keep.any():
        within = "" if n_sessions is None else f" in the first {n_sessions} sessions"
        raise ValueError(f"{subject.name} saw no {part} image{within}")
    trials, used = _standardised(subject, split, n_sessions, keep)
    image, responses, count = average_repeats(trials.responses, trials.image, trials.n_averaged)
    return Samples(subject=subject.name, image=image, responses=responses, n_repeats=count, standardised_by=used)


def test_trials(subject: SubjectStore, split: Split, *, n_sessions: int | None = None) -> Trials:
    """Return the trials of the test images, wherever they lie, standardised for a model that had `n_sessions`."""
    keep = split.select(subject.image, "test")
    if not keep.any():
        raise ValueError(f"{subject.name} saw no test image; it can't be scored on this split")
    return _standardised(subject, split, n_sessions, keep)[0]

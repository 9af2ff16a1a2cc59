"""From raw responses to what is fitted and what is scored; computed anew each time, never baked into a store.

Within the first N sessions, each session is standardised by its own training trials. Test trials of later sessions are
standardised by that session's non-test trials, without regard to which images they show (protocol rule 6).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float32, Int
from scipy import sparse

from data.noise_ceiling import ncsnr, noise_ceiling
from data.schema import json_digest
from data.splits import Part, Split
from data.store import SubjectStore

MIN_TRIALS = 10
VOXEL_BLOCK = 1024
"""Voxels that are standardised at a time, since double precision needs several times the memory of the responses."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What is done to raw responses; its name and digest go into every run's lineage."""

    later_sessions: Literal["session", "first-n"] = "session"
    """Test trials in sessions beyond the first N are standardised by their own session's non-test trials, or by the
    training trials of the first N."""

    @property
    def name(self) -> str:
        """How tables call the normalisation."""
        return "session-standardised" if self.later_sessions == "session" else "standardised by the first N sessions"

    @property
    def digest(self) -> str:
        """Digest of everything that decides the numbers."""
        rules = {
            "version": 1,
            "within_first_n": "session, training trials",
            "repeats": "mean",
            "min_trials": MIN_TRIALS,
        }
        return json_digest(rules | asdict(self))


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
    """One subject's single trials, standardised.

    For the leakage audit: `standardised_by` has the images whose trials gave the statistics by which the first N
    sessions are standardised, and later ones where the first N standardise these too; `later_standardised_by` the
    images of later sessions that are standardised by themselves.
    """

    subject: str
    image: Int[np.ndarray, " trial"]
    responses: Float32[np.ndarray, "trial voxel"]
    n_averaged: Float32[np.ndarray, " trial"]
    standardised_by: Int[np.ndarray, " used"] | None = None
    later_standardised_by: Int[np.ndarray, " later"] | None = None


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
    for number in np.unique(session).tolist():
        here = session == number
        for block in _voxel_blocks(responses.shape[1]):
            mean, sd = _statistics(responses[here & use, block], number)
            out[here, block] = _scaled(responses[here, block], mean, sd)
    return out


def _statistics(basis: np.ndarray, session: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation over trials, summed in double precision.

    In single, the mean of equal numbers may not be that number, and the rounding error would pass for variation.
    """
    if len(basis) < MIN_TRIALS:
        raise ValueError(
            f"session {session} has {len(basis)} trials to standardise by; at least {MIN_TRIALS} are needed, so "
            f"leave that session out"
        )
    return basis.mean(0, dtype=np.float64), basis.std(0, dtype=np.float64)


def _scaled(responses: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    return np.where(sd > 0, (responses - mean) / np.where(sd > 0, sd, 1), 0)


def _voxel_blocks(n_voxels: int) -> list[slice]:
    return [slice(start, start + VOXEL_BLOCK) for start in range(0, n_voxels, VOXEL_BLOCK)]


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


def _sessions(
    subject: SubjectStore,
    split: Split,
    n_sessions: int | None,
    wanted: Bool[np.ndarray, " trial"],
    preprocessing: Preprocessing,
) -> Iterator[tuple[Int[np.ndarray, " trial"], Float32[np.ndarray, "trial voxel"], Int[np.ndarray, " used"], bool]]:
    """Yield by session: the wanted trials, their standardised responses, the images that gave the statistics.

    Last comes whether these statistics are of the first N sessions. One session is in memory at a time, standardised
    where it lies; those without a wanted trial are not looked at.
    """
    session, first = _first_sessions(subject, n_sessions)
    train = split.select(subject.image, "train")
    of_first = _statistics_of(subject, session, first, train) if preprocessing.later_sessions == "first-n" else None
    for number in np.unique(session[wanted]).tolist():
        trials = np.flatnonzero(session == number)
        in_first = bool(first[trials[0]])
        use = train[trials] if in_first else ~split.select(subject.image[trials], "test")
        given = None if in_first else of_first
        responses = subject.responses(trials)
        for block in _voxel_blocks(subject.n_voxels):
            if given is None:
                mean, sd = _named_statistics(subject, responses[use, block], number)
            else:
                mean, sd = given[0][block], given[1][block]
            responses[:, block] = _scaled(responses[:, block], mean, sd)
        keep = wanted[trials]
        used = subject.image[trials][use] if given is None else given[2]
        yield trials[keep], _first_rows(responses, keep), used, in_first or given is not None
        del responses  # before the next session is read; who iterates must let go too


def _first_rows(responses: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Return the rows in `keep`, moved to the front of `responses`: no second session in memory."""
    rows = np.flatnonzero(keep)
    for place, row in enumerate(rows):
        responses[place] = responses[row]
    return responses[: len(rows)]


def _named_statistics(subject: SubjectStore, basis: np.ndarray, session: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        return _statistics(basis, session)
    except ValueError as error:
        raise ValueError(f"{subject.name}: {error}") from error


def _statistics_of(
    subject: SubjectStore, session: np.ndarray, first: np.ndarray, train: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean and standard deviation over the training trials of the first sessions, and the images of these.

    Standard deviations are within sessions: the average session's.
    """
    sums, squares, n = np.zeros(subject.n_voxels), np.zeros(subject.n_voxels), 0
    for number in np.unique(session[first]).tolist():
        basis = subject.responses(np.flatnonzero((session == number) & train))
        for block in _voxel_blocks(subject.n_voxels):
            mean, sd = _named_statistics(subject, basis[:, block], number)
            sums[block] += mean * len(basis)
            squares[block] += sd**2 * len(basis)
        n += len(basis)
        del basis
    return sums / n, np.sqrt(squares / n), subject.image[first & train]


def _standardised(
    subject: SubjectStore,
    split: Split,
    n_sessions: int | None,
    wanted: Bool[np.ndarray, " trial"],
    preprocessing: Preprocessing,
) -> Trials:
    """Return the trials in `wanted`, standardised, in their order."""
    place = np.cumsum(wanted) - 1
    responses = np.empty((int(wanted.sum()), subject.n_voxels), np.float32)
    by_first, by_later = [subject.image[:0]], [subject.image[:0]]
    for trials, values, used, by_first_n in _sessions(subject, split, n_sessions, wanted, preprocessing):
        responses[place[trials]] = values
        del values
        (by_first if by_first_n else by_later).append(used)
    averaged = subject.trial_column("n_averaged")
    return Trials(
        subject=subject.name,
        image=subject.image[wanted],
        responses=responses,
        n_averaged=np.ones(len(responses), np.float32) if averaged is None else averaged[wanted],
        standardised_by=np.concatenate(by_first),
        later_standardised_by=np.concatenate(by_later),
    )


def standardised_trials(
    subject: SubjectStore,
    split: Split,
    *,
    n_sessions: int | None = None,
    preprocessing: Preprocessing = Preprocessing(),
) -> Trials:
    """Return all of a subject's trials, standardised as the protocol says for a model that had `n_sessions`."""
    return _standardised(subject, split, n_sessions, np.ones(subject.n_trials, bool), preprocessing)


def standardised_voxels(
    subject: SubjectStore, split: Split, voxels: Int[np.ndarray, " voxel"]
) -> Float32[np.ndarray, "trial voxel"]:
    """Return all trials of some voxels, the numbers of `standardised_trials` for a model that had all sessions."""
    session, _ = _first_sessions(subject, None)
    try:
        return standardise(subject.voxel_responses(voxels), session, split.select(subject.image, "train"))
    except ValueError as error:
        raise ValueError(f"{subject.name}: {error}") from error


def samples(
    subject: SubjectStore,
    split: Split,
    part: Part,
    *,
    n_sessions: int | None = None,
    preprocessing: Preprocessing = Preprocessing(),
) -> Samples:
    """Return the images of `part` that a subject saw in the first `n_sessions` (None: in all) and its mean responses.

    Sessions are read one at a time: beside the result, one session is in memory.

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
    averaged = subject.trial_column("n_averaged")
    weight = np.ones(subject.n_trials, np.float32) if averaged is None else averaged
    rows, inverse = np.unique(subject.image[keep], return_inverse=True)
    count = np.bincount(inverse, weight[keep]).astype(np.float32)
    place = np.full(subject.n_trials, -1)
    place[keep] = inverse
    mean = np.zeros((len(rows), subject.n_voxels), np.float32)
    used = []
    for trials, values, of_session, _ in _sessions(subject, split, n_sessions, keep, preprocessing):
        shown, within_session = np.unique(place[trials], return_inverse=True)
        weights = weight[trials] / count[place[trials]]
        share = sparse.csr_array((weights, (within_session, np.arange(len(trials)))), (len(shown), len(trials)))
        for block in _voxel_blocks(subject.n_voxels):
            mean[shown, block] += share @ values[:, block]
        del values
        used.append(of_session)
    return Samples(
        subject=subject.name,
        image=rows,
        responses=mean,
        n_repeats=count,
        standardised_by=np.concatenate(used),
    )


def test_trials(
    subject: SubjectStore,
    split: Split,
    *,
    n_sessions: int | None = None,
    preprocessing: Preprocessing = Preprocessing(),
) -> Trials:
    """Return the trials of the test images, wherever they lie, standardised for a model that had `n_sessions`."""
    keep = split.select(subject.image, "test")
    if not keep.any():
        raise ValueError(f"{subject.name} saw no test image; it can't be scored on this split")
    return _standardised(subject, split, n_sessions, keep, preprocessing)


def validation_trials(
    subject: SubjectStore,
    split: Split,
    *,
    n_sessions: int | None = None,
    preprocessing: Preprocessing = Preprocessing(),
) -> Trials:
    """Return the trials of the validation images in the first `n_sessions`, standardised: the ones behind `samples`."""
    _, first = _first_sessions(subject, n_sessions)
    return _standardised(subject, split, n_sessions, first & split.select(subject.image, "validation"), preprocessing)


def training_reliability(
    subject: SubjectStore,
    split: Split,
    *,
    n_sessions: int | None = None,
    preprocessing: Preprocessing = Preprocessing(),
) -> tuple[Float[np.ndarray, " voxel"] | None, str | None]:
    """Return how much of a trial's variance is signal, per voxel, or why that can't be told.

    The noise ceiling of single trials (:mod:`data.noise_ceiling`), from nothing but the repeats of training images in
    the first `n_sessions`. Unlike a published NCSNR, it may weight what is fitted (protocol rule 5). All of these
    trials are in memory at once: 1.7 GB for the largest subject of NSD.

    Returns
    -------
    reliability
        0 to 1, NaN for a voxel that doesn't vary. None without repeats.
    reason
        Why there is no reliability; None where there is.
    """
    _, first = _first_sessions(subject, n_sessions)
    trials = _standardised(subject, split, n_sessions, first & split.select(subject.image, "train"), preprocessing)
    if (trials.n_averaged > 1).any():
        return None, f"{subject.name} came averaged over repeats, so their noise can't be told"
    _, repeats = np.unique(trials.image, return_counts=True)
    if (repeats < 2).all():
        within = "" if n_sessions is None else f" in the first {n_sessions} sessions"
        return None, f"{subject.name} saw no training image twice{within}"
    return noise_ceiling(ncsnr(trials.responses, trials.image), np.ones(1, int)), None

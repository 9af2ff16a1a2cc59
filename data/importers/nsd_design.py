"""NSD's experiment: which image each trial showed, which split each image is in, when and in which run it was shown.

Two files tell the same, and agree where both are there:

``nsd_expdesign.mat``        `masterordering` (1, trial), the same for all subjects, counts from 1 into a subject's
                             10,000 images; `subjectim` (8, 10000) has their 73k ids, from 1; `sharedix` (1, 1000)
                             those of the images that all subjects share, which are every subject's first
``nsd_stim_info_merged.csv`` a row an image: `nsdId` (from 0), `shared1000`, and `subjectK_rep0` to `rep2`, the trials
                             (from 1) that showed it to subject K, 0 for none

The experiment was planned for 40 sessions; four subjects did fewer. Trial t of session s is trial ``(s - 1) * n + t``
of the ordering, n = 750. Here images have their 73k id from 0.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float32, Int, Int8, Int16, Int32

from data.importers.findings import Findings

SESSIONS = (40, 40, 32, 30, 40, 32, 40, 30)
"""Sessions that subjects 1 to 8 did, whatever part of them a copy of the data has."""
PLANNED_SESSIONS = 40
RUNS = 12
N_IMAGES = 73_000
N_REPEATS = 3
_DATENUM = (700_000, 800_000)
"""Days that MATLAB's datenum gives for the years 1916 to 2190."""


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True)
class Design:
    """What every trial of the planned experiment shows to each of the eight subjects; -1 where a file doesn't say."""

    image: Int32[np.ndarray, "subject trial"]
    shared: Int32[np.ndarray, " image"]
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the files that it comes from, by name."""

    @property
    def trials_per_session(self) -> int:
        """Number of trials of a session (750)."""
        return self.image.shape[1] // PLANNED_SESSIONS

    def trials(self, session: int) -> slice:
        """Return where the trials of a session (from 1) lie."""
        return slice((session - 1) * self.trials_per_session, session * self.trials_per_session)

    def done(self, subject: int) -> Int32[np.ndarray, " trial"]:
        """Return the images of all trials that a subject (from 1) really did."""
        return self.image[subject - 1, : SESSIONS[subject - 1] * self.trials_per_session]

    def repeat(self, subject: int) -> Int8[np.ndarray, " trial"]:
        """Return how often each trial's image had been shown to a subject (from 1) before."""
        return pd.Series(self.image[subject - 1]).groupby(self.image[subject - 1]).cumcount().to_numpy(np.int8)

    def roles(self, images: Sequence[int] | Int[np.ndarray, " image"]) -> list[str]:
        """Return the split of each image: of the shared ones, those that all subjects saw three times test.

        The other shared images validate, and the rest trains. It depends on the sessions that were scanned, not on
        those that a copy of the data holds.
        """
        counts = [np.bincount(done[done >= 0], minlength=N_IMAGES) for done in map(self.done, range(1, 9))]
        tested = np.min(counts, axis=0) >= N_REPEATS
        shared = set(self.shared.tolist())
        return ["train" if i not in shared else "test" if tested[i] else "validation" for i in map(int, images)]


def read_design(source: Path, findings: Findings) -> Design | None:
    """Return the design that a tree of NSD tells, from the .mat where there is one, else from the .csv.

    None with a problem noted where neither is there, one can't be read, or the two differ.
    """
    directory = source / "nsddata" / "experiments" / "nsd"
    readers = {"nsd_expdesign.mat": read_expdesign, "nsd_stim_info_merged.csv": read_stim_info}
    there = {directory / name: reader for name, reader in readers.items() if (directory / name).exists()}
    if not there:
        findings.problems.append(
            f"{directory / 'nsd_expdesign.mat'} does not exist, nor does nsd_stim_info_merged.csv beside it; "
            f"fetch the first, it says which trial showed which image"
        )
    designs: list[Design] = []
    for path, reader in there.items():
        with findings.noting():
            designs.append(reader(path))
    if not designs or len(designs) < len(there):
        return None
    try:
        for other in designs[1:]:
            _check_agreement(designs[0], other, *there)
    except ValueError as error:
        findings.problems.append(str(error))
        return None
    files = {name: digest for design in designs for name, digest in design.files.items()}
    return Design(image=designs[0].image, shared=designs[0].shared, files=files)


def _check_agreement(design: Design, other: Design, path: Path, other_path: Path) -> None:
    remedy = f"fetch {path} and {other_path} again, one of them is not NSD's"
    if design.image.shape != other.image.shape:
        raise ValueError(
            f"{other_path.name} has {other.image.shape[1]} trials, {path.name} {design.image.shape[1]}; {remedy}"
        )
    differ = (design.image != other.image) & (other.image >= 0)
    if differ.any():
        subject, trial = np.argwhere(differ)[0]
        raise ValueError(
            f"{other_path.name} has image {other.image[subject, trial]} in trial {trial + 1} of subject {subject + 1}, "
            f"{path.name} has {design.image[subject, trial]}; {remedy}"
        )
    if set(design.shared.tolist()) != set(other.shared.tolist()):
        raise ValueError(f"{other_path.name} and {path.name} differ on which images are shared; {remedy}")


# -- nsd_expdesign.mat -------------------------------------------------------------------------------------------------


def read_expdesign(path: Path) -> Design:
    """Return the design that ``nsd_expdesign.mat`` tells.

    Raises
    ------
    ValueError
        If it can't be read, lacks a variable, or its ids are out of range.
    """
    from scipy.io import loadmat

    if not path.exists():
        raise ValueError(f"{path} does not exist; give the path of NSD's nsd_expdesign.mat")
    try:
        found = loadmat(path, variable_names=["masterordering", "subjectim", "sharedix"])
    except Exception as error:
        raise ValueError(f"{path} is damaged or no MATLAB 5 file ({error}); fetch it again") from error
    ordering = _whole(path, found, "masterordering").ravel()
    images = _whole(path, found, "subjectim")
    shared = _whole(path, found, "sharedix").ravel()
    if images.ndim != 2 or len(images) != len(SESSIONS):
        raise ValueError(
            f"{path}: 'subjectim' has shape {images.shape}, not a row for each of 8 subjects; fetch it again"
        )
    _check_length(path, "masterordering", len(ordering))
    _check_range(path, "masterordering", ordering, images.shape[1])
    _check_range(path, "subjectim", images, N_IMAGES)
    if len(shared) > images.shape[1] or (images[:, : len(shared)] != shared).any():
        raise ValueError(f"{path}: 'sharedix' are not the first {len(shared)} images of every subject; fetch it again")
    return Design(
        image=(images[:, ordering - 1] - 1).astype(np.int32),
        shared=(shared - 1).astype(np.int32),
        files={path.name: file_digest(path)},
    )


def _whole(path: Path, found: dict[str, Any], name: str) -> np.ndarray:
    values = found.get(name)
    if values is None or not values.size:
        raise ValueError(f"{path} has no variable {name!r}; fetch it again")
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all() or (values != np.round(values)).any():
        raise ValueError(f"{path}: {name!r} must hold whole numbers, got {values.dtype}; fetch it again")
    return values.astype(np.int64)


def _check_length(path: Path, what: str, n_trials: int) -> None:
    pairs = PLANNED_SESSIONS * RUNS // 2
    if n_trials == 0 or n_trials % pairs:
        raise ValueError(
            f"{path}: {what} has {n_trials} trials, which are not {PLANNED_SESSIONS} sessions of {RUNS} runs "
            f"(30000 in NSD's own); fetch it again"
        )


def _check_range(path: Path, name: str, values: np.ndarray, highest: int) -> None:
    beyond = values[(values < 1) | (values > highest)]
    if len(beyond):
        raise ValueError(f"{path}: {name!r} holds {beyond[0]}, outside 1 to {highest}; fetch it again")


# -- nsd_stim_info_merged.csv ------------------------------------------------------------------------------------------


def read_stim_info(path: Path) -> Design:
    """Return the design that ``nsd_stim_info_merged.csv`` tells.

    Raises
    ------
    ValueError
        If it can't be read, lacks a column, or leaves a trial without an image or with two.
    """
    repeats = {f"subject{s}_rep{r}": s - 1 for s in range(1, 9) for r in range(N_REPEATS)}
    table = _table(path, ["nsdId", "shared1000", *repeats], ",")
    ids = _column(path, table, "nsdId") + 1
    _check_range(path, "nsdId + 1", ids, N_IMAGES)
    if len(set(ids.tolist())) < len(ids):
        raise ValueError(f"{path}: an 'nsdId' occurs twice; fetch it again")
    trials = {name: _column(path, table, name) for name in repeats}
    n_trials = max(int(values.max()) for values in trials.values())
    _check_length(path, "the highest trial number", n_trials)
    image = np.full((len(SESSIONS), n_trials), -1, np.int32)
    for name, subject in repeats.items():
        shown = trials[name] > 0
        place = trials[name][shown] - 1
        if (image[subject, place] >= 0).any() or len(set(place.tolist())) < len(place):
            raise ValueError(f"{path}: a trial of {name!r} has two images; fetch it again")
        image[subject, place] = ids[shown] - 1
    shared = (ids[_column(path, table, "shared1000") != 0] - 1).astype(np.int32)
    design = Design(image=image, shared=shared, files={path.name: file_digest(path)})
    for subject in range(1, 9):
        if (design.done(subject) < 0).any():
            trial = int(np.argmax(design.done(subject) < 0)) + 1
            raise ValueError(f"{path} has no image for trial {trial} of subject {subject}; fetch it again")
    return design


def _table(path: Path, columns: list[str], separator: str) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, sep=separator, usecols=lambda name: name in columns)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable table ({' '.join(str(error).split())}); fetch it again") from error
    if missing := [name for name in columns if name not in table]:
        raise ValueError(f"{path} has no column {missing[0]!r}; fetch it again")
    if not len(table):
        raise ValueError(f"{path} has no rows; fetch it again")
    return table


def _column(path: Path, table: pd.DataFrame, name: str) -> Int[np.ndarray, " row"]:
    if table[name].dtype.kind not in "iub":
        raise ValueError(f"{path}: column {name!r} must hold whole numbers, got {table[name].dtype}; fetch it again")
    values = table[name].to_numpy(np.int64)
    if (values < 0).any():
        raise ValueError(f"{path}: column {name!r} holds {values.min()}; fetch it again")
    return values


def optional_design(path: Path | None, findings: Findings, without: str) -> Design | None:
    """Return the design of a data set made of NSD, whose users may lack the file: `without` warns of what follows."""
    if path is None:
        findings.warnings.append(f"{without}; pass --design nsd_expdesign.mat for NSD's own")
        return None
    with findings.noting():
        return read_expdesign(path)
    return None


# -- responses.tsv -----------------------------------------------------------------------------------------------------


def runs_by_rule(n_trials: int) -> Int16[np.ndarray, " trial"]:
    """Return the run (from 1) of each trial of a session: 12 runs, odd ones longer by one (63 and 62 of 750)."""
    longer, pair = -(-n_trials // RUNS), 2 * n_trials // RUNS
    return np.repeat(np.arange(1, RUNS + 1, dtype=np.int16), [longer, pair - longer] * (RUNS // 2))


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What ``responses.tsv`` tells of a subject's trials beside their images; a row a trial, in order."""

    session: Int16[np.ndarray, " trial"]
    run: Int16[np.ndarray, " trial"]
    time_s: Float32[np.ndarray, " trial"] | None
    """Seconds since the first trial of the session."""

    def of(self, session: int) -> Bool[np.ndarray, " trial"]:
        """Return where the trials of a session are."""
        return self.session == session


def read_behaviour(
    path: Path, design: Design, subject: int, sessions: Sequence[int], findings: Findings
) -> Behaviour | None:
    """Return what ``responses.tsv`` tells, compared with the design in the `sessions` that are wanted.

    Times are left out for all sessions, with a warning, where one is not a MATLAB date.

    Raises
    ------
    ValueError
        If it can't be read, belongs to another subject, or differs from the design.
    """
    table = _table(path, ["SUBJECT", "SESSION", "RUN", "73KID", "TIME"], "\t")
    columns = {name: _column(path, table, name) for name in ("SUBJECT", "SESSION", "RUN", "73KID")}
    if (columns["SUBJECT"] != subject).any():
        other = columns["SUBJECT"][columns["SUBJECT"] != subject][0]
        raise ValueError(f"{path} is of subject {other}, not {subject}; fetch the right one")
    _check_range(path, "RUN", columns["RUN"], RUNS)
    _check_range(path, "SESSION", columns["SESSION"], PLANNED_SESSIONS)
    for session in sessions:
        shown, planned = (
            columns["73KID"][columns["SESSION"] == session] - 1,
            design.image[subject - 1, design.trials(session)],
        )
        if len(shown) != len(planned):
            raise ValueError(f"{path} has {len(shown)} trials of session {session}, not {len(planned)}; fetch it again")
        if (shown != planned).any():
            trial = int(np.argmax(shown != planned))
            raise ValueError(
                f"{path}: trial {trial + 1} of session {session} has 73KID {shown[trial] + 1}, but "
                f"{planned[trial] + 1} by {' and '.join(design.files)}; one of them is not NSD's, fetch them again"
            )
    time = np.asarray(pd.to_numeric(table["TIME"], errors="coerce"), np.float64)
    time_s = None
    if np.isfinite(time).all() and time.min() > _DATENUM[0] and time.max() < _DATENUM[1]:
        first = pd.Series(time).groupby(columns["SESSION"]).transform("first").to_numpy()
        time_s = ((time - first) * 86_400).astype(np.float32)
    else:
        findings.warnings.append(f"{path}: TIME is not a MATLAB date in every trial, so times are left out")
    return Behaviour(session=columns["SESSION"].astype(np.int16), run=columns["RUN"].astype(np.int16), time_s=time_s)

"""Plain arrays: a directory with a ``recordings.json`` that says what is what.

``recordings.json`` is a list of objects; paths are relative to the directory::

    subject       name of the subject
    responses     .npy: (trial, voxel), or (image, voxel, repeat) with NaN where there was no repeat
    repeats_axis  optional: 1 if it is (image, repeat, voxel), as CHASMBrain's and SynBrain's arrays are (default 2)
    images        a zip or a directory of pictures (in the order of their names), or an .npy of uint8
                  (image, height, width, 3)
    trials        optional .csv: column `image` (0-based index into the images), optional `session`, `run`, `repeat`;
                  without it, row i shows image i
    session_column   optional: the column of `trials` that counts the sessions (default `session`, where there is one)
    blocks_of     optional: no scan sessions, so treat each successive block of that many images as one; a remainder
                  shorter than half a block joins the block before it
    rois          optional .csv: a column per family, a row per voxel, holding labels' names ("" for none)
    coordinates   optional .npy (voxel, 3) in mm
    n_averaged    optional: about how many repeats each row is already the mean of (above 1: upstream_preprocessing
                  must say how)
    unit, upstream_preprocessing   optional texts

An image's identity is the digest of its decoded pixels: equal names may be different pictures, and the same picture in
two recordings is one image.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data.importers.files import load_array, open_pictures
from data.importers.plan import ImportPlan, SessionChoice
from data.schema import (
    TRIAL_COLUMNS,
    ImageSource,
    Rois,
    SessionSource,
    SubjectSource,
    VoxelTable,
    check_finite,
)

REQUIRED = {"subject", "responses", "images"}
TEXTS = REQUIRED | {"trials", "session_column", "rois", "coordinates", "unit", "upstream_preprocessing", "note"}
KNOWN = TEXTS | {"blocks_of", "n_averaged", "repeats_axis"}
ROWS = 256
"""Rows of responses that are read at once."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One entry of ``recordings.json`` with its paths resolved."""

    directory: Path
    entry: dict[str, Any]

    @property
    def subject(self) -> str:
        """The subject's name."""
        return self.entry["subject"]

    def path(self, key: str) -> Path:
        """Return the path under `key`.

        Raises
        ------
        ValueError
            If nothing is there.
        """
        path = self.directory / self.entry[key]
        if not path.exists():
            raise ValueError(f"{path} does not exist; {self.subject!r} in recordings.json names it as {key!r}")
        return path


def read_recordings(directory: Path, table: Path | None = None) -> list[Recording]:
    """Return the recordings that `table` (default: ``recordings.json`` in `directory`) lists."""
    table = table or directory / "recordings.json"
    if not table.exists():
        raise ValueError(f"{table} does not exist; the arrays importer needs it to know what is what")
    try:
        entries = json.loads(table.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{table} is not JSON: {error}") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise ValueError(f"{table} must hold a list of objects, one per recording")
    for entry in entries:
        _check_entry(table, entry)
    names = [entry["subject"] for entry in entries]
    if len(set(names)) < len(names):
        raise ValueError(f"{table}: a subject occurs more than once in {names}; join its trials in one recording")
    return [Recording(directory=directory, entry=entry) for entry in entries]


def _check_entry(table: Path, entry: dict[str, Any]) -> None:
    if missing := REQUIRED - set(entry):
        raise ValueError(f"{table}: a recording lacks {sorted(missing)[0]!r}; it has {sorted(entry)}")
    where = f"{table}: recording of {entry['subject']!r}"
    if unknown := set(entry) - KNOWN:
        raise ValueError(f"{where}: {sorted(unknown)[0]!r} is unknown; known are {sorted(KNOWN)}")
    for key in sorted(TEXTS & set(entry)):
        if not isinstance(entry[key], str) or not entry[key]:
            raise ValueError(f"{where}: {key!r} must be text, got {entry[key]!r}; put it in quotes or leave it out")
    size = entry.get("blocks_of", 1)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{where}: 'blocks_of' must be a whole number of images of at least 1, got {size!r}")
    if entry.get("repeats_axis", 2) not in (1, 2):
        raise ValueError(
            f"{where}: 'repeats_axis' must be 1 (image, repeat, voxel) or 2, got {entry['repeats_axis']!r}"
        )
    n_averaged = entry.get("n_averaged", 1)
    if not isinstance(n_averaged, (int, float)) or isinstance(n_averaged, bool) or n_averaged < 1:
        raise ValueError(f"{where}: 'n_averaged' must be a number of repeats of at least 1, got {n_averaged!r}")
    if "session_column" in entry and "trials" not in entry:
        raise ValueError(f"{where}: 'session_column' names a column of 'trials', which is not given; give both or none")
    if "session_column" in entry and "blocks_of" in entry:
        raise ValueError(f"{where}: give 'session_column' or, where there are no sessions, 'blocks_of'; not both")


def _read_table(path: Path, n_rows: int, what: str, **options: Any) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, **options)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable CSV: {error}") from error
    if len(table) != n_rows:
        raise ValueError(f"{path} has {len(table)} rows, but there are {n_rows} {what}; give one row for each")
    return table


def _trials(recording: Recording, responses: np.ndarray, n_images: int) -> dict[str, np.ndarray | None]:
    """Return the columns image, session, run, repeat of a (trial, voxel) recording."""
    n = len(responses)
    if "trials" not in recording.entry:
        if n != n_images:
            raise ValueError(
                f"{recording.path('responses')} has {n} rows but there are {n_images} images; "
                f"give a 'trials' table that says which row shows which image"
            )
        return {"image": np.arange(n), "session": None, "run": None, "repeat": None}
    path = recording.path("trials")
    table = _read_table(path, n, "rows of responses")
    if "image" not in table:
        raise ValueError(f"{path} has no column 'image'; it has {list(table)}")
    wanted = recording.entry.get("session_column", "session" if "session" in table else None)
    if wanted is not None and wanted not in table:
        raise ValueError(f"{path} has no column {wanted!r}, which session_column names; it has {list(table)}")
    if wanted is not None and "blocks_of" in recording.entry:
        raise ValueError(f"{path} has a column {wanted!r} of sessions, so 'blocks_of' must go; or remove the column")
    columns = {"image": "image", "session": wanted, "run": "run", "repeat": "repeat"}
    found: dict[str, np.ndarray | None] = {}
    for ours, theirs in columns.items():
        if theirs is None or theirs not in table:
            found[ours] = None
            continue
        if not pd.api.types.is_integer_dtype(table[theirs]):
            raise ValueError(f"{path}: column {theirs!r} must hold whole numbers, got {table[theirs].dtype}")
        limits = np.iinfo(np.dtype(TRIAL_COLUMNS[ours]).name)
        values = table[theirs].to_numpy()
        beyond = values[(values < limits.min) | (values > limits.max)]
        if len(beyond):
            raise ValueError(
                f"{path}: column {theirs!r} holds {beyond[0]}, beyond {limits.max}; number them 1, 2, ... in order"
            )
        found[ours] = values
    image = found["image"]
    assert image is not None
    if image.min() < 0 or image.max() >= n_images:
        bad = int(image.max() if image.max() >= n_images else image.min())
        raise ValueError(f"{path}: image {bad} is not among the {n_images} images; they count from 0")
    return found


def _blocks(n_images: int, size: int) -> np.ndarray:
    """Return the block of each image, from 1; a remainder shorter than half a block joins the one before it."""
    n_blocks = max(1, (2 * n_images + size) // (2 * size))
    return np.minimum(np.arange(n_images) // size, n_blocks - 1) + 1


def _rois(recording: Recording, n_voxels: int) -> dict[str, Rois]:
    """Return the families of the `rois` table; every label is text, and an empty one is none."""
    if "rois" not in recording.entry:
        return {}
    path = recording.path("rois")
    # Blank lines count: in a table of one family they are the voxels without a label.
    table = _read_table(path, n_voxels, "voxels", dtype=str, keep_default_na=False, skip_blank_lines=False)
    rois = {}
    for family in table:
        labels = table[family].fillna("")
        names = sorted(set(labels) - {""})
        codes = {name: k + 1 for k, name in enumerate(names)} | {"": 0}
        rois[str(family)] = Rois(
            labels=np.array([codes[label] for label in labels], np.int16), names={codes[name]: name for name in names}
        )
    return rois


def _coordinates(recording: Recording, n_voxels: int) -> np.ndarray | None:
    if "coordinates" not in recording.entry:
        return None
    path = recording.path("coordinates")
    coordinates = load_array(path)
    if coordinates.shape != (n_voxels, 3):
        raise ValueError(f"{path} must be ({n_voxels}, 3), a position in mm for every voxel, got {coordinates.shape}")
    return coordinates.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Responses:
    """Responses on disk as (trial, voxel), the trial columns, and how to read the trials in some rows."""

    dtype: np.dtype[Any]
    n_voxels: int
    columns: dict[str, np.ndarray | None]
    read: Callable[[np.ndarray], np.ndarray]

    @property
    def n_trials(self) -> int:
        """Number of trials."""
        image = self.columns["image"]
        return 0 if image is None else len(image)

    def blocks(self, trials: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the responses of `trials`, a block at a time."""
        for start in range(0, len(trials), ROWS):
            yield self.read(trials[start : start + ROWS])


def _open_responses(recording: Recording, n_images: int) -> Responses:
    path = recording.path("responses")
    array = load_array(path, in_memory=False)
    dtype = array.dtype.newbyteorder("=")
    if dtype.kind == "u" or dtype == np.float64:
        dtype = np.dtype(np.float32)

    def native(values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # becomes infinite, which is refused
            return np.ascontiguousarray(values).astype(dtype, copy=False)

    if array.ndim == 2:
        columns = _trials(recording, array, n_images)
        return Responses(dtype=dtype, n_voxels=array.shape[1], columns=columns, read=lambda rows: native(array[rows]))
    if array.ndim != 3:
        raise ValueError(f"{path} must be (trial, voxel) or (image, voxel, repeat), got shape {array.shape}")
    if len(array) != n_images:
        raise ValueError(f"{path} has responses to {len(array)} images, but there are {n_images} pictures")
    if "trials" in recording.entry:
        raise ValueError(f"{path} has an axis of repeats, so 'trials' must go; or save it as (trial, voxel)")
    if recording.entry.get("repeats_axis", 2) == 1:
        array = array.swapaxes(1, 2)
    there = np.concatenate([~np.isnan(array[start : start + ROWS]).all(axis=1) for start in range(0, len(array), ROWS)])
    image, repeat = np.nonzero(there)
    columns: dict[str, np.ndarray | None] = {"image": image, "session": None, "run": None, "repeat": repeat}
    return Responses(
        dtype=dtype,
        n_voxels=array.shape[1],
        columns=columns,
        read=lambda rows: native(array[image[rows], :, repeat[rows]]),
    )


def open_recording(recording: Recording) -> SubjectSource:
    """Return a recording as a source; everything was read once, to find what can't be imported.

    Raises
    ------
    ValueError
        If something is missing, odd or contradictory.
    """
    entry = recording.entry
    pictures = open_pictures(recording.path("images"))
    responses = _open_responses(recording, len(pictures))
    columns = responses.columns
    image = columns["image"]
    assert image is not None
    provenance = {"importer": "arrays 1", "recording": entry}
    if "blocks_of" in entry:
        columns["session"] = _blocks(len(pictures), entry["blocks_of"])[image]
        provenance["sessions"] = f"successive blocks of {entry['blocks_of']} images, not scan sessions"
    identities = pictures.identities()
    first: dict[str, int] = {}
    for k, identity in enumerate(identities):
        first.setdefault(identity, k)
    places = np.array(list(first.values()))
    place_of = {identity: k for k, identity in enumerate(first)}
    given = {name: values for name, values in columns.items() if values is not None and name != "session"}
    given["image"] = np.array([place_of[identity] for identity in identities])[image]
    if "n_averaged" in entry:
        given["n_averaged"] = np.full(responses.n_trials, entry["n_averaged"])

    def session(number: int | None, trials: np.ndarray) -> SessionSource:
        return SessionSource(
            session=number,
            columns={name: values[trials].astype(TRIAL_COLUMNS[name]) for name, values in given.items()},
            read=lambda: responses.blocks(trials),
            files=(recording.path("responses"),),
        )

    numbers = columns["session"]
    sessions = (
        [session(None, np.arange(responses.n_trials))]
        if numbers is None
        else [session(int(number), np.flatnonzero(numbers == number)) for number in np.unique(numbers)]
    )
    source = SubjectSource(
        name=recording.subject,
        dtype=responses.dtype,
        voxels=VoxelTable(
            n_voxels=responses.n_voxels,
            coordinates=_coordinates(recording, responses.n_voxels),
            rois=_rois(recording, responses.n_voxels),
        ),
        images=ImageSource(
            ids=list(first),
            roles=[""] * len(first),
            shape=pictures.shape,
            read=lambda rows: pictures.read(places[rows]),
        ),
        sessions=tuple(sessions),
        unit=entry.get("unit", "a.u."),
        provenance=provenance,
        upstream_preprocessing=entry.get("upstream_preprocessing"),
    )
    try:
        source.check()
        for start in range(0, responses.n_trials, ROWS):
            rows = np.arange(start, min(start + ROWS, responses.n_trials))
            check_finite(source.name, responses.read(rows), first_trial=start)
    except ValueError as error:
        raise ValueError(f"{recording.path('responses')}: {error}") from error
    return source


def _choose(source: SubjectSource, choice: SessionChoice) -> SubjectSource:
    """Return a source with the chosen sessions alone."""
    numbers = [session.session for session in source.sessions if session.session is not None]
    if choice and not numbers:
        raise ValueError(f"{source.name} has no session index, so sessions can't be chosen; leave --sessions out")
    wanted = choice.of(numbers, source.name)
    return replace(source, sessions=tuple(s for s in source.sessions if s.session is None or s.session in wanted))


def plan_arrays(
    directory: Path,
    *,
    table: Path | None = None,
    subjects: tuple[str, ...] | None = None,
    sessions: SessionChoice = SessionChoice(),
    pixels: bool = True,
) -> ImportPlan:
    """Return the recordings that can be imported, and why the others can't; everything is read once."""
    try:
        recordings = read_recordings(directory, table)
        if subjects is not None:
            have = [r.subject for r in recordings]
            if unknown := set(subjects) - set(have):
                raise ValueError(f"subject {sorted(unknown)[0]!r} is not in recordings.json; it has {', '.join(have)}")
            recordings = [r for r in recordings if r.subject in subjects]
    except ValueError as error:
        return ImportPlan(problems=[str(error)])
    found, problems = [], []
    for recording in recordings:
        try:
            source = _choose(open_recording(recording), sessions)
            found.append(source if pixels else replace(source, images=replace(source.images, shape=None, read=None)))
        except ValueError as error:
            problems.append(str(error))
    shapes = sorted({source.images.shape for source in found if source.images.shape is not None})
    if len(shapes) > 1:
        problems.append(f"the recordings' pictures have different sizes {shapes}; crop them to one size first")
    return ImportPlan(subjects=found, problems=problems)

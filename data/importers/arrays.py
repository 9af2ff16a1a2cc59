"""Plain arrays: a directory with a ``recordings.json`` that says what is what.

`data.importers.recordings` has the table.

An image's identity is the digest of its decoded pixels: equal names may be different pictures, and the same picture in
two recordings is one image.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data.importers.files import Pictures, load_array, open_pictures
from data.importers.findings import Findings
from data.importers.plan import ImportPlan, SessionChoice, choose_subjects
from data.importers.recordings import TABLE, Recording, read_recordings
from data.schema import TRIAL_COLUMNS
from data.sources import ImageSource, SessionSource, SubjectSource, check_finite
from data.voxels import Rois, VoxelTable

Read = Callable[[np.ndarray], np.ndarray]
ROWS = 256
"""Rows of responses that are read at once."""


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
    read: Read

    @property
    def n_trials(self) -> int:
        """Number of trials."""
        image = self.columns["image"]
        return 0 if image is None else len(image)

    def blocks(self, trials: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the responses of `trials`, a block at a time."""
        for start in range(0, len(trials), ROWS):
            yield self.read(trials[start : start + ROWS])


def _in_pieces(
    reads: list[Callable[[np.ndarray], np.ndarray]], lengths: list[int]
) -> Callable[[np.ndarray], np.ndarray]:
    """Return what reads rows of the pieces that lie one after the other."""
    if len(reads) == 1:
        return reads[0]
    starts = np.cumsum([0, *lengths])

    def read(rows: np.ndarray) -> np.ndarray:
        piece = np.searchsorted(starts, rows, side="right") - 1
        order = np.argsort(piece, kind="stable")
        found = [reads[k](rows[piece == k] - starts[k]) for k in np.unique(piece)]
        return np.concatenate(found)[np.argsort(order, kind="stable")]

    return read


def _join_pictures(pieces: list[Pictures], paths: list[Path]) -> Pictures:
    for pictures, path in zip(pieces, paths, strict=True):
        if pictures.shape != pieces[0].shape:
            raise ValueError(
                f"{path} has pictures of {pictures.shape}, {paths[0]} of {pieces[0].shape}; crop to one size"
            )
    return Pictures(
        names=[name for pictures in pieces for name in pictures.names],
        shape=pieces[0].shape,
        read=_in_pieces([pictures.read for pictures in pieces], list(map(len, pieces))),
    )


def _join_responses(pieces: list[Responses], n_images: list[int], paths: list[Path]) -> Responses:
    for responses, path in zip(pieces, paths, strict=True):
        if (responses.n_voxels, set(responses.columns)) != (pieces[0].n_voxels, set(pieces[0].columns)):
            raise ValueError(
                f"{path} has {responses.n_voxels} voxels, {paths[0]} {pieces[0].n_voxels}; they must agree"
            )
    dtype = np.result_type(*(responses.dtype for responses in pieces))
    columns: dict[str, np.ndarray | None] = {}
    for name in pieces[0].columns:
        found = [responses.columns[name] for responses in pieces]
        there = [column for column in found if column is not None]
        columns[name] = np.concatenate(there) if len(there) == len(found) else None
    first = np.repeat(np.cumsum([0, *n_images[:-1]]), [responses.n_trials for responses in pieces])
    image = columns["image"]
    assert image is not None
    columns["image"] = image + first
    read = _in_pieces([responses.read for responses in pieces], [responses.n_trials for responses in pieces])
    return Responses(
        dtype=dtype,
        n_voxels=pieces[0].n_voxels,
        columns=columns,
        read=lambda rows: read(rows).astype(dtype, copy=False),
    )


def _open_responses(recording: Recording, path: Path, n_images: int) -> Responses:
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
    pieces = [open_pictures(path) for path in recording.paths("images")]
    pictures = _join_pictures(pieces, recording.paths("images"))
    paths = recording.paths("responses")
    of_pieces = [_open_responses(recording, path, len(piece)) for path, piece in zip(paths, pieces, strict=True)]
    responses = _join_responses(of_pieces, list(map(len, pieces)), paths)
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
    roles = np.repeat(entry.get("roles", [""] * len(pieces)), list(map(len, pieces))).tolist()
    for k, identity in enumerate(identities):
        if roles[k] != roles[first[identity]]:
            raise ValueError(
                f"{pictures.names[k]} is the picture of {pictures.names[first[identity]]}, so it can't be "
                f"{roles[k]!r} as well as {roles[first[identity]]!r}; an image has one role"
            )
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
            files=tuple(paths),
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
            roles=[roles[k] for k in places],
            shape=pictures.shape,
            files=tuple(path for path in recording.paths("images") if path.is_file()),
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
    findings = Findings()
    recordings: list[Recording] = []
    with findings.noting():
        recordings = read_recordings(directory, table)
    names = [recording.subject for recording in recordings]
    chosen = choose_subjects(subjects, names, table or directory / TABLE, findings)
    found = []
    for recording in recordings:
        if recording.subject in chosen:
            with findings.noting():
                source = _choose(open_recording(recording), sessions)
                bare = replace(source.images, shape=None, files=(), read=None)
                found.append(source if pixels else replace(source, images=bare))
    shapes = sorted({source.images.shape for source in found if source.images.shape is not None})
    if len(shapes) > 1:
        findings.problems.append(f"the recordings' pictures have different sizes {shapes}; crop them to one size first")
    return ImportPlan(subjects=found, problems=findings.problems)

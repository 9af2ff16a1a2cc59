"""Plain arrays: a directory with a ``recordings.json`` that says what is what.

``recordings.json`` is a list of objects; paths are relative to the directory::

    subject       name of the subject
    responses     .npy: (trial, voxel), or (image, voxel, repeat) with NaN where there was no repeat
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
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data.importers.files import load_array, read_images
from data.schema import Rois, SubjectData, digest_of, pixel_identity
from data.store import ImageBlock, PooledStore

REQUIRED = {"subject", "responses", "images"}
TEXTS = REQUIRED | {"trials", "session_column", "rois", "coordinates", "unit", "upstream_preprocessing", "note"}
KNOWN = TEXTS | {"blocks_of", "n_averaged"}
COLUMN_TYPES: dict[str, type[np.signedinteger]] = {
    "image": np.int32,
    "session": np.int16,
    "run": np.int16,
    "repeat": np.int8,
}


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
        limits = np.iinfo(COLUMN_TYPES[ours])
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


def _unfold_repeats(responses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return trials, image and repeat of (image, voxel, repeat) with NaN where there was no repeat."""
    there = ~np.isnan(responses).all(axis=1)
    image, repeat = np.nonzero(there)
    return np.ascontiguousarray(responses[image, :, repeat]), image, repeat


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


def _read_responses(recording: Recording, n_images: int) -> tuple[np.ndarray, dict[str, np.ndarray | None]]:
    """Return responses as (trial, voxel), and the columns image, session, run and repeat."""
    path = recording.path("responses")
    responses = load_array(path)
    if responses.ndim == 2:
        columns = _trials(recording, responses, n_images)
    elif responses.ndim == 3:
        if len(responses) != n_images:
            raise ValueError(f"{path} has responses to {len(responses)} images, but there are {n_images} pictures")
        if "trials" in recording.entry:
            raise ValueError(f"{path} has an axis of repeats, so 'trials' must go; or save it as (trial, voxel)")
        responses, image, repeat = _unfold_repeats(responses)
        columns = {"image": image, "session": None, "run": None, "repeat": repeat}
    else:
        raise ValueError(f"{path} must be (trial, voxel) or (image, voxel, repeat), got shape {responses.shape}")
    if responses.dtype.kind == "u" or responses.dtype == np.float64:
        with np.errstate(over="ignore"):  # becomes infinite, which the check of the record refuses
            responses = responses.astype(np.float32)
    return responses, columns


def read_recording(recording: Recording) -> tuple[ImageBlock, list[str], SubjectData]:
    """Return a recording's images (each once), the identity of each of its pictures in order, and its measurements.

    The measurements' `image` indexes those pictures; the store's rows take their place when they are known.
    """
    entry = recording.entry
    pixels = read_images(recording.path("images"))
    responses, columns = _read_responses(recording, len(pixels))
    image = columns["image"]
    assert image is not None
    provenance = {"importer": "arrays 1", "recording": entry, "responses_digest": digest_of(responses)}
    if "blocks_of" in entry:
        columns["session"] = _blocks(len(pixels), entry["blocks_of"])[image]
        provenance["sessions"] = f"successive blocks of {entry['blocks_of']} images, not scan sessions"
    n_averaged = entry.get("n_averaged")
    identities = [pixel_identity(picture) for picture in pixels]
    first: dict[str, int] = {}
    for k, identity in enumerate(identities):
        first.setdefault(identity, k)
    block = ImageBlock(ids=list(first), roles=[""] * len(first), pixels=pixels[list(first.values())])

    def column(name: str) -> np.ndarray | None:
        values = columns[name]
        return None if values is None else values.astype(COLUMN_TYPES[name])

    subject = SubjectData(
        name=recording.subject,
        responses=responses,
        unit=entry.get("unit", "a.u."),
        image=image.astype(np.int32),
        session=column("session"),
        run=column("run"),
        repeat=column("repeat"),
        n_averaged=None if n_averaged is None else np.full(len(responses), n_averaged, np.float32),
        coordinates=_coordinates(recording, responses.shape[1]),
        rois=_rois(recording, responses.shape[1]),
        provenance=provenance,
        upstream_preprocessing=entry.get("upstream_preprocessing"),
    )
    try:
        subject.check(n_images=len(pixels))
    except ValueError as error:
        raise ValueError(f"{recording.path('responses')}: {error}") from error
    return block, identities, subject


def check_arrays(directory: Path, table: Path | None = None) -> tuple[list[str], list[str]]:
    """Return a line about every recording that reads well, and one about every one that doesn't."""
    good, bad = [], []
    for recording in read_recordings(directory, table):
        try:
            block, _, subject = read_recording(recording)
            n_trials, n_voxels = subject.responses.shape
            good.append(f"{subject.name}: {n_trials} trials, {n_voxels} voxels, {len(block.ids)} images")
        except ValueError as error:
            bad.append(str(error))
    return good, bad


def import_arrays(
    directory: Path,
    store_path: str,
    *,
    table: Path | None = None,
    subjects: tuple[str, ...] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> PooledStore:
    """Import recordings into a store, made if it is missing; subjects that it has already are passed over.

    Everything is read and checked before the first byte is written; an import that was interrupted can be run again.

    Raises
    ------
    ValueError
        If a recording can't be imported, or the store has other data under a subject's name.
    """
    recordings = read_recordings(directory, table)
    if subjects is not None:
        have = [r.subject for r in recordings]
        if unknown := set(subjects) - set(have):
            raise ValueError(f"subject {sorted(unknown)[0]!r} is not in recordings.json; it has {', '.join(have)}")
        recordings = [r for r in recordings if r.subject in subjects]
    if not recordings:
        raise ValueError("no subject is named, so there is nothing to import")
    read = [read_recording(recording) for recording in recordings]
    sizes = {block.pixels.shape[1:3] for block, _, _ in read if block.pixels is not None}
    if len(sizes) > 1:
        raise ValueError(f"the recordings' pictures have different sizes {sorted(sizes)}; crop them to one size first")
    # A new store is made only now; with an old one, conflicts are found before anything is added to it.
    store = PooledStore.open_or_create(store_path, name=Path(store_path).stem, provenance={"importer": "arrays 1"})
    for block, identities, subject in read:
        store.check_images(block)
        if subject.name in store.subjects and store.subject(subject.name).digest != subject.digest(identities):
            raise ValueError(
                f"{subject.name!r} is in {store_path} already with other data; "
                f"import it into another store or under another name"
            )
    for block, identities, subject in read:
        if subject.name in store.subjects:
            progress(f"{subject.name}: there already")
            continue
        rows = dict(zip(block.ids, store.add_images(block).tolist(), strict=True))
        of_picture = np.array([rows[identity] for identity in identities], np.int32)
        store.add_subject(replace(subject, image=of_picture[subject.image]))
        progress(f"{subject.name}: {subject.responses.shape[0]} trials, {subject.responses.shape[1]} voxels")
    return store

"""Plain arrays: a directory with a ``recordings.json`` that says what is what.

``recordings.json`` is a list of objects; paths are relative to the directory::

    subject       name of the subject
    responses     .npy: (trial, voxel), or (image, voxel, repeat) with NaN where there was no repeat
    images        a zip or a directory of pictures (in the order of their names), or an .npy (image, height, width, 3) uint8
    trials        optional .csv: column `image` (0-based index into the images), optional `session`, `run`, `repeat`;
                  without it, row i shows image i
    session_column   optional: the column of `trials` that counts the sessions (default `session`, where there is one)
    blocks_of     optional: no scan sessions, so treat each successive block of that many images as one
    rois          optional .csv: a column per family, a row per voxel, holding labels' names ("" for none)
    coordinates   optional .npy (voxel, 3) in mm
    n_averaged    optional: about how many repeats each row is already the mean of
    unit, upstream_preprocessing   optional texts

An image's identity is the digest of its decoded pixels: equal names may be different pictures, and the same picture in
two recordings is one image.
"""

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from data.schema import Rois, SubjectData, digest_of, pixel_identity
from data.store import ImageBlock, PooledStore

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
REQUIRED = {"subject", "responses", "images"}
KNOWN = REQUIRED | {"trials", "session_column", "blocks_of", "rois", "coordinates", "n_averaged", "unit"}
KNOWN |= {"upstream_preprocessing", "note"}


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
        if missing := REQUIRED - set(entry):
            raise ValueError(f"{table}: a recording lacks {sorted(missing)[0]!r}; it has {sorted(entry)}")
        if unknown := set(entry) - KNOWN:
            raise ValueError(
                f"{table}: {sorted(unknown)[0]!r} of {entry['subject']!r} is unknown; known are {sorted(KNOWN)}"
            )
    names = [entry["subject"] for entry in entries]
    if len(set(names)) < len(names):
        raise ValueError(f"{table}: a subject occurs more than once in {names}; join its trials in one recording")
    return [Recording(directory=directory, entry=entry) for entry in entries]


def _load_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a readable .npy of numbers: {error}") from error


def _decode(source: Any, what: str) -> UInt8[np.ndarray, "height width 3"]:
    try:
        with Image.open(source) as picture:
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{what} is not a readable picture: {error}") from error


def read_images(path: Path) -> UInt8[np.ndarray, "image height width 3"]:
    """Return the pictures of a zip, a directory or an .npy, in the order of their names.

    Raises
    ------
    ValueError
        If there is none, one can't be decoded, or their sizes differ.
    """
    if path.suffix == ".npy":
        pixels = _load_array(path)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise ValueError(f"{path} must be uint8 (image, height, width, 3), got {pixels.dtype} {pixels.shape}")
        return pixels
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix.lower() in PICTURES)
        named = [(str(f), _decode(f, str(f))) for f in files]
    else:
        try:
            with zipfile.ZipFile(path) as archive:
                members = sorted(n for n in archive.namelist() if Path(n).suffix.lower() in PICTURES)
                named = [(f"{path}:{n}", _decode(io.BytesIO(archive.read(n)), f"{path}:{n}")) for n in members]
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is neither a directory, an .npy nor a zip of pictures") from error
    if not named:
        raise ValueError(f"{path} holds no picture ({', '.join(sorted(PICTURES))})")
    shape = named[0][1].shape
    for name, pixels in named:
        if pixels.shape != shape:
            raise ValueError(
                f"{name} is {pixels.shape[:2]} but the others are {shape[:2]}; crop them to one size first"
            )
    return np.stack([pixels for _, pixels in named])


def _read_table(path: Path, n_rows: int, what: str) -> pd.DataFrame:
    try:
        table = pd.read_csv(path)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable CSV: {error}") from error
    if len(table) != n_rows:
        raise ValueError(f"{path} has {len(table)} rows, but there are {n_rows} {what}")
    return table


def _trials(recording: Recording, responses: np.ndarray, n_images: int) -> dict[str, np.ndarray | None]:
    """Return the columns image, session, run, repeat of a (trial, voxel) recording."""
    n = len(responses)
    if "trials" not in recording.entry:
        if n != n_images:
            raise ValueError(
                f"{recording.subject}: {n} rows of responses but {n_images} images; give a trials.csv that says which is which"
            )
        return {"image": np.arange(n), "session": None, "run": None, "repeat": None}
    path = recording.path("trials")
    table = _read_table(path, n, "rows of responses")
    if "image" not in table:
        raise ValueError(f"{path} has no column 'image'; it has {list(table)}")
    wanted = recording.entry.get("session_column", "session" if "session" in table else None)
    if wanted is not None and wanted not in table:
        raise ValueError(f"{path} has no column {wanted!r}, which session_column names; it has {list(table)}")
    columns = {"image": "image", "session": wanted, "run": "run", "repeat": "repeat"}
    found: dict[str, np.ndarray | None] = {}
    for ours, theirs in columns.items():
        if theirs is None or theirs not in table:
            found[ours] = None
            continue
        if not pd.api.types.is_integer_dtype(table[theirs]):
            raise ValueError(f"{path}: column {theirs!r} must hold whole numbers, got {table[theirs].dtype}")
        found[ours] = table[theirs].to_numpy()
    image = found["image"]
    assert image is not None
    if image.min() < 0 or image.max() >= n_images:
        bad = int(image.max() if image.max() >= n_images else image.min())
        raise ValueError(f"{path}: image {bad} is not among the {n_images} images, which count from 0")
    return found


def _unfold_repeats(responses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return trials, image and repeat of (image, voxel, repeat) with NaN where there was no repeat."""
    there = ~np.isnan(responses).all(axis=1)
    image, repeat = np.nonzero(there)
    return np.ascontiguousarray(responses[image, :, repeat]), image, repeat


def _blocks(n_images: int, size: int) -> np.ndarray:
    """Return the block of each image, from 1; a remainder shorter than half a block joins the one before it."""
    n_blocks = max(1, round(n_images / size))
    return np.minimum(np.arange(n_images) // size, n_blocks - 1) + 1


def read_recording(recording: Recording) -> tuple[ImageBlock, list[str], SubjectData]:
    """Return a recording's images (each once), the identity of each of its pictures in order, and its measurements.

    The measurements' `image` indexes those pictures; the store's rows take their place when they are known.
    """
    entry, responses = recording.entry, _load_array(recording.path("responses"))
    pixels = read_images(recording.path("images"))
    if responses.ndim == 3:
        if len(responses) != len(pixels):
            raise ValueError(f"{recording.subject}: responses to {len(responses)} images but {len(pixels)} pictures")
        responses, image, repeat = _unfold_repeats(responses)
        columns: dict[str, np.ndarray | None] = {"image": image, "session": None, "run": None, "repeat": repeat}
    elif responses.ndim == 2:
        columns = _trials(recording, responses, len(pixels))
    else:
        raise ValueError(f"{recording.path('responses')} must have 2 or 3 axes, got shape {responses.shape}")
    image = columns["image"]
    assert image is not None
    provenance = {"importer": "arrays 1", "recording": entry, "responses_digest": digest_of(responses)}
    if "blocks_of" in entry:
        columns["session"] = _blocks(len(pixels), int(entry["blocks_of"]))[image]
        provenance["sessions"] = f"successive blocks of {entry['blocks_of']} images, not scan sessions"
    n_averaged = entry.get("n_averaged")
    rois = {}
    if "rois" in entry:
        table = _read_table(recording.path("rois"), responses.shape[1], "voxels").fillna("").astype(str)
        for family in table:
            names = sorted(set(table[family]) - {""})
            codes = table[family].map({name: k + 1 for k, name in enumerate(names)} | {"": 0})
            rois[str(family)] = Rois(labels=codes.to_numpy(np.int16), names={k + 1: n for k, n in enumerate(names)})
    identities = [pixel_identity(p) for p in pixels]
    first = list({identity: i for i, identity in reversed(list(enumerate(identities)))}.values())[::-1]
    block = ImageBlock(ids=[identities[i] for i in first], roles=[""] * len(first), pixels=pixels[first])

    def column(name: str, dtype: Any) -> np.ndarray | None:
        values = columns[name]
        return None if values is None else values.astype(dtype)

    subject = SubjectData(
        name=recording.subject,
        responses=responses
        if responses.dtype.kind in "if" and responses.dtype != np.float64
        else responses.astype(np.float32),
        unit=entry.get("unit", "a.u."),
        image=image.astype(np.int32),
        session=column("session", np.int16),
        run=column("run", np.int16),
        repeat=column("repeat", np.int8),
        n_averaged=None if n_averaged is None else np.full(len(responses), n_averaged, np.float32),
        coordinates=_load_array(recording.path("coordinates")).astype(np.float32) if "coordinates" in entry else None,
        rois=rois,
        provenance=provenance,
        upstream_preprocessing=entry.get("upstream_preprocessing"),
    )
    subject.check(n_images=len(pixels))
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

    Everything is read and checked before the first byte is written.
    """
    recordings = read_recordings(directory, table)
    if subjects is not None:
        have = [r.subject for r in recordings]
        if unknown := set(subjects) - set(have):
            raise ValueError(f"subject {sorted(unknown)[0]!r} is not in recordings.json; it has {', '.join(have)}")
        recordings = [r for r in recordings if r.subject in subjects]
    read = [read_recording(recording) for recording in recordings]
    sizes = {block.pixels.shape[1:3] for block, _, _ in read if block.pixels is not None}
    if len(sizes) > 1:
        raise ValueError(f"the recordings' pictures have different sizes {sorted(sizes)}; crop them to one size first")
    try:
        store = PooledStore.open(store_path, writable=True)
    except ValueError:
        store = PooledStore.create(store_path, name=Path(store_path).stem, provenance={"importer": "arrays 1"})
    for block, identities, subject in read:
        if subject.name in store.subjects:
            progress(f"{subject.name}: there already")
            continue
        rows = dict(zip(block.ids, store.add_images(block).tolist(), strict=True))
        of_picture = np.array([rows[identity] for identity in identities], np.int32)
        renamed = {**vars(subject), "image": of_picture[subject.image]}
        store.add_subject(SubjectData(**renamed))
        progress(f"{subject.name}: {subject.responses.shape[0]} trials, {subject.responses.shape[1]} voxels")
    return store

"""The table of a directory of plain arrays: ``recordings.json``, which says what is what.

``recordings.json`` is a list of objects; paths are relative to the directory::

    subject       name of the subject
    responses     .npy: (trial, voxel), or (image, voxel, repeat) with NaN where there was no repeat
                  A list of such files, with a list of as many `images`, is one recording in pieces
    roles         optional list, a role (train, validation, test) for the images of each of the pieces
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
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.schema import ROLES

TABLE = "recordings.json"
REQUIRED = {"subject", "responses", "images"}
TEXTS = REQUIRED | {"trials", "session_column", "rois", "coordinates", "unit", "upstream_preprocessing", "note"}
IN_PIECES = {"responses", "images"}
KNOWN = TEXTS | {"blocks_of", "n_averaged", "repeats_axis", "roles"}


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
        return self.paths(key)[0]

    def paths(self, key: str) -> list[Path]:
        """Return the paths under `key`, which may be one or a list.

        Raises
        ------
        ValueError
            If nothing is at one of them.
        """
        named = self.entry[key]
        paths = [self.directory / name for name in (named if isinstance(named, list) else [named])]
        for path in paths:
            if not path.exists():
                raise ValueError(f"{path} does not exist; {self.subject!r} in recordings.json names it as {key!r}")
        return paths


def read_recordings(directory: Path, table: Path | None = None) -> list[Recording]:
    """Return the recordings that `table` (default: ``recordings.json`` in `directory`) lists."""
    table = table or directory / TABLE
    if not table.exists():
        raise ValueError(f"{table} does not exist; the arrays importer needs it to know what is what")
    try:
        entries = json.loads(table.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{table} is not JSON: {error}; docs/importing.md has an example") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise ValueError(f"{table} must hold a list of objects, one per recording; docs/importing.md has an example")
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
    _check_pieces(where, entry)
    for key in sorted(TEXTS & set(entry)):
        if key in IN_PIECES and isinstance(entry[key], list):
            continue
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


def _check_pieces(where: str, entry: dict[str, Any]) -> None:
    """Check what is given as lists, in pieces."""
    pieces = {key: entry[key] for key in IN_PIECES if isinstance(entry[key], list)}
    for key, names in pieces.items():
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"{where}: {key!r} must be text or a list of texts, got {names!r}")
    if pieces and (len(pieces) < 2 or len(entry["responses"]) != len(entry["images"])):
        raise ValueError(f"{where}: 'responses' and 'images' must be lists of the same length, piece by piece")
    if pieces and "trials" in entry:
        raise ValueError(f"{where}: 'trials' goes with one file of responses, not with pieces; join the files")
    roles = entry.get("roles", [""])
    n_files = len(pieces.get("images", [0]))
    known = isinstance(roles, list) and set(map(str, roles)) <= set(ROLES)
    if not known or ("roles" in entry and len(roles) != n_files):
        raise ValueError(f"{where}: 'roles' must be a list of {', '.join(ROLES[1:])}, one for each file of images")

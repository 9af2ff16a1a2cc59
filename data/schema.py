"""What a pooled store's format fixes: its version, names, columns, and how content is digested.

``docs/store-format.md`` has the layout; `data.voxels` and `data.sources` the records that go into a store.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

FORMAT = "manybrains-store"
FORMAT_VERSION = 1
ROLES = ("", "train", "validation", "test")
TRIAL_COLUMNS: dict[str, type[np.generic]] = {
    "image": np.int32,
    "session": np.int16,
    "run": np.int16,
    "repeat": np.int8,
    "n_averaged": np.float32,
    "time_s": np.float32,
}
"""Columns of the trial table and their types; all but `image` may be missing."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_name(name: str, what: str) -> str:
    """Return `name` if it can name a group on every file system and object store.

    Raises
    ------
    ValueError
        If it holds anything but letters, digits, dot, dash and underscore.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{what} {name!r} must start with a letter or digit and hold only letters, digits, . - and _")
    return name


def resolve_subject(text: str, have: Sequence[str], where: object) -> str:
    """Return which name is meant by a name or a number: 5 is ``subj05``, ``sub05`` or, as BIDS has it, ``sub-05``.

    Raises
    ------
    ValueError
        If none is, or several are; `where` says where there are those names and no others.
    """
    if text in have:
        return text
    numbered = [name for name in have if text.isdecimal() and re.fullmatch(rf"sub[j-]?0*{int(text)}", name)]
    if len(numbered) != 1:
        told = f"could be {' or '.join(numbered)}" if numbered else f"is not in {where}"
        raise ValueError(f"subject {text!r} {told}; it has {', '.join(have) or 'no subjects'}")
    return numbered[0]


def digest_of(*parts: np.ndarray | str | bytes) -> str:
    """Return ``sha256:...`` of arrays (dtype, shape and content) and strings, in order."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            sha.update(f"{part.dtype.str}{part.shape}".encode())
            sha.update(np.ascontiguousarray(part).data)
        else:
            sha.update(part if isinstance(part, bytes) else part.encode())
        sha.update(b"\0")
    return "sha256:" + sha.hexdigest()


def json_digest(value: Any) -> str:
    """Return the digest of a JSON-able value in its canonical form."""
    return digest_of(json.dumps(value, sort_keys=True, separators=(",", ":")))


def pixel_identity(pixels: UInt8[np.ndarray, "height width 3"]) -> str:
    """Return an image's identity where the data set gives none: the digest of its decoded pixels, never a file name."""
    return digest_of(pixels)


def told_runs(numbers: list[int]) -> str:
    """Return whole numbers in order, runs shortened: 1-3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"

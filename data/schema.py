"""What a pooled store holds: the records that go in, and the layout on disk (format 1).

::

    STORE/                              attrs: format, format_version, name, provenance
      images/<block>/                   attrs: complete, digest, role_names
        id      uint8  (image, byte)    UTF-8, zero-padded: the data set's own id, else ``sha256:`` of the pixels
        role    uint8  (image,)         index into role_names: the split that the data set itself prescribes
        pixels  uint8  (image, height, width, 3)   optional
      features/<encoder>/               attrs: spec, digest
        <block>/                        attrs: complete
          cls   float16 (image, depth, width)
          patch float16 (image, depth, patch, width)
      subjects/<subject>/               attrs: complete, digest, scale, unit, provenance, upstream_preprocessing
        responses  native dtype (trial, voxel)     times `scale` gives `unit`
        trials/image, session, run, repeat, n_averaged, time_s    (trial,)
        voxels/coordinates float32 (voxel, 3) mm
        rois/<family> int16 (voxel,)    attrs: names {label: name}; 0 is "none"

An image's row is global: blocks in the order of their names, each block's images in order. Appending a subject or a
block never touches what is there. A group without ``complete`` is the remains of an interrupted write and is ignored.
"""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32, Int8, Int16, Int32, Shaped, UInt8

FORMAT = "manybrains-store"
FORMAT_VERSION = 1
ROLES = ("", "train", "validation", "test")
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


@dataclass(frozen=True, kw_only=True)
class Rois:
    """One family of ROI labels; label 0 means "in none of them"."""

    labels: Int16[np.ndarray, " voxel"]
    names: dict[int, str]

    def mask(self, *names: str) -> np.ndarray:
        """Return where a voxel carries one of `names`, as (voxel,) bool."""
        wanted = [label for label, name in self.names.items() if name in names]
        return np.isin(self.labels, wanted)


@dataclass(frozen=True, kw_only=True)
class ImageBlock:
    """Images that come into a store together."""

    ids: list[str]
    roles: list[str]
    pixels: UInt8[np.ndarray, "image height width 3"] | None = None

    def check(self) -> None:
        """Raise ValueError where the block contradicts itself."""
        n = len(self.ids)
        if n == 0:
            raise ValueError("an image block needs at least one image")
        identity, times = Counter(self.ids).most_common(1)[0]
        if times > 1:
            raise ValueError(f"image id {identity!r} occurs {times} times in the block; identical images are one image")
        if unfit := [i for i in self.ids if not i or not i.isprintable()]:
            raise ValueError(f"image id {unfit[0]!r} must be printable text of at least one character")
        n_pixels = n if self.pixels is None else len(self.pixels)
        if len(self.roles) != n or n_pixels != n:
            raise ValueError(f"{n} image ids need as many roles and pictures, got {len(self.roles)} and {n_pixels}")
        if unknown := set(self.roles) - set(ROLES):
            raise ValueError(f"image role {sorted(unknown)[0]!r} is unknown; it must be one of {ROLES}")


@dataclass(frozen=True, kw_only=True)
class SubjectData:
    """Everything measured from one subject, raw: `responses` times `scale` is in `unit`.

    `n_averaged` counts the repeats that a row is already the mean of (1 for single trials; more than 1 only in data
    that came averaged, which `upstream_preprocessing` then names).
    """

    name: str
    responses: Shaped[np.ndarray, "trial voxel"]
    image: Int32[np.ndarray, " trial"]
    scale: float = 1.0
    unit: str = "a.u."
    session: Int16[np.ndarray, " trial"] | None = None
    run: Int16[np.ndarray, " trial"] | None = None
    repeat: Int8[np.ndarray, " trial"] | None = None
    n_averaged: Float32[np.ndarray, " trial"] | None = None
    time_s: Float32[np.ndarray, " trial"] | None = None
    coordinates: Float32[np.ndarray, "voxel 3"] | None = None
    rois: dict[str, Rois] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    upstream_preprocessing: str | None = None

    def trial_columns(self) -> dict[str, np.ndarray]:
        """Return the columns of the trial table that are there."""
        named = {"image": self.image, "session": self.session, "run": self.run, "repeat": self.repeat}
        named |= {"n_averaged": self.n_averaged, "time_s": self.time_s}
        return {name: column for name, column in named.items() if column is not None}

    def check(self, *, n_images: int) -> None:
        """Raise ValueError where the record contradicts itself or names an image that the store doesn't have."""
        check_name(self.name, "subject")
        if "." in self.name:  # it names a module of the model too, and torch separates those by dots
            raise ValueError(f"subject {self.name!r} must not contain a dot; write {self.name.replace('.', '-')!r}")
        n_trials, n_voxels = self.responses.shape
        if n_trials == 0 or n_voxels == 0:
            raise ValueError(f"{self.name}: responses are empty, shape {self.responses.shape}")
        if self.responses.dtype.kind not in "if":
            raise ValueError(f"{self.name}: responses must be integers or floats, got {self.responses.dtype}")
        if self.responses.dtype.kind == "f" and not np.isfinite(self.responses).all():
            trial, voxel = np.argwhere(~np.isfinite(self.responses))[0]
            raise ValueError(f"{self.name}: response of trial {trial}, voxel {voxel} is not finite; drop or mask it")
        for name, column in self.trial_columns().items():
            if len(column) != n_trials:
                raise ValueError(f"{self.name}: {n_trials} trials but {len(column)} values of {name!r}")
        if self.image.min() < 0 or self.image.max() >= n_images:
            bad = int(self.image.min() if self.image.min() < 0 else self.image.max())
            raise ValueError(f"{self.name}: image row {bad} is outside the store's {n_images} images")
        if self.session is not None and self.session.min() < 1:
            raise ValueError(f"{self.name}: sessions count from 1, got {int(self.session.min())}")
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"{self.name}: scale must be a positive number, got {self.scale}")
        if self.n_averaged is not None:
            if not (np.isfinite(self.n_averaged) & (self.n_averaged > 0)).all():
                raise ValueError(f"{self.name}: n_averaged must be positive in every trial (1 for a single trial)")
            if (self.n_averaged > 1).any() and not self.upstream_preprocessing:
                raise ValueError(f"{self.name}: rows are averages (n_averaged), so upstream_preprocessing must say how")
        for family, rois in self.rois.items():
            check_name(family, "ROI family")
            if len(rois.labels) != n_voxels:
                raise ValueError(f"{self.name}: {n_voxels} voxels but {len(rois.labels)} labels of {family!r}")
            if missing := set(np.unique(rois.labels).tolist()) - set(rois.names) - {0}:
                raise ValueError(f"{self.name}: label {min(missing)} of {family!r} has no name")
        if self.coordinates is not None:
            if self.coordinates.shape != (n_voxels, 3):
                raise ValueError(f"{self.name}: coordinates must be ({n_voxels}, 3), got {self.coordinates.shape}")
            if not np.isfinite(self.coordinates).all():
                raise ValueError(f"{self.name}: coordinates must be finite; leave them out where they are unknown")

    def digest(self, image_ids: list[str]) -> str:
        """Return the digest of content; images enter by identity, so it doesn't depend on their rows in a store."""
        shown = digest_of("\n".join(image_ids[row] for row in self.image))
        columns = [part for name, col in self.trial_columns().items() if name != "image" for part in (name, col)]
        rois = [
            p for name in sorted(self.rois) for p in (name, self.rois[name].labels, json_digest(self.rois[name].names))
        ]
        place = [] if self.coordinates is None else [self.coordinates]
        return digest_of(self.name, repr(self.scale), self.unit, self.responses, shown, *columns, *place, *rois)

"""The records that go into a pooled store.

`SubjectSource` is what an importer hands over: tables at hand, responses and pictures still where they were, read when
they are written. `SubjectData` and `ImageBlock` are the same with everything in memory.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int8, Int16, Int32, Shaped, UInt8

from data.schema import ROLES, TRIAL_COLUMNS, check_name, digest_of
from data.voxels import Rois, Surface, Volume, VoxelTable


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """Images that a subject saw, each once; `read` gives the pictures of the images at some places of the list.

    `shape` is the pictures' height and width; without `read` only identities are kept, and nothing can be encoded.
    """

    ids: list[str]
    roles: list[str]
    shape: tuple[int, int] | None = None
    files: tuple[Path, ...] = ()
    """Files of the pictures, where they are few; an interrupted import goes on only if they are the same."""
    read: Callable[[np.ndarray], UInt8[np.ndarray, "image height width 3"]] | None = None

    def check(self) -> None:
        """Raise ValueError where the list contradicts itself."""
        n = len(self.ids)
        if n == 0:
            raise ValueError("an image block needs at least one image")
        identity, times = Counter(self.ids).most_common(1)[0]
        if times > 1:
            raise ValueError(f"image id {identity!r} occurs {times} times in the block; identical images are one image")
        if unfit := [i for i in self.ids if not i or not i.isprintable()]:
            raise ValueError(f"image id {unfit[0]!r} must be printable text of at least one character")
        if len(self.roles) != n:
            raise ValueError(f"{n} image ids need as many roles and pictures, got {len(self.roles)} roles")
        if unknown := set(self.roles) - set(ROLES):
            raise ValueError(f"image role {sorted(unknown)[0]!r} is unknown; it must be one of {ROLES}")


@dataclass(frozen=True, kw_only=True)
class ImageBlock:
    """Images that come into a store together, their pictures in memory."""

    ids: list[str]
    roles: list[str]
    pixels: UInt8[np.ndarray, "image height width 3"] | None = None

    def source(self) -> ImageSource:
        """Return the block as a source."""
        if self.pixels is None:
            return ImageSource(ids=self.ids, roles=self.roles)
        if len(self.pixels) != len(self.ids):
            raise ValueError(
                f"{len(self.ids)} image ids need as many roles and pictures, got {len(self.pixels)} pictures"
            )
        height, width = self.pixels.shape[1:3]
        return ImageSource(ids=self.ids, roles=self.roles, shape=(height, width), read=self.pixels.__getitem__)

    def check(self) -> None:
        """Raise ValueError where the block contradicts itself."""
        self.source().check()


@dataclass(frozen=True, kw_only=True)
class SessionSource:
    """One session: its trial table, and its responses still on disk.

    `columns` are those of `TRIAL_COLUMNS` but `session`; `image` counts the subject's `ImageSource`. `session` is None
    where a data set has no sessions: then there is one source with all trials. `read` yields the responses in blocks of
    successive trials, in the subject's dtype.
    """

    session: int | None
    columns: dict[str, np.ndarray]
    read: Callable[[], Iterator[Shaped[np.ndarray, "trial voxel"]]]
    files: tuple[Path, ...] = ()

    @property
    def key(self) -> str:
        """Name of the session in a store."""
        return "all" if self.session is None else f"{self.session:04d}"

    @property
    def n_trials(self) -> int:
        """Number of trials."""
        return len(self.columns["image"])


@dataclass(frozen=True, kw_only=True)
class SubjectSource:
    """One subject as an importer finds it: responses times `scale` are in `unit`, sessions in the order of scanning.

    `n_averaged` (a trial column) counts the repeats that a row is already the mean of: 1 for single trials, more only
    in data that came averaged, which `upstream_preprocessing` then names.
    """

    name: str
    dtype: np.dtype[Any]
    voxels: VoxelTable
    images: ImageSource
    sessions: tuple[SessionSource, ...]
    scale: float = 1.0
    unit: str = "a.u."
    measure: str = ""
    """What a response is where a data set has several, such as NSD's versions of betas; one subject has one."""
    upstream_preprocessing: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def n_trials(self) -> int:
        """Number of trials over all sessions."""
        return sum(session.n_trials for session in self.sessions)

    @property
    def n_bytes(self) -> int:
        """Size of the responses in memory."""
        return self.n_trials * self.voxels.n_voxels * self.dtype.itemsize

    def head_digest(self) -> str:
        """Return the digest of everything but the sessions."""
        return digest_of(
            self.name,
            repr(float(self.scale)),
            self.unit,
            self.measure,
            self.upstream_preprocessing or "",
            self.voxels.digest(),
        )

    def check(self) -> None:
        """Raise ValueError where the record contradicts itself; responses are checked when they are read."""
        check_name(self.name, "subject")
        if "." in self.name:  # it names a module of the model too, and torch separates those by dots
            raise ValueError(f"subject {self.name!r} must not contain a dot; write {self.name.replace('.', '-')!r}")
        try:
            self._check()
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def _check(self) -> None:
        if self.n_trials == 0 or self.voxels.n_voxels == 0:
            raise ValueError(f"responses are empty, shape ({self.n_trials}, {self.voxels.n_voxels})")
        if self.dtype.kind not in "if" or not self.dtype.isnative:
            raise ValueError(f"responses must be integers or floats in this machine's byte order, got {self.dtype}")
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be a positive number, got {self.scale}")
        self.voxels.check()
        self.images.check()
        numbers = [session.session for session in self.sessions]
        if None in numbers and len(numbers) > 1:
            raise ValueError("either every session has a number or there is one source without")
        counted = [number for number in numbers if number is not None]
        if counted != sorted(set(counted)):
            raise ValueError(f"sessions must be given once each, in the order of scanning, got {counted}")
        if counted and not 1 <= counted[0] <= counted[-1] <= 9999:
            raise ValueError(f"sessions count from 1, got {counted[0] if counted[0] < 1 else counted[-1]}")
        for session in self.sessions:
            self._check_columns(session)

    def _check_columns(self, session: SessionSource) -> None:
        n_images = len(self.images.ids)
        if unknown := set(session.columns) - set(TRIAL_COLUMNS) | ({"session"} & set(session.columns)):
            raise ValueError(f"{sorted(unknown)[0]!r} is no column of a trial table; there are {list(TRIAL_COLUMNS)}")
        if set(session.columns) != set(self.sessions[0].columns):
            raise ValueError(
                f"session {session.session} has other trial columns than session {self.sessions[0].session}"
            )
        for name, column in session.columns.items():
            if len(column) != session.n_trials:
                raise ValueError(f"{session.n_trials} trials but {len(column)} values of {name!r}")
            kind = np.dtype(TRIAL_COLUMNS[name])
            if kind.kind == "i" and len(column) and not _fits(column, kind):
                worst = column.flat[np.abs(column).argmax()]
                raise ValueError(f"{name!r} must be whole numbers of at most {np.iinfo(kind.name).max}, got {worst}")
        image = session.columns["image"]
        if len(image) and (image.min() < 0 or image.max() >= n_images):
            bad = int(image.min() if image.min() < 0 else image.max())
            raise ValueError(f"image row {bad} is outside the {n_images} images")
        averaged = session.columns.get("n_averaged")
        if averaged is not None:
            if not (np.isfinite(averaged) & (averaged > 0)).all():
                raise ValueError("n_averaged must be positive in every trial (1 for a single trial)")
            if (averaged > 1).any() and not self.upstream_preprocessing:
                raise ValueError("rows are averages (n_averaged), so upstream_preprocessing must say how")


def _fits(column: np.ndarray, kind: np.dtype[Any]) -> bool:
    """Return whether integers can be stored as `kind` without loss."""
    limits = np.iinfo(kind.name)
    return column.dtype.kind in "iu" and int(column.min()) >= limits.min and int(column.max()) <= limits.max


@dataclass(frozen=True, kw_only=True)
class SubjectData:
    """Everything measured from one subject, raw and in memory; `image` has rows of the store that it will go into.

    A store keeps trials in the order of sessions, and within a session in the order given.
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
    place: Volume | Surface | None = None
    rois: dict[str, Rois] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    upstream_preprocessing: str | None = None

    def trial_columns(self) -> dict[str, np.ndarray]:
        """Return the columns of the trial table that are there."""
        return {name: column for name in TRIAL_COLUMNS if (column := getattr(self, name)) is not None}

    def check(self, *, n_images: int) -> None:
        """Raise ValueError where the record contradicts itself or names an image that isn't among `n_images`."""
        if self.responses.ndim != 2:
            raise ValueError(f"{self.name}: responses must be (trial, voxel), got shape {self.responses.shape}")
        for name, column in self.trial_columns().items():
            if len(column) != len(self.responses):
                raise ValueError(f"{self.name}: {len(self.responses)} trials but {len(column)} values of {name!r}")
        if len(self.image) and (self.image.min() < 0 or self.image.max() >= n_images):
            bad = int(self.image.min() if self.image.min() < 0 else self.image.max())
            raise ValueError(f"{self.name}: image row {bad} is outside the store's {n_images} images")
        self.source([f"{row}" for row in range(n_images)]).check()
        check_finite(self.name, self.responses)

    def source(self, image_ids: list[str]) -> SubjectSource:
        """Return the record as a source, its images known by `image_ids`, one per row of the store."""
        shown, image = np.unique(self.image, return_inverse=True)
        numbers = np.zeros(len(image), np.int16) if self.session is None else self.session

        def session(number: int) -> SessionSource:
            rows = np.flatnonzero(numbers == number)
            columns = {name: column[rows] for name, column in self.trial_columns().items() if name != "session"}
            return SessionSource(
                session=None if self.session is None else number,
                columns=columns | {"image": image[rows].astype(np.int32)},
                read=lambda: iter([self.responses[rows]]),
            )

        return SubjectSource(
            name=self.name,
            dtype=self.responses.dtype,
            voxels=VoxelTable(
                n_voxels=self.responses.shape[1], coordinates=self.coordinates, place=self.place, rois=self.rois
            ),
            images=ImageSource(ids=[image_ids[row] for row in shown], roles=[""] * len(shown)),
            sessions=tuple(session(int(number)) for number in np.unique(numbers)),
            scale=self.scale,
            unit=self.unit,
            upstream_preprocessing=self.upstream_preprocessing,
            provenance=self.provenance,
        )

    def digest(self, image_ids: list[str]) -> str:
        """Return the digest of content; images enter by identity, so it doesn't depend on their rows in a store."""
        source = self.source(image_ids)
        return subject_digest(
            source.head_digest(), {s.key: session_digest(source, s, s.read()) for s in source.sessions}
        )


def check_finite(name: str, responses: Shaped[np.ndarray, "trial voxel"], *, first_trial: int = 0) -> None:
    """Raise ValueError where a response is not finite."""
    if responses.dtype.kind == "f" and not np.isfinite(responses).all():
        trial, voxel = np.argwhere(~np.isfinite(responses))[0]
        raise ValueError(
            f"{name}: response of trial {first_trial + trial}, voxel {voxel} is not finite; drop or mask it"
        )


def session_digest(
    source: SubjectSource, session: SessionSource, blocks: Iterator[Shaped[np.ndarray, "trial voxel"]]
) -> str:
    """Return the digest of a session's content: trial table, images by identity, responses as they come in `blocks`."""
    sha = hashlib.sha256()
    sha.update(f"{source.dtype.str}({session.n_trials}, {source.voxels.n_voxels})".encode())
    for block in blocks:
        sha.update(np.ascontiguousarray(block).data)
    shown = "\n".join(source.images.ids[row] for row in session.columns["image"])
    columns = [
        p
        for name in TRIAL_COLUMNS
        if name != "image" and name in session.columns
        for p in (name, session.columns[name].astype(TRIAL_COLUMNS[name], copy=False))
    ]
    return digest_of(sha.hexdigest(), session.key, shown, *columns)


def subject_digest(head: str, sessions: dict[str, str]) -> str:
    """Return a subject's digest from those of its head and of its sessions, by key, whenever they came."""
    return digest_of(head, *(part for key in sorted(sessions) for part in (key, sessions[key])))

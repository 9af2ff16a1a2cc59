"""One subject in a store: read lazily, written as a part that counts whole or not at all.

A subject's trials lie in parts, one per import; a part has a trial table and one array of responses per session. The
part's attribute ``complete``, set last in one write, makes its sessions and the images that came with it visible
together. Until then it is a draft: a later import of the same plan goes on where it stopped, any other clears it away.
"""

import hashlib
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Float32, Int, Shaped

from data.schema import TRIAL_COLUMNS, digest_of, json_digest
from data.sources import (
    SessionSource,
    SubjectSource,
    check_finite,
    session_digest,
    subject_digest,
)
from data.store.images import Progress
from data.store.shards import REMEDY
from data.store.zarr_arrays import (
    array_at,
    attribute,
    begin,
    check_whole,
    complete_members,
    create_array,
    get,
    get_optional,
    group_at,
    put,
    read_rows,
    resume_or_begin,
    rows_of,
    shard_rows,
)
from data.voxels import Rois, Surface, Volume, VoxelTable


def _whole(group: zarr.Group, needed: tuple[str, ...]) -> dict[str, Any]:
    """Return a group's attributes, which must have those needed."""
    attrs = group.attrs.asdict()
    if missing := [name for name in needed if attrs.get(name) is None]:
        raise ValueError(f"{group.store_path} lacks the attribute {missing[0]!r}; {REMEDY}")
    return attrs


class SubjectStore:
    """One subject's measurements, read lazily; trials are in the order of sessions."""

    def __init__(self, name: str, group: zarr.Group) -> None:
        self.name = name
        self._group = group
        self.attrs: dict[str, Any] = _whole(group, ("head_digest", "scale", "unit"))
        self.parts: dict[str, dict[str, Any]] = {}
        """Attributes of each part (one per import): provenance, digests and source files of its sessions."""
        self._place: dict[str, zarr.Group] = {}
        self._rows: dict[str, slice] = {}
        for key, part in complete_members(group, "parts"):
            self.parts[key] = _whole(part, ("n_trials", "digests", "files", "provenance"))
            start = 0
            for session, n_trials in self.parts[key]["n_trials"].items():
                self._place[session] = part
                self._rows[session] = slice(start, start := start + n_trials)

    @cached_property
    def session_digests(self) -> dict[str, str]:
        """Digest of content of each session, by key, in the order of scanning."""
        found = {key: digest for part in self.parts.values() for key, digest in part["digests"].items()}
        return dict(sorted(found.items()))

    @property
    def digest(self) -> str:
        """Digest of content, whatever parts it came in."""
        return subject_digest(self.attrs["head_digest"], self.session_digests)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """How the newest part was made."""
        return self.parts[max(self.parts)]["provenance"]

    @cached_property
    def _arrays(self) -> list[zarr.Array]:
        """Responses of each session, all of whose shards are there."""
        arrays = [array_at(self._place[key], f"responses/{key}") for key in self.session_digests]
        for array in arrays:
            check_whole(array)
        return arrays

    @cached_property
    def _first(self) -> zarr.Array:
        key = next(iter(self.session_digests))
        return array_at(self._place[key], f"responses/{key}")

    @cached_property
    def _starts(self) -> Int[np.ndarray, " session"]:
        """First trial of each session, and the end of the last."""
        lengths = [self._rows[key].stop - self._rows[key].start for key in self.session_digests]
        return np.cumsum([0, *lengths])

    @property
    def n_trials(self) -> int:
        """Number of trials."""
        return int(self._starts[-1])

    @cached_property
    def n_voxels(self) -> int:
        """Number of voxels."""
        return self._first.shape[1]

    @property
    def dtype(self) -> str:
        """Name of the dtype that responses are stored in."""
        return self._first.dtype.name

    @property
    def upstream_preprocessing(self) -> str | None:
        """What was done to the data before we saw it, if anything."""
        return self.attrs.get("upstream_preprocessing")

    def responses(self, trials: np.ndarray | None = None) -> Float32[np.ndarray, "trial voxel"]:
        """Return the responses of `trials` (indices or a mask; all if None) in the subject's unit."""
        wanted, inverse = np.unique(
            np.arange(self.n_trials)[slice(None) if trials is None else trials], return_inverse=True
        )
        out = np.empty((len(wanted), self.n_voxels), np.float32)
        scale = np.float32(self.attrs["scale"])
        for array, start, stop in zip(self._arrays, self._starts[:-1], self._starts[1:], strict=True):
            here = slice(*np.searchsorted(wanted, (start, stop)))
            rows, into = wanted[here] - start, out[here]
            if len(rows) < stop - start:
                np.multiply(rows_of(array, rows), scale, out=into, casting="unsafe")
                continue
            for first in range(0, len(rows), shard_rows(array)):  # a session is large, so it is never there twice
                shard = slice(first, first + shard_rows(array))
                np.multiply(read_rows(array, shard), scale, out=into[shard], casting="unsafe")
        return out if trials is None or (inverse == np.arange(len(inverse))).all() else out[inverse]

    def voxel_responses(self, voxels: Int[np.ndarray, " voxel"]) -> Float32[np.ndarray, "trial voxel"]:
        """Return the responses of some voxels in all trials, in the subject's unit; a shard at a time is in memory."""
        found = [
            np.asarray(array[start : start + shard_rows(array)])[:, voxels]
            for array in self._arrays
            for start in range(0, array.shape[0], shard_rows(array))
        ]
        return np.concatenate(found).astype(np.float32) * np.float32(self.attrs["scale"])

    def trial_column(self, name: str) -> np.ndarray | None:
        """Return a column of the trial table, or None where the data set has no such thing."""
        if name == "session":
            numbers = [0 if key == "all" else int(key) for key in self.session_digests]
            return None if 0 in numbers else np.repeat(np.array(numbers, np.int16), np.diff(self._starts))
        of_part = {part.path: get_optional(part, f"trials/{name}") for part in self._place.values()}
        found = []
        for key in self.session_digests:
            column = of_part[self._place[key].path]
            if column is None:
                return None
            found.append(column[self._rows[key]])
        return np.concatenate(found)

    def check_session(self, session: SessionSource, image_rows: list[int]) -> None:
        """Raise ValueError if a session that is there has other trials, or came from files of other sizes.

        `image_rows` are the store's rows of the images that `session` counts, -1 where the store doesn't have one.
        """
        part, rows = self._place[session.key], self._rows[session.key]
        given = session.columns | {"image": np.array(image_rows)[session.columns["image"]]}
        for name in TRIAL_COLUMNS:
            if name == "session":
                continue
            there, new = get_optional(part, f"trials/{name}"), given.get(name)
            if (there is None) != (new is None) or (
                there is not None and new is not None and not np.array_equal(there[rows], new.astype(there.dtype))
            ):
                raise ValueError(
                    f"session {session.key} of {self.name!r} is there already with other trials (column {name!r}); "
                    f"import it into another store"
                )
        known = attribute(part, "files").get(session.key, {})
        for path in session.files:
            named_alike = [entry for name, entry in known.items() if Path(name).name == path.name]
            entries = [known[str(path)]] if str(path) in known else named_alike
            if entries and all(_changed(path, entry) for entry in entries):
                raise ValueError(
                    f"{self.name!r} is in the store already with other data: {path} is not the file that session "
                    f"{session.key} was imported from; import it into another store or under another name"
                )

    @cached_property
    def image(self) -> Int[np.ndarray, " trial"]:
        """Global image row of each trial."""
        column = self.trial_column("image")
        assert column is not None
        return column

    @cached_property
    def session(self) -> Int[np.ndarray, " trial"] | None:
        """Session of each trial, counted from 1 in the order of scanning."""
        return self.trial_column("session")

    @cached_property
    def voxels(self) -> VoxelTable:
        """Places, labels and published reliability of the voxels."""
        rois, reliability = {}, {}
        if "rois" in self._group:
            for family, array in group_at(self._group, "rois").arrays():
                names: dict[str, str] = attribute(array, "names")
                rois[family] = Rois(labels=np.asarray(array[...]), names={int(k): v for k, v in names.items()})
        if "reliability" in self._group:
            reliability = {key: np.asarray(a[...]) for key, a in group_at(self._group, "reliability").arrays()}
        return VoxelTable(
            n_voxels=self.n_voxels,
            coordinates=get_optional(self._group, "voxels/coordinates"),
            place=_read_place(self._group),
            rois=rois,
            reliability=reliability,
        )

    @property
    def coordinates(self) -> Float32[np.ndarray, "voxel 3"] | None:
        """Voxel positions in mm."""
        return self.voxels.coordinates

    @property
    def rois(self) -> dict[str, Rois]:
        """ROI labels by family."""
        return self.voxels.rois


def _read_place(group: zarr.Group) -> Volume | Surface | None:
    described = attribute(group, "place")
    if described is None:
        return None
    if described["kind"] == "volume":
        affine = np.array(described["affine"], np.float64)
        return Volume(shape=tuple(described["shape"]), affine=affine, index=get(group, "voxels/index"))
    return Surface(
        space=described["space"],
        n_vertices=tuple(described["n_vertices"]),
        hemisphere=get(group, "voxels/hemisphere"),
        vertex=get(group, "voxels/vertex"),
    )


def _describe_place(place: Volume | Surface | None) -> dict[str, Any] | None:
    if place is None:
        return None
    if isinstance(place, Volume):
        return {"kind": "volume", "shape": list(place.shape), "affine": place.affine.tolist()}
    return {"kind": "surface", "space": place.space, "n_vertices": list(place.n_vertices)}


def write_head(subjects: zarr.Group, source: SubjectSource) -> zarr.Group:
    """Write what a subject has beside its sessions, unless the same is there; no part, no subject."""
    digest = source.head_digest()
    if source.name in subjects and attribute(group_at(subjects, source.name), "head_digest") == digest:
        return group_at(subjects, source.name)
    group = begin(subjects, source.name)
    voxels = source.voxels
    place = voxels.place
    arrays: dict[str, np.ndarray | None] = {"coordinates": voxels.coordinates}
    if isinstance(place, Volume):
        arrays["index"] = place.index
    if isinstance(place, Surface):
        arrays |= {"hemisphere": place.hemisphere, "vertex": place.vertex}
    for name, values in arrays.items():
        if values is not None:
            put(group, f"voxels/{name}", values)
    for family, rois in voxels.rois.items():
        put(group, f"rois/{family}", rois.labels)
        array_at(group, f"rois/{family}").attrs.put({"names": {str(k): v for k, v in rois.names.items()}})
    for name, values in voxels.reliability.items():
        put(group, f"reliability/{name}", values)
    group.attrs.put(
        {
            "complete": True,
            "head_digest": digest,
            "scale": source.scale,
            "unit": source.unit,
            "measure": source.measure,
            "coordinates": voxels.coordinates is not None,
            "upstream_preprocessing": source.upstream_preprocessing,
            "place": _describe_place(place),
            "reliability": sorted(voxels.reliability),
        }
    )
    return group


def plan_digest(source: SubjectSource, sessions: list[SessionSource]) -> str:
    """Return what identifies an import before its responses are read: voxels, trial tables, source files."""
    shown = ["\n".join(source.images.ids[row] for row in s.columns["image"]) for s in sessions]
    columns = [column for s in sessions for name, column in sorted(s.columns.items()) if name != "image"]
    files = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for s in sessions for path in s.files]
    return digest_of(source.head_digest(), *(s.key for s in sessions), *shown, *columns, json_digest(files))


def draft_part(subject: zarr.Group, name: str, *, plan: str) -> zarr.Group:
    """Return the part that an interrupted import of the same plan left, or a fresh one."""
    return resume_or_begin(subject, f"parts/{name}", plan=plan)


def write_session(part: zarr.Group, source: SubjectSource, session: SessionSource, progress: Progress) -> str:
    """Write one session's responses by whole shards and return its digest; what is there already is passed over.

    Raises
    ------
    ValueError
        If a response is not finite, or the blocks are not of the promised shape or dtype.
    """
    path = f"responses/{session.key}"
    n_voxels = source.voxels.n_voxels
    if path in part and (digest := attribute(array_at(part, path), "digest")):
        progress(session.n_trials * n_voxels * source.dtype.itemsize)
        return digest
    array = create_array(part, path, (session.n_trials, n_voxels), source.dtype, kind="responses")

    def written() -> Iterator[Shaped[np.ndarray, "trial voxel"]]:
        """Yield the blocks on to the digest while they are written."""
        start = 0
        for block in _by_shards(session.read(), shard_rows(array)):
            if block.dtype != source.dtype or block.ndim != 2 or block.shape[1] != n_voxels:
                raise ValueError(
                    f"{source.name}, session {session.key}: responses are {block.dtype} {block.shape}, but "
                    f"{source.dtype} of {n_voxels} voxels was announced"
                )
            if start + len(block) > session.n_trials:
                raise ValueError(
                    f"{source.name}, session {session.key}: more than {session.n_trials} trials of responses"
                )
            check_finite(source.name, block, first_trial=start)
            array[start : start + len(block)] = block
            start += len(block)
            progress(block.nbytes)
            yield block
        if start < session.n_trials:
            raise ValueError(f"{source.name}, session {session.key}: {start} of {session.n_trials} trials of responses")

    digest = session_digest(source, session, written())
    files = {str(path): _described_file(path) for path in session.files}
    array.attrs.put({"digest": digest, "files": files})
    return digest


def _by_shards(blocks: Iterator[np.ndarray], n_rows: int) -> Iterator[np.ndarray]:
    """Yield the same rows, `n_rows` at a time."""
    waiting: list[np.ndarray] = []
    for block in blocks:
        waiting.append(np.asarray(block))
        while sum(map(len, waiting)) >= n_rows:
            joined = waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
            yield joined[:n_rows]
            waiting = [joined[n_rows:]] if len(joined) > n_rows else []
    if waiting:
        yield waiting[0] if len(waiting) == 1 else np.concatenate(waiting)


def _described_file(path: Path) -> dict[str, Any]:
    stat = path.stat()
    digest = _sha256(path, stat.st_size, stat.st_mtime_ns)
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest}


def _changed(path: Path, entry: dict[str, Any]) -> bool:
    """Return whether a file is another than the one described; it is read only if its time differs."""
    stat = path.stat()
    if (stat.st_size, stat.st_mtime_ns) == (entry["bytes"], entry["mtime_ns"]):
        return False
    return stat.st_size != entry["bytes"] or _described_file(path)["sha256"] != entry["sha256"]


@lru_cache(maxsize=256)
def _sha256(path: Path, n_bytes: int, mtime_ns: int) -> str:
    """Return a file's digest; sessions of one file share it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit_part(
    part: zarr.Group,
    source: SubjectSource,
    sessions: list[SessionSource],
    digests: dict[str, str],
    image_rows: Int[np.ndarray, " image"],
    image_block: str | None,
) -> None:
    """Write the trial table and let the part count, together with the block of images that came with it.

    `image_rows` are the store's rows of the source's images.
    """
    for name, kind in TRIAL_COLUMNS.items():
        if name in sessions[0].columns:
            column = np.concatenate([s.columns[name] for s in sessions])
            put(part, f"trials/{name}", (image_rows[column] if name == "image" else column).astype(kind))
    files = {s.key: attribute(array_at(part, f"responses/{s.key}"), "files") for s in sessions if s.files}
    part.attrs.put(
        {
            "complete": True,
            "image_block": image_block,
            "n_trials": {s.key: s.n_trials for s in sessions},
            "digests": digests,
            "files": files,
            "provenance": source.provenance,
        }
    )

"""The pooled store on disk (Zarr v3): create, append, open, read. `data.schema` has the layout.

A write is atomic at the level of an image block, a subject, or an encoder's tokens of a block: its group gets the
attribute ``complete`` last, and readers pass over groups that lack it. That holds on object stores too, where nothing
can be renamed.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Float16, Float32, Int, UInt8
from zarr.codecs import BloscCodec
from zarr.errors import BaseZarrError, GroupNotFoundError

from data.schema import (
    FORMAT,
    FORMAT_VERSION,
    ROLES,
    ImageBlock,
    Rois,
    SubjectData,
    check_name,
    digest_of,
    json_digest,
    pixel_identity,
)

__all__ = ["ImageBlock", "PooledStore", "Rois", "SubjectData", "SubjectStore", "TokenReader", "pixel_identity"]

TokenBatch = tuple[Float16[np.ndarray, "image depth width"], Float16[np.ndarray, "image depth patch width"]]

_CHUNK_BYTES = 1 << 20
_TOKEN_CHUNK_BYTES = 1 << 17  # training reads scattered images, so a chunk holds few
_SHARD_BYTES = 64 << 20


class _NoStoreError(ValueError):
    """Nothing is at the path: the one case in which a store may be made there."""


def _write_array(
    group: zarr.Group, name: str, shape: tuple[int, ...], dtype: Any, *, chunk_bytes: int = _CHUNK_BYTES
) -> zarr.Array:
    """Create an array whose chunks are whole rows, of about `chunk_bytes`, in shards of at most 64 MB."""
    dtype = np.dtype(dtype)
    row_bytes = max(1, int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize)
    chunk_rows = int(np.clip(chunk_bytes // row_bytes, 1, shape[0]))
    chunks_per_shard = max(1, min(_SHARD_BYTES // (chunk_rows * row_bytes), -(-shape[0] // chunk_rows)))
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(chunk_rows, *shape[1:]),
        shards=(chunk_rows * chunks_per_shard, *shape[1:]),
        compressors=BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"),
    )


def _put(group: zarr.Group, name: str, values: np.ndarray) -> None:
    _write_array(group, name, values.shape, values.dtype)[...] = values


def _array(group: zarr.Group, name: str) -> zarr.Array:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array


def _group(group: zarr.Group, name: str) -> zarr.Group:
    found = group[name]
    assert isinstance(found, zarr.Group)
    return found


def _get(group: zarr.Group, name: str) -> np.ndarray:
    return np.asarray(_array(group, name)[...])


def _json(node: zarr.Group | zarr.Array, name: str) -> Any:
    """Return an attribute, or None where there is none."""
    return node.attrs.asdict().get(name)


def _rows(array: zarr.Array, rows: Int[np.ndarray, " row"]) -> np.ndarray:
    """Return `rows` (strictly rising) of an array, read by whole runs of neighbouring chunks.

    The same values as ``array.oindex[rows]``, which on a sharded array is ten times as slow (zarr 3.1).
    """
    if not len(rows):
        return np.empty((0, *array.shape[1:]), array.dtype)
    chunk = rows // array.chunks[0]
    runs = np.split(rows, np.flatnonzero(np.diff(chunk) > 1) + 1)
    return np.concatenate([np.asarray(array[int(run[0]) : int(run[-1]) + 1])[run - run[0]] for run in runs])


def _members(group: zarr.Group, name: str) -> list[tuple[str, zarr.Group]]:
    """Return the complete groups below `name`, by name."""
    if name not in group:
        return []
    members = sorted(_group(group, name).groups(), key=lambda member: member[0])
    return [(key, member) for key, member in members if _json(member, "complete")]


def _begin(group: zarr.Group, path: str) -> zarr.Group:
    """Start a group that will be complete later; the remains of an interrupted write are cleared away."""
    return group.create_group(path, overwrite=True)


def _encode_ids(ids: Sequence[str]) -> UInt8[np.ndarray, "image byte"]:
    encoded = [i.encode() for i in ids]
    width = max(map(len, encoded))
    return np.frombuffer(b"".join(e.ljust(width, b"\0") for e in encoded), np.uint8).reshape(len(ids), width)


def _decode_ids(array: UInt8[np.ndarray, "image byte"]) -> list[str]:
    return [row.tobytes().rstrip(b"\0").decode() for row in array]


def _whole_shards(batches: Iterator[TokenBatch], n_rows: int) -> Iterator[TokenBatch]:
    """Yield the same rows, `n_rows` at a time: a shard that is written in pieces is compressed anew for each."""
    kept_cls: list[np.ndarray] = []
    kept_patch: list[np.ndarray] = []
    for cls, patch in batches:
        kept_cls.append(cls)
        kept_patch.append(patch)
        while sum(map(len, kept_cls)) >= n_rows:
            all_cls, all_patch = np.concatenate(kept_cls), np.concatenate(kept_patch)
            yield all_cls[:n_rows], all_patch[:n_rows]
            kept_cls, kept_patch = [all_cls[n_rows:]], [all_patch[n_rows:]]
    if sum(map(len, kept_cls)):
        yield np.concatenate(kept_cls), np.concatenate(kept_patch)


class TokenReader:
    """One encoder's tokens, read by global image row; may be larger than memory."""

    def __init__(self, name: str, group: zarr.Group, blocks: list[tuple[str, int]]) -> None:
        self.name = name
        self.spec: dict[str, Any] = _json(group, "spec")
        self.digest: str = _json(group, "digest")
        self._starts = np.cumsum([0] + [n for _, n in blocks])
        self._cls = [_array(group, f"{block}/cls") for block, _ in blocks]
        self._patch = [_array(group, f"{block}/patch") for block, _ in blocks]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Depths, patches and width of the tokens."""
        _, depth, patch, width = self._patch[0].shape
        return depth, patch, width

    @property
    def depths(self) -> tuple[int, ...]:
        """The encoder blocks that the depths are, 1-based, shallow to deep."""
        return tuple(self.spec["depths"])

    def read(self, rows: Int[np.ndarray, " image"]) -> TokenBatch:
        """Return CLS and patch tokens of `rows`, in their order; each row is read from disk once."""
        wanted, inverse = np.unique(np.asarray(rows), return_inverse=True)
        cls, patch = [], []
        for k, (start, stop) in enumerate(pairwise(self._starts)):
            inside = wanted[(wanted >= start) & (wanted < stop)] - start
            if len(inside):
                cls.append(_rows(self._cls[k], inside))
                patch.append(_rows(self._patch[k], inside))
        return np.concatenate(cls)[inverse], np.concatenate(patch)[inverse]


class SubjectStore:
    """One subject's measurements, read lazily."""

    def __init__(self, name: str, group: zarr.Group) -> None:
        self.name = name
        self._group = group
        self.attrs: dict[str, Any] = group.attrs.asdict()

    @property
    def digest(self) -> str:
        """Digest of content."""
        return self.attrs["digest"]

    @property
    def n_trials(self) -> int:
        """Number of trials."""
        return _array(self._group, "responses").shape[0]

    @property
    def n_voxels(self) -> int:
        """Number of voxels."""
        return _array(self._group, "responses").shape[1]

    @property
    def upstream_preprocessing(self) -> str | None:
        """What was done to the data before we saw it, if anything."""
        return self.attrs.get("upstream_preprocessing")

    def responses(self, trials: np.ndarray | None = None) -> Float32[np.ndarray, "trial voxel"]:
        """Return the responses of `trials` (all if None) in the subject's unit."""
        array = _array(self._group, "responses")
        if trials is None:
            raw = np.asarray(array[...])
        else:
            wanted, inverse = np.unique(np.arange(array.shape[0])[trials], return_inverse=True)
            raw = _rows(array, wanted)[inverse]
        return raw.astype(np.float32) * np.float32(self.attrs["scale"])

    def trial_column(self, name: str) -> np.ndarray | None:
        """Return a column of the trial table, or None where the data set has no such thing."""
        path = f"trials/{name}"
        return _get(self._group, path) if path in self._group else None

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
    def coordinates(self) -> Float32[np.ndarray, "voxel 3"] | None:
        """Voxel positions in mm."""
        return _get(self._group, "voxels/coordinates") if "voxels/coordinates" in self._group else None

    @cached_property
    def rois(self) -> dict[str, Rois]:
        """ROI labels by family."""
        if "rois" not in self._group:
            return {}
        found = {}
        for family, array in _group(self._group, "rois").arrays():
            names: dict[str, str] = _json(array, "names")
            found[family] = Rois(labels=np.asarray(array[...]), names={int(k): v for k, v in names.items()})
        return found


def _occupied(path: str | Path) -> bool:
    """Return whether a local path holds anything; a URL without a group is taken to be free."""
    local = Path(path)
    return local.is_file() or (local.is_dir() and any(local.iterdir()))


class PooledStore:
    """Many subjects and the images that they saw, under one root."""

    def __init__(self, path: str, root: zarr.Group) -> None:
        self.path = path
        self._root = root

    @classmethod
    def create(cls, path: str | Path, *, name: str, provenance: dict[str, Any] | None = None) -> "PooledStore":
        """Create an empty store at a path or fsspec URL.

        Raises
        ------
        ValueError
            If something is there already.
        """
        attrs = {"format": FORMAT, "format_version": FORMAT_VERSION, "name": name, "provenance": provenance or {}}
        try:
            root = zarr.open_group(str(path), mode="w-", zarr_format=3, attributes=attrs)
        except (FileExistsError, BaseZarrError) as error:
            raise ValueError(f"{path} exists already; choose another path or remove it first") from error
        return cls(str(path), root)

    @classmethod
    def open(cls, path: str | Path, *, writable: bool = False) -> "PooledStore":
        """Open a store, read-only unless `writable`.

        Raises
        ------
        ValueError
            If nothing is there, if it is something else, or if a newer version of manybrains wrote it.
        """
        try:
            root = zarr.open_group(str(path), mode="r", zarr_format=3)
        except (FileNotFoundError, GroupNotFoundError) as error:
            if _occupied(path):
                raise ValueError(f"{path} is there but is not a manybrains store (no Zarr v3 group)") from error
            raise _NoStoreError(f"no store at {path}; `python -m data phantom {path}` makes one to try") from error
        except ValueError as error:  # an array, or metadata that zarr can't read
            raise ValueError(f"{path} is there but is not a manybrains store ({error})") from error
        if _json(root, "format") != FORMAT:
            raise ValueError(f"{path} is a Zarr group but not a manybrains store (no format attribute {FORMAT!r})")
        version = _json(root, "format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(
                f"{path} has store format {version}; this manybrains reads up to {FORMAT_VERSION}: update it"
            )
        if writable:  # only now: "r+" would leave an empty directory where nothing was
            root = zarr.open_group(str(path), mode="r+", zarr_format=3)
        return cls(str(path), root)

    @classmethod
    def open_or_create(cls, path: str | Path, *, name: str, provenance: dict[str, Any] | None = None) -> "PooledStore":
        """Open a store for writing, made first if nothing is there.

        Raises
        ------
        ValueError
            If something else is there, or a store that this version can't read.
        """
        try:
            return cls.open(path, writable=True)
        except _NoStoreError:
            return cls.create(path, name=name, provenance=provenance)

    @property
    def name(self) -> str:
        """Name given at creation."""
        return _json(self._root, "name")

    @property
    def provenance(self) -> dict[str, Any]:
        """How the store was made."""
        return _json(self._root, "provenance")

    # -- images ------------------------------------------------------------------------------------------------------

    def _image_blocks(self) -> list[tuple[str, zarr.Group]]:
        return _members(self._root, "images")

    @property
    def n_images(self) -> int:
        """Number of images over all blocks."""
        return sum(_array(group, "id").shape[0] for _, group in self._image_blocks())

    def image_ids(self) -> list[str]:
        """Return the identity of every image, by global row."""
        return [i for _, group in self._image_blocks() for i in _decode_ids(_get(group, "id"))]

    def image_roles(self) -> list[str]:
        """Return the split that the data set prescribes for every image ("" where it prescribes none)."""
        roles: list[str] = []
        for _, group in self._image_blocks():
            names = _json(group, "role_names")
            roles += [names[code] for code in _get(group, "role")]
        return roles

    def check_images(self, block: ImageBlock) -> None:
        """Raise ValueError if `block` contradicts itself, or the store on the role of an image."""
        block.check()
        there = dict(zip(self.image_ids(), self.image_roles(), strict=True))
        for identity, role in zip(block.ids, block.roles, strict=True):
            if there.get(identity, role) != role:
                raise ValueError(
                    f"image {identity!r} is in {self.path} with role {there[identity]!r}, not {role!r}; roles are "
                    f"global, so import it with the same role or into another store"
                )

    def add_images(self, block: ImageBlock) -> Int[np.ndarray, " image"]:
        """Append the images that aren't there yet and return the global row of each of `block`'s.

        An image that is there already keeps its row; the block must then agree on its role.
        """
        self.check_images(block)
        known = {identity: row for row, identity in enumerate(self.image_ids())}
        new = [i for i, identity in enumerate(block.ids) if identity not in known]
        if new:
            group = _begin(self._root, f"images/{len(self._image_blocks()):04d}")
            ids = _encode_ids([block.ids[i] for i in new])
            _put(group, "id", ids)
            _put(group, "role", np.array([ROLES.index(block.roles[i]) for i in new], np.uint8))
            if block.pixels is not None:
                _put(group, "pixels", block.pixels[new])
            known |= {block.ids[i]: len(known) + k for k, i in enumerate(new)}
            group.attrs.put({"complete": True, "digest": digest_of(ids), "role_names": list(ROLES)})
        return np.array([known[identity] for identity in block.ids], np.int32)

    def pixels(
        self, batch: int = 256, *, block: str | None = None
    ) -> Iterator[tuple[str, int, UInt8[np.ndarray, "image height width 3"]]]:
        """Yield (block, first row within it, pixels) over all images, or over those of one block.

        Raises
        ------
        ValueError
            If a block was stored without pixels.
        """
        for name, group in self._image_blocks():
            if block not in (None, name):
                continue
            if "pixels" not in group:
                raise ValueError(f"images of block {name} of {self.path} were stored without pixels; nothing to encode")
            array = _array(group, "pixels")
            for start in range(0, array.shape[0], batch):
                yield name, start, np.asarray(array[start : start + batch])

    # -- features ----------------------------------------------------------------------------------------------------

    @property
    def encoders(self) -> list[str]:
        """Names of the encoders whose tokens are there, of all images or of some."""
        if "features" not in self._root:
            return []
        return sorted(name for name, group in _group(self._root, "features").groups() if _json(group, "digest"))

    def missing_tokens(self, encoder: str) -> list[str]:
        """Return the image blocks that have no tokens of `encoder` yet."""
        have = {name for name, _ in _members(self._root, f"features/{encoder}")}
        return [name for name, _ in self._image_blocks() if name not in have]

    def begin_tokens(self, encoder: str, spec: dict[str, Any]) -> None:
        """Open an encoder's place in the store.

        Raises
        ------
        ValueError
            If tokens of another encoder, or of other depths, bear that name.
        """
        check_name(encoder, "encoder")
        digest = json_digest(spec)
        if encoder not in self.encoders:
            self._root.create_group(f"features/{encoder}", overwrite=True, attributes={"spec": spec, "digest": digest})
        elif _json(_group(self._root, f"features/{encoder}"), "digest") != digest:
            raise ValueError(
                f"{self.path} has tokens named {encoder!r} from another encoder or other depths; "
                f"pass --name to keep both"
            )

    def write_tokens(self, encoder: str, block: str, batches: Iterator[TokenBatch]) -> None:
        """Write one block's tokens as they come; they count once the last batch is in."""
        n = _array(self._root, f"images/{block}/id").shape[0]
        group = _begin(self._root, f"features/{encoder}/{block}")
        cls, patch = next(batches)
        arrays = [
            _write_array(group, name, (n, *values.shape[1:]), np.float16, chunk_bytes=_TOKEN_CHUNK_BYTES)
            for name, values in (("cls", cls), ("patch", patch))
        ]
        assert arrays[1].shards is not None
        start = 0
        for rows in _whole_shards(chain([(cls, patch)], batches), arrays[1].shards[0]):
            stop = start + len(rows[0])
            assert stop <= n, f"more than {n} images of block {block} were encoded"
            for array, values in zip(arrays, rows, strict=True):
                array[start:stop] = values
            start = stop
        assert start == n, f"{start} of {n} images of block {block} were encoded"
        group.attrs.put({"complete": True})

    def tokens(self, encoder: str) -> TokenReader:
        """Return a reader of `encoder`'s tokens.

        Raises
        ------
        ValueError
            If the encoder's tokens are not there, or not for every image.
        """
        blocks = [(name, _array(group, "id").shape[0]) for name, group in self._image_blocks()]
        if encoder not in self.encoders or not blocks:
            have = ", ".join(self.encoders) or "none"
            raise ValueError(
                f"{self.path} has no tokens of {encoder!r} (it has: {have}); run `python -m data features`"
            )
        if missing := self.missing_tokens(encoder):
            raise ValueError(
                f"{self.path} lacks {encoder!r} tokens of image block {missing[0]}; run `python -m data features` again"
            )
        return TokenReader(encoder, _group(self._root, f"features/{encoder}"), blocks)

    # -- subjects ----------------------------------------------------------------------------------------------------

    @property
    def subjects(self) -> list[str]:
        """Names of the subjects, sorted."""
        return [name for name, _ in _members(self._root, "subjects")]

    def add_subject(self, data: SubjectData) -> None:
        """Append a subject, whole or not at all.

        Raises
        ------
        ValueError
            If it is there already, or contradicts itself.
        """
        if data.name in self.subjects:
            raise ValueError(
                f"{data.name!r} is in {self.path} already; import it into another store or under another name"
            )
        ids = self.image_ids()
        data.check(n_images=len(ids))
        group = _begin(self._root, f"subjects/{data.name}")
        _put(group, "responses", data.responses)
        trials = group.create_group("trials")
        for name, column in data.trial_columns().items():
            _put(trials, name, column)
        if data.coordinates is not None:
            _put(group.create_group("voxels"), "coordinates", data.coordinates)
        if data.rois:
            place = group.create_group("rois")
            for family, rois in data.rois.items():
                _put(place, family, rois.labels)
                _array(place, family).attrs.put({"names": {str(k): v for k, v in rois.names.items()}})
        group.attrs.put(
            {
                "complete": True,
                "digest": data.digest(ids),
                "scale": data.scale,
                "unit": data.unit,
                "provenance": data.provenance,
                "upstream_preprocessing": data.upstream_preprocessing,
            }
        )

    def subject(self, name: str | int) -> SubjectStore:
        """Return a subject by name (``subj05``) or number (5).

        Raises
        ------
        ValueError
            If the store has no such subject.
        """
        name = self.resolve_subject(name)
        return SubjectStore(name, _group(self._root, f"subjects/{name}"))

    def resolve_subject(self, subject: str | int) -> str:
        """Return the name of a subject given by name or number."""
        text, have = str(subject), self.subjects
        name = f"subj{int(text):02d}" if text.isdecimal() and text not in have else text
        if name not in have:
            raise ValueError(f"subject {text!r} is not in {self.path}; it has {', '.join(have) or 'no subjects'}")
        return name

    def digest(self, subjects: Sequence[str], encoder: str) -> str:
        """Return the digest of what a model uses: its encoder and its subjects, each with its own digest."""
        parts = {f"subject/{name}": self.subject(name).digest for name in subjects}
        parts[f"encoder/{encoder}"] = self.tokens(encoder).digest
        return json_digest(parts)

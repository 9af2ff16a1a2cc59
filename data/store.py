"""The pooled store on disk (Zarr v3): create, append, open, read. `data.schema` has the layout.

A write is atomic at the level of an image block, a subject, or an encoder's tokens of a block: its group gets the
attribute ``complete`` last, and readers pass over groups that lack it. That holds on object stores too, where nothing
can be renamed.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Float16, Float32, Int, UInt8
from zarr.codecs import BloscCodec

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

_CHUNK_BYTES = 1 << 20
_SHARD_BYTES = 64 << 20


def _write_array(group: zarr.Group, name: str, shape: tuple[int, ...], dtype: Any) -> zarr.Array:
    """Create an array whose chunks are whole rows, about 1 MB each, in shards of at most 64 MB."""
    dtype = np.dtype(dtype)
    row_bytes = max(1, int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize)
    chunk_rows = int(np.clip(_CHUNK_BYTES // row_bytes, 1, shape[0]))
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


def _get(group: zarr.Group, name: str) -> np.ndarray:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return np.asarray(array[...])


def _members(group: zarr.Group, name: str) -> list[tuple[str, zarr.Group]]:
    """Return the complete groups below `name`, by name."""
    if name not in group:
        return []
    parent = group[name]
    assert isinstance(parent, zarr.Group)
    return [(key, sub) for key, sub in sorted(parent.groups()) if sub.attrs.get("complete")]


def _begin(group: zarr.Group, path: str) -> zarr.Group:
    """Start a group that will be complete later; the remains of an interrupted write are cleared away."""
    if path in group:
        del group[path]
    return group.create_group(path)


def _encode_ids(ids: Sequence[str]) -> UInt8[np.ndarray, "image byte"]:
    encoded = [i.encode() for i in ids]
    width = max(map(len, encoded))
    return np.frombuffer(b"".join(e.ljust(width, b"\0") for e in encoded), np.uint8).reshape(len(ids), width)


def _decode_ids(array: UInt8[np.ndarray, "image byte"]) -> list[str]:
    return [row.tobytes().rstrip(b"\0").decode() for row in array]


class TokenReader:
    """One encoder's tokens, read by global image row; may be larger than memory."""

    def __init__(self, name: str, group: zarr.Group, blocks: list[tuple[str, int]]) -> None:
        self.name = name
        self.spec: dict[str, Any] = dict(group.attrs["spec"])  # type: ignore[arg-type]
        self.digest = str(group.attrs["digest"])
        self._starts = np.cumsum([0] + [n for _, n in blocks])
        self._blocks = [group[block] for block, _ in blocks]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Depths, patches and width of the tokens."""
        _, depth, patch, width = self._blocks[0]["patch"].shape
        return depth, patch, width

    @property
    def depths(self) -> tuple[int, ...]:
        """The encoder blocks that the depths are, 1-based, shallow to deep."""
        return tuple(self.spec["depths"])

    def read(
        self, rows: Int[np.ndarray, " image"]
    ) -> tuple[Float16[np.ndarray, "image depth width"], Float16[np.ndarray, "image depth patch width"]]:
        """Return CLS and patch tokens of `rows`, in their order; each row is read from disk once."""
        wanted, inverse = np.unique(np.asarray(rows), return_inverse=True)
        cls, patch = [], []
        for block, start, stop in zip(self._blocks, self._starts[:-1], self._starts[1:], strict=True):
            inside = wanted[(wanted >= start) & (wanted < stop)] - start
            if len(inside):
                cls.append(block["cls"].oindex[inside])
                patch.append(block["patch"].oindex[inside])
        return np.concatenate(cls)[inverse], np.concatenate(patch)[inverse]


class SubjectStore:
    """One subject's measurements, read lazily."""

    def __init__(self, name: str, group: zarr.Group) -> None:
        self.name = name
        self._group = group
        self.attrs: dict[str, Any] = dict(group.attrs)

    @property
    def digest(self) -> str:
        """Digest of content."""
        return self.attrs["digest"]

    @property
    def n_trials(self) -> int:
        """Number of trials."""
        return self._group["responses"].shape[0]  # type: ignore[union-attr]

    @property
    def n_voxels(self) -> int:
        """Number of voxels."""
        return self._group["responses"].shape[1]  # type: ignore[union-attr]

    @property
    def upstream_preprocessing(self) -> str | None:
        """What was done to the data before we saw it, if anything."""
        return self.attrs.get("upstream_preprocessing")

    def responses(self, trials: np.ndarray | None = None) -> Float32[np.ndarray, "trial voxel"]:
        """Return the responses of `trials` (all if None) in the subject's unit."""
        array = self._group["responses"]
        raw = array[...] if trials is None else array.oindex[trials]  # type: ignore[union-attr]
        return np.asarray(raw, np.float32) * np.float32(self.attrs["scale"])

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
        for family, array in self._group["rois"].arrays():  # type: ignore[union-attr]
            names = {int(k): v for k, v in dict(array.attrs["names"]).items()}
            found[family] = Rois(labels=np.asarray(array[...]), names=names)
        return found


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
        try:
            root = zarr.open_group(str(path), mode="w-", zarr_format=3)
        except (FileExistsError, zarr.errors.ContainsGroupError) as error:
            raise ValueError(f"{path} exists already; choose another path or remove it first") from error
        attrs = {"format": FORMAT, "format_version": FORMAT_VERSION, "name": name, "provenance": provenance or {}}
        root.attrs.put(attrs)
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
            root = zarr.open_group(str(path), mode="r+" if writable else "r", zarr_format=3)
        except (FileNotFoundError, zarr.errors.BaseZarrError) as error:
            raise ValueError(f"no store at {path}; `python -m data phantom {path}` makes one to try") from error
        if root.attrs.get("format") != FORMAT:
            raise ValueError(f"{path} is a Zarr group but not a manybrains store (no format attribute {FORMAT!r})")
        version = root.attrs["format_version"]
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(
                f"{path} has store format {version}; this manybrains reads up to {FORMAT_VERSION}: update it"
            )
        return cls(str(path), root)

    @property
    def name(self) -> str:
        """Name given at creation."""
        return str(self._root.attrs["name"])

    @property
    def provenance(self) -> dict[str, Any]:
        """How the store was made."""
        return dict(self._root.attrs["provenance"])  # type: ignore[arg-type]

    # -- images ------------------------------------------------------------------------------------------------------

    def _image_blocks(self) -> list[tuple[str, zarr.Group]]:
        return _members(self._root, "images")

    @property
    def n_images(self) -> int:
        """Number of images over all blocks."""
        return sum(group["id"].shape[0] for _, group in self._image_blocks())  # type: ignore[union-attr]

    def image_ids(self) -> list[str]:
        """Return the identity of every image, by global row."""
        return [i for _, group in self._image_blocks() for i in _decode_ids(_get(group, "id"))]

    def image_roles(self) -> list[str]:
        """Return the split that the data set prescribes for every image ("" where it prescribes none)."""
        roles: list[str] = []
        for _, group in self._image_blocks():
            names = list(group.attrs["role_names"])  # type: ignore[arg-type]
            roles += [names[code] for code in _get(group, "role")]
        return roles

    def add_images(self, block: ImageBlock) -> Int[np.ndarray, " image"]:
        """Append the images that aren't there yet and return the global row of each of `block`'s.

        An image that is there already keeps its row; the block must then agree on its role.
        """
        block.check()
        known = {identity: row for row, identity in enumerate(self.image_ids())}
        roles = self.image_roles()
        for identity, role in zip(block.ids, block.roles, strict=True):
            if identity in known and roles[known[identity]] != role:
                there = roles[known[identity]]
                raise ValueError(
                    f"image {identity!r} is in the store with role {there!r}, not {role!r}; roles are global"
                )
        new = [i for i, identity in enumerate(block.ids) if identity not in known]
        if new:
            blocks = self._image_blocks()
            group = _begin(self._root, f"images/{len(blocks):04d}")
            ids = _encode_ids([block.ids[i] for i in new])
            _put(group, "id", ids)
            _put(group, "role", np.array([ROLES.index(block.roles[i]) for i in new], np.uint8))
            if block.pixels is not None:
                _put(group, "pixels", block.pixels[new])
            known |= {block.ids[i]: len(known) + k for k, i in enumerate(new)}
            group.attrs.put({"complete": True, "digest": digest_of(ids), "role_names": list(ROLES)})
        return np.array([known[identity] for identity in block.ids], np.int32)

    def pixels(self, batch: int = 256) -> Iterator[tuple[str, int, UInt8[np.ndarray, "image height width 3"]]]:
        """Yield (block, first row within it, pixels) over all images.

        Raises
        ------
        ValueError
            If a block was stored without pixels.
        """
        for name, group in self._image_blocks():
            if "pixels" not in group:
                raise ValueError(f"images of block {name} of {self.path} were stored without pixels; nothing to encode")
            array = group["pixels"]
            for start in range(0, array.shape[0], batch):  # type: ignore[union-attr]
                yield name, start, np.asarray(array[start : start + batch])  # type: ignore[index]

    # -- features ----------------------------------------------------------------------------------------------------

    @property
    def encoders(self) -> list[str]:
        """Names of the encoders whose tokens are there."""
        if "features" not in self._root:
            return []
        return sorted(name for name, _ in self._root["features"].groups())  # type: ignore[union-attr]

    def missing_tokens(self, encoder: str) -> list[str]:
        """Return the image blocks that have no tokens of `encoder` yet."""
        have: set[str] = set()
        if f"features/{encoder}" in self._root:
            have = {name for name, group in self._root[f"features/{encoder}"].groups() if group.attrs.get("complete")}  # type: ignore[union-attr]
        return [name for name, _ in self._image_blocks() if name not in have]

    def begin_tokens(self, encoder: str, spec: dict[str, Any]) -> None:
        """Open an encoder's place in the store.

        Raises
        ------
        ValueError
            If tokens of another encoder, or of other depths, bear that name.
        """
        check_name(encoder, "encoder")
        path = f"features/{encoder}"
        if path in self._root:
            there = self._root[path].attrs["digest"]
            if there != json_digest(spec):
                raise ValueError(
                    f"{self.path} has tokens named {encoder!r} from another encoder or other depths; pass --name to keep both"
                )
            return
        group = self._root.require_group("features").create_group(encoder)
        group.attrs.put({"spec": spec, "digest": json_digest(spec)})

    def write_tokens(
        self,
        encoder: str,
        block: str,
        batches: Iterator[
            tuple[Float16[np.ndarray, "image depth width"], Float16[np.ndarray, "image depth patch width"]]
        ],
    ) -> None:
        """Write one block's tokens as they come; they count once the last batch is in."""
        n = self._root[f"images/{block}/id"].shape[0]  # type: ignore[union-attr]
        group = _begin(self._root, f"features/{encoder}/{block}")
        start = 0
        for cls, patch in batches:
            if start == 0:
                arrays = [
                    _write_array(group, name, (n, *values.shape[1:]), np.float16)
                    for name, values in (("cls", cls), ("patch", patch))
                ]
            for array, values in zip(arrays, (cls, patch), strict=True):
                array[start : start + len(values)] = values.astype(np.float16)
            start += len(cls)
        assert start == n, f"{start} of {n} images of block {block} were encoded"
        group.attrs.put({"complete": True})

    def tokens(self, encoder: str) -> TokenReader:
        """Return a reader of `encoder`'s tokens.

        Raises
        ------
        ValueError
            If the encoder's tokens are not there, or not for every image.
        """
        if f"features/{encoder}" not in self._root:
            have = ", ".join(self.encoders) or "none"
            raise ValueError(
                f"{self.path} has no tokens of {encoder!r} (it has: {have}); run `python -m data features`"
            )
        if missing := self.missing_tokens(encoder):
            raise ValueError(
                f"{self.path} lacks {encoder!r} tokens of image block {missing[0]}; run `python -m data features` again"
            )
        group = self._root[f"features/{encoder}"]
        assert isinstance(group, zarr.Group)
        return TokenReader(encoder, group, [(n, g["id"].shape[0]) for n, g in self._image_blocks()])  # type: ignore[union-attr]

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
                place[family].attrs.put({"names": {str(k): v for k, v in rois.names.items()}})
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
        group = self._root[f"subjects/{name}"]
        assert isinstance(group, zarr.Group)
        return SubjectStore(name, group)

    def resolve_subject(self, subject: str | int) -> str:
        """Return the name of a subject given by name or number."""
        text = str(subject)
        name = f"subj{int(text):02d}" if text.isdigit() else text
        have = self.subjects
        if name not in have:
            raise ValueError(f"subject {text!r} is not in {self.path}; it has {', '.join(have) or 'no subjects'}")
        return name

    def digest(self, subjects: Sequence[str], encoder: str) -> str:
        """Return the digest of what a model uses: its encoder and its subjects, each with its own digest."""
        parts = {f"subject/{name}": self.subject(name).digest for name in subjects}
        parts[f"encoder/{encoder}"] = self.tokens(encoder).digest
        return json_digest(parts)

"""Arrays and groups of a store, as Zarr v3 has them: codecs by kind, shards, what is complete and what isn't.

Every chunk ends with a CRC-32C, so that a flipped byte is found and named. The codecs were chosen by measurement
(`tests/benchmarks/test_codecs.py`, figures in ``docs/store-format.md``); an array's own metadata records them, and a
reader goes by that.
"""

import itertools
import math
from typing import Any, Literal

import numpy as np
import zarr
from jaxtyping import Int
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.array_spec import ArrayConfigLike
from zarr.core.sync import sync

from data.store.shards import REMEDY, files_of, has_checksums

Kind = Literal["responses", "tokens", "pixels", "table"]

CODECS: dict[Kind, tuple[BytesBytesCodec, ...]] = {
    "responses": (BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle"), Crc32cCodec()),
    "tokens": (Crc32cCodec(),),  # half-precision tokens hardly shrink, and decoding would cost more than reading
    "pixels": (BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"), Crc32cCodec()),
    "table": (BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"), Crc32cCodec()),
}
_CHUNK_BYTES: dict[Kind, int] = {
    "responses": 1 << 20,
    "tokens": 1 << 18,  # training reads scattered images, so a chunk holds few
    "pixels": 1 << 20,
    "table": 1 << 20,
}
_SHARD_BYTES = 64 << 20
_WRITES_ALL: ArrayConfigLike = {"write_empty_chunks": True}
"""Zarr leaves chunks of zeros out by itself; then a missing chunk couldn't be told from one of zeros."""


def create_array(
    group: zarr.Group, name: str, shape: tuple[int, ...], dtype: Any, *, kind: Kind, rows_per_shard: int | None = None
) -> zarr.Array:
    """Create an array whose chunks are whole rows, in shards of at most 64 MB; an older one gives way.

    `rows_per_shard` makes shards of that many rows, for arrays that are written side by side.
    """
    dtype = np.dtype(dtype)
    row_bytes = max(1, int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize)
    chunk_rows = int(np.clip(_CHUNK_BYTES[kind] // row_bytes, 1, max(1, shape[0])))
    chunks_per_shard = max(1, min(_SHARD_BYTES // (chunk_rows * row_bytes), -(-shape[0] // chunk_rows)))
    if rows_per_shard is not None:
        chunk_rows = rows_per_shard if chunk_rows >= rows_per_shard else math.gcd(chunk_rows, rows_per_shard)
        chunks_per_shard = rows_per_shard // chunk_rows
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(chunk_rows, *(max(1, n) for n in shape[1:])),
        shards=(chunk_rows * chunks_per_shard, *(max(1, n) for n in shape[1:])),
        compressors=CODECS[kind],
        overwrite=True,
        config=_WRITES_ALL,
    )


def shard_rows(array: zarr.Array) -> int:
    """Return how many rows a shard holds: what is written at once, since a shard in pieces is encoded anew for each."""
    assert array.shards is not None
    return array.shards[0]


def put(group: zarr.Group, name: str, values: np.ndarray, *, kind: Kind = "table") -> None:
    """Write a whole array."""
    create_array(group, name, values.shape, values.dtype, kind=kind)[...] = values


def array_at(group: zarr.Group, name: str) -> zarr.Array:
    """Return the array at a path below `group`; ValueError where there is none."""
    array = group.get(name)
    if not isinstance(array, zarr.Array):
        raise ValueError(f"{group.store_path}/{name} is missing; {REMEDY}")
    return array.with_config(_WRITES_ALL)


def check_whole(array: zarr.Array) -> None:
    """Raise ValueError if the file of a shard is missing, in whose place Zarr would give zeros.

    Arrays from before checksums may lack shards of zeros, so those can't be told.
    """
    if array.shards is None or 0 in array.shape or not has_checksums(array):
        return
    numbers = itertools.product(*(range(-(-n // k)) for n, k in zip(array.shape, array.shards, strict=True)))
    wanted = [f"{array.path}/{array.metadata.encode_chunk_key(number)}" for number in numbers]  # type: ignore[union-attr]
    if missing := sorted(set(wanted) - set(files_of(array.store, f"{array.path}/"))):
        raise ValueError(
            f"{array.store_path} lacks {len(missing)} of its {len(wanted)} shards, such as {missing[0]}; {REMEDY}, and "
            f"`python -m data validate` finds all that is damaged"
        )


def group_at(group: zarr.Group, name: str) -> zarr.Group:
    """Return the group at a path below `group`; ValueError where there is none."""
    found = group.get(name)
    if not isinstance(found, zarr.Group):
        raise ValueError(f"{group.store_path}/{name} is missing; {REMEDY}")
    return found


def get(group: zarr.Group, name: str) -> np.ndarray:
    """Read a whole array.

    Raises
    ------
    ValueError
        If a part of it is missing.
    """
    array = array_at(group, name)
    check_whole(array)
    return read_rows(array, slice(None))


def read_rows(array: zarr.Array, rows: slice) -> np.ndarray:
    """Return successive rows of an array.

    Raises
    ------
    ValueError
        If a chunk of them is damaged.
    """
    try:
        return np.asarray(array[rows])
    except (ValueError, RuntimeError) as error:  # what zarr's checksum and its decoders raise
        told = " ".join(str(error).split())
        raise ValueError(
            f"{array.store_path} is damaged ({told}); {REMEDY}; `python -m data validate` says where"
        ) from error


def get_optional(group: zarr.Group, name: str) -> np.ndarray | None:
    """Read a whole array, or return None where there is none."""
    return get(group, name) if name in group else None


def attribute(node: zarr.Group | zarr.Array, name: str) -> Any:
    """Return an attribute, or None where there is none."""
    return node.attrs.asdict().get(name)


def rows_of(array: zarr.Array, rows: Int[np.ndarray, " row"]) -> np.ndarray:
    """Return `rows` (strictly rising) of an array, read by whole runs of neighbouring chunks.

    The same values as ``array.oindex[rows]``, which on a sharded array is ten times as slow (zarr 3.1).
    """
    if not len(rows):
        return np.empty((0, *array.shape[1:]), array.dtype)
    chunk = rows // array.chunks[0]
    runs = np.split(rows, np.flatnonzero(np.diff(chunk) > 1) + 1)
    return np.concatenate([read_rows(array, slice(int(run[0]), int(run[-1]) + 1))[run - run[0]] for run in runs])


def _directories(group: zarr.Group) -> list[str]:
    """Return the names of what lies in a group, sorted, without its metadata and what a kill left of writing them."""

    async def listed() -> list[str]:
        return [name async for name in group.store.list_dir(group.path)]

    return sorted(name for name in sync(listed()) if name != "zarr.json" and not name.endswith(".partial"))


def members(group: zarr.Group, name: str) -> list[tuple[str, zarr.Group]]:
    """Return all groups below `name`, by name, complete or not; what a kill left between them is passed over."""
    if name not in group:
        return []
    parent = group_at(group, name)
    found = [(key, parent.get(key)) for key in _directories(parent)]
    return [(key, member) for key, member in found if isinstance(member, zarr.Group)]


def complete_members(group: zarr.Group, name: str) -> list[tuple[str, zarr.Group]]:
    """Return the complete groups below `name`, by name."""
    return [(key, member) for key, member in members(group, name) if attribute(member, "complete")]


def begin(group: zarr.Group, path: str, **attributes: Any) -> zarr.Group:
    """Start a group that will be complete later; the remains of an interrupted write are cleared away.

    They lose their attributes first, and what is in them before themselves: half cleared away they are still remains,
    and are never taken up again.
    """
    if path in group:
        remains = group_at(group, path)
        remains.attrs.put({})
        for name in _directories(remains):
            sync(remains.store.delete_dir(f"{remains.path}/{name}"))
    return group.create_group(path, overwrite=True, attributes=attributes)


def resume_or_begin(group: zarr.Group, path: str, *, plan: str) -> zarr.Group:
    """Return the group that an interrupted write of the same `plan` left, or a fresh one."""
    if path in group and attribute(group_at(group, path), "plan") == plan:
        return group_at(group, path)
    return begin(group, path, plan=plan)

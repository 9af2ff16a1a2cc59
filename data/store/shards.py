"""The shards of an array, read and checked one by one: what is missing, cut short or damaged is named.

Zarr gives the fill value where a shard or a chunk is missing, so what is there is told from the listing of the store
and from each shard's index: (offset, length) of every chunk, then a CRC-32C, at the end of the file.
"""

import itertools
from collections.abc import Iterator

import google_crc32c
import numpy as np
import zarr
from jaxtyping import Shaped
from zarr.abc.store import RangeByteRequest, Store, SuffixByteRequest
from zarr.codecs import Crc32cCodec, ShardingCodec
from zarr.codecs.sharding import ShardingCodecIndexLocation
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

REMEDY = "restore it from a copy of the store, or import into a new one"
_NO_CHUNK = np.uint64(2**64 - 1)
_SHOWN = 3


def files_of(store: Store, prefix: str = "") -> list[str]:
    """Return the keys of all files below `prefix`, sorted."""

    async def listed() -> list[str]:
        return [key async for key in store.list_prefix(prefix)]

    return sorted(sync(listed()))


def size_of(store: Store, key: str) -> int:
    """Return a file's size in bytes."""
    return sync(store.getsize(key))


def has_checksums(array: zarr.Array) -> bool:
    """Return whether every chunk ends with a CRC-32C; then empty chunks were written as well, so that none may lack."""
    sharding = _sharding(array)
    return sharding is not None and isinstance(sharding.codecs[-1], Crc32cCodec)


def read_shards(
    array: zarr.Array, names: set[str], *, deep: bool, found: list[str]
) -> Iterator[tuple[int, Shaped[np.ndarray, "row ..."]]]:
    """Yield (first row, rows) of each shard that is whole; what is wrong with the others is added to `found`.

    Parameters
    ----------
    names
        The array's chunk files in the listing of the store, such as ``c/0/0``.
    deep
        Read the chunks, which checks their CRC-32C, and yield them; else only the shards' presence and indices are
        looked at, and nothing is yielded.
    """
    if not _whole_rows(array):
        found.append(
            f"{array.path}/zarr.json: shape {array.shape} and chunks {array.chunks} in shards of {array.shards} "
            f"contradict each other, since a chunk holds whole rows; {REMEDY}"
        )
        return
    step = (array.shards or array.chunks)[0]
    n_shards = -(-array.shape[0] // step)
    numbers = {name: _place(name, array.ndim) for name in names}
    there = {number for number in numbers.values() if number is not None and number < n_shards}
    if beyond := sorted(name for name, number in numbers.items() if number not in there):
        found.append(
            f"{array.path}/{beyond[0]}: {len(beyond)} chunk files lie outside the array's shape {array.shape}; {REMEDY}"
        )
    if has_checksums(array) and len(there) < n_shards:
        for number in itertools.islice((n for n in range(n_shards) if n not in there), _SHOWN):
            found.append(
                f"{array.path}/{_name(array, number)}: rows {number * step} to "
                f"{min(array.shape[0], (number + 1) * step) - 1} are missing (no such file); {REMEDY}"
            )
        if len(there) + _SHOWN < n_shards:
            found.append(f"{array.path}: {n_shards - len(there) - _SHOWN} more shards are missing; {REMEDY}")
    for number in sorted(there) if has_checksums(array) else range(n_shards):
        start, stop = number * step, min(array.shape[0], (number + 1) * step)
        wrong = _index_findings(array, number, stop - start) if number in there else []
        found += wrong
        if deep and not wrong:
            try:
                rows = np.asarray(array[start:stop])
            except Exception as error:  # noqa: BLE001  whatever damage makes zarr and its codecs raise is a finding
                found += _damaged_chunks(array, number, start, stop) or [_told(array, number, start, stop, error)]
                continue
            yield start, rows


def _sharding(array: zarr.Array) -> ShardingCodec | None:
    codecs = getattr(array.metadata, "codecs", ())
    return codecs[0] if codecs and isinstance(codecs[0], ShardingCodec) else None


def _whole_rows(array: zarr.Array) -> bool:
    if not array.ndim:
        return False
    trailing = tuple(max(1, n) for n in array.shape[1:])
    return array.chunks[1:] == trailing and (array.shards is None or array.shards[1:] == trailing)


def _name(array: zarr.Array, number: int) -> str:
    return "/".join(["c", str(number), *["0"] * (array.ndim - 1)])


def _place(name: str, ndim: int) -> int | None:
    """Return a chunk file's place along the rows, None if no array of whole rows has such a file."""
    first, *coordinates = name.split("/")
    fits = first == "c" and len(coordinates) == ndim and all(c.isdecimal() for c in coordinates)
    return int(coordinates[0]) if fits and not any(map(int, coordinates[1:])) else None


def _index_findings(array: zarr.Array, number: int, n_rows: int) -> list[str]:
    """Return what is wrong with one shard's index, or with the chunks that it promises."""
    sharding = _sharding(array)
    if sharding is None or array.shards is None:
        return []
    key = f"{array.path}/{_name(array, number)}"
    n_chunks = array.shards[0] // array.chunks[0]
    n_bytes = 16 * n_chunks + 4
    at_end = sharding.index_location == ShardingCodecIndexLocation.end
    asked = SuffixByteRequest(n_bytes) if at_end else RangeByteRequest(0, n_bytes)
    buffer = sync(array.store.get(key, prototype=default_buffer_prototype(), byte_range=asked))
    index, size = b"" if buffer is None else buffer.to_bytes(), size_of(array.store, key)
    if len(index) != n_bytes:
        return [f"{key}: {size} bytes are too few for the index of {n_chunks} chunks; it was cut short; {REMEDY}"]
    if google_crc32c.value(index[:-4]) != int.from_bytes(index[-4:], "little"):
        return [f"{key}: the shard's index is damaged or was cut off (its CRC-32C doesn't fit); {REMEDY}"]
    table = np.frombuffer(index[:-4], "<u8").reshape(n_chunks, 2)[: -(-n_rows // array.chunks[0])]
    missing = np.flatnonzero((table == _NO_CHUNK).any(1))
    if len(missing) and has_checksums(array):
        return [f"{key}: chunk {missing[0]} is missing ({len(missing)} of {len(table)} are); {REMEDY}"]
    there = table[(table != _NO_CHUNK).all(1)].astype(float)
    if len(there) and there.sum(1).max() > size:
        return [f"{key}: {size} bytes, but its index speaks of chunks beyond that; it was cut short; {REMEDY}"]
    return []


def _damaged_chunks(array: zarr.Array, number: int, start: int, stop: int) -> list[str]:
    """Return a finding for each chunk of a shard that can't be read."""
    wrong = []
    for first in range(start, stop, array.chunks[0]):
        last = min(stop, first + array.chunks[0])
        try:
            np.asarray(array[first:last])
        except Exception as error:  # noqa: BLE001  as above
            wrong.append(_told(array, number, first, last, error))
    return wrong


def _told(array: zarr.Array, number: int, start: int, stop: int, error: Exception) -> str:
    chunk = start % (array.shards or array.chunks)[0] // array.chunks[0]
    where = f"{array.path}/{_name(array, number)}: chunk {chunk} (rows {start} to {stop - 1})"
    damage = "its CRC-32C doesn't fit" if "checksum" in str(error) else " ".join(f"{error}".split()) or repr(error)
    return f"{where} is damaged: {damage}; {REMEDY}"

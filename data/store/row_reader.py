"""Rows of an array on disk, in any order, read straight into the caller's memory.

An array whose chunks are whole rows, uncompressed, in ``sharding_indexed`` shards on a local file system (as
`zarr_arrays` writes tokens) is read by byte ranges: row r of chunk c begins at ``offset[c] + r * row_bytes`` of its
shard, so it is put where it is wanted, and nothing else is read or copied. Every other array goes through Zarr.
Which of the two a reader is depends on the array alone, and `how` tells.

A shard ends with its index: (offset, nbytes) of each chunk as little-endian uint64, all ones where a chunk was never
written; then the index's CRC-32C. Zarr gives the fill value for such a chunk, but a store of ours has all of them, so
that a missing one is an error here. A chunk ends with its own CRC-32C. It is checked when a reader first comes to the
chunk, which then is read whole; later reads are of the row alone, most often out of the page cache, and are trusted.

https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html
"""

import mmap
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from jaxtyping import Int, Shaped, UInt8
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.codecs.sharding import ShardingCodecIndexLocation
from zarr.core.metadata.v3 import ArrayV3Metadata
from zarr.storage import LocalStore

from data.store.zarr_arrays import check_whole

_MOST_FILES = 1 << 14  # kept open, where the system's limit is higher than that or none
_CRC_BYTES = 4
_SMALL_BYTES = 1 << 16  # up to here, to ask whether a row is in the page cache costs more than it gives
_MAP_AFTER = 16  # reads of a file; to map one that gives way after a few would cost more than it gives
_RUN_BYTES = 32 << 20  # Zarr decodes a run of chunks into an array of its own, so a long one is read in pieces
_NEVER_WRITTEN = np.uint64(2**64 - 1)
_REMEDY = "put the file back from a copy or write the array again; `python -m data validate` finds all that is damaged"

Bytes = UInt8[np.ndarray, " _"]


class _File:
    """A file open for reading, closed when the last one who holds it lets go."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.descriptor: int | None = None
        self._n_taken = 0
        self._bytes: Bytes | None = None
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)

    def size(self) -> int:
        """Return the file's size in bytes."""
        assert self.descriptor is not None
        return os.fstat(self.descriptor).st_size

    def read_into(self, parts: Sequence[memoryview | Bytes], offset: int) -> None:
        """Fill `parts` in turn from `offset` on; a read may come back short and is then gone on with."""
        assert self.descriptor is not None
        missing = sum(map(len, parts))
        while n := os.preadv(self.descriptor, parts, offset):  # type: ignore[arg-type]  # arrays are writable buffers
            if n == missing:
                return
            missing, offset = missing - n, offset + n
            while n:  # drop what is filled
                taken = min(n, len(parts[0]))
                parts = [parts[0][taken:], *parts[1:]] if taken < len(parts[0]) else parts[1:]
                n -= taken
        raise ValueError(f"{self.path} ends {missing} bytes early")

    def take_into(self, part: memoryview, offset: int) -> None:
        """Fill `part` from `offset` on: copied from the mapped file if its end is in the page cache, else read.

        The copy takes some 10 to 15 % less than a read that finds all in the cache. To read a mapped file that isn't
        there would go by a few pages at a time. Beyond the file's end the system would end the process, so the end is
        asked for each time; only a file that is cut within these microseconds goes unseen, and a store of ours never
        cuts one.
        """
        assert self.descriptor is not None
        self._n_taken += 1
        if len(part) < _SMALL_BYTES or self._n_taken <= _MAP_AFTER:
            self.read_into([part], offset)
            return
        try:
            there = os.preadv(self.descriptor, [bytearray(1)], offset + len(part) - 1, os.RWF_NOWAIT)
        except OSError:  # it isn't, or the file system can't say
            there = 0
        if not there:
            self.read_into([part], offset)
            return
        if self._bytes is None:
            self._bytes = np.frombuffer(mmap.mmap(self.descriptor, 0, prot=mmap.PROT_READ), np.uint8)
        np.frombuffer(part, np.uint8)[...] = self._bytes[offset : offset + len(part)]  # lets other threads run


class OpenFiles:
    """At most `limit` files, kept open for reading.

    If it is None, a quarter of what the process may open, for each may take two descriptors: a map has its own.
    There is no lock, so threads don't wait and a fork in the middle of a read leaves none behind: a file that two
    threads open at once is kept once, one that gives way while it is read is closed after that, and reads go by offset,
    so it does no harm that a forked process shares the descriptors. A pickled copy opens the files anew.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = _most_files() if limit is None else limit
        self.open = lru_cache(maxsize=self.limit)(_File)

    def __reduce__(self) -> tuple[type["OpenFiles"], tuple[int]]:
        return OpenFiles, (self.limit,)

    @property
    def n_open(self) -> int:
        """Number of files that are open now."""
        return self.open.cache_info().currsize

    def close(self) -> None:
        """Let go of all files; the next read opens anew."""
        self.open.cache_clear()


def _most_files() -> int:
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_FILES if allowed == resource.RLIM_INFINITY else max(1, min(allowed // 4, _MOST_FILES))


@dataclass(frozen=True)
class _Shard:
    path: str
    offsets: list[int]
    """Where each chunk begins; -1 where it is missing."""
    checked: list[bool]
    """Whether a chunk was read and had its checksum."""


class ByteRangeReader:
    """Reads rows by their place in the shards' files; see the module's text. Threads may share one, and forks.

    A pickled copy reads the shards' indices and compares the checksums anew.
    """

    how = "byte ranges"
    """How the rows are read."""

    def __init__(self, array: zarr.Array, files: OpenFiles | None = None) -> None:
        assert can_read_byte_ranges(array)
        assert isinstance(array.store, LocalStore)
        assert array.shards is not None
        self._directory = Path(array.store.root) / array.path
        self._chunk_key = array.metadata.encode_chunk_key  # type: ignore[union-attr]
        self._files = OpenFiles() if files is None else files
        self._shape, self._dtype = array.shape, array.dtype
        self._chunk_rows, self._shard_chunks = array.chunks[0], array.shards[0] // array.chunks[0]
        self._row_bytes = int(np.prod(array.shape[1:], dtype=np.int64)) * array.dtype.itemsize
        self._shards: dict[int, _Shard] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_shards": {}}

    def read_into(
        self, out: Shaped[np.ndarray, "place ..."], at: Int[np.ndarray, " row"], rows: Int[np.ndarray, " row"]
    ) -> None:
        """Set ``out[at]`` to the array's `rows`, which may repeat.

        Raises
        ------
        ValueError
            If a file or chunk is missing, cut short or unlike its checksum: the message names the array and the row.
        """
        assert out.flags.c_contiguous
        assert (out.dtype, out.shape[1:]) == (self._dtype, self._shape[1:])
        if len(rows) == 0 or self._row_bytes == 0:
            return
        assert rows.min() >= 0
        assert rows.max() < self._shape[0]
        places = memoryview(out.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # faster to cut than an array
        order = np.argsort(rows, kind="stable")  # as they lie on disk
        for place, row in zip(at[order].tolist(), rows[order].tolist(), strict=True):
            try:
                self._read_row(row, places[place * self._row_bytes : (place + 1) * self._row_bytes])
            except (ValueError, OSError) as error:
                raise ValueError(f"row {row} of {self._directory} can't be read: {error}; {_REMEDY}") from error

    def _read_row(self, row: int, into: memoryview) -> None:
        chunk, within = divmod(row, self._chunk_rows)
        number, chunk = divmod(chunk, self._shard_chunks)
        shard = self._shards.get(number) or self._open_shard(number)
        file, offset = self._files.open(shard.path), shard.offsets[chunk]
        if shard.checked[chunk]:
            file.take_into(into, offset + within * self._row_bytes)
            return
        if offset < 0:
            raise ValueError(f"its chunk in {shard.path} is missing")
        self._read_chunk(file, offset, within, into)
        shard.checked[chunk] = True

    def _read_chunk(self, file: _File, offset: int, within: int, into: memoryview) -> None:
        """Read the whole chunk at `offset`, its row `within` to where it is wanted, and compare its checksum."""
        before = np.empty(within * self._row_bytes, np.uint8)
        after = np.empty((self._chunk_rows - 1 - within) * self._row_bytes, np.uint8)
        stored = np.empty(_CRC_BYTES, np.uint8)
        parts = [part for part in (before, np.frombuffer(into, np.uint8), after) if len(part)]
        file.read_into([*parts, stored], offset)
        if _crc32c(parts) != int(stored.view("<u4")[0]):
            raise ValueError(f"its chunk in {file.path} doesn't have its checksum")

    def _open_shard(self, number: int) -> _Shard:
        """Read the index of a shard and keep it."""
        path = str(self._directory / self._chunk_key((number,) + (0,) * (len(self._shape) - 1)))
        file = self._files.open(path)
        encoded = np.empty(self._shard_chunks * 16 + _CRC_BYTES, np.uint8)
        end = file.size() - len(encoded)
        if end < 0:
            raise ValueError(f"{path} has {file.size()} bytes, too few for the index of a shard")
        file.read_into([encoded], end)
        index, stored = encoded[:-_CRC_BYTES], encoded[-_CRC_BYTES:]
        if _crc32c([index]) != int(stored.view("<u4")[0]):
            raise ValueError(f"the index of {path} doesn't have its checksum")
        offset, n_bytes = index.view("<u8").reshape(-1, 2).T
        written = offset != _NEVER_WRITTEN
        chunk_bytes = self._chunk_rows * self._row_bytes + _CRC_BYTES
        if (n_bytes[written] != chunk_bytes).any() or (offset[written] > end).any():
            raise ValueError(f"the index of {path} doesn't fit its chunks")
        offsets = np.where(written, offset, 0).astype(np.int64)
        self._shards[number] = _Shard(path, np.where(written, offsets, -1).tolist(), [False] * len(offsets))
        return self._shards[number]


def _crc32c(parts: Sequence[Bytes]) -> int:
    crc = 0
    for part in parts:
        crc = google_crc32c.extend(crc, part)  # type: ignore[arg-type]  # takes arrays, but no memoryview
    return crc


class ZarrReader:
    """Reads rows through Zarr: arrays that are compressed, or not in local files."""

    how = "zarr"
    """How the rows are read."""

    def __init__(self, array: zarr.Array) -> None:
        self._array = array
        chunk_bytes = array.chunks[0] * int(np.prod(array.shape[1:], dtype=np.int64)) * array.dtype.itemsize
        self._run_chunks = max(1, _RUN_BYTES // max(1, chunk_bytes))

    def read_into(
        self, out: Shaped[np.ndarray, "place ..."], at: Int[np.ndarray, " row"], rows: Int[np.ndarray, " row"]
    ) -> None:
        """Set ``out[at]`` to the array's `rows`, which may repeat.

        Raises
        ------
        ValueError
            If a chunk can't be decoded, or its checksum doesn't agree.
        """
        order = np.argsort(rows, kind="stable")
        chunk = rows[order] // self._array.chunks[0]
        cut = (np.diff(chunk) > 1) | (np.diff(chunk // self._run_chunks) > 0)
        for run in np.split(order, np.flatnonzero(cut) + 1):  # neighbouring chunks are read together
            if not len(run):
                continue
            first, last = int(rows[run[0]]), int(rows[run[-1]])
            try:
                out[at[run]] = np.asarray(self._array[first : last + 1])[rows[run] - first]
            except (ValueError, RuntimeError) as error:  # what zarr's checksum and its decoders raise
                raise ValueError(
                    f"rows {first} to {last} of {self._array.store_path} can't be read: "
                    f"{' '.join(str(error).split())}; {_REMEDY}"
                ) from error


def can_read_byte_ranges(array: zarr.Array) -> bool:
    """Return whether every row of `array` lies in one piece, unchanged, in a local file.

    That is: a local store, shards with their index at the end, and in them chunks of whole rows in C order and this
    machine's (little-endian) byte order, each with its CRC-32C.
    """
    metadata = array.metadata
    if (
        sys.byteorder != "little"
        or not isinstance(array.store, LocalStore)
        or not isinstance(metadata, ArrayV3Metadata)
    ):
        return False
    if array.shards is None or len(metadata.codecs) != 1 or not array.dtype.isnative or array.dtype.kind not in "iufb":
        return False
    codec = metadata.codecs[0]
    if not isinstance(codec, ShardingCodec) or codec.index_location != ShardingCodecIndexLocation.end:
        return False
    checked = (BytesCodec(), Crc32cCodec())
    plain = checked if array.dtype.itemsize > 1 else (BytesCodec(endian=None), Crc32cCodec())
    if tuple(codec.codecs) != plain or tuple(codec.index_codecs) != checked:
        return False
    row = tuple(max(1, n) for n in array.shape[1:])
    return array.chunks[1:] == row and array.shards[1:] == row


RowReader = ByteRangeReader | ZarrReader


def row_reader(array: zarr.Array, files: OpenFiles | None = None) -> RowReader:
    """Return the reader that `array` allows: by byte ranges, its files kept among `files`, or through Zarr.

    Raises
    ------
    ValueError
        If the file of a shard is missing.
    """
    check_whole(array)
    return ByteRangeReader(array, files) if can_read_byte_ranges(array) else ZarrReader(array)

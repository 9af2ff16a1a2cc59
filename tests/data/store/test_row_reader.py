"""The row reader: the same rows as Zarr's, read by byte ranges where that can be, and damage told, never passed on."""

import multiprocessing
import os
import pickle
import resource
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec
from zarr.core.sync import sync

from data.store.row_reader import ByteRangeReader, OpenFiles, row_reader
from data.store.zarr_arrays import array_at, create_array

N = 50


@pytest.fixture(autouse=True, scope="module", params=[0, 1 << 16], ids=["mapped", "read"])
def small_bytes(request) -> Iterator[int]:
    """All tests go both ways: rows copied out of the mapped file, and rows so small that they are read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.store.row_reader._SMALL_BYTES", request.param)
        patch.setattr("data.store.row_reader._MAP_AFTER", 0)
        yield request.param


def make_array(path: Path | str, *, dtype="float16", n=N, row=(3, 4), chunk=1, shard=8, **more) -> zarr.Array:
    """An array of random bits, written by Zarr and opened anew."""
    group = zarr.open_group(str(path), mode="w")
    given = {"shards": (shard, *row), "compressors": (Crc32cCodec(),), "config": {"write_empty_chunks": True}} | more
    array = group.create_array("x", shape=(n, *row), dtype=dtype, chunks=(chunk, *row), **given)
    bits = np.random.default_rng(3).integers(0, 200, (n, *row)).astype(dtype)
    array[...] = bits
    return array_at(zarr.open_group(str(path), mode="r"), "x")


def read(reader, rows, array: zarr.Array) -> np.ndarray:
    out = np.full((len(rows), *array.shape[1:]), 99, array.dtype)
    reader.read_into(out, np.arange(len(rows)), np.asarray(rows, np.int64))
    return out


def filled(reader, out: np.ndarray, rows: np.ndarray) -> np.ndarray:
    reader.read_into(out, np.arange(len(rows)), rows)
    return out


def shard_file(array: zarr.Array, number: int = 0) -> Path:
    return Path(array.store.root) / array.path / "c" / str(number) / Path(*["0"] * (array.ndim - 1))


@pytest.mark.parametrize("dtype", ["float16", "int16", "uint8", "float32", "bool"])
@pytest.mark.parametrize(("chunk", "shard"), [(1, 8), (4, 8), (7, 49), (64, 64)])
def test_any_rows_in_any_order_are_those_that_zarr_gives(tmp_path, dtype, chunk, shard):
    array = make_array(tmp_path, dtype=dtype, chunk=chunk, shard=shard)
    reader, expected = row_reader(array), np.asarray(array[...])
    assert reader.how == "byte ranges"
    rng = np.random.default_rng(0)
    for rows in ([7], [49, 0], rng.permutation(N), rng.integers(0, N, 200), []):
        np.testing.assert_array_equal(read(reader, rows, array), expected[np.asarray(rows, int)])


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """The same rows read either way, and as Zarr gives them."""
    plain = make_array(tmp_path_factory.mktemp("plain"), chunk=3, shard=9)
    packed = make_array(tmp_path_factory.mktemp("packed"), chunk=3, shard=9, compressors=(BloscCodec(), Crc32cCodec()))
    return row_reader(plain), row_reader(packed), np.asarray(plain[...])


@given(rows=st.lists(st.integers(0, N - 1), max_size=40), data=st.data())
def test_each_row_goes_where_it_is_wanted_and_nowhere_else(readers, rows, data):
    at = np.array(data.draw(st.permutations(range(45)))[: len(rows)], np.int64)
    by_range, by_zarr, array = readers
    assert (by_range.how, by_zarr.how) == ("byte ranges", "zarr")
    expected = np.full((45, 3, 4), 99, np.float16)
    expected[at] = array[np.array(rows, np.int64)]
    for reader in (by_range, by_zarr):
        out = np.full((45, 3, 4), 99, np.float16)
        reader.read_into(out, at, np.array(rows, np.int64))
        np.testing.assert_array_equal(out, expected)


def test_arrays_as_the_store_writes_tokens_are_read_by_byte_ranges(tmp_path):
    group = zarr.open_group(tmp_path, mode="w")
    tokens = create_array(group, "tokens", (10, 2, 5, 3), np.float16, kind="tokens")
    responses = create_array(group, "responses", (10, 5), np.int16, kind="responses")
    tokens[...] = responses[...] = 0
    assert row_reader(tokens).how == "byte ranges"
    assert row_reader(responses).how == "zarr"


@pytest.mark.parametrize(
    "settings",
    [
        {"compressors": (BloscCodec(), Crc32cCodec())},
        {"compressors": None},
        {"filters": (TransposeCodec(order=(2, 1, 0)),)},
        {"serializer": zarr.codecs.BytesCodec(endian="big")},
        {"shards": None},
        {"shards": {"shape": (8, 3, 4), "index_location": "start"}},
        {"shards": (8, 3, 4), "chunks": (1, 3, 2)},
    ],
    ids=["compressed", "no checksum", "transposed", "big-endian", "no shards", "index first", "parts of rows"],
)
def test_what_byte_ranges_cannot_read_goes_through_zarr_and_says_so(tmp_path, settings):
    group = zarr.open_group(tmp_path, mode="w")
    given = {"chunks": (1, 3, 4), "shards": (8, 3, 4), "compressors": (Crc32cCodec(),)} | settings
    array = group.create_array("x", shape=(20, 3, 4), dtype="float16", **given)
    array[...] = values = np.random.default_rng(0).random((20, 3, 4)).astype(np.float16)
    reader = row_reader(array)
    assert reader.how == "zarr"
    np.testing.assert_array_equal(read(reader, [5, 19, 5, 0], array), values[[5, 19, 5, 0]])


def test_an_array_in_memory_goes_through_zarr():
    array = make_array("memory://row-reader/store")
    reader = row_reader(array)
    assert reader.how == "zarr"
    np.testing.assert_array_equal(read(reader, [5, 49, 5], array), np.asarray(array[...])[[5, 49, 5]])


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("compressors", [(Crc32cCodec(),), (BloscCodec(), Crc32cCodec())], ids=["plain", "packed"])
def test_a_flipped_byte_is_an_error_that_names_the_array_the_row_and_the_remedy(tmp_path, chunk, compressors):
    array = make_array(tmp_path, chunk=chunk, compressors=compressors)
    flip(shard_file(array, 2), 5)
    reader = row_reader(array)
    read(reader, [0, 15, 24, 49], array)
    with pytest.raises(
        ValueError, match=r"rows? 16 .*/x can't be read: .*checksum.*`python -m data validate`"
    ) as found:
        read(reader, [16], array)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: flip(path, -1), "the index of .* doesn't have its checksum"),
        (lambda path: flip(path, -20), "the index of .* doesn't have its checksum"),
        (lambda path: path.write_bytes(path.read_bytes()[40:]), "doesn't fit its chunks|doesn't have its checksum"),
        (lambda path: path.write_bytes(path.read_bytes()[:50]), "50 bytes, too few"),
        (lambda path: path.write_bytes(b""), "0 bytes, too few"),
    ],
    ids=["index checksum", "index", "beginning lost", "cut short", "empty"],
)
def test_a_damaged_shard_is_an_error(tmp_path, damage, message):
    array = make_array(tmp_path)
    damage(shard_file(array))
    with pytest.raises(ValueError, match=rf"row [0-7] of .*/x can't be read: .*({message}).*; put the file back"):
        read(row_reader(array), np.arange(8), array)


def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path):
    array = make_array(tmp_path)
    reader = row_reader(array)
    read(reader, [0], array)
    os.truncate(shard_file(array), 10)
    with pytest.raises(ValueError, match=r"row 3 of .* ends .* bytes early"):
        read(reader, [3], array)


def test_a_chunk_that_was_never_written_is_not_taken_for_zeros(tmp_path):
    array = make_array(tmp_path, config={"write_empty_chunks": False})
    writable = zarr.open_group(tmp_path, mode="a")["x"]
    writable[3] = 0  # left out of the shard
    with pytest.raises(ValueError, match=r"row 3 of .* its chunk in .* is missing"):
        read(row_reader(array), [2, 3], array)


@pytest.mark.parametrize("place", ["plain", "packed", "memory"])
def test_a_missing_shard_is_an_error_when_the_reader_is_made(tmp_path, place):
    """Zarr itself would give zeros."""
    where = "memory://row-reader/gone" if place == "memory" else tmp_path
    array = make_array(where, compressors=((BloscCodec(),) if place == "packed" else ()) + (Crc32cCodec(),))
    assert row_reader(array).how == ("byte ranges" if place == "plain" else "zarr")
    sync(zarr.open_group(str(where), mode="a").store.delete("x/c/2/0/0"))
    assert not np.asarray(array[16:24]).any()
    with pytest.raises(ValueError, match=r"x lacks 1 of its 7 shards, such as x/c/2/0/0; .*validate"):
        row_reader(array)


def test_a_shard_that_goes_after_that_is_an_error_by_byte_ranges(tmp_path):
    array = make_array(tmp_path)
    reader = row_reader(array)
    shard_file(array).unlink()
    with pytest.raises(ValueError, match=r"row 3 of .*/x can't be read: .*No such file.*; put the file back"):
        read(reader, [3], array)


@pytest.mark.parametrize("compressors", [(Crc32cCodec(),), (BloscCodec(), Crc32cCodec())], ids=["plain", "packed"])
def test_a_pickled_reader_reads_the_same_in_a_spawned_process(tmp_path, compressors):
    array = make_array(tmp_path, compressors=compressors)
    reader, expected = row_reader(array), np.asarray(array[...])
    np.testing.assert_array_equal(read(reader, range(N), array), expected)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        out, at = np.empty_like(expected), np.arange(N)
        np.testing.assert_array_equal(pool.submit(filled, reader, out, at).result(), expected)


def test_a_pickled_reader_compares_checksums_anew(tmp_path):
    array = make_array(tmp_path)
    reader = row_reader(array)
    read(reader, range(N), array)
    copy = pickle.loads(pickle.dumps(reader))
    flip(shard_file(array, 2), 5)
    with pytest.raises(ValueError, match=r"row 16 .*checksum"):
        read(copy, [16], array)


def test_files_are_kept_open_up_to_a_quarter_of_what_the_system_allows(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert OpenFiles().limit == 256
    assert pickle.loads(pickle.dumps(OpenFiles(limit=7))).limit == 7


def test_a_file_is_mapped_only_once_it_is_read_often(tmp_path, monkeypatch, small_bytes):
    if small_bytes:
        pytest.skip("small rows are never mapped")
    monkeypatch.setattr("data.store.row_reader._MAP_AFTER", 3)
    array = make_array(tmp_path)
    reader, before = row_reader(array), len(os.listdir("/proc/self/fd"))
    found = []
    for _ in range(6):
        read(reader, [1], array)
        found.append(len(os.listdir("/proc/self/fd")) - before)
    assert found == [1, 1, 1, 1, 2, 2]  # the first has the checksum


def test_short_reads_are_gone_on_with(tmp_path, monkeypatch):
    array = make_array(tmp_path, chunk=4)
    whole = os.preadv

    def in_bits(descriptor, buffers, offset, flags=0):
        """As the system may: at most five bytes at once, ending in the middle of a buffer; and nothing is cached."""
        if flags & os.RWF_NOWAIT:
            raise BlockingIOError
        first = next(buffer for buffer in buffers if len(buffer))
        return whole(descriptor, [first[:5]], offset)

    monkeypatch.setattr(os, "preadv", in_bits)
    rows, expected, reader = np.random.default_rng(0).permutation(N), np.asarray(array[...]), row_reader(array)
    for _ in range(2):  # with the checksums, then without
        np.testing.assert_array_equal(read(reader, rows, array), expected[rows])


def test_files_kept_open_are_bounded_and_closed_at_the_end(tmp_path, small_bytes):
    array = make_array(tmp_path, shard=1)
    before = len(os.listdir("/proc/self/fd"))
    files = OpenFiles(limit=4)
    reader = ByteRangeReader(array, files)
    for _ in range(2):
        np.testing.assert_array_equal(read(reader, range(N), array), np.asarray(array[...]))
    assert files.n_open == 4
    each = 1 if small_bytes else 2  # a map has a descriptor of its own
    assert len(os.listdir("/proc/self/fd")) == before + 4 * each
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before
    np.testing.assert_array_equal(read(reader, [9], array), np.asarray(array[9:10]))
    del reader, files
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_may_share_a_reader(tmp_path):
    array = make_array(tmp_path, chunk=2, shard=2)
    expected = np.asarray(array[...])
    reader = ByteRangeReader(array, OpenFiles(limit=2))  # so that files give way while others read them
    together = threading.Barrier(8)

    def work(seed: int) -> bool:
        together.wait()
        drawn = [np.random.default_rng([seed, k]).integers(0, N, 30) for k in range(40)]
        return all((read(reader, rows, array) == expected[rows]).all() for rows in drawn)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_a_fork_reads_on_with_what_is_open(tmp_path):
    array = make_array(tmp_path)
    reader, expected = row_reader(array), np.asarray(array[...])
    read(reader, [1, 20], array)
    child = os.fork()
    if child == 0:  # no test framework in here: leave at once
        same = (read(reader, range(N), array) == expected).all()
        os._exit(0 if same else 1)
    np.testing.assert_array_equal(read(reader, range(N), array), expected)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0

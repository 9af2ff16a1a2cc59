"""What each codec makes of each kind of array: its size, and GB/s of encoding and decoding on one core.

The choices in `data.store.zarr_arrays.CODECS` rest on this table; ``*`` marks them. `make test` sees to it that each
codec gives back what it was given; `make bench` measures, in CPU time, since a machine is seldom idle. The last column
is how fast an array comes in from a disk of 2 GB/s, decoded after reading.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numcodecs
import numcodecs.blosc
import numpy as np
import pytest
import zarr
from PIL import Image
from scipy.ndimage import gaussian_filter1d
from zarr.codecs import BloscCodec

from data.features import load_encoder
from data.phantom import PhantomConfig, write_phantom
from data.store.zarr_arrays import CODECS, Kind, create_array

DISK_GB_S = 2.0
SHUFFLES = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}
Make = Callable[[bool, Path], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A codec by name: `encode` takes a chunk, `decode` what came of it and room for the chunk."""

    name: str
    encode: Callable[[np.ndarray], bytes | np.ndarray]
    decode: Callable[[bytes | np.ndarray, np.ndarray], None]


def copied(encoded, out: np.ndarray) -> None:
    out[...] = encoded


def checked(encoded, out: np.ndarray) -> None:
    out[...] = encoded
    google_crc32c.value(out.reshape(-1).view(np.uint8))


def summed(chunk: np.ndarray) -> np.ndarray:
    google_crc32c.value(chunk.reshape(-1).view(np.uint8))
    return chunk.copy()


def blosc(cname: str, clevel: int, shuffle: str) -> Candidate:
    codec = numcodecs.Blosc(cname, clevel, SHUFFLES[shuffle])
    return Candidate(
        name=f"{cname} {clevel} {shuffle}", encode=codec.encode, decode=lambda encoded, out: codec.decode(encoded, out)
    )


def delta_then(codec: numcodecs.Blosc, name: str, axis: int) -> Candidate:
    """The differences along an axis, then `codec`: what neighbours share is left out."""

    def encode(chunk: np.ndarray) -> bytes:
        return codec.encode(np.diff(integers(chunk), axis=axis, prepend=integers(chunk).dtype.type(0)))

    def decode(encoded, out: np.ndarray) -> None:
        whole = integers(out)
        differences = np.frombuffer(codec.decode(encoded), whole.dtype).reshape(out.shape)
        np.cumsum(differences, axis=axis, dtype=whole.dtype, out=whole)

    return Candidate(name=name, encode=encode, decode=decode)


def integers(chunk: np.ndarray) -> np.ndarray:
    """The chunk's bits as unsigned integers, whose differences wrap around and so lose nothing."""
    return chunk.view(f"u{chunk.dtype.itemsize}")


def candidates() -> list[Candidate]:
    """What was looked at; PCodec and ZFP need packages that aren't numcodecs' own."""
    zstd = numcodecs.Zstd(1)
    return [
        Candidate(name="none", encode=np.copy, decode=copied),
        Candidate(name="crc32c alone", encode=summed, decode=checked),
        *(blosc("lz4", level, shuffle) for level in (1, 5) for shuffle in SHUFFLES),
        *(blosc("zstd", level, shuffle) for level in (1, 3, 5) for shuffle in SHUFFLES),
        delta_then(numcodecs.Blosc("zstd", 1, 2), "delta rows, zstd 1 bitshuffle", 0),
        delta_then(numcodecs.Blosc("zstd", 1, 2), "delta last, zstd 1 bitshuffle", -1),
        Candidate(name="zstd 1, no blosc", encode=zstd.encode, decode=lambda encoded, out: zstd.decode(encoded, out)),
    ]


def chosen(kind: Kind) -> str:
    """Name of the candidate that `CODECS` has."""
    first = CODECS[kind][0]
    if not isinstance(first, BloscCodec):
        return "crc32c alone"
    return f"{first.cname.value} {first.clevel} {first.shuffle.value}"


# -- arrays of each kind -----------------------------------------------------------------------------------------------


def phantom_betas(measuring: bool, directory: Path) -> np.ndarray:
    """Int16 betas of a simulated subject, 1/300 percent signal change."""
    n_trials, n_voxels = (200, 1400) if measuring else (40, 60)
    write_phantom(
        directory / "phantom.zarr",
        PhantomConfig(subjects=1, sessions=1, trials_per_session=n_trials, voxels=n_voxels),
    )
    array = zarr.open_group(directory / "phantom.zarr", mode="r")["subjects/subj01/parts/0000/responses/0001"]
    assert isinstance(array, zarr.Array)
    return np.asarray(array[...])


def nsd_like_betas(measuring: bool, directory: Path) -> np.ndarray:
    """Int16 betas as NSD's: 1/300 percent, the spread differs from voxel to voxel, and neighbours go together."""
    rng = np.random.default_rng(0)
    n_trials, n_voxels = (750, 15724) if measuring else (30, 100)
    noise = rng.standard_t(5, (n_trials, n_voxels)).astype(np.float32)
    together = gaussian_filter1d(noise, 1.0, axis=1) * 1.9 + 0.5 * noise
    spread = np.exp(rng.normal(np.log(1.5), 0.5, n_voxels))  # percent signal change
    return np.clip(np.round(300 * spread * together), -32768, 32767).astype(np.int16)


def vit_tokens(measuring: bool, directory: Path) -> np.ndarray:
    """Half-precision tokens of a trained ViT-S/14 on photographs, depths 3, 6, 9 and 12."""
    if not measuring:
        return np.random.default_rng(0).standard_normal((4, 2, 16, 8)).astype(np.float16)
    encoder = load_encoder(str(directory / "shared" / "encoder-vits14"), depths=(3, 6, 9, 12))
    return encoder.encode(photographs(True, directory)[:24]).named()["patch"].astype(np.float16)


def photographs(measuring: bool, directory: Path) -> np.ndarray:
    """Photographs, 256 x 256, decoded from JPEG."""
    if not measuring:
        return np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    paths = sorted((directory / "shared" / "photos").glob("*.jpg"))[:96]
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])


ARRAYS: dict[str, tuple[Kind, Make]] = {
    "int16 betas, phantom": ("responses", phantom_betas),
    "int16 betas, like NSD's": ("responses", nsd_like_betas),
    "float16 ViT tokens": ("tokens", vit_tokens),
    "uint8 photographs": ("pixels", photographs),
}

# -- measurement -------------------------------------------------------------------------------------------------------


@pytest.fixture
def measuring(request) -> bool:
    return bool(request.config.getoption("benchmark_enable"))


@pytest.fixture
def directory(request, measuring, tmp_path) -> Path:
    """Where what is drawn lies, and the shared data below ``shared``."""
    if measuring:
        (tmp_path / "shared").symlink_to(request.getfixturevalue("shared_data"))
    return tmp_path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Blosc on one thread."""
    before, numcodecs.blosc.use_threads = numcodecs.blosc.use_threads, False
    yield
    numcodecs.blosc.use_threads = before


def chunks_of(values: np.ndarray, kind: Kind) -> list[np.ndarray]:
    """The chunks in which the store has it."""
    array = create_array(zarr.group(), "x", values.shape, values.dtype, kind=kind)
    n = array.chunks[0]
    return [np.ascontiguousarray(values[start : start + n]) for start in range(0, len(values), n)]


def cpu_seconds(work: Callable[[], None], *, repeats: int) -> float:
    """Least CPU time of one of some calls."""
    took = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        took.append(time.process_time() - start)
    return max(min(took), 1e-9)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("what", ARRAYS)
def test_codecs_by_size_and_speed(what, directory, measuring, one_thread, capsys):
    kind, make = ARRAYS[what]
    chunks = chunks_of(make(measuring, directory), kind)
    rooms = [np.empty_like(chunk) for chunk in chunks]
    n_bytes = sum(chunk.nbytes for chunk in chunks)
    lines = [f"\n{what}: {n_bytes / 1e6:.0f} MB in chunks of {chunks[0].nbytes / 1e6:.2f} MB"]
    lines += [f"  {'':32s}{'size':>7s}{'encode GB/s':>13s}{'decode GB/s':>13s}{'from disk':>11s}"]
    assert chosen(kind) in {candidate.name for candidate in candidates()}
    for candidate in candidates():
        encoded = [candidate.encode(chunk) for chunk in chunks]
        for chunk, part, room in zip(chunks, encoded, rooms, strict=True):
            room.view(np.uint8)[...] = 255
            candidate.decode(part, room)
            np.testing.assert_array_equal(integers(room), integers(chunk), err_msg=candidate.name)

        def encode_all(candidate: Candidate = candidate) -> None:
            for chunk in chunks:
                candidate.encode(chunk)

        def decode_all(candidate: Candidate = candidate, encoded: list = encoded) -> None:
            for part, room in zip(encoded, rooms, strict=True):
                candidate.decode(part, room)

        size = sum(memoryview(part).nbytes for part in encoded) / n_bytes
        repeats = 5 if measuring else 1
        rates = [n_bytes / 1e9 / cpu_seconds(work, repeats=repeats) for work in (encode_all, decode_all)]
        overall = 1 / (size / DISK_GB_S + 1 / rates[1])
        mark = "*" if candidate.name == chosen(kind) else " "
        lines.append(f"{mark} {candidate.name:32s}{size:7.3f}{rates[0]:13.2f}{rates[1]:13.2f}{overall:11.2f}")
    with capsys.disabled() if measuring else contextlib.nullcontext():
        print("\n".join(lines))

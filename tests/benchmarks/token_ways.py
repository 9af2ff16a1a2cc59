"""Shuffled batches from one set of tokens, read our way and the ways of others: h5py as MindEye2 does, and np.memmap.

All give the same steps of the same sampler: tokens (image, depth, 1 + patch, width) in half precision, the token of the
whole image first, and every subject's responses. ``python -m tests.benchmarks.token_ways WAY DIRECTORY N_STEPS`` prints
by how many bytes a process of its own grows that reads so many steps, in all and without the files that it maps.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import h5py
import numpy as np
import zarr

from data.batch import Batch
from data.loader import Loader
from data.preprocess import Samples, samples
from data.sampler import Sampler
from data.sources import ImageBlock, SubjectData
from data.splits import split_of
from data.store import PooledStore, TokenReader
from data.store.zarr_arrays import array_at, group_at, rows_of

ENCODER = "random"
BATCH = 32
BUFFER = 32
Taken = tuple[np.ndarray, list[np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much there is to read."""

    n_images: int
    depth: int
    patch: int
    width: int
    n_voxels: tuple[int, ...]

    @property
    def token_bytes(self) -> int:
        """Bytes of all tokens."""
        return self.n_images * self.depth * (1 + self.patch) * self.width * 2


TINY = Size(n_images=120, depth=2, patch=16, width=8, n_voxels=(5, 9, 6, 7, 11, 4, 8, 10))
REAL = Size(n_images=5400, depth=4, patch=256, width=384, n_voxels=(2000, 2250, 2500, 2750, 3000, 3250, 3500, 3750))


def write(directory: Path, size: Size) -> None:
    """Write a pooled store whose subjects each saw half of the images, and its tokens as .h5 and .npy."""
    rng = np.random.default_rng(0)
    store = PooledStore.create(directory / "store.zarr", name="benchmark")
    roles = ["test"] * 2 + ["validation"] * 2 + ["train"] * (size.n_images - 4)
    store.add_images(ImageBlock(ids=[f"image{k:05d}" for k in range(size.n_images)], roles=roles))
    shape = (size.n_images, size.depth, 1 + size.patch, size.width)
    npy = np.lib.format.open_memmap(directory / "tokens.npy", mode="w+", dtype=np.float16, shape=shape)

    def batches(h5: h5py.Dataset) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, size.n_images, 64):
            n = min(64, size.n_images - start)
            bits = rng.integers(0, 1 << 14, (n, *shape[1:]), dtype=np.uint16)  # all of them finite
            tokens = bits.view(np.float16)
            npy[start : start + n] = h5[start : start + n] = tokens
            yield {"cls": tokens[:, :, 0], "patch": tokens[:, :, 1:]}

    with h5py.File(directory / "tokens.h5", "w") as file:
        store.begin_tokens(ENCODER, {"depths": list(range(1, size.depth + 1))})
        store.write_tokens(ENCODER, "0000", batches(file.create_dataset("tokens", shape, np.float16)))
    npy.flush()
    for k, n_voxels in enumerate(size.n_voxels):
        image = rng.permutation(size.n_images)[: size.n_images // 2].astype(np.int32)
        responses = rng.standard_normal((len(image), n_voxels), np.float32)
        store.add_subject(SubjectData(name=f"subj{k + 1:02d}", responses=responses, image=image))


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is read: a directory that `write` made, and the training samples of (some of) its subjects."""

    directory: Path
    train: dict[str, Samples]

    @classmethod
    def open(cls, directory: Path, n_subjects: int | None = None) -> "Source":
        """Open the first `n_subjects`, all by default."""
        store = PooledStore.open(directory / "store.zarr")
        split, names = split_of(store), store.subjects[:n_subjects]
        return cls(directory=directory, train={n: samples(store.subject(n), split, "train") for n in names})

    @property
    def image_bytes(self) -> int:
        """Bytes of one image's tokens."""
        return self.tokens().image_bytes

    def tokens(self) -> TokenReader:
        """Return our reader of its tokens."""
        return PooledStore.open(self.directory / "store.zarr").tokens(ENCODER)

    def loader(self, **more: int) -> Loader:
        """Return our loader over it."""
        return Loader(self.tokens(), self.train, batch_size=BATCH, seed=0, **more)

    def by_rows(self, read: Callable[[np.ndarray], np.ndarray]) -> "Steps[Taken]":
        """Return what yields batches whose tokens `read` gives by image row, which may repeat."""
        sampler = Sampler(sizes={name: len(s) for name, s in self.train.items()}, batch_size=BATCH, seed=0)

        def steps(start: int, stop: int) -> Iterator[Taken]:
            for step in range(start, stop):
                wanted = sampler.step(step)
                rows = np.concatenate([self.train[name].image[index] for name, index in wanted.items()])
                yield read(rows), [self.train[name].responses[index] for name, index in wanted.items()]

        return steps


T = TypeVar("T")
Steps = Callable[[int, int], Iterator[T]]
Way = Callable[[Source], Steps[Batch] | Steps[Taken]]


def same_form(batch: Batch | Taken) -> Taken:
    """Return one of our batches as the others are."""
    if not isinstance(batch, Batch):
        return batch
    tokens = np.concatenate([batch.cls.numpy()[:, :, None], batch.patch.numpy()], axis=2)
    return tokens, [part.responses.numpy() for part in batch.parts.values()]


def ours(source: Source) -> Steps[Batch]:
    """Our loader as it is, two batches ahead."""
    return source.loader().steps


def ours_at_once(source: Source) -> Steps[Batch]:
    """Our loader without reading ahead, so on one thread like the others."""
    loader = source.loader()
    return lambda start, stop: (loader.batch(step) for step in range(start, stop))


def ours_buffered(source: Source) -> Steps[Batch]:
    """Our loader, shuffled within a buffer: other steps than the rest, as many images."""
    return source.loader(shuffle_buffer=BUFFER).steps


def _data_set(source: Source) -> h5py.Dataset:
    data_set = h5py.File(source.directory / "tokens.h5", "r")["tokens"]
    assert isinstance(data_set, h5py.Dataset)
    return data_set


def h5py_sorted(source: Source) -> Steps[Taken]:
    """As in MindEye2's training loop, ``images[np.unique(index)]``, and back to the order of the batch."""
    tokens = _data_set(source)

    def read(rows: np.ndarray) -> np.ndarray:
        unique, inverse = np.unique(rows, return_inverse=True)
        return tokens[unique][inverse]

    return source.by_rows(read)


def h5py_unsorted(source: Source) -> Steps[Taken]:
    """The same without the way back, which is a copy; MindEye2 brings the responses into this order instead."""
    tokens = _data_set(source)
    return source.by_rows(lambda rows: tokens[np.unique(rows)])


def h5py_rows(source: Source) -> Steps[Taken]:
    """One row after the other of an HDF5 data set, as a `Dataset.__getitem__` does that a DataLoader calls."""
    tokens = _data_set(source)
    return source.by_rows(lambda rows: np.stack([tokens[row] for row in rows]))


def memmap(source: Source) -> Steps[Taken]:
    """Fancy indexing of an .npy in memory-mapped mode."""
    tokens = np.load(source.directory / "tokens.npy", mmap_mode="r")
    return source.by_rows(lambda rows: np.asarray(tokens[rows]))


def through_zarr(source: Source) -> Steps[Taken]:
    """Our store through zarr-python alone."""
    block = group_at(zarr.open_group(source.directory / "store.zarr", mode="r"), f"features/{ENCODER}/0000")
    arrays = [array_at(block, "cls"), array_at(block, "patch")]

    def read(rows: np.ndarray) -> np.ndarray:
        unique, inverse = np.unique(rows, return_inverse=True)
        cls, patch = (rows_of(array, unique) for array in arrays)
        return np.concatenate([cls[:, :, None], patch], axis=2)[inverse]

    return source.by_rows(read)


def through_zarrs(source: Source) -> Steps[Taken]:
    """Our store through zarr-python with the codecs of zarrs, written in Rust."""
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return through_zarr(source)


OURS: dict[str, Way] = {
    "manybrains loader": ours,
    "manybrains, no read-ahead": ours_at_once,
    f"manybrains, buffer {BUFFER}": ours_buffered,
}
THEIRS: dict[str, Way] = {
    "h5py, sorted rows": h5py_sorted,
    "h5py, order of the file": h5py_unsorted,
    "h5py, row by row": h5py_rows,
    "np.memmap": memmap,
}
ZARR: dict[str, Way] = {"zarr-python": through_zarr}
if importlib.util.find_spec("zarrs"):
    ZARR["zarr-python + zarrs"] = through_zarrs
WAYS = OURS | THEIRS | ZARR
OTHER_ORDER = {f"manybrains, buffer {BUFFER}", "h5py, order of the file"}


def memory_bytes(key: str) -> int:
    """Return this process's memory: ``VmRSS`` as it is, ``VmHWM`` at its highest, ``RssAnon`` without mapped files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) * 1024


def main(way: str, directory: str, n_steps: int) -> None:
    """Read `n_steps` and print the growth of memory at its highest, of all of it and of what isn't mapped files."""
    steps = WAYS[way](Source.open(Path(directory)))
    for _ in steps(0, 1):
        pass
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
    before, private = memory_bytes("VmRSS"), memory_bytes("RssAnon")
    highest = max(memory_bytes("RssAnon") for _ in steps(1, n_steps))
    print(memory_bytes("VmHWM") - before, highest - private)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

"""An import that is killed, or stopped, at a chosen file operation: what the tests of interrupted writes start.

Every file that zarr writes and every directory that it removes is one operation. The fatal one is half done: half of
the bytes in zarr's own temporary file, half of the directory's files gone.
"""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import zarr
import zarr.storage._local as local

import data.store.zarr_arrays
from data.sources import ImageSource, SessionSource, SubjectSource
from data.store import PooledStore
from data.voxels import Rois, VoxelTable

SESSIONS = {"subj01": 2, "subj02": 3, "subj03": 1}
N_TRIALS, N_VOXELS = 40, 7


class Stopped(Exception):
    """The operation before which everything ends, where a process isn't killed."""


def kill() -> None:
    """End this process as the kernel would."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """End what runs by an exception."""
    raise Stopped


@contextmanager
def counted(at: int | None = None, end: Callable[[], None] = kill) -> Iterator[list[str]]:
    """Count the file operations, one at a time, and `end` in the middle of number `at`."""
    done: list[str] = []
    put, rmtree = local._put, shutil.rmtree

    def dying_put(path: Path, value: Any, exclusive: bool = False) -> int:
        done.append(f"write {path}")
        if len(done) - 1 == at:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = bytes(value.as_buffer_like())
            path.with_suffix(".0123.partial").write_bytes(content[: len(content) // 2])
            end()
        return put(path, value, exclusive)

    def dying_rmtree(path: Path) -> None:
        done.append(f"remove {path}")
        if len(done) - 1 == at:
            files = sorted(file for file in Path(path).rglob("*") if file.is_file())
            for file in files[: -(-len(files) // 2)]:
                file.unlink()
            end()
        rmtree(path)

    with (
        mock.patch.object(local, "_put", dying_put),
        mock.patch.object(local.shutil, "rmtree", dying_rmtree),
        zarr.config.set({"async.concurrency": 1, "threading.max_workers": 1}),
    ):
        yield done


@contextmanager
def small_shards() -> Iterator[None]:
    """Chunks and shards of a few rows, so that small arrays have several of each."""
    chunk_bytes = dict.fromkeys(data.store.zarr_arrays._CHUNK_BYTES, 256)
    with (
        mock.patch.object(data.store.zarr_arrays, "_SHARD_BYTES", 512),
        mock.patch.object(data.store.zarr_arrays, "_CHUNK_BYTES", chunk_bytes),
    ):
        yield


def shown(name: str) -> list[str]:
    """Identities of the images that a subject saw: half are the subject's own."""
    return [f"{name if k % 2 else 'shared'}-{k}" for k in range(20)]


def picture(identity: str) -> np.ndarray:
    """A picture that belongs to an identity alone."""
    return np.random.default_rng(list(identity.encode())).integers(0, 256, (8, 8, 3), np.uint8)


def source(name: str) -> SubjectSource:
    """A subject with sessions, labels and pictures, always the same."""
    ids = shown(name)
    rng = np.random.default_rng(list(name.encode()))

    def session(number: int) -> SessionSource:
        responses = rng.integers(-300, 300, (N_TRIALS, N_VOXELS)).astype(np.int16)
        image = rng.permutation(np.repeat(np.arange(len(ids), dtype=np.int32), 2))
        return SessionSource(
            session=number, columns={"image": image}, read=lambda: iter([responses[:15], responses[15:]])
        )

    return SubjectSource(
        name=name,
        dtype=np.dtype(np.int16),
        voxels=VoxelTable(
            n_voxels=N_VOXELS,
            rois={"streams": Rois(labels=np.arange(N_VOXELS, dtype=np.int16) % 2, names={1: "early"})},
        ),
        images=ImageSource(
            ids=ids,
            roles=[""] * len(ids),
            shape=(8, 8),
            read=lambda rows: np.stack([picture(ids[row]) for row in rows]),
        ),
        sessions=tuple(session(n + 1) for n in range(SESSIONS[name])),
    )


def import_into(path: str | Path, names: tuple[str, ...]) -> PooledStore:
    """Import these subjects, as an importer does it."""
    with small_shards():
        store = PooledStore.open_or_create(path, name="small")
        for name in names:
            store.write_subject(source(name))
    return store


def import_and_die(path: str, names: tuple[str, ...], at: int) -> None:
    """Import these subjects and be killed in the middle of operation `at`."""
    with counted(at):
        import_into(path, names)

"""Subjects as importers hand them over, and writes that die."""

import contextlib
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from zarr.storage import LocalStore

from data.sources import ImageBlock, SessionSource, SubjectSource
from data.voxels import VoxelTable
from tests.store_writes import Stop


@pytest.fixture
def dying_after(monkeypatch):
    """Make the n-th write of a file fail, as a kill between two writes would."""

    @contextlib.contextmanager
    def after(n: int):
        left = itertools.count(n, -1)

        def dying(write):
            async def write_or_die(self, key, value):
                if next(left) <= 0:
                    raise Stop
                await write(self, key, value)

            return write_or_die

        with monkeypatch.context() as patch:
            for name in ("set", "set_if_not_exists"):
                patch.setattr(LocalStore, name, dying(getattr(LocalStore, name)))
            yield

    return after


@pytest.fixture
def make_source():
    """A subject of three sessions of four trials with pictures, as an importer hands it over."""

    def make(sessions: Sequence[int] = (1, 2, 3), *, name: str = "subj09", n_voxels: int = 5) -> SubjectSource:
        def of(number: int) -> SessionSource:
            rng = np.random.default_rng(number)
            responses = rng.integers(-999, 999, (4, n_voxels), dtype=np.int16)
            image = (np.arange(4, dtype=np.int32) + number) % 6
            columns = {"image": image, "run": np.ones(4, np.int16)}
            return SessionSource(session=number, columns=columns, read=lambda: iter([responses[:1], responses[1:]]))

        pixels = np.random.default_rng(9).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
        return SubjectSource(
            name=name,
            dtype=np.dtype(np.int16),
            scale=1 / 300,
            voxels=VoxelTable(n_voxels=n_voxels),
            images=ImageBlock(ids=[f"pic-{k}" for k in range(6)], roles=["train"] * 6, pixels=pixels).source(),
            sessions=tuple(of(number) for number in sessions),
        )

    return make

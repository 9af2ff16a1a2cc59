"""Small records for the tests of the data package."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from data.__main__ import main
from data.sources import ImageBlock, SubjectData
from data.store import PooledStore

# Time is measured by the benchmarks; on a busy machine a deadline fails at random.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run ``python -m data`` with these arguments; return exit code, stdout and stderr."""

    def invoke(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["python -m data", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "200")
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return invoke


@pytest.fixture
def make_block() -> Callable[..., ImageBlock]:
    """Images by id, each a flat 8 x 8 picture of its own colour."""

    def make(ids: Sequence[str], roles: Sequence[str] | None = None, *, pixels: bool = True) -> ImageBlock:
        colour = [hash_colour(identity) for identity in ids]
        pictures = np.broadcast_to(np.array(colour, np.uint8)[:, None, None, :], (len(ids), 8, 8, 3)).copy()
        return ImageBlock(ids=list(ids), roles=list(roles or [""] * len(ids)), pixels=pictures if pixels else None)

    return make


def hash_colour(identity: str) -> tuple[int, int, int]:
    code = sum(ord(c) * 31**k for k, c in enumerate(identity))
    return code % 251, code // 251 % 251, code // 63001 % 251


@pytest.fixture
def make_subject() -> Callable[..., SubjectData]:
    """A subject with random responses to given image rows."""

    def make(name: str, image: Sequence[int] | np.ndarray, *, n_voxels: int = 5, seed: int = 0, **more: Any) -> Any:
        rng = np.random.default_rng(seed)
        rows = np.asarray(image, np.int32)
        given = {"responses": rng.normal(size=(len(rows), n_voxels)).astype(np.float32)} | more
        return SubjectData(name=name, image=rows, **given)

    return make


@pytest.fixture
def store(tmp_path, make_block, make_subject) -> PooledStore:
    """Sixty images without a prescribed split; subj01 with three sessions of forty trials, subj02 with no sessions."""
    store = PooledStore.create(tmp_path / "pooled.zarr", name="pooled")
    rows = store.add_images(make_block([f"image-{k}" for k in range(60)]))
    rng = np.random.default_rng(7)
    session = np.repeat(np.arange(1, 4), 40).astype(np.int16)
    store.add_subject(make_subject("subj01", np.tile(rng.permutation(rows), 2), session=session))
    store.add_subject(make_subject("subj02", rng.permutation(rows)[:50], n_voxels=3, seed=1))
    return store

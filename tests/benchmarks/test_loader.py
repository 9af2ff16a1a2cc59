"""Shuffled batches per second from a store of 4 GB, warm and cold, beside h5py and np.memmap on the same tokens.

`make test` runs this once on a tiny store and sees to it that all ways give the same arrays; `make bench` measures. The
ways take turns in each round, each round with other steps, and medians are told, since a machine is seldom idle.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.loader import PREFETCH
from tests.benchmarks.token_ways import (
    BATCH,
    BUFFER,
    OTHER_ORDER,
    OURS,
    REAL,
    THEIRS,
    TINY,
    WAYS,
    ZARR,
    Source,
    Steps,
    Way,
    ours_at_once,
    same_form,
    write,
)

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = {"h5py": "tokens.h5", "np.memmap": "tokens.npy"}
MARGIN_BYTES = 100_000_000
"""For responses, the chunks whose checksums are compared, and what the C library keeps to itself."""
Show = Callable[[str], None]


@pytest.fixture(scope="module")
def measuring(request) -> bool:
    return bool(request.config.getoption("benchmark_enable"))


@pytest.fixture(scope="module")
def directory(measuring) -> Iterator[Path]:
    """The same tokens as a pooled store, .h5 and .npy; 13 GB in all when it is measured, and gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="manybrains-loader-") as path:
        write(Path(path), REAL if measuring else TINY)
        os.sync()
        yield Path(path)


@pytest.fixture(scope="module")
def source(directory) -> Source:
    return Source.open(directory)


@pytest.fixture
def show(capsys, measuring) -> Show:
    """Print a line past pytest when it is measured."""

    def line(text: str) -> None:
        with capsys.disabled() if measuring else contextlib.nullcontext():
            print(text)

    return line


def files_of(directory: Path, way: str) -> list[Path]:
    """Files that hold a way's tokens."""
    for key, name in FILES.items():
        if way.startswith(key):
            return [directory / name]
    return [path for path in (directory / "store.zarr" / "features").rglob("*") if path.is_file()]


def bytes_from_disk() -> int:
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["read_bytes"])


def warm_up(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def cool_down(files: list[Path]) -> None:
    """Drop a way's files from the page cache, and only those: others are measuring too."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def seconds(steps: Steps[Any], start: int, stop: int) -> tuple[float, float]:
    """Time per batch that passes, and time of the processors."""
    began, busy = time.perf_counter(), time.process_time()
    n = sum(1 for _ in steps(start, stop))
    assert n == stop - start
    return (time.perf_counter() - began) / n, (time.process_time() - busy) / n


def rounds(
    ways: Mapping[str, Way], source: Source, *, n_rounds: int, n_steps: int, cold: bool
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Return each way's seconds per batch as (round, 2): passed, of the processors; and MB per batch from the disk.

    Warm, all stay open from a first pass over every step that is measured: our checksums are compared by then, and
    memmap's pages in the page table. Cold, they are opened anew.
    """
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    disk = dict.fromkeys(ways, 0.0)
    opened: dict[str, Steps[Any]] = {}
    if not cold:
        for name, way in ways.items():
            warm_up(files_of(source.directory, name))
            opened[name] = way(source)
            seconds(opened[name], 0, n_rounds * n_steps)
    for turn in range(n_rounds):
        names = list(ways)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if cold:
                cool_down(files_of(source.directory, name))
            steps = ways[name](source) if cold else opened[name]
            before = bytes_from_disk()
            took[name].append(seconds(steps, turn * n_steps, (turn + 1) * n_steps))
            disk[name] += (bytes_from_disk() - before) / (n_rounds * n_steps * 1e6)
            del steps
    return {name: np.array(times) for name, times in took.items()}, disk


def test_all_ways_give_the_same_batches(source):
    mine = [same_form(batch) for batch in ours_at_once(source)(0, 8)]
    for name in WAYS.keys() - OTHER_ORDER:
        for batch, (tokens, responses) in zip(WAYS[name](source)(0, 8), mine, strict=True):
            their_tokens, their_responses = same_form(batch)
            np.testing.assert_array_equal(their_tokens, tokens, err_msg=name)
            for a, b in zip(their_responses, responses, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.timeout(3600)
def test_batches_per_second(source, measuring, show):
    tokens, _ = same_form(next(iter(ours_at_once(source)(0, 1))))
    show(f"\n\nShuffled batches of {BATCH} images, {tokens.nbytes / 1e6:.1f} MB of tokens each; medians of rounds")
    ratios = f"{'x h5py':>8s}{'x memmap':>9s}"
    show(f"{'':28s}{'batches/s':>10s}{ratios}{'CPU ms':>8s}{ratios}{'disk MB':>9s}")
    for cold, ways, n_rounds, n_steps in (
        (False, OURS | THEIRS, 7, 50),
        (False, ZARR, 3, 8),
        (True, OURS | THEIRS, 3, 40),
    ):
        if not measuring:
            n_rounds, n_steps = 1, 3
        took, disk = rounds(ways, source, n_rounds=n_rounds, n_steps=n_steps, cold=cold)
        show("cold: dropped from the page cache" if cold else "warm: in the page cache")
        for name, times in took.items():
            passed, busy = np.median(times, axis=0)
            peers = [took[peer] if peer in took else np.nan * times for peer in ("h5py, sorted rows", "np.memmap")]
            faster, thriftier = np.transpose([np.median(peer / times, axis=0) for peer in peers])
            told = [f"{1 / passed:10.1f}{faster[0]:8.2f}{faster[1]:9.2f}", f"{1e3 * busy:8.2f}"]
            show(f"  {name:26s}{''.join(told)}{thriftier[0]:8.2f}{thriftier[1]:9.2f}{disk[name]:9.1f}")
            assert np.isfinite(times).all()


@pytest.mark.timeout(3600)
def test_memory_and_disk(source, measuring, show):
    n_steps = 60 if measuring else 3
    show(f"\n{'':28s}{'peak memory, MB':>16s}{'of it private':>15s}{'on disk, GB':>13s}")
    for name in OURS | THEIRS if measuring else ["manybrains loader", "np.memmap"]:
        command = [sys.executable, "-m", "tests.benchmarks.token_ways", name, str(source.directory), str(n_steps)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
        grown, private = map(int, done.stdout.split())
        on_disk = sum(path.stat().st_blocks * 512 for path in files_of(source.directory, name))
        show(f"  {name:26s}{grown / 1e6:16.1f}{private / 1e6:15.1f}{on_disk / 1e9:13.3f}")
        assert on_disk > 0
        if measuring and name in OURS:
            bound = memory_bound(source, name) + MARGIN_BYTES
            assert private < bound, f"{name} took {private / 1e6:.1f} MB of memory, more than {bound / 1e6:.1f}"


def memory_bound(source: Source, way: str) -> int:
    """Return the bytes of the batches that are alive at once, and of two windows of each subject if there are any."""
    n_images = BATCH * (PREFETCH + 2) + ("buffer" in way) * 2 * BUFFER * len(source.train)
    return n_images * source.image_bytes


@pytest.mark.timeout(3600)
def test_cost_per_sample_as_subjects_are_added(directory, measuring, show):
    n_rounds, n_steps = (7, 60) if measuring else (1, 2)
    opened = {n: ours_at_once(Source.open(directory, n)) for n in (1, 2, 4, 8)}
    took: dict[int, list[float]] = {n: [] for n in opened}
    for steps in opened.values():
        seconds(steps, 0, n_rounds * n_steps)
    for turn in range(n_rounds):
        for n, steps in opened.items():
            took[n].append(seconds(steps, turn * n_steps, (turn + 1) * n_steps)[1] / BATCH)
    show("\nsubjects pooled     " + "".join(f"{n:>9d}" for n in opened))
    show("CPU us per sample   " + "".join(f"{1e6 * np.median(times):9.1f}" for times in took.values()))
    assert all(np.isfinite(times).all() for times in took.values())

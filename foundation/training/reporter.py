"""Telling people and the tracking server how a run goes: a line per epoch, every step's metrics in batches.

The lines go to ``progress.log`` in the run's directory, where whoever waits for the run follows them: workers may be on
other machines, and what they print would come with Ray's own chatter.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from foundation.tracking.runs import TrackedRun

FLUSH_S = 5.0
_NAME = "progress.log"


class Reporter:
    """Writes lines and tracks; given no run (the ranks but one), it does nothing."""

    def __init__(self, run: TrackedRun | None, directory: Path) -> None:
        self._run, self._file = run, directory / _NAME
        self._waiting: list[tuple[int, Mapping[str, float]]] = []
        self._flushed = time.monotonic()

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        """Take note of a step's metrics."""
        if self._run is None:
            return
        self._waiting.append((step, metrics))
        scored = "validation/voxel_r" in metrics
        if scored:
            line = (
                f"step {step:5d}  loss {metrics['train/loss']:.4f}  voxel mse {metrics['train/voxel']:.4f}  "
                f"validation r {metrics['validation/voxel_r']:.4f}  {metrics['train/images_per_s']:.0f} images/s"
            )
            with open(self._file, "a") as file:
                file.write(line + "\n")
        if scored or time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Send what waits."""
        if self._run is None:
            return
        self._run.log_steps(self._waiting)
        self._waiting = []
        self._flushed = time.monotonic()


@contextlib.contextmanager
def follow(directory: Path) -> Iterator[Callable[[], None]]:
    """Give a function that prints the lines of a run's progress that came since it was last called."""
    path = directory / _NAME
    path.touch()
    with open(path) as file:
        file.seek(0, 2)

        def told() -> None:
            for line in file:
                print(line, end="", flush=True)

        yield told
        told()

"""Telling people and the tracking server how a run goes.

Lines for people go to ``progress.log`` in the run's directory, where whoever waits for the run follows them: workers
may be on other machines, and what they print would come with Ray's own chatter.

Metrics go to ``metrics.jsonl``, a line per step, and from there to the tracking server, in batches and from a thread of
their own: a server that is slow, or down for a while, holds up no step. What it hasn't taken when training ends is sent
when the run goes on.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from foundation.checkpoint import write_json
from foundation.tracking.runs import TrackedRun, TrackingError

FLUSH_S = 5.0
"""Seconds between batches of metrics."""
LINE_S = 30.0
"""Seconds between lines for people, besides those with each validation."""
PATIENCE_S = 30.0
"""Seconds for which the end of training waits for a server that doesn't answer, besides a call that is under way."""
_LINES, _METRICS, _SENT = "progress.log", "metrics.jsonl", "sent.json"

Step = tuple[int, dict[str, float]]


class Reporter:
    """Writes lines and tracks one run; to be closed when training is over, however it ends.

    What can't be written, say to a full disk, is left out: the checkpoint that can't be either says so.
    """

    def __init__(self, run: TrackedRun, directory: Path) -> None:
        self._run, self._directory = run, directory
        self._lock, self._closing = threading.Lock(), threading.Event()
        _mend(directory / _METRICS)
        sent, known = directory / _SENT, _read(directory)
        n_sent = json.loads(sent.read_text())["step"] if sent.exists() else 0
        self._waiting = [entry for entry in known if entry["step"] > n_sent]
        self._known = max([n_sent, *(entry["step"] for entry in known)])
        self._down = False
        self._told = time.monotonic()
        self._sender = threading.Thread(target=self._send_on, name="tracking", daemon=True)
        self._sender.start()

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        """Take note of a step's metrics; those of a step that is trained over, after a kill, are known already."""
        if step > self._known:
            entry = {"step": step, "time_ms": int(time.time() * 1000), "metrics": dict(metrics)}
            with contextlib.suppress(OSError), open(self._directory / _METRICS, "a") as file:
                file.write(json.dumps(entry) + "\n")
            with self._lock:
                self._waiting.append(entry)
            self._known = step
        if "validation/voxel_r" in metrics or ("train/images_per_s" in metrics and self._due()):
            self._told = time.monotonic()
            self.tell(line(metrics, step))

    def _due(self) -> bool:
        return time.monotonic() - self._told > LINE_S

    def tell(self, text: str) -> None:
        """Say something to people."""
        with contextlib.suppress(OSError), open(self._directory / _LINES, "a") as file:
            file.write(text + "\n")

    def _send_on(self) -> None:
        while not self._closing.wait(FLUSH_S):
            self._send()

    def _send(self) -> bool:
        """Send what waits; return whether the server has all of it."""
        with self._lock:
            batch = list(self._waiting)
        if not batch:
            return True
        try:
            steps = [(entry["step"], entry["metrics"]) for entry in batch]
            self._run.log_steps(steps, times_ms=[entry["time_ms"] for entry in batch])
        except TrackingError as error:
            if not self._down:
                self.tell(f"the tracking server doesn't take metrics ({error}); training goes on, they are kept")
            self._down = True
            return False
        if self._down:
            self.tell("the tracking server takes metrics again")
        self._down = False
        with self._lock:
            self._waiting = self._waiting[len(batch) :]
        with contextlib.suppress(OSError):  # else they are sent again, as the same points
            write_json(self._directory / _SENT, {"step": batch[-1]["step"]})
        return True

    def close(self) -> None:
        """Send what waits, for half a minute at most where the server doesn't answer; keep what it doesn't take."""
        self._closing.set()
        until = time.monotonic() + PATIENCE_S
        self._sender.join()
        while not (sent := self._send()) and time.monotonic() < until:
            time.sleep(FLUSH_S)
        if not sent:
            n = len(self._waiting)
            self.tell(f"metrics of {n} steps wait in {self._directory / _METRICS}; --resume sends them")


def read_metrics(directory: Path) -> list[Step]:
    """Return the metrics of a run's steps; a last line that is cut off, or being written, is left out."""
    return [(entry["step"], entry["metrics"]) for entry in _read(directory)]


def _read(directory: Path) -> list[dict[str, Any]]:
    path = directory / _METRICS
    text = path.read_text() if path.exists() else ""
    return [json.loads(entry) for entry in text[: text.rfind("\n") + 1].splitlines()]


def _mend(path: Path) -> None:
    """Remove a last line that a kill cut off."""
    if path.exists():
        with open(path, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def line(metrics: Mapping[str, float], step: int) -> str:
    """Return how a run goes in a line."""
    parts = [f"step {step:5d}", f"loss {metrics['train/loss']:.4f}", f"voxel mse {metrics['train/voxel']:.4f}"]
    if "validation/voxel_r" in metrics:
        parts.append(f"validation r {metrics['validation/voxel_r']:.4f}")
    if "train/images_per_s" in metrics:
        parts.append(f"{metrics['train/images_per_s']:.0f} images/s")
    if "time/data_share" in metrics:
        parts.append(f"waiting for data {metrics['time/data_share']:.0%}")
    if metrics.get("time/left_s", 0) >= 1:
        parts.append(f"{_duration(metrics['time/left_s'])} left")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    """Return seconds in the two largest units."""
    whole = round(seconds)
    for unit, size, below, smaller in (("d", 86400, 3600, "h"), ("h", 3600, 60, "min"), ("min", 60, 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below} {smaller}"
    return f"{whole} s"


@contextlib.contextmanager
def follow(directory: Path) -> Iterator[Callable[[], None]]:
    """Give a function that prints the lines of a run's progress that came since it was last called."""
    path = directory / _LINES
    path.touch()
    with open(path) as file:
        file.seek(0, 2)

        def told() -> None:
            for text in file:
                print(text, end="", flush=True)

        yield told
        told()

"""Where a run's time goes: seconds by phase, throughput, memory. On a GPU, kernels run on behind the phase that started
them, up to the next number that is read: the loss (forward) and the gradient's norm (update)."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from typing import Literal

import torch

Phase = Literal["data", "forward", "backward", "update", "validation", "checkpoint"]
PHASES: tuple[Phase, ...] = ("data", "forward", "backward", "update", "validation", "checkpoint")
OF_STEP: tuple[Phase, ...] = PHASES[:4]
_GIB = 2**30


class Stopwatch:
    """Adds up a window's seconds by phase."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._since = time.perf_counter()
        self.n_steps = 0

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count the block's time as `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    @property
    def window_s(self) -> float:
        """Seconds since the window began."""
        return time.perf_counter() - self._since

    def take(self, *, images_per_step: int, tokens_per_image: int) -> dict[str, float]:
        """Return the window's metrics, and begin the next window.

        ``train/images_per_s`` and ``train/tokens_per_s`` (of the encoder) are over the whole window, validation and
        checkpoints included; ``time/<phase>_ms`` are milliseconds per step, and ``time/data_share`` the share of a
        step's time that was spent waiting for data.
        """
        images = self.n_steps * images_per_step / self.window_s
        told = {"train/images_per_s": images, "train/tokens_per_s": images * tokens_per_image}
        if self.n_steps:
            told |= {f"time/{name}_ms": 1e3 * self._seconds[name] / self.n_steps for name in OF_STEP}
            stepping = sum(self._seconds[name] for name in OF_STEP)
            told["time/data_share"] = self._seconds["data"] / stepping if stepping else 0.0
        told |= {f"time/{name}_s": self._seconds[name] for name in PHASES[4:] if self._seconds[name]}
        self._begin()
        return told | memory()


def memory() -> dict[str, float]:
    """Return the peak memory of this process so far, in GiB: the machine's, and the GPU's where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    told = {"memory/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB}
    if torch.cuda.is_available():
        told["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated() / _GIB
    return told

"""A trace of a few steps by torch's profiler: where a step's time and memory go, operator by operator."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from foundation.training.checkpoints import Tell

WAIT, WARMUP, ACTIVE = 5, 2, 10
ROWS = 40


@contextlib.contextmanager
def profiled(directory: Path, *, tell: Tell) -> Iterator[Callable[[], None]]:
    """Trace ten steps after the first seven; give what is to be called after each step.

    ``trace.json`` opens in Perfetto or chrome://tracing, ``operators.txt`` is a table by operator.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])

    n_steps = 0

    def write(of: profile) -> None:
        if n_steps < WAIT + WARMUP + ACTIVE:  # the profiler's end, not the end of its steps
            return
        directory.mkdir(parents=True, exist_ok=True)
        of.export_chrome_trace(str(directory / "trace.json"))
        by_time = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = of.key_averages().table(sort_by=by_time, row_limit=ROWS)
        (directory / "operators.txt").write_text(table)
        tell(f"profile of {ACTIVE} steps: {directory}/trace.json, operators.txt")

    steps = schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=write) as tracer:

        def after_step() -> None:
            nonlocal n_steps
            n_steps += 1
            tracer.step()

        yield after_step
    if n_steps < WAIT + WARMUP + ACTIVE:
        tell(f"too few steps for a profile: it needs {WAIT + WARMUP + ACTIVE}")

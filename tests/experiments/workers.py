"""What a second worker gains, and what Ray and DeepSpeed cost: whole runs of recipe `base`, one after the other.

python -m tests.experiments.workers STORE [--encoder encoder-vits14] [--epochs 2]

Every worker has one thread and a core of its own. Printed are milliseconds of a step by phase, averaged over the run's
reports but the first, and what a run takes besides its steps. Strong scaling: the same batch on one and on two workers;
weak: twice the batch on two.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from foundation.training.reporter import read_metrics
from foundation.training.stopwatch import OF_STEP


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A way to run."""

    name: str
    batch: int
    cores: str
    options: tuple[str, ...]


def settings(batch: int) -> list[Setting]:
    """Return the ways to run, each on as many cores as it has workers."""
    one, two = ("--cluster.workers", "1"), ("--cluster.workers", "2")
    return [
        Setting(name="local loop", batch=batch, cores="0", options=("--cluster.engine", "local")),
        Setting(name="Ray, 1 worker", batch=batch, cores="0", options=one),
        Setting(name="Ray, 2 workers (strong)", batch=batch, cores="0,1", options=two),
        Setting(name="Ray, 2 workers (weak)", batch=2 * batch, cores="0,1", options=two),
        *(
            Setting(name=f"Ray, 2 workers, ZeRO {stage}", batch=batch, cores="0,1", options=(*two, *zero))
            for stage in (1, 2, 3)
            for zero in [("--cluster.zero-stage", str(stage))]
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run took."""

    phases_ms: dict[str, float]
    images_per_s: float
    wall_s: float
    stepping_s: float


def measure(store: Path, encoder: str, epochs: int, setting: Setting) -> Measured:
    """Run once, in a home of its own, to the end of training."""
    with tempfile.TemporaryDirectory() as home:
        words = ["-m", "foundation.pretrain", "base", "--store", str(store), "--encoder", encoder, "--start", "random"]
        words += ["--optim.epochs", str(epochs), "--optim.batch-size", str(setting.batch), *setting.options]
        begun = time.perf_counter()
        process = subprocess.Popen(
            ["taskset", "-c", setting.cores, sys.executable, *words],
            env=os.environ | {"MANYBRAINS_HOME": home, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        trained_at = None
        while process.poll() is None:
            time.sleep(0.1)
            if trained_at is None and any(_status(run) == "trained" for run in Path(home, "runs").glob("*")):
                trained_at = time.perf_counter()
        assert process.returncode == 0, f"{setting.name} ended with {process.returncode}"
        assert trained_at is not None
        (run,) = Path(home, "runs").iterdir()
        told = [metrics for _, metrics in read_metrics(run) if "time/forward_ms" in metrics][1:]
        n_steps = len(read_metrics(run))
    phases = {phase: sum(metrics[f"time/{phase}_ms"] for metrics in told) / len(told) for phase in OF_STEP}
    return Measured(
        phases_ms=phases,
        images_per_s=1e3 * setting.batch / sum(phases.values()),
        wall_s=trained_at - begun,
        stepping_s=n_steps * sum(phases.values()) / 1e3,
    )


def _status(run: Path) -> str:
    path = run / "run.json"
    return json.loads(path.read_text())["status"] if path.exists() else ""


def main(
    store: tyro.conf.Positional[Path], /, encoder: str = "encoder-vits14", epochs: int = 2, batch: int = 32
) -> None:
    """Run all settings and print a table."""
    table = Table(*("", "batch", *(f"{phase} ms" for phase in OF_STEP), "step ms", "images/s", "rest of the run s"))
    for setting in settings(batch):
        found = measure(store, encoder, epochs, setting)
        table.add_row(
            setting.name,
            str(setting.batch),
            *(f"{ms:.1f}" for ms in found.phases_ms.values()),
            f"{sum(found.phases_ms.values()):.1f}",
            f"{found.images_per_s:.0f}",
            f"{found.wall_s - found.stepping_s:.1f}",
        )
        Console(stderr=True).print(setting.name, found)
    Console(width=140).print(table)


if __name__ == "__main__":
    tyro.cli(main)

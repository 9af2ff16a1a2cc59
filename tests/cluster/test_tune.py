"""`foundation.sweep` over Ray Tune, whole, on a Ray cluster that the tests start themselves."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from foundation import sweep
from foundation.tracking.runs import find_runs
from foundation.training.run import describe_run
from foundation.training.sweeps import sweeps_dir
from foundation.training.trials import BEST
from tests.tiny_store import ENCODER

pytestmark = [
    pytest.mark.timeout(600),
    # Ray's client closes its sockets and log files when it is collected.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SETTINGS = (
    f"phantom-tiny --encoder {ENCODER} --subjects 1 2 --parcels auto:4 --optim.batch-size 20 --checkpoint-every 3 "
    "--backbone.width 8 --backbone.n-cls-layer 1 --backbone.n-patch-layer 2 --backbone.n-query 2 "
    "--backbone.n-component 4 --backbone.n-local 3 --backbone.mamba.headdim 8"
).split()


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    sweep: Path


@pytest.fixture
def call(module_home: Path, ray_cluster, store: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> Callable[..., Ended]:
    """Call the command as the shell would."""

    def run(*words: str, resumes: bool = False) -> Ended:
        monkeypatch.setattr(sys, "argv", ["sweep", *([] if resumes else [*SETTINGS, "--store", str(store)]), *words])
        try:
            sweep.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        told = capfd.readouterr()
        newest = max(sweeps_dir().glob("*/run.json"), key=lambda path: describe_run(path.parent)["created"]).parent
        return Ended(code, told.out, told.err, newest)

    return run


def results(directory: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(directory.glob("trial-*/result.json"))]


def children(directory: Path) -> dict[str, str]:
    """The status in MLflow of a sweep's trials, by name."""
    parent = describe_run(directory)["tracking_run"]
    return {
        run.info.run_name.split("/")[1]: run.info.status for run in find_runs(f"tags.`mlflow.parentRunId` = '{parent}'")
    }


def stop_once_there(pattern: str) -> threading.Thread:
    """Send ourselves a SIGTERM once there is a file of that pattern below the sweeps' directory."""
    before = set(sweeps_dir().glob(pattern))

    def wait() -> None:
        while not set(sweeps_dir().glob(pattern)) - before:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_sweep_that_was_stopped_and_resumed_has_the_results_of_one_that_was_not(call):
    words = ("--trials", "3", "--optim.epochs", "4", "--no-early-stop")
    whole = call(*words)
    assert whole.code == 0, whole.err
    expected = results(whole.sweep)
    assert [result["status"] for result in expected] == ["finished"] * 3
    assert children(whole.sweep) == dict.fromkeys(("000", "001", "002"), "FINISHED")
    best = max(expected, key=lambda result: result["best"])
    assert f"best: trial {best['trial']}, validation r {best['best']:.4f}" in whole.out
    assert "The best of several validation scores is optimistic" in whole.out
    assert "next: python -m foundation.pretrain phantom-tiny --store" in whole.out
    (parent,) = [run for run in find_runs() if run.info.run_name == whole.sweep.name]
    assert parent.data.metrics == {BEST: pytest.approx(best["best"])}
    assert parent.data.tags["manybrains.best_trial"] == str(best["trial"])

    stopping = stop_once_there("*/trial-00*/metrics.jsonl")
    stopped = call(*words)
    stopping.join()
    assert stopped.code == 130, stopped.err
    assert f"interrupted; go on with: python -m foundation.sweep --resume {stopped.sweep.name}" in stopped.out
    assert stopped.sweep != whole.sweep
    assert len(results(stopped.sweep)) < 3
    assert "KILLED" in children(stopped.sweep).values()
    assert list(stopped.sweep.glob("trial-*/checkpoints/step-*"))

    resumed = call("--resume", stopped.sweep.name, resumes=True)
    assert resumed.code == 0, resumed.err
    assert resumed.sweep == stopped.sweep
    assert results(resumed.sweep) == expected
    assert set(children(resumed.sweep).values()) == {"FINISHED"}

    kept = [(path, path.stat().st_mtime_ns) for path in sorted(whole.sweep.glob("trial-*/result.json"))]
    larger = call("--resume", whole.sweep.name, "--trials", "4", resumes=True)
    assert larger.code == 0, larger.err
    assert [(path, path.stat().st_mtime_ns) for path, _ in kept] == kept
    assert len(results(whole.sweep)) == 4


def test_a_trial_that_is_behind_is_stopped_and_one_that_fails_is_told_and_stops_no_other(call):
    words = ("--trials", "3", "--optim.epochs", "4", "--at-once", "1", "--optim.bad-step", "stop")
    ended = call(*words, "--space", "optim.lr=1e-12,1e30")
    assert ended.code == 0, ended.err
    slow, wild = ([trial for trial in (1, 2) if f"trial {trial}: {how}" in ended.out] for how in ("stopped", "failed"))
    assert f"trial {slow[0]}: stopped at epoch 1" in ended.out
    assert f"trial {wild[0]}: failed: " in ended.out
    assert {result["trial"]: result["status"] for result in results(ended.sweep)} == {
        0: "finished",
        slow[0]: "stopped at epoch 1",
    }
    assert children(ended.sweep) == {"000": "FINISHED", f"00{slow[0]}": "FINISHED", f"00{wild[0]}": "FAILED"}
    assert "best: trial 0" in ended.out
    assert "Traceback" not in ended.out + ended.err


def test_gpus_that_the_cluster_has_not_are_refused_at_once(call):
    ended = call("--trials", "2", "--gpus-per-trial", "7")
    assert ended.code == 1
    assert "--gpus-per-trial 7 don't fit the Ray cluster" in ended.err

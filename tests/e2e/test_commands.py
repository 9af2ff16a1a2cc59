"""The commands as a user types them: a Ray job, an adaptation after it, a run killed and one stopped, both resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from foundation.tracking.registry import find_backbone
from foundation.tracking.runs import find_runs
from foundation.training.checkpoints import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home for the module; the phantom in it is made by the first command that needs it."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def in_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYBRAINS_HOME", str(home))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")


def call(*command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == code, (
        f"{command} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done


def pretrain(*options: str) -> list[str]:
    return [str(BIN / "python"), "-m", "foundation.pretrain", *options]


def start_and_wait_for_checkpoint(home: Path, *options: str) -> tuple[subprocess.Popen, Path]:
    """Start a run in a group of its own, and return when it has a checkpoint."""
    known = set((home / "runs").glob("*"))
    process = subprocess.Popen(pretrain(*options), start_new_session=True, stdout=subprocess.DEVNULL)
    for _ in range(1500):
        for run in set((home / "runs").glob("*")) - known:
            if checkpoints(run):
                return process, run
        assert process.poll() is None, f"the run ended with {process.poll()} before its first checkpoint"
        time.sleep(0.2)
    raise AssertionError("no checkpoint after five minutes")


def status(run: Path) -> str:
    return json.loads((run / "run.json").read_text())["status"]


@pytest.fixture(scope="module")
def ray_head(home: Path) -> Iterator[None]:
    environment = os.environ | {"MANYBRAINS_HOME": str(home), "RAY_AUTH_MODE": "token"}
    environment["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["ray", "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    subprocess.run(["ray", "start", "--head"], env=environment, check=True, capture_output=True)
    yield
    subprocess.run(["ray", "stop", "--force"], env=environment, check=False, capture_output=True)


def test_a_ray_job_succeeds_and_adapt_finds_its_backbone(home, ray_head):
    options = ["--optim.epochs", "2"]
    told = call("ray", "job", "submit", "--", "python", "-m", "foundation.pretrain", *options)
    assert "succeeded" in told.stdout + told.stderr
    assert "protocol strict" in told.stdout
    (run,) = find_runs("tags.`manybrains.kind` = 'pretrain'")
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test/voxel_r"] > 0.05

    call("adapt", "--subject", "5", "--sessions", "3")
    (adapted,) = find_runs("tags.`manybrains.kind` = 'adapt'")
    backbone = find_backbone(None)
    assert adapted.data.tags["manybrains.backbone"] == backbone.label == "phantom-tiny/1"
    for wrong in (["--subject", "9", "--sessions", "3"], ["--subject", "5", "--sessions", "99"]):
        failed = call("adapt", *wrong, code=1)
        assert failed.stderr.startswith("error: ")
        assert failed.stderr.count("\n") == 1
    assert len(find_runs("tags.`manybrains.kind` = 'adapt'")) == 1


def test_a_run_killed_with_9_goes_on_from_its_last_checkpoint(home):
    options = ["--optim.epochs", "4", "--checkpoint-every", "10"]
    process, run = start_and_wait_for_checkpoint(home, *options)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert status(run) == "running"
    last = checkpoints(run)[-1]
    call(*pretrain(*options, "--resume"))
    assert status(run) == "finished"
    assert checkpoints(run)[-1].name > last.name


def test_ctrl_c_leaves_a_checkpoint_of_the_step_it_was_in(home):
    options = ["--optim.epochs", "5", "--checkpoint-every", "10", "--cluster.engine", "local"]
    process, run = start_and_wait_for_checkpoint(home, *options)
    before = checkpoints(run)[-1]
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(120) == 130
    assert status(run) == "interrupted"
    assert checkpoints(run)[-1].name >= before.name
    call(*pretrain(*options, "--resume", run.name))
    assert status(run) == "finished"

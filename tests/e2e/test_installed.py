"""As a user has it: the wheel installed, a second directory, a Ray cluster, jobs that are watched, stopped, resumed."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from foundation.tracking.runs import client, find_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def environment(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A virtual environment with our wheel in it; what it depends on is that of the one that runs the tests."""
    place = tmp_path_factory.mktemp("installed")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(place), str(REPOSITORY)],
        check=True,
        capture_output=True,
    )
    (wheel,) = place.glob("manybrains-*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(place / "venv")], check=True)
    python = place / "venv" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(place / "venv"), "platbase": str(place / "venv")})
    # A plain path, so that this environment's own .pth files, which lead to the checkout, aren't followed.
    (Path(packages) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    ray = place / "venv" / "bin" / "ray"
    ray.write_text(f"#!{python}\nimport sys\nfrom ray.scripts.scripts import main\nsys.exit(main())\n")
    ray.chmod(0o755)
    made = os.environ | {"MANYBRAINS_HOME": str(home), "RAY_AUTH_MODE": "token"}
    made["PATH"] = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    for name in ("PYTHONPATH", "RAY_ADDRESS", "VIRTUAL_ENV"):
        made.pop(name, None)
    return made


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that has nothing to do with the checkout."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(autouse=True)
def in_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYBRAINS_HOME", str(home))


@pytest.fixture(scope="module")
def call(environment: dict[str, str], elsewhere: Path):
    def called(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, cwd=elsewhere)
        told = done.stdout + done.stderr
        assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{told[-4000:]}"
        return told

    return called


@pytest.fixture(scope="module")
def ray_head(call) -> Iterator[None]:
    call("ray", "get-auth-token", "--generate")
    call("ray", "start", "--head")
    yield
    call("ray", "stop", "--force")


def wait_for(what, *, seconds: float = 300.0):
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(1.0)
    return found


def test_the_wheel_is_what_runs(call, elsewhere, environment):
    where = call("python", "-c", "import foundation, data, cluster, adapters; print(foundation.__file__)")
    assert Path(environment["PATH"].split(os.pathsep)[0]).parent in Path(where.strip()).parents


def test_a_job_is_watched_stopped_and_goes_on_in_the_same_mlflow_run(call, ray_head, home):
    options = ["--optim.epochs", "40", "--checkpoint-every", "10"]
    submit = ["ray", "job", "submit"]
    call(*submit, "--no-wait", "--submission-id", "first", "--", "python", "-m", "foundation.pretrain", *options)
    wait_for(lambda: re.search(r"^step +\d+ .*images/s", call("ray", "job", "logs", "first"), re.MULTILINE))
    call("ray", "job", "stop", "first")
    wait_for(lambda: "was stopped" in call("ray", "job", "status", "first"))
    (directory,) = (home / "runs").iterdir()
    described = wait_for(lambda: (d := json.loads((directory / "run.json").read_text()))["status"] != "running" and d)
    assert described["status"] == "interrupted"
    assert f"--resume {directory.name}" in call("ray", "job", "logs", "first")

    told = call(*submit, "--", "python", "-m", "foundation.pretrain", "--resume", directory.name)
    assert re.search(r"going on from step \d+", told)
    assert "registered backbone phantom-tiny/1" in told
    (run,) = find_runs("tags.`manybrains.kind` = 'pretrain'")
    assert (run.info.run_id, run.info.status) == (described["tracking_run"], "FINISHED")
    steps = [point.step for point in client().get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(steps) == list(range(1, len(steps) + 1))


def test_a_job_can_bring_its_own_code(call, ray_head, home, tmp_path):
    """As in ``--working-dir .`` in a checkout that was changed: driver and workers run what was shipped."""
    shipped = tmp_path / "checkout"
    for package in ("adapters", "cluster", "data", "foundation"):
        shutil.copytree(REPOSITORY / package, shipped / package, ignore=shutil.ignore_patterns("__pycache__"))
    reporter = shipped / "foundation" / "training" / "reporter.py"
    reporter.write_text(reporter.read_text().replace('f"step {step:5d}"', 'f"shipped step {step:5d}"'))
    submit = ["ray", "job", "submit", "--working-dir", str(shipped)]
    told = call(*submit, "--", "python", "-m", "foundation.pretrain", "--optim.epochs", "1")
    assert re.search(r"^shipped step +\d+ ", told, re.MULTILINE)

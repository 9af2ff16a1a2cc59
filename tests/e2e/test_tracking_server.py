"""A tracking server that hangs, dies and comes back while a run trains, and one that is down from the start."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from foundation.training.reporter import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """An MLflow server with an artifact proxy, that can be stopped and started again on the same data."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.port = directory, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        options = ["--backend-store-uri", f"sqlite:///{self.directory / 'server.db'}", "--port", str(self.port)]
        options += ["--artifacts-destination", str(self.directory / "artifacts"), "--workers", "1"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            start_new_session=True,
        )
        for _ in range(300):
            if self.answers():
                return
            time.sleep(0.4)
        raise AssertionError("mlflow server did not start")

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                return True
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait(30)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.kill()


def pretrain(server: Server, *options: str, **of_call) -> subprocess.Popen:
    environment = os.environ | {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    command = [sys.executable, "-m", "foundation.pretrain", "--cluster.engine", "local", *options]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **of_call
    )


def n_steps(home: Path) -> int:
    found = [len(read_metrics(run)) for run in (home / "runs").glob("*")]
    return max(found, default=0)


def test_a_server_that_hangs_and_dies_holds_up_no_step_and_lacks_none_in_the_end(server, home):
    server.start()
    process = pretrain(server, "--optim.epochs", "24")

    def steps_go_on(n: int) -> None:
        until, target = time.monotonic() + 240, n_steps(home) + n
        while n_steps(home) < target:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until, "no step in four minutes"
            time.sleep(0.1)

    steps_go_on(20)
    server.signal(signal.SIGSTOP)
    steps_go_on(40)
    server.kill()
    steps_go_on(40)
    server.start()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    assert "the tracking server doesn't take metrics" in out
    assert "the tracking server takes metrics again" in out
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("manybrains")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == list(range(1, n_steps(home) + 1))
    assert client.get_model_version_by_alias("phantom-tiny", "champion").run_id == run.info.run_id


def test_a_server_that_is_down_from_the_start_is_one_line_and_nothing_is_trained(server, home):
    out, err = pretrain(server).communicate(timeout=300)
    assert err.startswith(f"error: the tracking server {server.uri} doesn't do what it is asked: ")
    assert err.count("\n") == 1, err
    assert not list((home / "runs").iterdir())
    assert "closed-form" not in out

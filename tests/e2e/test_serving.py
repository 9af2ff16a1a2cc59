"""``mlflow models serve`` answers what the predictor says, refuses what is malformed, and goes on."""

import base64
import json
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
from typing import Any

import numpy as np
import pytest

from data.encoders.gabor import GaborEncoder
from foundation.prediction import Predictor
from tests.foundation.test_image_files import bomb
from tests.tiny_version import ADAPTED, N_VOXELS, picture, png, random_model, save_version

GOOD = png(picture(0))


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def records(*images: Any, **params: Any) -> dict[str, Any]:
    return {"dataframe_records": [{"image": image} for image in images]} | ({"params": params} if params else {})


class Server:
    """A model that is served on a port of its own."""

    def __init__(self, version: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
        command += ["--model-uri", str(version), "--port", str(self.port)]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, env=os.environ | {"PATH": path}, start_new_session=True
            )

    def wait(self) -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "the server ended"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ping", timeout=2):
                    return
            except OSError:
                time.sleep(0.3)
        raise AssertionError("the server did not start")

    def post(self, body: Any) -> tuple[int, str]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/invocations", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("served")
    made = Server(save_version(directory), directory / "log")
    try:
        made.wait()
        yield made
    finally:
        made.kill()


def assert_answers(server: Server, body: Any = None) -> None:
    status, answer = server.post(body or records(text(GOOD)))
    assert status == 200, answer
    expected = Predictor(random_model(*N_VOXELS), GaborEncoder(), ADAPTED).predict([picture(0)])
    np.testing.assert_allclose(json.loads(answer)["predictions"], expected, rtol=0, atol=1e-5)


def test_a_picture_is_answered_by_what_the_predictor_says(server):
    assert_answers(server)
    status, answer = server.post(records(text(GOOD), text(png(picture(1))), n_samples=3, seed=1))
    assert status == 200
    assert np.shape(json.loads(answer)["predictions"]) == (2, 3, N_VOXELS[ADAPTED])


@pytest.mark.parametrize(
    "body",
    [
        {"dataframe_split": {"columns": ["image"], "data": [[text(GOOD)]]}},
        {"instances": [{"image": text(GOOD)}]},
        {"inputs": {"image": [text(GOOD)]}},
        {"inputs": {"image": text(GOOD)}},
    ],
    ids=["split", "instances", "list", "one"],
)
def test_every_form_that_mlflow_takes_will_do(server, body):
    assert_answers(server, body)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{ no JSON", "valid JSON"),
        (b"\xff\xfe", "valid JSON"),
        ([1, 2], "must be a JSON dictionary"),
        ({"pictures": [text(GOOD)]}, "exactly one of the input fields"),
        ({"dataframe_records": [{"picture": text(GOOD)}]}, "image"),
        (records(), "image"),
        (records("not base64 at all!"), "image"),
        (records(3), "image"),
        (records(None), "image"),
        (records(text(GOOD), text(b"a text, not a picture")), "row 1 of 'image' is not a readable picture"),
        (records(text(GOOD[: len(GOOD) // 2])), "row 0 of 'image' is not a readable picture"),
        (records(text(bomb(100_000))), "pixels"),
        (records(text(GOOD), n_samples="many"), "n_samples"),
        (records(text(GOOD), n_samples=-2), "n_samples must be 0"),
        (records(text(GOOD), n_samples=10**12), "too many for one request"),
        ({**records(text(GOOD)), "params": "many"}, "arameters must be a dictionary"),
    ],
    ids=[
        *("no JSON", "no text", "a list", "another key", "another column", "no rows", "no base64", "a number", "null"),
        *("a text", "cut off", "a bomb", "param of another type", "negative", "too many", "params of another type"),
    ],
)
def test_a_malformed_request_gets_a_clear_error_and_the_server_goes_on(server, body, said):
    status, answer = server.post(body)
    assert 400 <= status < 500, answer
    assert said in json.loads(answer)["message"]
    assert_answers(server)

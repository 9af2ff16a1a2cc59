"""Encoders from the hub: by name at a commit, from the cache, and what is said where it can't be reached."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.tiny_encoder import COMMIT, save_model

ASK = """
import json, sys, logging
from data.encoders.huggingface import HuggingFaceEncoder
try:
    encoder = HuggingFaceEncoder(sys.argv[1])
    told = encoder.provenance()
    print(json.dumps([encoder.name, told["source"], told["revision"]]))
except ValueError as error:
    print(json.dumps(str(error)))
"""


def ask(source: str, *, endpoint: str, cache: Path) -> tuple[str | list[str], str]:
    """Load an encoder in a process that isn't offline; return what it says, and its stderr. A minute is too long."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    environment |= dict(
        HF_ENDPOINT=endpoint, HF_HOME=str(cache), HF_HUB_DISABLE_TELEMETRY="1", NO_PROXY="*", no_proxy="*"
    )
    done = subprocess.run(
        [sys.executable, "-c", ASK, source],
        env=environment,
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("encoders") / "dinov2"
    save_model(path, "Dinov2")
    return path


@pytest.fixture
def silent_hub() -> Iterator[str]:
    """A hub that takes calls and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def no_hub() -> str:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def hub(dinov2) -> Iterator[str]:
    """A hub that has somebody/tiny-dinov2 and nothing else."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(with_body=True)

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def answer(self, *, with_body: bool) -> None:
            path, headers, status = self.path.split("?")[0], {}, 404
            body = b'{"error": "Repository not found"}'
            if path.startswith("/api/models/somebody/tiny-dinov2"):
                body = json.dumps({"id": "somebody/tiny-dinov2", "sha": COMMIT, "siblings": []}).encode()
                status = 200 if path.removesuffix("/revision/main").count("/") == 4 else 404
            elif path.startswith("/somebody/tiny-dinov2/resolve/"):
                file = dinov2 / path.split("/")[-1]
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{file.name}"'}
                if file.is_file():
                    body, status = file.read_bytes(), 200
                else:
                    headers["X-Error-Code"] = "EntryNotFound"
            else:
                headers["X-Error-Code"] = "RepoNotFound"
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_an_encoder_comes_from_the_hub_at_a_commit_and_then_from_the_cache(tmp_path, hub, no_hub):
    expected = ["tiny-dinov2", "somebody/tiny-dinov2", COMMIT]
    assert ask("somebody/tiny-dinov2", endpoint=hub, cache=tmp_path)[0] == expected
    told, warned = ask("somebody/tiny-dinov2", endpoint=no_hub, cache=tmp_path)
    assert told == expected
    assert f"somebody/tiny-dinov2 is taken from the cache, commit {COMMIT}: the hub was not asked" in warned


def test_a_name_that_the_hub_lacks_is_said_to_be(tmp_path, hub):
    told, warned = ask("somebody/else", endpoint=hub, cache=tmp_path)
    assert "no encoder 'somebody/else': neither a local directory nor reachable on the hub; check the name" in told
    assert warned == ""


@pytest.mark.parametrize("kind", ["no_hub", "silent_hub"])
def test_an_unreachable_hub_is_said_to_be_at_once_and_in_one_line(tmp_path, request, kind):
    told, warned = ask("facebook/dinov2-small", endpoint=request.getfixturevalue(kind), cache=tmp_path)
    assert (
        "no encoder 'facebook/dinov2-small': neither a local directory nor reachable on the hub, nor cached (" in told
    )
    assert "\n" not in told
    assert warned == ""

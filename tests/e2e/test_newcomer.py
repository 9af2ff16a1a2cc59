"""A newcomer's first hour: in a fresh copy, every command line of README, typed in order, does what README says.

Then those of docs/evaluating.md. A line runs as it is written; what it can't know (a run's name, pictures) comes from
what earlier lines printed, or is put there. A line that can't run stands in `SKIPPED` with its reason, and any other
that fails, fails here: README can't grow commands that nobody has tried.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.documented import README, ROOT, CommandLine, command_lines

LINES = [line for page in (README, ROOT / "docs/evaluating.md") for line in command_lines(page)]
OWN_DATA = "needs NSD; tests/data/importers imports small trees of the same layout"
SKIPPED = {
    "python -m data import nsd NSD/ lab.zarr --check": OWN_DATA,
    "python -m data import nsd NSD/ lab.zarr --subjects 1 2 5 7": OWN_DATA,
    "python -m data features lab.zarr --encoder facebook/dinov2-base --depths 3 6 9 12": "needs the Hugging Face hub",
    "python -m data validate lab.zarr": OWN_DATA,
    "python -m foundation.pretrain --store lab.zarr --encoder dinov2-base --subjects 1 2 7": OWN_DATA,
    "adapt --subject 5 --sessions 3 --store lab.zarr": OWN_DATA,
}
MAKES = ("responses.npy", "model.safetensors", "report.html", "scores.json", "scores.csv", "ablation.json")
"""Files that lines name: each is there after its line."""
FEW_TESTS = "tests/data/test_noise_ceiling.py"
"""What `make test` is narrowed to, in its own variable: all of them run in the checkout anyway."""
RUN = re.compile(r"^run ([\w.-]+-\d{8}-\d{6}-\w+):", re.MULTILINE)


@dataclass
class Newcomer:
    """A directory as a clone is, and who types into it."""

    place: Path
    home: Path
    run: str | None = None
    """The name of the last training that was printed."""
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        python = Path(sys.base_prefix) / "bin" / "python3"
        self.environment = os.environ | {"MANYBRAINS_HOME": str(self.home), "PYTHON": str(python)}
        self.environment["PATH"] = f"{self.place / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.environment["RAY_AUTH_MODE"] = "token"
        for name in ("PYTHONPATH", "RAY_ADDRESS", "VIRTUAL_ENV", "HF_HUB_OFFLINE"):
            self.environment.pop(name, None)

    def types(self, line: str, **environment: str) -> str:
        """Run a line and return what it printed; a failing one fails the test."""
        if re.search(r"\bRUN\b", line):
            assert self.run is not None, f"no earlier line printed a run's name for {line}"
            line = re.sub(r"\bRUN\b", self.run, line)
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.place,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=3000,
        )
        told = done.stdout + done.stderr
        assert done.returncode == 0, f"{line} ended with {done.returncode}:\n{told[-4000:]}"
        if runs := RUN.findall(told):
            self.run = runs[-1]
        return told

    def opens(self, line: str) -> str:
        """Start a line that serves until it is ended, ask it over HTTP, end it, and return the page."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = self.environment | {"ARGS": f"--port {port}"}
        server = subprocess.Popen(["bash", "-c", line], cwd=self.place, env=environment, start_new_session=True)
        try:
            for _ in range(480):
                assert server.poll() is None, f"{line} ended with {server.poll()}"
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                        return answer.read().decode()
                except OSError:
                    time.sleep(0.5)
            raise AssertionError(f"{line} didn't answer in four minutes")
        finally:
            os.killpg(server.pid, signal.SIGINT)
            server.wait(60)

    def submits(self, line: str) -> str:
        """Start a Ray cluster as docs/cluster.md says, run the line, and stop the cluster."""
        first = [of.text for of in command_lines(ROOT / "docs/cluster.md")]
        start = first[: first.index("ray start --head") + 1]
        try:
            self.types("\n".join(["set -e", *start]))
            time.sleep(10)  # until the job agent has registered
            return self.types(line)
        finally:
            subprocess.run(["ray", "stop", "--force"], env=self.environment, check=False, capture_output=True)


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Newcomer]:
    """A copy of what git has, or would have if all of this checkout were committed; nothing is installed yet."""
    place = tmp_path_factory.mktemp("newcomer") / "manybrains"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    (place / "pictures").mkdir()
    yield Newcomer(place=place, home=tmp_path_factory.mktemp("home"))
    shutil.rmtree(place)  # its environment has several gigabytes


def picture(path: Path, seed: int) -> None:
    import numpy as np
    from PIL import Image

    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "line", [pytest.param(of, id=f"{k:02d} {of.id}") for k, of in enumerate(LINES) if of.text not in SKIPPED]
)
def test_a_documented_line_works_as_written(line: CommandLine, newcomer: Newcomer):
    text = line.text
    if text == "make ui":
        assert "mlflow" in newcomer.opens(text).lower()
    elif text == "make test":
        assert re.search(r"\d+ passed", newcomer.types(text, ARGS=FEW_TESTS))
    elif text.startswith("ray job submit"):
        assert "succeeded" in newcomer.submits(text)
    else:
        if "pictures/" in text:
            for seed in range(3):
                picture(newcomer.place / "pictures" / f"{seed}.png", seed)
        newcomer.types(text)
        for name in MAKES:
            assert name not in text or (newcomer.place / name).stat().st_size > 0


def test_what_is_skipped_is_in_the_readme():
    assert set(SKIPPED) <= {line.text for line in command_lines(README)}


def test_the_quickstart_shows_lines_of_the_readme():
    assert {line.text for line in command_lines(ROOT / "docs/quickstart.md")} <= {line.text for line in LINES}


def test_a_line_that_fails_is_told_with_its_output(tmp_path):
    with pytest.raises(AssertionError, match=r"echo why; exit 3 ended with 3:\s+why"):
        Newcomer(place=tmp_path, home=tmp_path).types("echo why; exit 3")

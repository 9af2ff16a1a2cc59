"""How long a command takes to answer --help: what a user waits before every error in a flag."""

import subprocess
import sys

import pytest

COMMANDS = {
    "data": ["-m", "data"],
    "pretrain": ["-m", "foundation.pretrain"],
    "adapt": ["-c", "from adapters.cli import main; main()"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_answers(benchmark, name):
    def ask() -> str:
        command = [sys.executable, *COMMANDS[name], "--help"]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout

    assert "usage:" in benchmark.pedantic(ask, rounds=3)

"""Every command line that README and docs show is one that our commands take: their own parsers read it, none runs."""

import importlib
import re
import sys
import tomllib
from collections.abc import Callable
from typing import Any

import pytest

from data import command_line
from tests.documented import PAGES, ROOT, CommandLine, command_lines

LINES = [line for page in PAGES for line in command_lines(page)]
OURS = {line.id: line for line in LINES if line.ours is not None}
ENTRY_POINTS = next(
    contract["protected_modules"]
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    if contract["id"] == "entry-points"
)
SUBCOMMANDS = {
    "data.__main__": ("phantom", "import", "features", "info", "validate", "export", "migrate"),
    "foundation.registry": ("list", "show", "promote", "diff", "export", "import"),
}
LAYOUTS = ("nsd", "algonauts", "mindeye", "glmsingle", "arrays")
FOREIGN = {
    "cluster": {"--cpus-per-task", "--dashboard-agent-listen-port", "--head", "--no-wait", "--signal", "--wheel"},
    "predict": {"--env-manager"},
}
"""Options of other programs that the text of a page names."""
LOGS = {"experiments"}
"""Pages that say what was typed at the time."""
PLACEHOLDERS = {"--resume RUN": "--resume", "--resume NAME": "--resume"}
"""What stands for a run of the reader's, whose settings would be looked up while the line is read."""


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[str]], None]:
    """Have a command read its arguments, and do nothing with them; a wrong one exits."""
    parse = command_line._parse

    def parse_only(*args: Any) -> Callable[[], None]:
        parse(*args)
        return lambda: None

    monkeypatch.setattr(command_line, "_parse", parse_only)

    def read(module: str, args: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", [module, *args])
        importlib.import_module(module).main()

    return read


def refused(read: Callable[[str, list[str]], None], module: str, args: list[str]) -> bool:
    try:
        read(module, args)
    except SystemExit as stop:
        return bool(stop.code)
    return False


@pytest.mark.parametrize("line", list(OURS.values()), ids=list(OURS))
def test_a_documented_command_line_is_taken(line: CommandLine, read, capsys):
    text = line.text
    for placeholder, instead in PLACEHOLDERS.items():
        text = re.sub(rf"{placeholder}\b", instead, text)
    ours = CommandLine(line.page, text).ours
    assert ours is not None
    assert not refused(read, *ours), f"{line.text}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("module", ENTRY_POINTS)
def test_help_is_shown_and_ends_well(module: str, read, capsys):
    with pytest.raises(SystemExit) as stop:
        read(module, ["--help"])
    assert not stop.value.code
    assert "usage:" in capsys.readouterr().out


def helps() -> list[tuple[str, list[str]]]:
    """Return every command and subcommand."""
    found = [(module, [name]) for module, names in SUBCOMMANDS.items() for name in names]
    return [(module, []) for module in ENTRY_POINTS] + found + [("data.__main__", ["import", kind]) for kind in LAYOUTS]


def test_every_option_that_a_text_names_exists(read, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    for module, args in helps():
        with pytest.raises(SystemExit):
            read(module, [*args, "--help"])
    exist = set(re.findall(r"--[a-z][a-z0-9.-]*", capsys.readouterr().out))
    for page in PAGES:
        code = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE))
        named = {option for text in code for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9.-]*", text)}
        if page.stem not in LOGS:
            assert named - exist == FOREIGN.get(page.stem, set()), page.name


@pytest.mark.parametrize("module", ENTRY_POINTS)
def test_an_option_that_does_not_exist_is_refused(module: str, read, capsys):
    assert refused(read, module, ["--no-such-option", "1"])


def test_every_command_is_shown_somewhere():
    shown = {line.ours[0] for line in OURS.values() if line.ours is not None}
    by_make = {"foundation.ui": "make ui"}
    missing = [m for m in ENTRY_POINTS if m not in shown and by_make.get(m) not in {line.text for line in LINES}]
    assert missing == []


def test_every_make_target_that_is_shown_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {word for line in LINES if line.text.startswith("make ") for word in line.text.split()[1:]}
    assert shown
    assert {word for word in shown if "=" not in word} <= targets


def test_lines_are_read_as_a_shell_reads_them(tmp_path):
    page = tmp_path / "page.md"
    block = ["first --at 1  # why", "# nothing but a comment", "long --one \\", "    --two '#3'", "a |", "  b"]
    page.write_text("\n".join(["```bash", *block, "```", ""]))
    assert [line.text for line in command_lines(page)] == ["first --at 1", "long --one --two '#3'", "a | b"]

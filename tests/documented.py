"""What README and docs show as code: the fenced blocks of a page, and the command lines of its shell blocks."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_OURS = {"foundation", "data"}


@dataclass(frozen=True)
class CommandLine:
    """A line of a shell block, its comment left out and what it continues on joined."""

    page: Path
    text: str

    @property
    def id(self) -> str:
        """What a test of it is called."""
        return f"{self.page.stem}: {self.text}"

    @property
    def ours(self) -> tuple[str, list[str]] | None:
        """The module that it runs and the arguments, if it runs a command of ours, perhaps as a Ray job."""
        words = shlex.split(self.text)
        if words[:3] == ["ray", "job", "submit"] and "--" in words:
            words = words[words.index("--") + 1 :]
        if words[:1] == ["adapt"]:
            return "adapters.cli", words[1:]
        if words[:2] == ["python", "-m"] and words[2].split(".")[0] in _OURS:
            module = "data.__main__" if words[2] == "data" else words[2]
            return module, words[3:]
        return None


def blocks(page: Path, language: str) -> list[str]:
    """Return the text of a page's blocks in a language."""
    return [text for of, text in _BLOCK.findall(page.read_text()) if of == language]


def command_lines(page: Path) -> list[CommandLine]:
    """Return the command lines of a page's shell blocks, in the order in which they stand there."""
    lines = []
    for block in blocks(page, "bash"):
        whole = re.sub(r"\\\n\s*", "", re.sub(r"\|\n\s*", "| ", block))
        lines += [re.sub(r"\s+#\s.*$", "", line).strip() for line in whole.splitlines()]
    return [CommandLine(page, line) for line in lines if line and not line.startswith("#")]

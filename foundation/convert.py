"""``python -m foundation.convert RUN --out FILE``: a run's model as one safetensors file, whichever engine trained it.

``model, made_from = foundation.bundle.load_bundle(Path("FILE"))`` makes the model of it again; the same tensors load
with `safetensors` alone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from tyro.conf import Positional, arg

from data.command_line import CommonOptions, Session, begin, run
from foundation.bundle import write_bundle
from foundation.checkpoint import standing
from foundation.training.checkpoints import newest_checkpoint
from foundation.training.course import FINAL, START
from foundation.training.run import run_named

PROGRAM = "python -m foundation.convert"


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a run's model into one safetensors file."""

    run: Positional[str]
    """Name of a run, or the path of a checkpoint or another model directory."""
    out: Path
    """File to write."""
    which: Literal["newest", "best", "final"] = "newest"
    """Of a run: the newest whole checkpoint, the best by validation, or what was scored and registered."""
    session: CommonOptions = Session()


def convert(command: Convert) -> None:
    """Run the command."""
    begin(command.session)
    console = Console(soft_wrap=True)
    directory = _directory(command, console)
    if command.out.suffix != ".safetensors":
        raise ValueError(f"--out {command.out} must end in .safetensors, which is what is written")
    if command.out.exists() and not command.out.is_dir():
        raise ValueError(f"--out {command.out} exists already; name another file, or remove it")
    if command.out.is_dir():
        raise ValueError(
            f"--out {command.out} is a directory; name a file, such as {command.out / 'model.safetensors'}"
        )
    description = write_bundle(directory, command.out)
    subjects = ", ".join(description["subjects"])
    console.print(f"{command.out}: {command.out.stat().st_size / 1e6:.1f} MB, {subjects}, from {directory}")


def _directory(command: Convert, console: Console) -> Path:
    """Return the model directory that the command names."""
    path = Path(command.run)
    if (path / "model.json").exists():
        return path
    directory = run_named(command.run)
    if command.which == "newest":
        found = newest_checkpoint(directory, tell=console.print)
        if found is None:
            raise ValueError(f"run {command.run!r} has no whole checkpoint yet; it has {START}/ only")
        return found
    found = standing(directory / {"best": "best", "final": FINAL}[command.which])
    if not found.exists():
        raise ValueError(
            f"run {command.run!r} has no {command.which} model yet; its newest checkpoint is --which newest"
        )
    return found


def main() -> None:
    """Run the command line."""

    def command(options: Annotated[Convert, arg(name="")]) -> None:
        """Write a run's model into one safetensors file."""
        convert(options)

    run(command, program=PROGRAM, description=__doc__)


if __name__ == "__main__":
    main()

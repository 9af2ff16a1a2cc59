"""What all our commands share: ``--home``, ``--debug``, and errors as one line on stderr with a failing exit code."""

import contextlib
import functools
import inspect
import io
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from rich.console import Console
from rich.progress import Progress, ProgressColumn

from data.home import set_home

Value = TypeVar("Value")
_BOX = re.compile(r"[╭╮╰╯│─┌┐└┘]+|-{8,}")


@dataclass(frozen=True, kw_only=True)
class Session:
    """Options of every command."""

    home: Path | None = None
    """Where stores, runs and the MLflow database live (default: $MANYBRAINS_HOME, else a per-user directory)."""
    debug: bool = False
    """Show the traceback of an error."""


CommonOptions = Annotated[Session, tyro.conf.arg(name="")]


def _parse(command: Any, args: Sequence[str], program: str, description: str | None) -> Callable[[], Any]:
    """Return the call that `args` ask for; tyro's boxed message about a wrong one becomes one line."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            if isinstance(command, dict):
                deferred = {name: _deferred(function) for name, function in command.items()}
                return tyro.extras.subcommand_cli_from_dict(deferred, prog=program, description=description, args=args)
            return tyro.cli(_deferred(command), prog=program, description=description, args=args)
    except SystemExit as stop:
        if stop.code:
            text = " ".join(_BOX.sub(" ", told.getvalue()).split())
            text = re.sub(r" For full helptext,.*$", "", text)
            print(f"error: {text} (see {program} --help)", file=sys.stderr)
        raise


def _deferred(function: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    """Return `function` as one that binds its arguments and leaves the call for later."""

    @functools.wraps(function)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return functools.partial(function, *args, **kwargs)

    vars(bind)["__signature__"] = inspect.signature(function).replace(return_annotation=Any)
    return bind


def or_exit(call: Callable[[], Value]) -> Value:
    """Return what `call` does; a ValueError of it is one line on stderr, and the end with 1."""
    try:
        return call()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def run(command: Any, *, program: str, description: str | None = None, args: Sequence[str] | None = None) -> None:
    """Run a command, or one of a dictionary of them: functions whose parameters tyro turns into options.

    Exits with 1 after an error, with 2 after wrong arguments, with 130 after Ctrl-C.
    """
    args = list(sys.argv[1:] if args is None else args)
    call = _parse(command, args, program, description)
    try:
        call()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # noqa: BLE001  the edge: whatever happens, one line, and a traceback only if asked for
        if "--debug" in args:
            traceback.print_exc()
        text = " ".join(str(error).split())
        if not isinstance(error, (ValueError, OSError)):
            text = f"unexpected {type(error).__name__}: {text} (--debug shows where; please report it)"
        print(f"error: {text}", file=sys.stderr)
        sys.exit(1)


def progress_bar(*columns: ProgressColumn) -> Progress:
    """Return a bar on stderr, which shows where that is a terminal, and is gone when all is done."""
    console = Console(stderr=True)
    shown = columns or Progress.get_default_columns()
    return Progress(*shown, console=console, transient=True, disable=not console.is_terminal)


def begin(session: Session) -> None:
    """Apply the options that every command has."""
    set_home(session.home)

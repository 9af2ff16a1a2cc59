"""What Ctrl-C and SIGTERM, which is what ``ray job stop`` sends, do to a run."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType


@contextlib.contextmanager
def on_signal(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let `handler` answer Ctrl-C and SIGTERM, which is what ``ray job stop`` sends."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def interrupt_on_signal() -> contextlib.AbstractContextManager[None]:
    """Turn Ctrl-C or SIGTERM into a KeyboardInterrupt, in what is started over when the run is resumed."""
    return on_signal(signal.default_int_handler)


@contextlib.contextmanager
def stop_file_on_signal(directory: Path) -> Iterator[None]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop after this step; the second one stops at once."""
    stop = directory / "stop"
    stop.unlink(missing_ok=True)

    def request(number: int, frame: FrameType | None) -> None:
        if stop.exists():
            raise KeyboardInterrupt
        stop.touch()
        print(
            "stopping after this step; a checkpoint is written (once more to stop at once)", file=sys.stderr, flush=True
        )

    with on_signal(request):
        yield
    stop.unlink(missing_ok=True)  # but not after an error: workers that are still there shall stop

"""When a step is bad, and what is done about it: skip, or stop (`OptimConfig.bad_step`)."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from foundation.config import OptimConfig

WINDOW = 64
"""Losses that the next one is compared with."""
FEWEST = 16
"""Losses before which none has exploded."""
MOST_IN_A_ROW = 10


def what_is_bad(loss: float, recent: Sequence[float], config: OptimConfig) -> str | None:
    """Return what is wrong with a step's loss, given those of the last good steps; None: nothing."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if config.explosion is not None and len(recent) >= FEWEST:
        usual = float(np.median(recent))
        if loss > config.explosion * usual > 0:
            return f"the loss is {loss:.3g}, more than {config.explosion:g} times the usual {usual:.3g}"
    return None


def refuse(what: str, step: int, n_in_a_row: int, config: OptimConfig, *, newest: Callable[[], Path | None]) -> None:
    """Raise where bad steps end the run; `newest` is asked for the checkpoint to name.

    Raises
    ------
    ValueError
        If the policy is to stop, or too many in a row were skipped.
    """
    if config.bad_step == "skip" and n_in_a_row < MOST_IN_A_ROW:
        return
    found = newest()
    times = f", the {n_in_a_row}th bad step in a row" if n_in_a_row > 1 else ""
    raise ValueError(
        f"step {step}: {what}{times}; start a run with --optim.lr below {config.lr:g}, or look at that step's "
        f"data (the newest whole checkpoint: {found.name if found else 'none yet'})"
    )

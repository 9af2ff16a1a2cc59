"""What a sweep tells at the end: the table of its trials, how far they lie apart, and the best one as a command."""

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from foundation.config import Recipe
from foundation.recipes import recipe_named
from foundation.training.trials import Outcome

WIDTH = 132
OPTIMISTIC = (
    "The best of several validation scores is optimistic: it was chosen by them, so part of its lead is luck with "
    "these images. No test image was looked at; pretraining with the best settings scores the test images, once."
)


def best_of(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the finished trial with the highest score.

    Raises
    ------
    ValueError
        If none has finished.
    """
    finished = [outcome for outcome in outcomes if outcome.status == "finished" and outcome.best is not None]
    if not finished:
        raise ValueError(f"no trial has finished; trial {outcomes[0].trial} {outcomes[0].status}")
    return max(finished, key=lambda outcome: outcome.best or 0.0)


def tell_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Print the table of trials, the best first, and how far those that finished lie apart."""
    console = Console(width=max(Console().width, WIDTH))
    table = Table(
        box=box.SIMPLE_HEAD,
        title="trials, by their best epoch's mean voxelwise r on validation images (the network alone)",
    )
    settings = list(outcomes[0].settings)
    short = [name.rpartition(".")[2] for name in settings]
    names = short if len(set(short)) == len(short) else settings
    for heading in ("trial", *(name.replace("_", "-") for name in names), "validation r", "at epoch", "epochs"):
        table.add_column(heading, justify="right")
    table.add_column("status", overflow="fold")
    for outcome in sorted(outcomes, key=lambda outcome: -(outcome.best if outcome.best is not None else -2)):
        table.add_row(
            "0 (recipe)" if outcome.trial == 0 else str(outcome.trial),
            *(str(outcome.settings[name]) for name in settings),
            "" if outcome.best is None else f"{outcome.best:.4f}",
            str(outcome.best_epoch or ""),
            str(outcome.epochs),
            outcome.status,
        )
    console.print(table)
    scores = [outcome.best for outcome in outcomes if outcome.status == "finished" and outcome.best is not None]
    if len(scores) > 1:
        console.print(
            f"{len(scores)} finished trials: validation r {min(scores):.4f} to {max(scores):.4f}, "
            f"median {statistics.median(scores):.4f}, standard deviation {statistics.stdev(scores):.4f}"
        )


def recipe_options(recipe: Recipe) -> list[str]:
    """Return the options that make the recipe of that name this one, for ``foundation.pretrain`` and for ourselves."""
    return list(_options(recipe_named(recipe.name), recipe))


def _options(plain: Any, changed: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(changed):
        before, value = getattr(plain, field.name), getattr(changed, field.name)
        if dataclasses.is_dataclass(value):
            yield from _options(before, value, "" if field.name == "data" else f"{prefix}{field.name}.")
        elif value != before:
            option = f"--{prefix}{field.name}".replace("_", "-")
            if isinstance(value, bool):
                yield option if value else f"--{prefix}no-{field.name}".replace("_", "-")
            else:
                yield from (option, *(map(str, value) if isinstance(value, tuple) else [str(value)]))

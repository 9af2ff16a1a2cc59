"""Runs on the tiny store, by the local engine: of a few seconds, stopped or killed where a test likes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from foundation.config import Recipe
from foundation.training.checkpoints import newest_checkpoint
from foundation.training.course import train_run
from foundation.training.engine import LocalEngine
from foundation.training.run import Plan

N_STEPS = 20
"""Of `tiny_recipe`."""


@dataclass
class Told:
    """What a run logs; it may ask for a stop, or fail, at given steps."""

    directory: Path
    stop_at: tuple[int, ...] = ()
    die_at: tuple[int, ...] = ()
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        self.metrics[step] = dict(metrics)
        if step in self.stop_at:
            (self.directory / "stop").touch()
        if step in self.die_at:
            raise KeyboardInterrupt


def plan(recipe: Recipe, directory: Path) -> Plan:
    directory.mkdir(parents=True, exist_ok=True)
    assert recipe.data.store is not None
    return Plan(recipe=recipe, store=recipe.data.store, directory=directory, tracking_uri="", tracking_run="")


def run_once(recipe: Recipe, directory: Path, **options) -> tuple[str, Told]:
    told = Told(directory, **options)
    (directory / "stop").unlink(missing_ok=True)
    return train_run(plan(recipe, directory), LocalEngine, told), told


def result(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor], dict]:
    """Weights, best weights, optimiser and progress at the end of a run."""
    newest = newest_checkpoint(directory)
    assert newest is not None
    return (
        load_file(newest / "model.safetensors"),
        load_file(directory / "best" / "model.safetensors"),
        load_file(newest / "optimiser.safetensors"),
        json.loads((newest / "training.json").read_text())["progress"],
    )


def assert_same(one: Path, other: Path) -> None:
    *mine, my_progress = result(one)
    *theirs, their_progress = result(other)
    assert my_progress == their_progress
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)

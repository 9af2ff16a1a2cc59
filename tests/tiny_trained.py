"""A finished run on the tiny store, with the model that was scored and its checkpoints, in a home."""

import time
from pathlib import Path

from foundation.config import Recipe
from foundation.training.course import finish_run
from foundation.training.run import describe_run
from tests.tiny_runs import plan, run_once


def train_tiny(recipe: Recipe, home: Path, *, name: str = "tiny-run") -> Path:
    """Train, finish and describe a run as `foundation.pretrain` does, without MLflow; return its directory."""
    directory = home / "runs" / name
    run_once(recipe, directory)
    finish_run(plan(recipe, directory))
    describe_run(directory, status="finished", created=time.time(), recipe=recipe.to_json(), store=recipe.data.store)
    return directory

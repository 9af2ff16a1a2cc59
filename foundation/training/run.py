"""A training run as a directory: its plan, what describes it, and which one may be resumed."""

import json
import os
import secrets
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.home import home
from data.schema import json_digest
from foundation.checkpoint import write_json
from foundation.config import Recipe
from foundation.training.memory import keep_freed_memory


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a worker must be told; everything else is in the store and in the run's directory."""

    recipe: Recipe
    store: str
    directory: Path
    tracking_uri: str
    tracking_run: str


def runs_dir() -> Path:
    """Return the directory of all training runs."""
    return home() / "runs"


def run_digest(recipe: Recipe, store_digest: str) -> str:
    """Return what identifies a run that may be resumed: the recipe and the data."""
    return json_digest({"recipe": recipe.to_json(), "store": store_digest})


def new_run(recipe: Recipe) -> Path:
    """Make a directory for a new run."""
    name = f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    path = runs_dir() / name
    path.mkdir(parents=True)
    return path


def describe_run(directory: Path, **entries: Any) -> dict[str, Any]:
    """Add to a run's ``run.json`` and return it.

    `status` is running, interrupted, failed, trained (what is left is to score and register) or finished.
    """
    path = directory / "run.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if entries:
        known |= entries
        write_json(path, known)
    return known


def run_to_resume(digest: str, *, name: str | None) -> Path:
    """Return the run called `name`, or the newest unfinished one of the same recipe and data.

    Raises
    ------
    ValueError
        If there is none, or the one named is finished or of another recipe or other data.
    """
    if name is None:
        found = [p.parent for p in runs_dir().glob("*/run.json")]
        found = [p for p in found if (d := describe_run(p))["digest"] == digest and d["status"] != "finished"]
        if not found:
            raise ValueError(f"no unfinished run of this recipe and data in {runs_dir()}; start one without --resume")
        return max(found, key=lambda p: describe_run(p)["created"])
    path = runs_dir() / name
    if not (path / "run.json").exists():
        have = ", ".join(sorted(p.parent.name for p in runs_dir().glob("*/run.json"))) or "none"
        raise ValueError(f"run {name!r} is not in {runs_dir()}; there are: {have}")
    described = describe_run(path)
    if described["digest"] != digest:
        raise ValueError(f"run {name!r} was made with other settings or data; give the same recipe, options and store")
    if described["status"] == "finished":
        raise ValueError(f"run {name!r} is finished; there is nothing to resume")
    return path


def code_version() -> str:
    """Return our version, and the commit where we run from a checkout."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("manybrains")
    except PackageNotFoundError:
        found = "0+unknown"
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found += f"+{done.stdout.strip()}"
    return found


def set_threads(n_workers_here: int) -> None:
    """Share this machine's cores among the workers on it, and keep the memory that a step frees for the next one."""
    keep_freed_memory()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // n_workers_here))

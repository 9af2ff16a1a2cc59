"""A training run as a directory: its plan, what describes it, and which one may be resumed."""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data.home import home
from foundation.checkpoint import write_json
from foundation.config import Recipe, differences
from foundation.training.memory import keep_freed_memory

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a worker must be told; everything else is in the store and in the run's directory."""

    recipe: Recipe
    store: str
    directory: Path
    tracking_uri: str
    tracking_run: str
    profile: bool = False
    """Write a trace of a few steps of the first worker."""


def runs_dir() -> Path:
    """Return the directory of all training runs."""
    return home() / "runs"


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


def unfinished_runs(recipe: Recipe, data_digest: str) -> list[Path]:
    """Return the runs of a recipe and data that could go on, the newest first."""
    found = []
    for path in runs_dir().glob("*/run.json"):
        described = describe_run(path.parent)
        if described.get("data_digest") != data_digest or described["status"] == "finished":
            continue
        with contextlib.suppress(ValueError):  # another version's, with settings that we don't know
            if Recipe.from_json(described["recipe"]) == recipe:
                found.append(path.parent)
    return sorted(found, key=lambda run: describe_run(run)["created"], reverse=True)


def finished_runs(recipe: Recipe, data_digest: str) -> list[Path]:
    """Return the finished runs of a recipe and data, the newest first, however their store and subjects were named."""

    def settings(of: Recipe) -> Recipe:
        return replace(of, data=replace(of.data, store=None, subjects=()))

    found = []
    for path in runs_dir().glob("*/run.json"):
        described = describe_run(path.parent)
        if described.get("data_digest") != data_digest or described["status"] != "finished":
            continue
        with contextlib.suppress(ValueError):  # another version's, with settings that we don't know
            if settings(Recipe.from_json(described["recipe"])) == settings(recipe):
                found.append(path.parent)
    return sorted(found, key=lambda run: describe_run(run)["created"], reverse=True)


def run_named(name: str, *, among: Path | None = None, kind: str = "run") -> Path:
    """Return the directory of a run, or of something else that has a ``run.json``, `among` others.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    among = among or runs_dir()
    if not (among / name / "run.json").exists():
        have = ", ".join(sorted(path.parent.name for path in among.glob("*/run.json"))) or "none"
        raise ValueError(f"{kind} {name!r} is not in {among}; there are: {have}")
    return among / name


def check_settings(run: Path, recipe: Recipe) -> None:
    """Raise ValueError where a run has another recipe than the one given."""
    if different := differences(recipe, Recipe.from_json(describe_run(run)["recipe"])):
        raise ValueError(
            f"run {run.name!r} has other settings than those given: {'; '.join(different)}; leave them out, and the "
            "run's own are taken"
        )


def run_to_resume(recipe: Recipe, data_digest: str, *, name: str | None) -> Path:
    """Return the run called `name`, or the newest unfinished one of the same recipe and data.

    Raises
    ------
    ValueError
        If there is none, or the one named is finished or of another recipe or other data.
    """
    if name is None:
        found = unfinished_runs(recipe, data_digest)
        if not found:
            raise ValueError(
                f"no unfinished run of this recipe, these options and data in {runs_dir()}; name one (--resume RUN "
                "takes the run's own options), or start one without --resume"
            )
        return found[0]
    path = run_named(name)
    described = describe_run(path)
    if described["status"] == "finished":
        raise ValueError(f"run {name!r} is finished; there is nothing to resume, and it can't be made longer")
    check_settings(path, recipe)
    if described["data_digest"] != data_digest:
        raise ValueError(
            f"the data that run {name!r} was made with have changed since in {described['store']}; start a new run"
        )
    return path


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Keep a run for this process.

    Raises
    ------
    ValueError
        If another process has it.
    """
    with open(directory / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"run {directory.name} is being trained by another process; stop that one first, or start a new run"
            ) from error
        except OSError as error:
            _LOG.warning("%s can't be locked (%s): see to it that no two processes train it", directory, error)
        yield


def is_held(directory: Path) -> bool:
    """Return whether another process trains a run."""
    try:
        with held(directory):
            return False
    except ValueError:
        return True


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
    """Share the cores of this machine that we may use among the workers on it; keep the memory that a step frees."""
    keep_freed_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // n_workers_here))

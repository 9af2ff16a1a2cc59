"""A training run from its plan: what every worker does, be it one process or many."""

import json
import os
import secrets
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from data.audit import audit_fit
from data.home import home
from data.parcels import Parcels, make_parcels, parse_parcels
from data.preprocess import Preprocessing, samples
from data.schema import json_digest
from data.splits import split_of
from data.store import PooledStore
from foundation.checkpoint import load_model, newest_checkpoint, write_json
from foundation.config import OptimConfig, Recipe
from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel
from foundation.training.engine import Engine
from foundation.training.loop import Course, Log, Progress, train

STATISTICS_IMAGES = 2048
EngineFactory = Callable[[EncodingModel, OptimConfig], Engine]


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


def build_model(
    recipe: Recipe, store: PooledStore, course_images: np.ndarray, parcels: dict[str, Parcels]
) -> EncodingModel:
    """Return a fresh model for subjects with `parcels`; the tokens' statistics are of (some of) `course_images`."""
    tokens = store.tokens(recipe.data.encoder)
    depth, patch, width = tokens.shape
    of_voxels = {name: torch.from_numpy(of_subject.labels).long() for name, of_subject in parcels.items()}
    torch.manual_seed(recipe.seed)
    model = EncodingModel(TokenShape(depth=depth, patch=patch, width=width), recipe.backbone, of_voxels)
    images = np.unique(course_images)
    images = np.random.default_rng(recipe.seed).permutation(images)[:STATISTICS_IMAGES]
    cls, patches = tokens.read(np.sort(images))
    model.streams.set_statistics(torch.from_numpy(cls).float(), torch.from_numpy(patches).float())
    return model


def train_run(plan: Plan, make_engine: EngineFactory, log: Log) -> Literal["trained", "interrupted"]:
    """Train as `plan` says, from the newest checkpoint of its directory if there is one."""
    recipe, store = plan.recipe, PooledStore.open(plan.store)
    split = split_of(store)
    names = [store.resolve_subject(s) for s in recipe.data.subjects]
    train_samples = {name: samples(store.subject(name), split, "train") for name in names}
    validation = {name: samples(store.subject(name), split, "validation") for name in names}
    spec = parse_parcels(recipe.data.parcels)
    parcels = {
        name: make_parcels(
            spec,
            store.subject(name).voxels,
            responses=train_samples[name],
            split_digest=split.digest_of(store.subject(name).image),
            seed=recipe.seed,
        )
        for name in names
    }
    pictures = store.picture_digests()
    audit_fit(store.image_ids(), split, train_samples, validation, parcels=parcels, pictures=pictures)
    progress, checkpoint = Progress(), newest_checkpoint(plan.directory)
    if checkpoint is None:
        model = build_model(recipe, store, np.concatenate([s.image for s in train_samples.values()]), parcels)
    else:
        model, _ = load_model(checkpoint)
        progress = Progress(**json.loads((checkpoint / "training.json").read_text()))
    tokens = store.tokens(recipe.data.encoder)
    for part in (train_samples, validation):
        tokens.require(np.concatenate([s.image for s in part.values()]))
    engine = make_engine(model, recipe.optim)
    if checkpoint is not None:
        engine.load_optimiser(checkpoint / "optimiser")
    made_from = {
        "recipe": recipe.to_json(),
        "store": plan.store,
        "store_digest": store.digest(names, recipe.data.encoder),
        "subject_digests": {name: store.subject(name).digest for name in names},
        "encoder_digest": tokens.digest,
        "split_digest": split.digest_of(np.concatenate([store.subject(name).image for name in names])),
        "preprocessing_digest": Preprocessing().digest,
        "parcels": {name: of_subject.key for name, of_subject in parcels.items()},
        "code_version": code_version(),
        "run": plan.directory.name,
    }
    course = Course(
        recipe=recipe,
        tokens=tokens,
        train=train_samples,
        validation=validation,
        directory=plan.directory,
        made_from=made_from,
    )
    stop = plan.directory / "stop"
    return train(engine, course, progress, log=log if engine.rank == 0 else _silent, stop=stop.exists)


def _silent(metrics: Any, step: int) -> None:
    """Log nothing: the other ranks."""


def set_threads(n_workers_here: int) -> None:
    """Share this machine's cores among the workers on it."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // n_workers_here))

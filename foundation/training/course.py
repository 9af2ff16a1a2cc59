"""A training run from its plan: the closed-form start, what every worker does, and what is settled at the end.

::

    start_run    once   parcels, token statistics, each subject's closed-form path      -> start/
    train_run    each worker, be it one process or many                                 -> checkpoints/, best/
    finish_run   once   the network's share in each voxel, the noise of single trials   -> final/
"""

import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from data.audit import audit_fit
from data.parcels import Parcels, make_parcels, parse_parcels
from data.preprocess import Preprocessing, Samples, samples
from data.splits import Part, Split, split_of
from data.store import PooledStore, TokenReader
from foundation.checkpoint import load_adapter, load_model, new_directory, read_description, save_model, standing
from foundation.closed_form.finish import finish_adapter
from foundation.closed_form.linear_start import linear_start
from foundation.closed_form.roi_weights import weights_of_subject
from foundation.closed_form.threads import threads_for
from foundation.config import Recipe
from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel
from foundation.training.checkpoints import Progress, Tell, newest_checkpoint, read_optimiser_state, read_progress
from foundation.training.engine import EngineFactory
from foundation.training.loop import Course, Log, train
from foundation.training.profile import profiled
from foundation.training.run import Plan, code_version
from foundation.training.validation import validation_scores

STATISTICS_IMAGES = 2048
STATISTICS_BATCH = 64
START, SOLVED, FINAL = "start", "solved", "final"


@dataclass(frozen=True)
class Material:
    """What a run learns from: the training and validation images of its subjects, audited."""

    plan: Plan

    @cached_property
    def store(self) -> PooledStore:
        """The store."""
        return PooledStore.open(self.plan.store)

    @cached_property
    def split(self) -> Split:
        """The store's split."""
        return split_of(self.store)

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.plan.recipe

    @cached_property
    def names(self) -> list[str]:
        """The subjects."""
        return [self.store.resolve_subject(s) for s in self.recipe.data.subjects]

    @cached_property
    def train(self) -> dict[str, Samples]:
        """Training images."""
        return self._samples("train")

    @cached_property
    def validation(self) -> dict[str, Samples]:
        """Validation images."""
        return self._samples("validation")

    def _samples(self, part: Part) -> dict[str, Samples]:
        n_sessions = self.recipe.data.sessions
        return {name: samples(self.store.subject(name), self.split, part, n_sessions=n_sessions) for name in self.names}

    @cached_property
    def parcels(self) -> dict[str, Parcels]:
        """Stage-1 ROIs."""
        spec = parse_parcels(self.recipe.data.parcels)
        return {
            name: make_parcels(
                spec,
                self.store.subject(name).voxels,
                responses=self.train[name],
                split_digest=self.split.digest_of(self.store.subject(name).image),
                n_sessions=self.recipe.data.sessions,
                seed=self.recipe.seed,
            )
            for name in self.names
        }

    @cached_property
    def tokens(self) -> TokenReader:
        """The encoder's tokens, which are there for every image that is needed."""
        tokens = self.store.tokens(self.recipe.data.encoder)
        for part in (self.train, self.validation):
            tokens.require(np.concatenate([s.image for s in part.values()]))
        return tokens

    def audit(self) -> None:
        """Refuse a leak."""
        pictures = self.store.picture_digests()
        ids = self.store.image_ids()
        audit_fit(ids, self.split, self.train, self.validation, parcels=self.parcels, pictures=pictures)

    @cached_property
    def made_from(self) -> dict[str, Any]:
        """The lineage that a model of this run carries."""
        images = np.concatenate([self.store.subject(name).image for name in self.names])
        return {
            "recipe": self.recipe.to_json(),
            "store": self.plan.store,
            "store_digest": self.store.digest(self.names, self.recipe.data.encoder),
            "subject_digests": {name: self.store.subject(name).digest for name in self.names},
            "encoder_digest": self.tokens.digest,
            "encoder": {
                "name": self.tokens.name,
                "digest": self.tokens.digest,
                "spec": self.tokens.spec,
                "source": self.tokens.provenance.get("source", self.tokens.name),
                "revision": self.tokens.provenance.get("revision"),
            },
            "split_digest": self.split.digest_of(images),
            "preprocessing_digest": Preprocessing().digest,
            "parcels": {name: of_subject.key for name, of_subject in self.parcels.items()},
            "code_version": code_version(),
            "run": self.plan.directory.name,
        }


def build_model(
    recipe: Recipe, tokens: TokenReader, course_images: np.ndarray, parcels: dict[str, Parcels]
) -> EncodingModel:
    """Return a fresh model for subjects with `parcels`; the tokens' statistics are of (some of) `course_images`."""
    depth, patch, width = tokens.shape
    of_voxels = {name: torch.from_numpy(of_subject.labels).long() for name, of_subject in parcels.items()}
    torch.manual_seed(recipe.seed)
    model = EncodingModel(TokenShape(depth=depth, patch=patch, width=width), recipe.backbone, of_voxels)
    images = np.unique(course_images)
    images = np.random.default_rng(recipe.seed).permutation(images)[:STATISTICS_IMAGES]
    batches = np.split(np.sort(images), range(STATISTICS_BATCH, len(images), STATISTICS_BATCH))
    read = (tokens.read(rows) for rows in batches)
    model.streams.set_statistics((torch.from_numpy(cls), torch.from_numpy(patch)) for cls, patch in read)
    return model


def start_run(plan: Plan, *, tell: Tell = lambda text: None) -> None:
    """Write the model that training starts from, unless it is there: the run is then resumed.

    A subject whose closed-form path is solved is kept in ``solved/`` meanwhile, so that an interruption costs one
    subject's.
    """
    if standing(plan.directory / START).exists():
        return
    material = Material(plan)
    material.audit()
    recipe, tokens = plan.recipe, material.tokens
    images = np.concatenate([s.image for s in material.train.values()])
    model = build_model(recipe, tokens, images, material.parcels).eval()
    for name, train_samples in material.train.items():
        solved = plan.directory / SOLVED / name
        if standing(solved).exists():
            load_adapter(model, solved)
            continue
        adapter = model.adapter(name)
        subject = material.store.subject(name)
        weights = weights_of_subject(
            recipe.loss.roi_target,
            adapter.parcel,
            subject,
            material.split,
            train_samples,
            n_sessions=recipe.data.sessions,
        )
        adapter.target_weight.copy_(weights)
        if recipe.start == "ridge":
            tell(f"closed-form start of {name}: {len(train_samples)} images, {adapter.n_voxel} voxels")
            with threads_for(train_samples.responses.size):
                linear_start(model, name, tokens, train_samples, seed=recipe.seed)
            with new_directory(solved) as directory:
                save_model(model, directory, made_from=material.made_from, only=name)
    with new_directory(plan.directory / START) as directory:
        save_model(model, directory, made_from=material.made_from)
    shutil.rmtree(plan.directory / SOLVED, ignore_errors=True)


def train_run(
    plan: Plan, make_engine: EngineFactory, log: Log, *, tell: Tell = lambda text: None
) -> Literal["trained", "interrupted"]:
    """Train as `plan` says, from the newest checkpoint of its directory if there is one, else from its start.

    Only the first rank's `log` and `tell` are used.
    """
    material, recipe = Material(plan), plan.recipe
    material.audit()
    damaged: list[str] = []
    progress, checkpoint = Progress(), newest_checkpoint(plan.directory, tell=damaged.append)
    if checkpoint is None:
        start_run(plan)
    model, _ = load_model(checkpoint or plan.directory / START)
    engine = make_engine(model, recipe)
    if engine.rank != 0:
        log, tell = _silent, _silent
    for line in damaged:
        tell(line)
    if checkpoint is not None:
        progress = read_progress(checkpoint)
        engine.load_optimiser_state(read_optimiser_state(checkpoint))
        tell(f"going on from step {progress.step}")
    if engine.any(engine.mean([float(progress.step)]) != [float(progress.step)]):
        raise RuntimeError("workers found different checkpoints: not all of them see the same files yet")
    if engine.any(not _best_is_of(plan.directory / "best", progress)):
        progress.best_score = progress.best_step = None
    course = Course(
        recipe=recipe,
        tokens=material.tokens,
        train=material.train,
        validation=material.validation,
        directory=plan.directory,
        made_from=material.made_from,
    )
    profiler = profiled(plan.directory / "profile", tell=tell) if plan.profile and engine.rank == 0 else nullcontext()
    with profiler as after_step:
        stop = (plan.directory / "stop").exists
        return train(engine, course, progress, log=log, tell=tell, stop=stop, after_step=after_step or (lambda: None))


def _best_is_of(directory: Path, progress: Progress) -> bool:
    """Return whether ``best/`` is what a run's progress says; not so if it came after the checkpoint, or is damaged.

    It then comes again, and is written again.
    """
    if progress.best_step is None:
        return True
    try:
        made_from = read_description(directory)["made_from"]
    except ValueError:
        return False
    return (made_from["step"], made_from["validation_voxel_r"]) == (progress.best_step, progress.best_score)


def finish_run(plan: Plan, *, tell: Tell = lambda text: None) -> None:
    """Write the model that is scored and registered: the best checkpoint, with what only validation images settle."""
    material = Material(plan)
    model, made_from = load_model(plan.directory / "best")
    for name, validation in material.validation.items():
        subject = material.store.subject(name)
        settled = finish_adapter(
            model,
            subject,
            material.tokens,
            material.split,
            validation,
            seed=plan.recipe.seed,
            n_sessions=plan.recipe.data.sessions,
        )
        tell(f"{name}: {settled}")
    # Of what is registered, not of the network alone; the shares were settled on these very images.
    score = validation_scores(model, material.tokens, material.validation)["validation/voxel_r"]
    with new_directory(plan.directory / FINAL) as directory:
        save_model(model, directory, made_from=made_from | {"validation_voxel_r": score})


def _silent(*_: Any) -> None:
    """Say nothing: the other ranks."""

"""The training loop. It knows neither Ray nor DeepSpeed nor MLflow: an engine computes, a `log` is told.

Randomness is drawn anew at each step from (seed, step, rank), so a resumed run needs no saved generator.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from data.loader import Loader, ordered_batches
from data.preprocess import Samples
from data.store import TokenReader
from foundation.checkpoint import new_directory, newest_checkpoint, prune_checkpoints, save_model, write_json
from foundation.config import Recipe
from foundation.evaluation.metrics import voxelwise_r
from foundation.losses import objective
from foundation.model.encoding_model import EncodingModel
from foundation.training.engine import Engine
from foundation.training.optim import learning_rate, stage_at

Log = Callable[[Mapping[str, float], int], None]


@dataclass(kw_only=True)
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    best_score: float | None = None
    best_step: int | None = None


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a run trains on, and where it keeps its checkpoints."""

    recipe: Recipe
    tokens: TokenReader
    train: dict[str, Samples]
    validation: dict[str, Samples]
    directory: Path
    made_from: dict[str, Any]


def predict_samples(model: EncodingModel, tokens: TokenReader, samples: Samples) -> np.ndarray:
    """Return the model's prediction for each of a subject's samples, (image, voxel), the latent at its mean."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    found = []
    with torch.inference_mode():
        for batch in ordered_batches(tokens, samples):
            batch = batch.to(device)
            found.append(model.predict(batch.cls, batch.patch, samples.subject).cpu().numpy())
    model.train(was_training)
    return np.concatenate(found)


def validation_scores(model: EncodingModel, tokens: TokenReader, validation: Mapping[str, Samples]) -> dict[str, float]:
    """Return each subject's mean voxelwise correlation on its validation images, and their mean."""
    scores = {}
    for name, samples in validation.items():
        r = voxelwise_r(predict_samples(model, tokens, samples), samples.responses)
        scores[f"validation/voxel_r/{name}"] = float(np.nan_to_num(r).mean())
    return scores | {"validation/voxel_r": float(np.mean(list(scores.values())))}


def save_checkpoint(engine: Engine, course: Course, progress: Progress) -> None:
    """Write a checkpoint: whole under its final name, or not there; an older one of the same step gives way."""
    final = course.directory / "checkpoints" / f"step-{progress.step:07d}"
    temporary = final.with_name(f".{final.name}.optimiser")
    engine.save_optimiser(temporary)
    engine.barrier()
    if engine.rank == 0:
        with new_directory(final) as directory:
            save_model(engine.model, directory, made_from=course.made_from)
            write_json(directory / "training.json", vars(progress))
            temporary.rename(directory / "optimiser")
        prune_checkpoints(course.directory, keep=course.recipe.keep_checkpoints)
    engine.barrier()


def train(
    engine: Engine, course: Course, progress: Progress, *, log: Log, stop: Callable[[], bool]
) -> Literal["trained", "interrupted"]:
    """Train from `progress` to the end, or until `stop` says so on any rank; a checkpoint is left in either case.

    Raises
    ------
    ValueError
        If the loss is not finite: the message names the step and the newest checkpoint.
    """
    recipe = course.recipe
    loader = Loader(
        course.tokens,
        course.train,
        batch_size=recipe.optim.batch_size,
        seed=recipe.seed,
        rank=engine.rank,
        world=engine.world,
        shuffle_buffer=recipe.data.shuffle_buffer,
    )
    n_steps = loader.steps_per_epoch * recipe.optim.epochs
    since, at = time.perf_counter(), progress.step
    for batch in loader.steps(progress.step, n_steps):
        if engine.any(stop()):
            save_checkpoint(engine, course, progress)
            return "interrupted"
        step = progress.step
        torch.manual_seed(int(np.random.SeedSequence([recipe.seed, step, engine.rank]).generate_state(1)[0]))
        engine.wrapped.train()
        batch = batch.to(engine.device)
        rows = {name: part.rows for name, part in batch.parts.items()}
        stage = stage_at(step, n_steps, recipe.optim)
        output = engine.wrapped(batch.cls, batch.patch, rows, sample=True, hold_stage1=stage == "stage2")
        responses = {name: part.responses for name, part in batch.parts.items()}
        losses = objective(engine.model, output, responses, recipe.loss, stage=stage, image=batch.image)
        rate = learning_rate(step, n_steps, recipe.optim)
        loss = float(losses.total.detach())
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss of step {step} is {loss}; start a run with --optim.lr below {recipe.optim.lr:g} "
                f"(the newest whole checkpoint: {newest_checkpoint(course.directory) or 'none yet'})"
            )
        norm = engine.step(losses.total, lr=rate, stage=stage)
        progress.step = step + 1
        terms = {f"train/{name}": float(term.detach()) for name, term in losses.terms.items()}
        means = engine.mean([loss, *terms.values()])
        told = dict(zip(["train/loss", *terms], means, strict=True)) | {"train/lr": rate, "train/grad_norm": norm}
        last = progress.step == n_steps
        if progress.step % loader.steps_per_epoch == 0 or last:
            scores = validation_scores(engine.model, course.tokens, course.validation)
            passed = time.perf_counter() - since
            told |= scores | {"train/images_per_s": (progress.step - at) * recipe.optim.batch_size / passed}
            since, at = time.perf_counter(), progress.step
            _keep_best(engine, course, progress, scores["validation/voxel_r"])
        log(told, progress.step)
        if progress.step % recipe.checkpoint_every == 0 or last:
            save_checkpoint(engine, course, progress)
    return "trained"


def _keep_best(engine: Engine, course: Course, progress: Progress, score: float) -> None:
    """Keep the model in ``best/`` if it beats all before it on the validation images."""
    if progress.best_score is not None and score <= progress.best_score:
        return
    progress.best_score, progress.best_step = score, progress.step
    if engine.rank == 0:
        with new_directory(course.directory / "best") as directory:
            save_model(
                engine.model,
                directory,
                made_from=course.made_from | {"step": progress.step, "validation_voxel_r": score},
            )
    engine.barrier()

"""The training loop. It knows neither Ray nor DeepSpeed nor MLflow: an engine computes, a `log` is told.

Randomness is drawn anew for each part of a step from (seed, step, rank among all ranks' parts), so a resumed run needs
no saved generator, and a rank that takes its share in two parts draws what two ranks would.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from data.batch import Batch
from data.loader import Loader
from data.preprocess import Samples
from data.store import TokenReader
from foundation.checkpoint import new_directory, save_model
from foundation.config import Recipe
from foundation.training.bad_steps import WINDOW, refuse, what_is_bad
from foundation.training.checkpoints import Progress, Tell, newest_checkpoint, prune_checkpoints, write_checkpoint
from foundation.training.engine import Engine
from foundation.training.optim import learning_rate, stage_at
from foundation.training.stopwatch import Stopwatch
from foundation.training.validation import validation_scores

TELL_S = 10.0
"""Seconds between reports of throughput and phases, besides those with each validation."""

Log = Callable[[Mapping[str, float], int], None]


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a run trains on, and where it keeps its checkpoints."""

    recipe: Recipe
    tokens: TokenReader
    train: dict[str, Samples]
    validation: dict[str, Samples]
    directory: Path
    made_from: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The things that a step needs."""

    engine: Engine
    course: Course
    progress: Progress
    tell: Tell
    watch: Stopwatch
    n_steps: int
    steps_per_epoch: int


def train(
    engine: Engine,
    course: Course,
    progress: Progress,
    *,
    log: Log,
    tell: Tell,
    stop: Callable[[], bool],
    after_step: Callable[[], None] = lambda: None,
) -> Literal["trained", "interrupted"]:
    """Train from `progress` to the end, or until `stop` says so on any rank; a checkpoint is left in either case.

    Parameters
    ----------
    log, tell : are given each step's metrics, and what people should hear.
    after_step : called after each step, for a profiler.

    Raises
    ------
    ValueError
        If a step is bad (`bad_steps`) and the policy is to stop, or too many were skipped.
    OSError
        If a checkpoint can't be written.
    """
    recipe = course.recipe
    loader = Loader(
        course.tokens,
        course.train,
        batch_size=recipe.optim.batch_size,
        seed=recipe.seed,
        rank=engine.rank,
        world=engine.world,
        parts=engine.accumulate,
        shuffle_buffer=recipe.data.shuffle_buffer,
    )
    run = _Run(
        engine=engine,
        course=course,
        progress=progress,
        tell=tell,
        watch=Stopwatch(),
        n_steps=loader.steps_per_epoch * recipe.optim.epochs,
        steps_per_epoch=loader.steps_per_epoch,
    )
    with closing(loader.steps(progress.step, run.n_steps)) as batches:
        while progress.step < run.n_steps and not _patience_is_over(run):
            if engine.any(stop()):
                _save(run)
                return "interrupted"
            told = _step(run, batches)
            over = progress.step == run.n_steps
            if progress.step % run.steps_per_epoch == 0 or over:
                told |= _validate(run)
                over = over or _patience_is_over(run)
            if "validation/voxel_r" in told or run.watch.window_s > TELL_S:
                told |= _pace(run)
            log(told, progress.step)
            if progress.step % recipe.checkpoint_every == 0 or over:
                _save(run)
            after_step()
    return "trained"


def _step(run: _Run, batches: Iterator[Batch]) -> dict[str, float]:
    """Take a step, unless it is bad; return what there is to tell."""
    engine, progress, config, watch = run.engine, run.progress, run.course.recipe.optim, run.watch
    step, parts = progress.step, engine.accumulate
    stage, rate = stage_at(step, run.n_steps, config), learning_rate(step, run.n_steps, config)
    if step and stage != stage_at(step - 1, run.n_steps, config):
        progress.losses = []  # another objective, with other usual losses
    sums: dict[str, float] = {}
    means: dict[str, float] = {}
    bad = None
    for part in range(parts):
        with watch.phase("data"):
            batch = next(batches).to(engine.device)
        with watch.phase("forward"):
            seeds = [run.course.recipe.seed, step, engine.rank + engine.world * part]
            torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))
            losses = engine.forward(batch, stage=stage)
            for name, term in (("loss", losses.total), *losses.terms.items()):
                sums[name] = sums.get(name, 0.0) + float(term.detach()) / parts
            total, last = losses.total, part == parts - 1
            if last:  # known to all ranks alike, before a gradient counts
                means = dict(zip(sums, engine.mean(list(sums.values())), strict=True))
                bad = what_is_bad(means["loss"], progress.losses, config)
                total = total if bad is None else total * torch.nan  # which no engine takes a step by
        with watch.phase("backward"):
            engine.backward(total, last=last)
    with watch.phase("update"):
        norm = engine.step(lr=rate, stage=stage)
    if bad is None and not np.isfinite(norm):
        bad = f"the gradient's norm is {norm}"
    progress.step += 1
    watch.n_steps += 1
    _take_note(run, step, means["loss"], bad)
    told = {f"train/{name}": mean for name, mean in means.items()} | {"train/lr": rate, "train/grad_norm": norm}
    return told | ({"train/skipped": progress.n_skipped} if progress.n_skipped else {})


def _take_note(run: _Run, step: int, loss: float, bad: str | None) -> None:
    """Count a good or a bad step, and say so or stop if it was bad."""
    progress, config = run.progress, run.course.recipe.optim
    if bad is None:
        progress.losses = [*progress.losses, loss][-WINDOW:]
        progress.n_skipped_in_a_row = 0
        return
    progress.n_skipped += 1
    progress.n_skipped_in_a_row += 1
    refuse(bad, step, progress.n_skipped_in_a_row, config, newest=lambda: newest_checkpoint(run.course.directory))
    run.tell(f"step {step} is skipped: {bad}")


def _validate(run: _Run) -> dict[str, float]:
    """Score the model on the validation images, and keep it in ``best/`` if it beats all before it."""
    engine, course, progress = run.engine, run.course, run.progress
    with run.watch.phase("validation"):
        scores = validation_scores(engine.model, course.tokens, course.validation, engine=engine)
    (score,) = engine.mean([scores["validation/voxel_r"]])  # ranks on unlike processors must decide alike
    if progress.best_score is None or score > progress.best_score:
        progress.best_score, progress.best_step = score, progress.step
        weights = engine.weights()
        if weights is not None:
            made_from = course.made_from | {"step": progress.step, "validation_voxel_r": score}
            with new_directory(course.directory / "best") as directory:
                save_model(engine.model, directory, made_from=made_from, state=weights)
        engine.barrier()
    return scores


def _patience_is_over(run: _Run) -> bool:
    """Return whether the validation score hasn't risen for as many epochs as the recipe waits."""
    patience, progress = run.course.recipe.optim.patience, run.progress
    if patience is None or progress.best_step is None:
        return False
    return progress.step - progress.best_step >= patience * run.steps_per_epoch


def _save(run: _Run) -> None:
    """Write a checkpoint, and remove those that are too old."""
    engine, course = run.engine, run.course
    with run.watch.phase("checkpoint"):
        weights, optimiser = engine.weights(), engine.optimiser_state()
        if weights is not None and optimiser is not None:
            written = write_checkpoint(
                course.directory,
                run.progress,
                engine.model,
                weights=weights,
                optimiser=optimiser,
                made_from=course.made_from,
            )
            prune_checkpoints(course.directory, written, keep=course.recipe.keep_checkpoints)
        engine.barrier()


def _pace(run: _Run) -> dict[str, float]:
    """Return throughput, phases, and how long the rest will take at this pace."""
    n_steps, window_s = run.watch.n_steps, run.watch.window_s
    depth, patch, _ = run.course.tokens.shape
    told = run.watch.take(images_per_step=run.course.recipe.optim.batch_size, tokens_per_image=depth * (1 + patch))
    return told | {"time/left_s": (run.n_steps - run.progress.step) * window_s / max(n_steps, 1)}

"""Ranks without Ray: a process each, joined by gloo, that train a tiny model by a DeepSpeed engine.

What is trained on is told by a rank's number among all ranks' parts, so that ranks and parts can be compared.
"""

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from cluster.config import ClusterConfig
from data.batch import Batch, Part
from foundation.config import BackboneConfig, LossConfig, OptimConfig, Recipe
from foundation.losses import Stage
from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel
from foundation.training.engine import Engine
from tests.tiny_store import TINY_BACKBONE

SHAPE = TokenShape(depth=2, patch=16, width=6)
N_VOXELS = {"subj01": 14, "subj02": 9, "subj05": 12}
BACKBONE = replace(TINY_BACKBONE, n_contrast=5, drop_path=0.1, token_dropout=0.1)
RECIPE = Recipe(name="tiny", backbone=BACKBONE, loss=LossConfig(), optim=OptimConfig(lr=1e-2, clip=1.0, batch_size=24))
N_STEPS, HALF, BAD = 20, 10, 7
N_ROWS = 6
"""Rows of a part: with three subjects, one is often absent."""


def make_model(backbone: BackboneConfig = BACKBONE) -> EncodingModel:
    """Return the same model in every process."""
    torch.manual_seed(0)
    return EncodingModel(SHAPE, backbone, {name: torch.arange(n) % 4 for name, n in N_VOXELS.items()})


def make_batch(step: int, part: int) -> Batch:
    """Return the rows of a part of a step; every third step, part 0 has none of the second subject."""
    rng = np.random.default_rng([step, part])
    owner = np.sort(rng.integers(0, len(N_VOXELS), N_ROWS))
    if part == 0 and step % 3 == 0:
        owner[owner == 1] = 0
    made = torch.Generator().manual_seed(1000 * step + part)
    parts, start = {}, 0
    for i, (name, n_voxel) in enumerate(N_VOXELS.items()):
        n = int((owner == i).sum())
        parts[name] = Part(rows=slice(start, start + n), responses=torch.randn(n, n_voxel, generator=made))
        start += n
    return Batch(
        cls=torch.randn(N_ROWS, SHAPE.depth, SHAPE.width, generator=made),
        patch=torch.randn(N_ROWS, SHAPE.depth, SHAPE.patch, SHAPE.width, generator=made),
        image=torch.arange(N_ROWS),
        parts=parts,
    )


@dataclass(kw_only=True)
class Trained:
    """What a training did; states and weights by the step before which they were taken."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[int, dict[str, Tensor] | None] = field(default_factory=dict)
    states: dict[int, dict[str, Tensor] | None] = field(default_factory=dict)
    predicted: dict[str, Tensor] = field(default_factory=dict)
    held: int = 0
    """Most numbers of the model's parameters that a rank had at a time."""


def train(engine: Engine, *, start: int = 0, stage_at: Callable[[int], Stage | None]) -> Trained:
    """Take steps `start` to `N_STEPS`, step `BAD` with a loss that isn't a number, and predict."""
    found = Trained()
    for step in range(start, N_STEPS + 1):
        if step in (BAD, BAD + 1, HALF, N_STEPS):
            found.weights[step] = _copied(engine.weights())
            found.states[step] = _copied(engine.optimiser_state())
        if step == N_STEPS:
            break
        means = []
        for k in range(engine.accumulate):
            part = engine.rank + engine.world * k
            torch.manual_seed(100 * step + part)
            losses = engine.forward(make_batch(step, part), stage=stage_at(step))
            means.append(float(losses.total.detach()))
            last = k == engine.accumulate - 1
            engine.backward(losses.total * (torch.nan if last and step == BAD else 1), last=last)
        found.losses += engine.mean([float(np.mean(means))])
        found.norms.append(engine.step(lr=0.01 / (1 + step), stage=stage_at(step)))
    engine.model.eval()
    with torch.no_grad():
        batch = make_batch(N_STEPS, 0)
        found.predicted = {name: engine.model.predict(batch.cls, batch.patch, name) for name in N_VOXELS}
    engine.model.train()
    return found


def _copied(state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    return None if state is None else {name: tensor.clone() for name, tensor in state.items()}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training on some ranks."""

    name: str
    cluster: ClusterConfig
    resume: str | None = None
    """Training whose weights and state at step `HALF` this one goes on from."""
    backbone: BackboneConfig = BACKBONE
    staged: bool = False


def run_jobs(jobs: Sequence[Job], world: int, *, given: Mapping[str, Trained]) -> dict[str, Trained]:
    """Run the jobs one after the other, all on the same ranks; return what the first rank tells, and what is given."""
    with tempfile.TemporaryDirectory() as place:
        for name, trained in given.items():
            torch.save(trained, Path(place) / name)
        mp.spawn(_rank, args=(world, list(jobs), place), nprocs=world)
        told = {job.name: torch.load(Path(place) / job.name, weights_only=False) for job in jobs}
    return told | dict(given)


def _rank(rank: int, world: int, jobs: list[Job], place: str) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}
    warnings.simplefilter("ignore")  # DeepSpeed calls what torch deprecates
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=world)
    from cluster.deepspeed_engine import DeepSpeedEngine

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    for job in jobs:
        model, before = make_model(job.backbone), None
        if job.resume is not None:
            before = torch.load(Path(place) / job.resume, weights_only=False)
            model.load_state_dict(before.weights[HALF])
        recipe = replace(RECIPE, backbone=job.backbone)
        engine = DeepSpeedEngine(model, recipe, job.cluster, bucket=1000, persistent=0)
        if before is not None:
            engine.load_optimiser_state(before.states[HALF])
        held = watch_held(model)
        found = train(engine, start=HALF if before else 0, stage_at=staged if job.staged else jointly)
        found.held = max(held)
        if rank == 0:
            torch.save(found, Path(place) / job.name)
        engine.barrier()
    dist.destroy_process_group()


def watch_held(model: EncodingModel) -> list[int]:
    """Return a list that numbers are added to while `model` trains: how many numbers of its parameters are there."""
    held: list[int] = []

    def look(*_: object) -> None:
        held.append(sum(parameter.numel() for parameter in model.parameters()))

    for module in model.modules():
        module.register_forward_pre_hook(look)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(look)
    return held


def jointly(step: int) -> None:
    """Return the stage of a training without stages."""


def staged(step: int) -> Stage:
    """Return the stage that a staged training is in."""
    return "stage1" if step < N_STEPS // 2 else "stage2"


def difference(one: Any, other: Any) -> float:
    """Return the largest relative difference of two lists of numbers, where both are finite."""
    one, other = np.asarray(one), np.asarray(other)
    np.testing.assert_array_equal(np.isfinite(one), np.isfinite(other))
    finite = np.isfinite(one)
    return float(np.max(np.abs(one - other)[finite] / np.abs(other)[finite]))

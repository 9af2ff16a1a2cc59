"""What ZeRO's stages save and cost: two workers on this machine's processors against the local engine, as a table.

    python -m tests.experiments.zero_stages [--steps 20]

A model of 8 subjects x 16,000 voxels learns random responses to random tokens. Every process computes on one thread.
Memory is what a worker takes beyond what it had before the model was made: `held` counts the tensors that are alive
between a step's backward pass and its update (parameters, gradients, the optimiser's state; exact), `peak` is the
kernel's own high-water mark of the resident memory while training. Seconds are medians; on a busy machine those of the
processor (`CPU`) tell more than those of the clock.
"""

import argparse
import gc
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from cluster.config import ClusterConfig
from data.batch import Batch, Part
from foundation.config import BackboneConfig, ComputeConfig, MambaConfig, OptimConfig, Recipe
from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel
from foundation.training.engine import Engine, LocalEngine

SHAPE = TokenShape(depth=4, patch=16, width=256)
N_SUBJECTS, N_VOXELS, N_ROIS = 8, 16_000, 40
BACKBONE = BackboneConfig(
    width=512,
    n_patch_layer=8,
    n_component=512,
    n_local=32,
    n_linear_whole=1,  # the closed-form path is no parameter: every stage holds it whole
    n_linear_field=1,
    linear_grid=1,
    mamba=MambaConfig(headdim=64),
)
RECIPE = Recipe(name="zero", backbone=BACKBONE, optim=OptimConfig(lr=1e-3, batch_size=2 * N_SUBJECTS))
WORKERS = 2
MIB = 2**20
CASES = {
    "local": None,
    "ZeRO 0": ClusterConfig(zero_stage=0),
    "ZeRO 1": ClusterConfig(zero_stage=1),
    "ZeRO 2": ClusterConfig(zero_stage=2),
    "ZeRO 3": ClusterConfig(zero_stage=3),
    "ZeRO 3, offloaded": ClusterConfig(zero_stage=3, offload=True),
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one worker, sizes in bytes."""

    losses: list[float]
    held: int
    peak: int
    step_s: float
    cpu_s: float
    n_parameters: int


def make_model() -> EncodingModel:
    """Return the same model in every process."""
    torch.manual_seed(0)
    parcel = torch.arange(N_VOXELS) % N_ROIS
    return EncodingModel(SHAPE, BACKBONE, {f"subj{i + 1:02d}": parcel for i in range(N_SUBJECTS)})


def make_batch(step: int, part: int) -> Batch:
    """Return an image of each subject."""
    made = torch.Generator().manual_seed(1000 * step + part)
    rows = {f"subj{i + 1:02d}": slice(i, i + 1) for i in range(N_SUBJECTS)}
    return Batch(
        cls=torch.randn(N_SUBJECTS, SHAPE.depth, SHAPE.width, generator=made),
        patch=torch.randn(N_SUBJECTS, SHAPE.depth, SHAPE.patch, SHAPE.width, generator=made),
        image=torch.arange(N_SUBJECTS),
        parts={
            name: Part(rows=where, responses=torch.randn(1, N_VOXELS, generator=made)) for name, where in rows.items()
        },
    )


def tensor_bytes() -> int:
    """Return the bytes of all tensors that are alive, each storage once."""
    gc.collect()
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor):
            for tensor in (found, found.grad if found.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu":
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def resident(key: str) -> int:
    """Return ``VmRSS`` or ``VmHWM`` of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def measure(engine_of: Callable[[EncodingModel], Engine], n_steps: int) -> Measured:
    """Train, and measure."""
    gc.collect()
    before, tensors_before = resident("VmRSS"), tensor_bytes()
    model = make_model()
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    engine = engine_of(model)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    losses, times, cpu_times, held = [], [], [], 0
    for step in range(n_steps):
        engine.barrier()
        since, cpu_since, means = time.perf_counter(), time.process_time(), []
        for k in range(engine.accumulate):
            part = engine.rank + engine.world * k
            torch.manual_seed(100 * step + part)
            batch = make_batch(step, part)
            total = engine.forward(batch).total
            engine.backward(total, last=k == engine.accumulate - 1)
            means.append(float(total.detach()))
            del total
        if step == n_steps - 1:
            del batch
            held = tensor_bytes() - tensors_before - buffers
        losses += engine.mean([sum(means) / len(means)])
        engine.step(lr=RECIPE.optim.lr)
        times.append(time.perf_counter() - since)
        cpu_times.append(time.process_time() - cpu_since)
    return Measured(
        losses=losses,
        held=held,
        peak=resident("VmHWM") - before,
        step_s=median(times[2:-1]),
        cpu_s=median(cpu_times[2:-1]),
        n_parameters=n_parameters,
    )


def worker(rank: int, world: int, case: str, n_steps: int, place: str) -> None:
    """Be a worker of a case; the first tells what it measured."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cluster = CASES[case]
    if cluster is None:
        compute = ComputeConfig(accumulate=WORKERS)
        measured = measure(lambda model: LocalEngine(model, RECIPE, compute, device=torch.device("cpu")), n_steps)
    else:
        dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=world)
        from cluster.deepspeed_engine import DeepSpeedEngine

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        nn.Linear(2, 2)(torch.zeros(1, 2)).sum().backward()  # what starts with the first use is no part of the model
        dist.barrier()
        measured = measure(lambda model: DeepSpeedEngine(model, RECIPE, cluster), n_steps)
        dist.destroy_process_group()
    if rank == 0:
        torch.save(measured, Path(place) / "measured")


def run(case: str, n_steps: int) -> Measured:
    """Run a case in processes of its own."""
    world = WORKERS if CASES[case] is not None else 1
    with tempfile.TemporaryDirectory() as place:
        mp.spawn(worker, args=(world, case, n_steps, place), nprocs=world)
        return torch.load(Path(place) / "measured", weights_only=False)


def row(case: str, measured: Measured, local: Measured) -> str:
    """Return a case's row of the table."""
    worst = max(abs(a - b) / abs(b) for a, b in zip(measured.losses, local.losses, strict=True))
    sizes = f"{measured.held / MIB:.0f} | {measured.peak / MIB:.0f}"
    return f"| {case} | {worst:.1e} | {sizes} | {measured.step_s:.2f} | {measured.cpu_s:.2f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all cases, or those that are named, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args(arguments)
    # Blocks of a megabyte or more go back to the system when they are freed: the resident memory tells the need.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MIB)
    local = run("local", options.steps)
    print(f"{local.n_parameters / 1e6:.1f} M parameters ({4 * local.n_parameters / MIB:.0f} MiB)\n")
    print("| | worst relative difference of the loss | held, MiB | peak, MiB | s/step | CPU s/step |")
    print("|---|---|---|---|---|---|")
    print(row("local", local, local), flush=True)
    for case in options.cases:
        if case != "local":
            print(row(case, run(case, options.steps), local), flush=True)


if __name__ == "__main__":
    main()

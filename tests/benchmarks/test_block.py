"""The Mamba-2 block and its scan: speed, memory, and how well the backends agree.

One block, forward and backward on the CPU with two threads, at batch 16 and width 192.

`make bench ARGS="-k block"` prints the table: our block, eager and compiled, beside the block of `transformers` (with
its own default chunks, and with ours), attention of the same width, and our block's own matrix products alone. Below
it is what our compiled block does besides. All take turns in one process; a figure is a median over the rounds, and a
ratio the median of the rounds' ratios, so that a busy machine slows both sides of it. `make bench ARGS="-k backend"`
prints the errors of each backend against the definition in double precision.
"""

import time
from collections.abc import Iterator
from statistics import median

import jaxtyping
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from foundation.config import MambaConfig
from foundation.model.scan import chunked_scan, reference_scan
from foundation.training.memory import keep_freed_memory
from tests.benchmarks.block_contestants import (
    Size,
    Step,
    attention,
    convolution,
    gate_and_norm,
    ours,
    ours_compiled,
    products_of_the_scan,
    projections,
    scan,
    transformers_of_chunks,
)
from tests.foundation.model import triton_shim
from tests.foundation.model.scan_cases import RECIPES, differentiated, largest_errors, recipe_inputs

OWN_CHUNKS = MambaConfig().chunk_size
THEIRS = "transformers, chunks of 256"
BLOCKS = {
    "ours, eager": ours,
    "ours, compiled": ours_compiled,
    THEIRS: transformers_of_chunks(256),
    f"transformers, chunks of {OWN_CHUNKS}": transformers_of_chunks(OWN_CHUNKS),
    "attention": attention,
}
PIECES = {
    "projections": projections,
    "products of the scan": products_of_the_scan,
    "convolution, SiLU": convolution,
    "scan, with its products": scan,
    "D, gate, norm": gate_and_norm,
}


@pytest.fixture
def measuring(request) -> Iterator[bool]:
    """Whether this measures; shapes aren't checked meanwhile, since torch.compile can't trace the checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    enabled = bool(request.config.getoption("benchmark_enable"))
    if enabled:
        keep_freed_memory()  # as training does; it serves all contestants
    yield enabled
    torch.set_num_threads(n_threads)
    jaxtyping.config.update("jaxtyping_disable", False)


def in_turns(steps: dict[str, Step], *, rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of each step in each round."""
    took = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            took[name].append(1e3 * (time.perf_counter() - start))
    return took


def peak_mb(step: Step) -> float:
    """Return how much torch holds at once, at most, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest / 1e6


def ratio(one: list[float], other: list[float]) -> float:
    return median(a / b for a, b in zip(one, other, strict=True))


@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile warns of its own code
@pytest.mark.parametrize("length", [256, 1024])
def test_a_block_forward_and_backward(length, measuring, capsys):
    size = Size(length=length) if measuring else Size(batch=1, length=length // 16, width=32, compiler="eager")
    torch.manual_seed(0)
    steps = {name: make(size) for name, make in (BLOCKS | PIECES).items()}
    took = in_turns(steps, rounds=7 if measuring else 1)
    own = [sum(both) for both in zip(took["projections"], took["products of the scan"], strict=True)]
    lines = [f"\nbatch {size.batch}, length {length}, width {size.width}{'':9s}median   least"]
    lines += [f"  {'':30s}{'ms':>8s}{'ms':>8s}{'tokens/s':>10s}{'x theirs':>10s}{'own products':>14s}{'peak MB':>9s}"]
    for name in BLOCKS:
        ms = median(took[name])
        speed, of_own = ratio(took[THEIRS], took[name]), ratio(took[name], own)
        figures = f"{ms:8.1f}{min(took[name]):8.1f}{1e3 * size.batch * size.length / ms:10.0f}"
        lines += [f"  {name:30s}{figures}{speed:10.2f}{of_own:14.2f}{peak_mb(steps[name]):9.0f}"]
    lines += [f"  {'own matrix products':30s}{median(own):8.1f}{min(own):8.1f}"]
    lines += ["  Each piece of ours, compiled alone:"]
    lines += [f"    {name:28s}{median(took[name]):8.1f}{min(took[name]):8.1f}" for name in PIECES]
    if measuring:
        with capsys.disabled():
            print("\n".join(lines))
    assert all(ms > 0 for name in steps for ms in took[name])


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_backend_by_its_errors(recipe, measuring, capsys, tmp_path):
    double = recipe_inputs(recipe, dtype=torch.float64)
    single = recipe_inputs(recipe)
    expected = differentiated(reference_scan, double)
    of_single = differentiated(reference_scan, {name: value.double() for name, value in single.items()})
    errors = {
        "chunked, float64": largest_errors(differentiated(chunked_scan, double), expected),
        "chunked, float32": largest_errors(differentiated(chunked_scan, single), of_single),
        "reference, float32": largest_errors(differentiated(reference_scan, single), of_single),
    }
    if measuring and not triton_shim.missing():
        (kernels,) = triton_shim.run_kernels([(single, OWN_CHUNKS)], tmp_path)
        errors["mamba-ssm, float32"] = largest_errors(kernels, of_single)
        errors["chunked against mamba-ssm"] = largest_errors(differentiated(chunked_scan, single), kernels)
    lines = [f"\nerrors relative to each array's largest number, {recipe}: {tuple(single['x'].shape)}"]
    lines += ["  " + "".join(f"{name:>10s}" for name in ["", "", *expected])]
    lines += [f"  {name:26s}" + "".join(f"{error:10.0e}" for error in row.values()) for name, row in errors.items()]
    if measuring:
        with capsys.disabled():
            print("\n".join(lines))
    assert max(errors["chunked, float64"].values()) < 1e-12

"""Which part of a parameter's optimiser state a rank keeps, by ZeRO stage; whole tensors out of the parts, and back.

ZeRO 1 and 2 lay the parameters of a group end to end and cut that in equal parts, one a rank; ZeRO 3 cuts each
parameter. Either way a rank's optimiser steps flat tensors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from foundation.training.optimiser_state import MOMENTS, STEP, check_names

ZeroOptimiser = DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3


@dataclass(frozen=True, kw_only=True)
class Shard:
    """This rank's part of a parameter: `n` numbers, from `start` of it, which are those from `offset` of `flat`."""

    flat: Tensor
    offset: int
    start: int
    n: int


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """Return a parameter's whole shape, also where ZeRO 3 has taken it apart."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def optimiser_shard(optimiser: ZeroOptimiser, parameter: nn.Parameter) -> Shard | None:
    """Return this rank's part of a parameter, if it has one."""
    if isinstance(optimiser, DeepSpeedZeroOptimizer_Stage3):
        group, offset, size = optimiser.grad_position[optimiser.get_param_id(parameter)]
        start = dist.get_rank() * size
        n = min(size, shape_of(parameter).numel() - start)  # the last part may be padded
        flat = optimiser.fp32_partitioned_groups_flat[group]
        return Shard(flat=flat, offset=offset, start=start, n=n) if n > 0 else None
    mapping = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
    if mapping is None:
        return None
    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
    flat = optimiser.single_partition_of_fp32_groups[mapping.param_group_index]
    return Shard(flat=flat, offset=here.start, start=there.start, n=here.numel)


@torch.no_grad()
def step_parameters_themselves(optimiser: ZeroOptimiser) -> None:
    """Let the optimiser step a rank's part of the parameters in place, and not a copy of it.

    DeepSpeed keeps the copy for parameters in half precision; ours are in single precision, as is the copy.
    """
    if isinstance(optimiser, DeepSpeedZeroOptimizer_Stage3):
        for copy, part in zip(
            optimiser.fp32_partitioned_groups_flat, optimiser.fp16_partitioned_groups_flat, strict=True
        ):
            copy.data = part.data
        return
    for i, copy in enumerate(optimiser.single_partition_of_fp32_groups):
        copy.data = optimiser.parallel_partitioned_bit16_groups[i][dist.get_rank()].data
    optimiser._link_all_hp_params()  # which point into the copies


def whole(shape: torch.Size, part: Tensor | None, start: int, device: torch.device) -> Tensor | None:
    """Return a tensor out of all ranks' parts, on the CPU of the first rank."""
    flat = torch.zeros(shape.numel(), device=device)
    if part is not None:
        flat[start : start + len(part)] = part
    dist.reduce(flat, 0)  # parts don't overlap: the sum is exact
    return flat.view(shape).cpu() if dist.get_rank() == 0 else None


def whole_state(model: nn.Module, optimiser: ZeroOptimiser, device: torch.device) -> dict[str, Tensor] | None:
    """Return what `named_state` would of an optimiser that isn't sharded, on the first rank."""
    steps = [entry[STEP] for entry in optimiser.optimizer.state.values()]
    state = {STEP: steps[0].detach().cpu().float() if steps else torch.zeros(())}
    for name, parameter in model.named_parameters() if steps else ():
        shard = optimiser_shard(optimiser, parameter)
        for moment in MOMENTS:
            part = None
            if shard is not None:
                part = optimiser.optimizer.state[shard.flat][moment][shard.offset : shard.offset + shard.n]
            found = whole(shape_of(parameter), part, shard.start if shard else 0, device)
            if found is not None:
                state[f"{name}.{moment}"] = found
    return state if dist.get_rank() == 0 else None


def load_whole_state(model: nn.Module, optimiser: ZeroOptimiser, state: Mapping[str, Tensor]) -> None:
    """Keep this rank's parts of a state that `whole_state` or `named_state` returned."""
    named = dict(model.named_parameters())
    n_updates = check_names(state, {name: shape_of(parameter) for name, parameter in named.items()})
    optimiser.optimizer.state.clear()
    if not n_updates:
        return
    for flat in _flats(optimiser):
        moments = {moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS}
        optimiser.optimizer.state[flat] = {STEP: torch.tensor(float(n_updates), device=flat.device)} | moments
    for name, parameter in named.items():
        shard = optimiser_shard(optimiser, parameter)
        if shard is None:
            continue
        for moment in MOMENTS:
            given = state[f"{name}.{moment}"].flatten()[shard.start : shard.start + shard.n]
            optimiser.optimizer.state[shard.flat][moment][shard.offset : shard.offset + shard.n] = given


def _flats(optimiser: ZeroOptimiser) -> Iterator[Tensor]:
    if isinstance(optimiser, DeepSpeedZeroOptimizer_Stage3):
        yield from optimiser.fp32_partitioned_groups_flat
    else:
        yield from optimiser.single_partition_of_fp32_groups

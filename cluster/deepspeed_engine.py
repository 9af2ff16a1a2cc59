"""The training loop's `Engine` on DeepSpeed: ZeRO 0 to 3 over the process group that is set up already.

All stages give the same numbers but for rounding, and their states pass between them, and to and from `LocalEngine`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.config import ClusterConfig
from cluster.shards import ZeroOptimiser, load_whole_state, shape_of, step_parameters_themselves, whole, whole_state
from cluster.zero3 import ShardedStep
from data.batch import Batch
from foundation.config import OptimConfig, Recipe
from foundation.losses import Losses, Stage
from foundation.model.encoding_model import EncodingModel
from foundation.training.optim import build_optimiser, set_rates
from foundation.training.optimiser_state import load_named_state, named_state
from foundation.training.recompute import recompute_blocks
from foundation.training.step import TrainingStep, autocast_dtype

BUCKET = 5_000_000
"""Numbers that are reduced or gathered at once: 20 MB, near DDP's 25. DeepSpeed's own 500 million are as much memory as
many a model, and what ZeRO saves would go into them."""
PERSISTENT = 10_000
"""Numbers up to which a parameter stays whole under ZeRO 3: biases, norms, embeddings of ROIs."""


def zero_settings(
    cluster: ClusterConfig, optim: OptimConfig, *, world: int, bucket: int, persistent: int
) -> dict[str, Any]:
    """Return DeepSpeed's configuration."""
    stage = cluster.zero_stage
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage == 3:
        zero |= {
            "sub_group_size": bucket,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_reuse_distance": 0,  # let go after the forward pass whatever the backward pass reads again
            "stage3_param_persistence_threshold": persistent,
        }
    if cluster.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": max(1, optim.batch_size // (world * cluster.accumulate)),
        "gradient_accumulation_steps": cluster.accumulate,
        "gradient_clipping": optim.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class DeepSpeedEngine:
    """One rank of many. Parameters, gradients and the optimiser's state are in single precision in every stage.

    Parameters
    ----------
    bucket : numbers that are reduced, gathered ahead or stepped at once; even.
    persistent : numbers up to which a parameter stays whole under ZeRO 3.
    """

    def __init__(
        self,
        model: EncodingModel,
        recipe: Recipe,
        cluster: ClusterConfig,
        *,
        bucket: int = BUCKET,
        persistent: int = PERSISTENT,
    ) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.model, self.accumulate, self._stage = model, cluster.accumulate, cluster.zero_stage
        self._bucket = bucket
        # On CPUs DeepSpeed would compile an all-reduce in C++ first, which only its inference calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if cluster.recompute:
            recompute_blocks(model, early_stop=self._stage < 3)
        kind = torch.device("cuda" if cluster.gpus_per_worker else "cpu")
        step = TrainingStep(model, recipe.loss, autocast=autocast_dtype(cluster.precision, kind))
        wrapped = ShardedStep(step) if self._stage == 3 else step
        self._optimiser = build_optimiser(model, recipe.optim)  # DeepSpeed steps it, whole or sharded, by its groups
        if self._stage > 0:
            # What a rank steps lies in few long tensors; unless fused, AdamW works with several more of that length.
            for group in self._optimiser.param_groups:
                group["fused"] = True
        self._engine, zero, *_ = deepspeed.initialize(
            model=wrapped,
            optimizer=self._optimiser,
            config=zero_settings(cluster, recipe.optim, world=self.world, bucket=bucket, persistent=persistent),
            dist_init_required=False,
        )
        self.device = torch.device(str(self._engine.device))
        self._zero = zero if isinstance(zero, ZeroOptimiser) else None
        if self._zero is not None and not cluster.offload:
            step_parameters_themselves(self._zero)
        if isinstance(wrapped, ShardedStep):
            wrapped.joined()
        # Without ZeRO it would flatten all gradients into one more copy; `step` reduces them by buckets.
        self._engine.enable_backward_allreduce = self._zero is not None

    def forward(self, batch: Batch, *, stage: Stage | None = None) -> Losses:
        """Return the objective of a part of this rank's share, in training."""
        self._engine.train()
        total, terms = self._engine(batch, stage)
        return Losses(total=total, terms=terms)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of a part's loss; `last` is the step's last part."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self, *, lr: float, stage: Stage | None = None) -> float:
        """Clip and update, unless the gradient isn't finite; return its norm before clipping."""
        set_rates(self._optimiser.param_groups, lr, stage)
        if self._zero is not None:
            self._engine.step()
            norm = self._engine.get_global_grad_norm()
            assert norm is not None
            return float(norm)
        self._engine.allreduce_gradients(bucket_size=self._bucket)
        norm = float(nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]))
        if math.isfinite(norm):
            self._engine.step()
        else:
            self._engine.zero_grad()
        return norm

    def mean(self, values: Sequence[float]) -> list[float]:
        """Return the means over ranks."""
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(reduced)
        return (reduced / self.world).tolist()

    def any(self, flag: bool) -> bool:
        """Return whether any rank says so."""
        raised = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return bool(raised.item())

    def gather(self, rows: Tensor) -> Tensor:
        """Return all ranks' rows, one rank after the other; each has as many."""
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(self.world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def weights(self) -> dict[str, Tensor] | None:
        """Return the model's state, whole and on the CPU; on ranks but the first, None."""
        tensors = self.model.state_dict(keep_vars=True)
        if self._stage < 3:
            return {name: tensor.detach().cpu() for name, tensor in tensors.items()} if self.rank == 0 else None
        state = {}
        for name, tensor in tensors.items():
            found = self._whole_parameter(tensor) if isinstance(tensor, nn.Parameter) else tensor.cpu()
            if found is not None:
                state[name] = found
        return state if self.rank == 0 else None

    def _whole_parameter(self, parameter: nn.Parameter) -> Tensor | None:
        part: Tensor = parameter.ds_tensor  # pyright: ignore[reportAttributeAccessIssue]
        start, shape = self.rank * len(part), shape_of(parameter)
        return whole(shape, part[: max(0, shape.numel() - start)], start, self.device)

    def optimiser_state(self) -> dict[str, Tensor] | None:
        """Return the optimiser's state by the parameters' names; on ranks but the first, None."""
        if self._zero is not None:
            return whole_state(self.model, self._zero, self.device)
        return named_state(self.model, self._optimiser) if self.rank == 0 else None

    def load_optimiser_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state, whichever engine and however many ranks gave it."""
        if self._zero is not None:
            load_whole_state(self.model, self._zero, state)
        else:
            load_named_state(self.model, self._optimiser, state)

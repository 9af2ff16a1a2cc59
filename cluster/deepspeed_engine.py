"""The training loop's `Engine` on DeepSpeed: ZeRO 0 to 2 over the process group that Ray Train has set up."""

import json
from collections.abc import Sequence
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.config import ClusterConfig
from foundation.config import OptimConfig
from foundation.losses import Stage
from foundation.model.encoding_model import EncodingModel
from foundation.training.engine import load_optimiser_state, save_optimiser_state
from foundation.training.optim import build_optimiser, set_rates

SHARDS = "deepspeed"


class DeepSpeedEngine:
    """One worker of many. Single precision throughout; gradients are averaged over the workers."""

    def __init__(self, model: EncodingModel, optim: OptimConfig, cluster: ClusterConfig) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.model = model
        self._stage = cluster.zero_stage
        config = {
            "train_micro_batch_size_per_gpu": max(1, optim.batch_size // self.world),
            "gradient_accumulation_steps": 1,
            "gradient_clipping": optim.clip,
            "zero_optimization": {"stage": cluster.zero_stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
            "wall_clock_breakdown": False,
        }
        # On CPUs DeepSpeed would compile an all-reduce in C++ first, which only its inference calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._optimiser = build_optimiser(model, optim)  # DeepSpeed steps it, whole or sharded, by its param_groups
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self._optimiser, config=config, dist_init_required=False
        )
        self.device = torch.device(str(self._engine.device))

    @property
    def wrapped(self) -> nn.Module:
        """The module to call in training."""
        return self._engine

    def step(self, loss: Tensor, *, lr: float, stage: Stage | None = None) -> float:
        """Back-propagate, reduce, clip, update; return the global norm of the gradient before clipping."""
        self._engine.backward(loss)
        set_rates(self._optimiser.param_groups, lr, stage)
        whole = self._norm_of_whole_gradients() if self._stage == 0 else None
        self._engine.step()
        norm = self._engine.get_global_grad_norm() if whole is None else whole
        return float("nan") if norm is None else float(norm)

    def _norm_of_whole_gradients(self) -> Tensor:
        """Return the norm where every worker holds the reduced gradients, which DeepSpeed then doesn't tell."""
        return nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def mean(self, values: Sequence[float]) -> list[float]:
        """Return the means over workers."""
        reduced = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(reduced)
        return (reduced / self.world).tolist()

    def any(self, flag: bool) -> bool:
        """Return whether any worker says so."""
        raised = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return bool(raised.item())

    def barrier(self) -> None:
        """Wait for all workers."""
        dist.barrier()

    def save_optimiser(self, directory: Path) -> None:
        """Write the state: as plain safetensors where it isn't sharded, as DeepSpeed's shards where it is."""
        if self._stage == 0:
            if self.rank == 0:
                save_optimiser_state(self._optimiser, directory)
            return
        if self.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            settings = {"kind": SHARDS, "zero_stage": self._stage, "workers": self.world}
            (directory / "optimiser.json").write_text(json.dumps(settings))
        self.barrier()
        self._engine.save_checkpoint(str(directory / SHARDS), tag="state", save_latest=False)

    def load_optimiser(self, directory: Path) -> None:
        """Read what `save_optimiser` wrote, with the same ZeRO stage and number of workers."""
        if self._stage == 0:
            load_optimiser_state(self._optimiser, directory)
            return
        found = json.loads((directory / "optimiser.json").read_text())
        wanted = {"kind": SHARDS, "zero_stage": self._stage, "workers": self.world}
        if found != wanted:
            raise ValueError(
                f"the checkpoint's optimiser was written with {found}, but this run has {wanted}; "
                "resume with the same --cluster settings, or with --cluster.zero-stage 0 from the start"
            )
        self._engine.load_checkpoint(str(directory / SHARDS), tag="state")

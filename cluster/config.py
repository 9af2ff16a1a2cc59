"""Where and how a run computes. It is no part of the recipe: the same run may be moved to another cluster."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from foundation.config import ComputeConfig

Preset = Literal["laptop", "one-node-8gpu", "multi-node"]


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(ComputeConfig):
    """Engine, workers, and what each of them gets."""

    preset: Preset = "laptop"
    """Named settings, which those given beside it override: laptop (two workers on the CPU), one-node-8gpu,
    multi-node (16 workers with a GPU each, wherever the cluster has them)."""
    engine: Literal["ray", "local"] = "ray"
    """ray: Ray Train and DeepSpeed; local: the same loop in this process, on the GPU if there is one, for which only
    precision, accumulate and recompute count."""
    workers: int = 2
    """Workers, each with its share of every batch."""
    cpus_per_worker: float = 1.0
    """CPUs that Ray sets aside for a worker."""
    gpus_per_worker: float = 0.0
    """GPUs that Ray sets aside for a worker (0: train on the CPU)."""
    placement: Literal["pack", "spread"] = "pack"
    """Workers on as few machines as can be, or on as many."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed's ZeRO: workers share 0 nothing, 1 the optimiser's state, 2 and gradients, 3 and parameters."""
    offload: bool = False
    """Keep the optimiser's state (and with ZeRO 3 the parameters) in the machine's memory, not the GPU's."""
    address: str | None = None
    """Ray cluster to join; auto: the one on this machine (default: $RAY_ADDRESS, which a job has, else a new one)."""
    retries: int = 3
    """How often in a row training starts again from its newest checkpoint after a worker died or hung, without having
    got further."""
    timeout_s: float = 1800.0
    """Seconds after which a worker that doesn't answer, or that the others wait for, counts as hung."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers < 1:
            raise ValueError(f"--cluster.workers {self.workers} must be at least 1")
        if self.retries < 0:
            raise ValueError(f"--cluster.retries {self.retries} must be at least 0")
        if self.timeout_s <= 0:
            raise ValueError(f"--cluster.timeout-s {self.timeout_s:g} must be above 0")
        if self.offload and self.zero_stage == 0:
            raise ValueError(
                "--cluster.offload needs --cluster.zero-stage 1, 2 or 3: stage 0 shards nothing to offload"
            )

    def kept(self) -> dict[str, Any]:
        """Return what a run keeps of its settings: all but the cluster's address, which may be another tomorrow."""
        return asdict(replace(self, address=None))


def check_batch(batch_size: int, cluster: ClusterConfig) -> None:
    """Raise ValueError where a batch can't be shared out evenly."""
    workers = cluster.workers if cluster.engine == "ray" else 1
    if batch_size % (workers * cluster.accumulate):
        raise ValueError(
            f"batch size {batch_size} can't be shared out evenly: it is not a multiple of {workers} workers x "
            f"{cluster.accumulate}; change --optim.batch-size, --cluster.workers or --cluster.accumulate"
        )


PRESETS = {
    config.preset: config
    for config in (
        ClusterConfig(),
        ClusterConfig(preset="one-node-8gpu", workers=8, cpus_per_worker=6.0, gpus_per_worker=1.0, zero_stage=1),
        ClusterConfig(
            preset="multi-node", workers=16, cpus_per_worker=6.0, gpus_per_worker=1.0, zero_stage=2, retries=10
        ),
    )
}

"""Where a run computes. It is no part of the recipe: the same run may be moved to another cluster."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Engine and workers."""

    engine: Literal["ray", "local"] = "ray"
    """ray: Ray Train and DeepSpeed; local: the same loop in this process."""
    workers: int = 2
    """Workers, each with its share of every batch."""
    cpus_per_worker: float = 1.0
    """CPUs that Ray sets aside for a worker."""
    gpus_per_worker: float = 0.0
    """GPUs that Ray sets aside for a worker (0: train on the CPU)."""
    zero_stage: Literal[0, 1, 2] = 0
    """DeepSpeed's ZeRO: 0 nothing, 1 optimiser state, 2 and gradients are sharded over the workers."""
    address: str | None = None
    """Ray cluster to join; auto: the one on this machine (default: $RAY_ADDRESS, which a job has, else a new one)."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"--cluster.workers {self.workers} must be at least 1")
        if self.engine == "local" and self.workers != 1:
            object.__setattr__(self, "workers", 1)

"""What a large run takes, by arithmetic from measured constants: the formulas behind docs/scaling.md.

`MEASURED` comes from `tests.experiments.scaling_constants`, `VENDOR` from data sheets, `ASSUMED` is judgement. Legend:
P trained numbers, K numbers that are solved and kept, S subjects, N GPUs, B images of a step over all GPUs.
"""

from dataclasses import dataclass, replace

MEASURED_IMAGES_PER_S = 91.0
"""Training steps on one thread of this project's machine, batch 32, without reading."""

MEASURED = {
    "backbone": 662_426,
    "adapter": 840_790,
    "adapter_kept": 1_328_128,
    "flops_per_image": 231_145_568,
    "saved_bytes_per_image": 4_221_167,
    "saved_bytes_fixed": 6_363_696,
    "operators_fixed": 1_131,
    "operators_per_subject": 311,
    "encoder_flops": 46_322_454_528,
    "images_per_s": MEASURED_IMAGES_PER_S,
    "saved_bytes_per_s": 1.1e9,
    "token_bytes_ratio": 1.0001,
    "response_bytes_ratio": 0.83947,
}
"""Recipe `base` at DINOv2-base's shape, 16,000 voxels in 30 ROIs a subject; the last two of a store on disk."""

VENDOR = {
    "peak_flops": 312e12,
    "memory_bytes_per_s": 2.0e12,
    "nvlink_bytes_per_s": 300e9,
    "network_bytes_per_s": 25e9,
}
"""A100 SXM 80 GB: bf16 dense, HBM, NVLink one way (NVIDIA's data sheet); 200 Gb/s InfiniBand between machines."""

ASSUMED = {
    "utilisation": 0.10,
    "encoder_utilisation": 0.40,
    "launch_s": 5e-6,
    "read_bytes_per_s": 5e9,
}
"""Share of the peak that our narrow products and the encoder's wide ones reach; the time to launch a kernel; what a
machine reads from its storage."""

TOKEN_BYTES = 4 * (1 + 256) * 768 * 2
"""Of an image: depths x (CLS + patches) x width x half precision."""
N_VOXEL = 16_000
CHECKPOINT_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A data set, a machine park and a batch size."""

    name: str
    n_subjects: int
    n_images: int
    trials: int
    train_images: int
    machines: int
    batch: int
    gpus_per_machine: int = 8
    epochs: int = 10

    @property
    def gpus(self) -> int:
        """N."""
        return self.machines * self.gpus_per_machine

    @property
    def trained(self) -> int:
        """P."""
        return MEASURED["backbone"] + self.n_subjects * MEASURED["adapter"]

    @property
    def kept(self) -> int:
        """K."""
        return self.n_subjects * MEASURED["adapter_kept"]

    @property
    def steps(self) -> int:
        """Steps of the run, the last batch of an epoch being full."""
        return self.epochs * -(-self.n_subjects * self.train_images // self.batch)


EIGHT = {"n_subjects": 8, "n_images": 73_000, "trials": 30_000, "train_images": 9_000, "machines": 1}
THOUSAND = {"n_subjects": 1_000, "n_images": 73_000, "trials": 1_000, "train_images": 900, "machines": 2}
PLANS = (
    Plan(name="8 subjects, batch 32", batch=32, **EIGHT),
    Plan(name="8 subjects, batch 512", batch=512, **EIGHT),
    Plan(name="8 subjects, batch 512, one GPU", batch=512, gpus_per_machine=1, **EIGHT),
    Plan(name="1,000 subjects, batch 512", batch=512, **THOUSAND),
    Plan(name="1,000 subjects, batch 4,096", batch=4_096, **THOUSAND),
)
DATA_SETS = (replace(PLANS[0], name="8 subjects"), replace(PLANS[-1], name="1,000 subjects"))


def state_bytes(plan: Plan, stage: int) -> float:
    """Return a GPU's bytes of parameters, gradients and Adam's moments (4, 4, 8 a number) and of what is kept.

    ``4 P + 4 P + 8 P``, of which ZeRO divides by N: 1 the moments, 2 and the gradients, 3 and the parameters. What is
    kept (4 K) are buffers, which ZeRO doesn't shard.
    """
    shares = [plan.gpus if stage >= least else 1 for least in (3, 2, 1)]
    per_number = sum(size / share for size, share in zip((4, 4, 8), shares, strict=True))
    return per_number * plan.trained + 4 * plan.kept


def activation_bytes(plan: Plan) -> float:
    """Return a GPU's bytes that the forward pass keeps: ``B / N`` images, and the fields of every subject's voxels."""
    return plan.batch / plan.gpus * MEASURED["saved_bytes_per_image"] + plan.n_subjects * MEASURED["saved_bytes_fixed"]


def traffic_bytes(plan: Plan, stage: int) -> float:
    """Return what a GPU sends in a step: a ring's ``2 (N - 1) / N`` of the gradient, in single precision.

    An all-reduce is a reduce-scatter and an all-gather, ``(N - 1) / N`` each; ZeRO 3 gathers the parameters twice.
    """
    passes = 3 if stage == 3 else 2
    return passes * (plan.gpus - 1) / plan.gpus * 4 * plan.trained


def step_seconds(plan: Plan) -> dict[str, float]:
    """Return the parts of a step under ZeRO 2, in seconds."""
    operators = MEASURED["operators_fixed"] + plan.n_subjects * MEASURED["operators_per_subject"]
    link = VENDOR["nvlink_bytes_per_s"] if plan.machines == 1 else VENDOR["network_bytes_per_s"]
    flops = plan.batch / plan.gpus * MEASURED["flops_per_image"]
    return {
        "products": flops / (VENDOR["peak_flops"] * ASSUMED["utilisation"]),
        "launches": operators * ASSUMED["launch_s"],
        "optimiser": 28 * plan.trained / plan.gpus / VENDOR["memory_bytes_per_s"],
        "network": traffic_bytes(plan, 2) / link,
        "reading": plan.batch * TOKEN_BYTES / (plan.machines * ASSUMED["read_bytes_per_s"]),
    }


def unread_seconds(plan: Plan) -> float:
    """Return a step's time where reading is free: ``max(products, launches) + optimiser + network``."""
    part = step_seconds(plan)
    return max(part["products"], part["launches"]) + part["optimiser"] + part["network"]


def seconds_per_step(plan: Plan) -> float:
    """Return a step's time: only reading goes on beside the rest."""
    return max(unread_seconds(plan), step_seconds(plan)["reading"])


def checkpoint_bytes(plan: Plan) -> float:
    """Return the bytes of a checkpoint: ``4 (P + K)`` of the model, ``8 P`` of the moments."""
    return 4 * (plan.trained + plan.kept) + 8 * plan.trained


def read_of(plan: Plan) -> float:
    """Return the bytes of tokens that an epoch reads: every subject's own images."""
    return plan.n_subjects * plan.train_images * TOKEN_BYTES

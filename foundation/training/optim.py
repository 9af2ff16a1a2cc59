"""AdamW and its schedule."""

import math

import torch
from torch import nn

from foundation.config import OptimConfig
from foundation.losses import Stage
from foundation.model.encoding_model import EncodingModel

BETAS = (0.9, 0.95)


def learning_rate(step: int, n_steps: int, config: OptimConfig) -> float:
    """Return the learning rate of `step`: a linear rise, then half a cosine down to zero."""
    warmup = max(1, round(config.warmup * n_steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, n_steps - warmup)))


def stage_of(name: str) -> Stage:
    """Return the stage that trains a parameter: Stage 1 owns the streams and what reads ROIs from them."""
    first = name.startswith("streams.") or (".roi_" in name and ".roi_embedding" not in name)
    return "stage1" if first else "stage2"


def stage_at(step: int, n_steps: int, config: OptimConfig) -> Stage | None:
    """Return the stage that `step` trains; None: both."""
    if config.stage1_share is None:
        return None
    return "stage1" if step < config.stage1_share * n_steps else "stage2"


def set_rates(groups: list[dict], lr: float, stage: Stage | None) -> None:
    """Give every group the rate `lr`, and those of a stage that rests zero, which leaves them as they are."""
    for group in groups:
        group["lr"] = lr if stage in (None, group["stage"]) else 0.0


def parameter_groups(parameters: dict[str, nn.Parameter], config: OptimConfig) -> list[dict]:
    """Return, for each stage, matrices with weight decay, and everything else (biases, norms, places) without."""
    free = ("bias", "embedding", "queries", "place", "A_log", "map_")
    groups = [
        {"params": [], "weight_decay": decay, "stage": stage}
        for stage in ("stage1", "stage2")
        for decay in (config.weight_decay, 0.0)
    ]
    for name, parameter in parameters.items():
        own = name.rsplit(".", 1)[-1]
        keep = parameter.ndim < 2 or any(word in own for word in free)
        groups[2 * (stage_of(name) == "stage2") + keep]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def build_optimiser(model: EncodingModel, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over all of the model's parameters."""
    groups = parameter_groups(dict(model.named_parameters()), config)
    return torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, eps=1e-8)

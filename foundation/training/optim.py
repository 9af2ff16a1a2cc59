"""AdamW and its schedule."""

import math

import torch
from torch import nn

from foundation.config import OptimConfig
from foundation.model.encoding_model import EncodingModel

BETAS = (0.9, 0.95)


def learning_rate(step: int, n_steps: int, config: OptimConfig) -> float:
    """Return the learning rate of `step`: a linear rise, then half a cosine down to zero."""
    warmup = max(1, round(config.warmup * n_steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, n_steps - warmup)))


def parameter_groups(parameters: dict[str, nn.Parameter], config: OptimConfig) -> list[dict]:
    """Return matrices with weight decay, and everything else (biases, norms, embeddings, places) without."""
    free = ("bias", "embedding", "queries", "place", "A_log")
    decayed, plain = [], []
    for name, parameter in parameters.items():
        keep = parameter.ndim < 2 or any(word in name for word in free)
        (plain if keep else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimiser(model: EncodingModel, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over all of the model's parameters."""
    groups = parameter_groups(dict(model.named_parameters()), config)
    return torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, eps=1e-8)

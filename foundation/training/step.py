"""One module from a batch to the objective: what an engine wraps, so that parameters are read inside a forward pass.

Under ZeRO 3 a parameter is whole only while the module that reads it runs; so the losses belong inside, not after.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import Batch
from foundation.config import LossConfig, Precision
from foundation.losses import Stage, objective
from foundation.model.encoding_model import EncodingModel


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """Return the type that matrix products are taken in, or None for single precision.

    ``auto`` is bfloat16 on a GPU with units for it, and single precision on processors, where bfloat16 is several times
    faster on some and far slower on others (docs/experiments.md, 2026-11-26), and numbers shouldn't hang on which.
    """
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else None
    return torch.bfloat16 if precision == "bf16" else None


class TrainingStep(nn.Module):
    """The model under its objective. Parameters, gradients and losses are in single precision throughout.

    Parameters
    ----------
    autocast : type of the network's matrix products; None: single precision.
    """

    def __init__(self, model: EncodingModel, loss: LossConfig, *, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model, self.config, self.autocast = model, loss, autocast

    def forward(self, batch: Batch, stage: Stage | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the objective of a batch, a mean over its images, and its terms."""
        rows = {name: part.rows for name, part in batch.parts.items()}
        responses = {name: part.responses for name, part in batch.parts.items()}
        with torch.autocast(batch.cls.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            output = self.model(batch.cls, batch.patch, rows, sample=True, hold_stage1=stage == "stage2")
        losses = objective(self.model, _widened(output), responses, self.config, stage=stage, image=batch.image)
        return losses.total, losses.terms


def _widened(value: Any) -> Any:
    """Return a forward pass's output with its half-precision tensors in single precision."""
    if isinstance(value, Tensor):
        return value.to(torch.promote_types(value.dtype, torch.float32)) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _widened(field) for key, field in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{key: _widened(field) for key, field in vars(value).items()})
    return value

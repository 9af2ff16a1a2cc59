"""A step's mixed batch: one set of tokens, and each subject's responses to its share of them."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Part:
    """One subject's rows of a batch."""

    rows: slice
    responses: Float[Tensor, "image voxel"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Tokens of all rows, ordered by subject, and each subject's part (all subjects are there, some perhaps empty).

    A loader gives tokens as they are stored, in half precision; `to` gives them in single precision.
    """

    cls: Float[Tensor, "image depth width"]
    patch: Float[Tensor, "image depth patch width"]
    image: Int64[Tensor, " image"]
    """Which image of the store each row is; two subjects may have seen the same."""
    parts: dict[str, Part]

    def __len__(self) -> int:
        return len(self.cls)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`, its tokens in single precision: they travel as halves and are widened there."""
        parts = {name: Part(rows=part.rows, responses=part.responses.to(device)) for name, part in self.parts.items()}
        tokens = {"cls": self.cls.to(device).float(), "patch": self.patch.to(device).float()}
        return Batch(**tokens, image=self.image.to(device), parts=parts)

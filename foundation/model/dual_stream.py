"""Stage 1, shared part: the CLS stream ("what"), the patch stream ("where") and the gate's trunk.

The CLS stream scans the CLS tokens of several encoder depths, shallow to deep; the patch stream scans the grid, its
tokens made of all depths at a place.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.config import BackboneConfig, ScanOrder
from foundation.model.mamba import MambaStack


@dataclass(frozen=True, kw_only=True)
class TokenShape:
    """The encoder's tokens: number of depths, patches of a square grid, width."""

    depth: int
    patch: int
    width: int

    @property
    def side(self) -> int:
        """Patches along one side of the grid."""
        side = round(self.patch**0.5)
        if side * side != self.patch:
            raise ValueError(f"{self.patch} patches are not a square grid")
        return side


@dataclass(frozen=True, kw_only=True)
class Streams:
    """What both streams make of an image."""

    cls: Float[Tensor, "b width"]
    patch: Float[Tensor, "b patch width"]
    gate: Float[Tensor, "b gate"]

    @property
    def summary(self) -> Float[Tensor, "b twice_width"]:
        """The CLS stream and the mean of the patch stream, side by side."""
        return torch.cat([self.cls, self.patch.mean(1)], dim=-1)

    def __getitem__(self, rows: slice | Tensor) -> "Streams":
        """Return some of the images."""
        return Streams(cls=self.cls[rows], patch=self.patch[rows], gate=self.gate[rows])

    def __len__(self) -> int:
        return len(self.cls)


def scan_order(order: ScanOrder, side: int) -> Int64[Tensor, " patch"]:
    """Return the permutation in which `order` visits a row-major grid."""
    grid = torch.arange(side * side).view(side, side)
    path = grid.T.flatten() if order.startswith("column") else grid.flatten()
    return path.flip(0) if order.endswith("reversed") else path


class DualStream(nn.Module):
    """Both streams over frozen tokens; token statistics come from the training images and are part of the weights."""

    cls_mean: Tensor
    cls_sd: Tensor
    patch_mean: Tensor
    patch_sd: Tensor
    orders: Tensor

    def __init__(self, shape: TokenShape, config: BackboneConfig) -> None:
        super().__init__()
        width = config.width
        self.register_buffer("cls_mean", torch.zeros(shape.depth, shape.width))
        self.register_buffer("cls_sd", torch.ones(shape.depth, shape.width))
        self.register_buffer("patch_mean", torch.zeros(shape.depth, shape.width))
        self.register_buffer("patch_sd", torch.ones(shape.depth, shape.width))
        self.cls_proj = nn.Linear(shape.width, width)
        self.depth_embedding = nn.Parameter(0.02 * torch.randn(shape.depth, width))
        self.cls_stack = MambaStack(width, config.n_cls_layer, config.mamba)
        self.patch_proj = nn.Linear(shape.depth * shape.width, width)
        self.position_embedding = nn.Parameter(0.02 * torch.randn(shape.patch, width))
        self.patch_stack = MambaStack(width, config.n_patch_layer, config.mamba)
        orders = torch.stack([scan_order(order, shape.side) for order in config.scan_orders])
        self.register_buffer("orders", orders, persistent=False)
        self.gate_trunk = nn.Linear(2 * width, config.n_gate)
        self.dropout = nn.Dropout(config.dropout)

    def set_statistics(self, cls: Float[Tensor, "n depth width"], patch: Float[Tensor, "n depth patch width"]) -> None:
        """Take mean and standard deviation of the tokens from these images, which must be training images."""
        self.cls_mean.copy_(cls.mean(0))
        self.cls_sd.copy_(cls.std(0, correction=0).clamp_min(1e-3))
        self.patch_mean.copy_(patch.mean((0, 2)))
        self.patch_sd.copy_(patch.std((0, 2), correction=0).clamp_min(1e-3))

    def forward(self, cls: Float[Tensor, "b depth token"], patch: Float[Tensor, "b depth patch token"]) -> Streams:
        """Return both streams' outputs."""
        cls = (cls - self.cls_mean) / self.cls_sd
        patch = (patch - self.patch_mean[:, None]) / self.patch_sd[:, None]
        what = self.dropout(self.cls_proj(cls) + self.depth_embedding)
        what = self.cls_stack(what)[:, -1]
        where = self.patch_proj(patch.transpose(1, 2).flatten(2)) + self.position_embedding
        where = self.patch_stack(self.dropout(where), orders=self.orders)
        gate = torch.tanh(self.gate_trunk(torch.cat([what, where.mean(1)], dim=-1)))
        return Streams(cls=what, patch=where, gate=gate)


def gaussian_field(
    place: Float[Tensor, "unit 2"], log_size: Float[Tensor, " unit"], side: int
) -> Float[Tensor, "unit patch"]:
    """Return Gaussian population receptive fields over a row-major grid, each summing to 1 (Dumoulin & Wandell 2008).

    `place` is (x, y) and `exp(log_size)` the standard deviation, both in fractions of the image's side.
    """
    centre = (torch.arange(side, device=place.device, dtype=place.dtype) + 0.5) / side
    inverse = torch.exp(-2 * log_size)[:, None]
    across = -0.5 * (centre - place[:, :1]) ** 2 * inverse
    down = -0.5 * (centre - place[:, 1:]) ** 2 * inverse
    return F.softmax((down[:, :, None] + across[:, None, :]).flatten(1), dim=-1)

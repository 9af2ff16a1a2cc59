"""Stage 1, shared part: the CLS stream ("what"), the patch stream ("where"), the gate's trunk and the alignment.

The CLS stream scans the CLS tokens of several encoder depths, shallow to deep; the patch stream scans the grid, its
tokens made of all depths at a place. A stream that the model is built without gives zeros. One joint stream may stand
for both: it scans the CLS tokens, then the grid, and what it makes of the patches counts as the patch stream's.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.config import BackboneConfig, Depths, ScanOrder
from foundation.model.mamba import MambaStack
from foundation.model.mixers import make_mixer


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
    """What both streams make of an image; `gate` is the gate's trunk, or its logit where an image has one gate."""

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


def concatenated(streams: list[Streams]) -> Streams:
    """Return the images of several, in order."""
    return Streams(
        cls=torch.cat([s.cls for s in streams]),
        patch=torch.cat([s.patch for s in streams]),
        gate=torch.cat([s.gate for s in streams]),
    )


def scan_order(order: ScanOrder, side: int, *, n_before: int = 0) -> Int64[Tensor, " token"]:
    """Return the permutation in which `order` visits a row-major grid, after the `n_before` tokens that come first."""
    grid = torch.arange(side * side).view(side, side)
    path = grid.T.flatten() if order.startswith("column") else grid.flatten()
    path = path.flip(0) if order.endswith("reversed") else path
    return torch.cat([torch.arange(n_before), n_before + path])


def pool_grid(patch: Float[Tensor, "b depth patch width"], n_cells: int) -> Float[Tensor, "b depth cell width"]:
    """Average a row-major square grid of patches in ``n_cells x n_cells`` cells; the grid itself where it is no finer.

    Where `n_cells` doesn't divide the side, cells overlap by a patch (adaptive average pooling).
    """
    side = round(patch.shape[2] ** 0.5)
    if n_cells >= side:
        return patch
    grid = patch.unflatten(2, (side, side))
    if side % n_cells == 0:
        size = side // n_cells
        cells = grid.unflatten(3, (n_cells, size)).unflatten(2, (n_cells, size))
        # Adding whole slices takes a third of the time of a mean over two inner axes.
        total = sum((cells[:, :, :, i, :, j] for i, j in product(range(size), repeat=2)), patch.new_zeros(()))
        return total.flatten(2, 3) / size**2
    cells = F.adaptive_avg_pool2d(grid.flatten(0, 1).permute(0, 3, 1, 2), n_cells)
    return cells.flatten(2).mT.unflatten(0, patch.shape[:2])


def _depths(kind: Depths, n_depth: int) -> slice:
    return slice(n_depth) if kind == "all" else slice(n_depth - 1, n_depth)


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
        self.config = config
        self.side = min(shape.side, config.token_budget or shape.side)
        self.cls_depths = _depths(config.cls_depths, shape.depth)
        self.patch_depths = _depths(config.patch_depths, shape.depth)
        n_cls_depth, n_patch_depth = (len(range(shape.depth)[s]) for s in (self.cls_depths, self.patch_depths))
        self.register_buffer("cls_mean", torch.zeros(shape.depth, shape.width))
        self.register_buffer("cls_sd", torch.ones(shape.depth, shape.width))
        self.register_buffer("patch_mean", torch.zeros(shape.depth, shape.width))
        self.register_buffer("patch_sd", torch.ones(shape.depth, shape.width))
        joint = config.streams == ("joint",)
        make = partial(make_mixer, config.mixer, width, config.mamba)
        if "cls" in config.read_at or joint:
            self.cls_proj = nn.Linear(shape.width, width)
            self.depth_embedding = nn.Parameter(0.02 * torch.randn(n_cls_depth, width))
        if "cls" in config.read_at:
            self.cls_stack = MambaStack(width, config.n_cls_layer, config.mamba, make=make, drop_path=config.drop_path)
        if "patch" in config.read_at:
            self.patch_proj = nn.Linear(n_patch_depth * shape.width, width)
            self.position_embedding = nn.Parameter(0.02 * torch.randn(self.side**2, width))
            self.patch_stack = MambaStack(
                width,
                config.n_patch_layer,
                config.mamba,
                make=make,
                bidirectional=config.bidirectional,
                drop_path=config.drop_path,
            )
        n_before = n_cls_depth if joint else 0
        orders = torch.stack([scan_order(order, self.side, n_before=n_before) for order in config.scan_orders])
        self.register_buffer("orders", orders, persistent=False)
        self.gate_trunk = nn.Sequential()
        if len(config.streams) == 2:
            self.gate_trunk.extend([nn.Linear(2 * width, config.n_gate), nn.Tanh()])
            if config.gate == "image":
                self.gate_trunk.append(nn.Linear(config.n_gate, 1))
        self.dropout = nn.Dropout(config.dropout)
        self.token_dropout = nn.Dropout(config.token_dropout)
        if config.n_contrast is not None:
            self.align_image = nn.Sequential(
                nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, config.n_contrast)
            )
            self.align_rois = nn.Sequential(nn.GELU(), nn.Linear(width, config.n_contrast))

    def set_statistics(
        self, batches: Iterable[tuple[Float[Tensor, "b depth width"], Float[Tensor, "b depth patch width"]]]
    ) -> None:
        """Take mean and standard deviation of the tokens from batches of images, which must be training images."""
        totals = [torch.zeros(2, *self.cls_mean.shape, dtype=torch.float64) for _ in range(2)]
        counts = [0, 0]
        for cls, patch in batches:
            for k, rows in enumerate((cls, patch.transpose(1, 2).flatten(0, 1))):
                totals[k] += torch.stack([rows.double().sum(0), rows.double().square().sum(0)])
                counts[k] += len(rows)
        for (total, squares), n, mean, sd in zip(
            totals, counts, (self.cls_mean, self.patch_mean), (self.cls_sd, self.patch_sd), strict=True
        ):
            mean.copy_(total / n)
            sd.copy_((squares / n - (total / n) ** 2).clamp_min(0).sqrt().clamp_min(1e-3))

    def standardised(
        self, cls: Float[Tensor, "b depth token"], patch: Float[Tensor, "b depth patch token"]
    ) -> tuple[Float[Tensor, "b depth token"], Float[Tensor, "b depth patch token"]]:
        """Return the tokens in units of the training images' standard deviations."""
        return (cls - self.cls_mean) / self.cls_sd, (patch - self.patch_mean[:, None]) / self.patch_sd[:, None]

    def forward(self, cls: Float[Tensor, "b depth token"], patch: Float[Tensor, "b depth patch token"]) -> Streams:
        """Return both streams' outputs."""
        cls, patch = self.standardised(cls, pool_grid(patch, self.side))
        what = cls.new_zeros(len(cls), self.config.width)
        where = patch.new_zeros(len(patch), self.side**2, self.config.width)
        if "cls" in self.config.streams:
            what = self.cls_stack(self._cls_tokens(cls))[:, -1]
        if "patch" in self.config.streams:
            where = self.patch_stack(self._patch_tokens(patch), orders=self.orders)
        if "joint" in self.config.streams:
            tokens = torch.cat([self._cls_tokens(cls), self._patch_tokens(patch)], dim=1)
            where = self.patch_stack(tokens, orders=self.orders)[:, -(self.side**2) :]
        gate = self.gate_trunk(torch.cat([what, where.mean(1)], dim=-1))
        return Streams(cls=what, patch=where, gate=gate)

    def _cls_tokens(self, cls: Float[Tensor, "b depth token"]) -> Float[Tensor, "b cls_depth width"]:
        seen = self.token_dropout(cls[:, self.cls_depths])
        return self.dropout(self.cls_proj(seen) + self.depth_embedding)

    def _patch_tokens(self, patch: Float[Tensor, "b depth cell token"]) -> Float[Tensor, "b cell width"]:
        seen = self.token_dropout(patch[:, self.patch_depths]).transpose(1, 2).flatten(2)
        return self.dropout(self.patch_proj(seen) + self.position_embedding)

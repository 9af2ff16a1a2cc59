"""The closed-form path: a voxel as a linear map of frozen tokens, of low rank, with no network between.

    y_v = w_v' U' [cls; coarse patches] + q_v' T' sum_p f_v(p) patch_p + b_v

Legend: the first term sees the whole image (CLS tokens of all depths, patches averaged on a coarse grid); the second
sees the patches of all depths through the voxel's own Gaussian field `f_v`. `U` and `T` are the subject's, of rank
`r`; `w_v` and `q_v` are the voxel's. Nothing here is trained by gradient: `foundation.closed_form.linear_start` solves
it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foundation.model.dual_stream import TokenShape, pool_grid
from foundation.model.spatial import gaussian_field


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """Sizes of the path: `whole` features of the image, `channel` features of a patch, their ranks."""

    whole: int
    channel: int
    side: int
    rank_whole: int
    rank_field: int

    @classmethod
    def of(cls, shape: TokenShape, *, grid: int, rank_whole: int, rank_field: int) -> "LinearShape":
        """Return the sizes for an encoder's tokens, with a coarse grid of `grid` cells a side at most."""
        cells = min(grid, shape.side) ** 2
        channel = shape.depth * shape.width
        return cls(
            whole=channel * (1 + cells),
            channel=channel,
            side=shape.side,
            rank_whole=rank_whole,
            rank_field=rank_field,
        )


@dataclass(frozen=True, kw_only=True)
class LinearFeatures:
    """What the path sees of an image: `whole` (CLS by depth; patches by depth and cell) and the patches themselves."""

    whole: Float[Tensor, "b whole"]
    patch: Float[Tensor, "b patch channel"]

    def __getitem__(self, rows: slice | Tensor) -> "LinearFeatures":
        """Return some of the images."""
        return LinearFeatures(whole=self.whole[rows], patch=self.patch[rows])


def linear_features(
    cls: Float[Tensor, "b depth width"], patch: Float[Tensor, "b depth patch width"], *, grid: int
) -> LinearFeatures:
    """Return the features of standardised tokens."""
    coarse = pool_grid(patch, grid)
    return LinearFeatures(
        whole=torch.cat([cls.flatten(1), coarse.flatten(1)], dim=1),
        patch=patch.transpose(1, 2).flatten(2),
    )


class LinearPath(nn.Module):
    """One subject's closed-form path; it gives zeros until it is solved."""

    basis_whole: Tensor
    weight_whole: Tensor
    basis_field: Tensor
    weight_field: Tensor
    place: Tensor
    log_size: Tensor
    bias: Tensor

    def __init__(self, n_voxel: int, shape: LinearShape) -> None:
        super().__init__()
        self.shape = shape
        whole, field = min(shape.rank_whole, n_voxel), min(shape.rank_field, n_voxel)
        self.register_buffer("basis_whole", torch.zeros(shape.whole, whole))
        self.register_buffer("weight_whole", torch.zeros(n_voxel, whole))
        self.register_buffer("basis_field", torch.zeros(shape.channel, field))
        self.register_buffer("weight_field", torch.zeros(n_voxel, field))
        self.register_buffer("place", torch.full((n_voxel, 2), 0.5))
        self.register_buffer("log_size", torch.zeros(n_voxel))
        self.register_buffer("bias", torch.zeros(n_voxel))

    @property
    def solved(self) -> bool:
        """Whether there is anything in it."""
        return bool(self.weight_whole.any() or self.weight_field.any() or self.bias.any())

    def forward(self, features: LinearFeatures) -> Float[Tensor, "b voxel"]:
        """Predict the voxels."""
        whole, field = self.terms(features)
        return whole + field + self.bias

    def terms(self, features: LinearFeatures) -> tuple[Float[Tensor, "b voxel"], Float[Tensor, "b voxel"]]:
        """Return what either term gives, the one that sees the whole image and the one that sees a field."""
        field = gaussian_field(self.place, self.log_size, self.shape.side)
        seen = torch.einsum("bpr,vp->bvr", features.patch @ self.basis_field, field)
        return features.whole @ self.basis_whole @ self.weight_whole.T, (seen * self.weight_field).sum(-1)

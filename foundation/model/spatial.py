"""How a unit, an ROI or a voxel, weighs the places of the patch grid: three readouts, each a weight per place.

::

    mean         1 / P                                        where is thrown away, as in the paper
    factorised   a free map of its own                        space x feature (Klindt et al. 2017)
    gaussian     N(place; (x, y), size), of sum 1             population receptive field (Dumoulin & Wandell 2008)

Legend: P patches of a row-major grid of ``side x side`` cells; x to the right, y downwards, in fractions of the
image's side.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.config import SpatialReadout

INITIAL_SIZE = 0.25
BLUR = 0.25
"""In cells. Half a cell costs the network .005 in correlation on phantom voxels, and a quarter nothing."""
EVERYWHERE = 1.0
Pyramid = tuple[tuple[float, int], ...]
"""Sizes, as standard deviations in image widths, and how many places a side each is tried at."""
PYRAMID: Pyramid = ((0.04, 16), (0.07, 14), (0.12, 10), (0.2, 8), (0.3, 6))
"""Half as many predict phantom voxels worse by .005 in correlation; on V4 recordings the two differ by .001."""
COARSE_PYRAMID: Pyramid = ((0.08, 4), (0.18, 4))
"""For whoever fits a cross-validated ridge under every field."""


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


@dataclass(frozen=True, kw_only=True)
class CandidateFields:
    """A grid of Gaussian fields that a closed-form start chooses from, the whole image last."""

    place: Float[Tensor, "candidate 2"]
    log_size: Float[Tensor, " candidate"]

    def __len__(self) -> int:
        return len(self.place)


def field_pyramid(pyramid: Pyramid = PYRAMID) -> CandidateFields:
    """Return the fields of `pyramid`, by size and row, the whole image last."""
    grid = [((x + 0.5) / n, (y + 0.5) / n, size) for size, n in pyramid for y in range(n) for x in range(n)]
    x, y, size = torch.tensor([*grid, (0.5, 0.5, EVERYWHERE)]).T
    return CandidateFields(place=torch.stack([x, y], dim=1), log_size=size.log())


class GaussianField(nn.Module):
    """A place and a size for each unit, blurred by a quarter of a cell.

    A field far below a cell is one cell's indicator, and its gradient by place and size rounding noise, which Adam
    would make whole steps of.
    """

    def __init__(self, n_unit: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.place = nn.Parameter(torch.full((n_unit, 2), 0.5))
        self.log_size = nn.Parameter(torch.full((n_unit,), INITIAL_SIZE).log())

    def forward(self) -> Float[Tensor, "unit patch"]:
        """Return the weights of places."""
        blurred = (torch.exp(2 * self.log_size) + (BLUR / self.side) ** 2).log() / 2
        return gaussian_field(self.place, blurred, self.side)

    @torch.no_grad()
    def choose(self, candidates: CandidateFields, choice: Int64[Tensor, " unit"]) -> None:
        """Take the candidates that `choice` points to."""
        self.place.copy_(candidates.place[choice])
        self.log_size.copy_(candidates.log_size[choice])


class FactorisedField(nn.Module):
    """A free weight for each unit and place."""

    def __init__(self, n_unit: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.map_ = nn.Parameter(torch.full((n_unit, side * side), 1 / side**2))

    def forward(self) -> Float[Tensor, "unit patch"]:
        """Return the weights of places."""
        return self.map_

    @torch.no_grad()
    def choose(self, candidates: CandidateFields, choice: Int64[Tensor, " unit"]) -> None:
        """Take the candidates that `choice` points to."""
        self.map_.copy_(gaussian_field(candidates.place, candidates.log_size, self.side)[choice])


class MeanField(nn.Module):
    """The same weight everywhere, for every unit: nothing to learn."""

    def __init__(self, n_unit: int, side: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.full((1, side * side), 1 / side**2), persistent=False)
        self.n_unit = n_unit

    weight: Tensor

    def forward(self) -> Float[Tensor, "unit patch"]:
        """Return the weights of places."""
        return self.weight.expand(self.n_unit, -1)

    def choose(self, candidates: CandidateFields, choice: Int64[Tensor, " unit"]) -> None:
        """Do nothing: there is no choice."""


Field = GaussianField | FactorisedField | MeanField
_FIELDS: dict[SpatialReadout, type[Field]] = {
    "mean": MeanField,
    "factorised": FactorisedField,
    "gaussian": GaussianField,
}


def make_field(readout: SpatialReadout, n_unit: int, side: int) -> Field:
    """Return fresh fields of `n_unit` units over a grid of `side` x `side` places."""
    return _FIELDS[readout](n_unit, side)

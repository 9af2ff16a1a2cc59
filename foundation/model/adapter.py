"""What a subject owns: the readouts of its ROIs and voxels, each through its own population receptive field.

Everything here is per subject and light: a voxel has ``n_component + n_local + n_residual + 4`` numbers.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from foundation.config import BackboneConfig
from foundation.model.dual_stream import Streams, gaussian_field

INITIAL_SIZE = 0.25


@dataclass(frozen=True, kw_only=True)
class RoiValues:
    """Stage 1 of one subject: each stream's ROI values, the CLS stream's share, and their mixture."""

    cls: Float[Tensor, "b roi"]
    patch: Float[Tensor, "b roi"]
    share: Float[Tensor, "b roi"]

    @property
    def value(self) -> Float[Tensor, "b roi"]:
        """The gated mixture."""
        return self.share * self.cls + (1 - self.share) * self.patch


class Adapter(nn.Module):
    """One subject's parameters.

    Parameters
    ----------
    parcel : ROI of each voxel, 0 to n_roi - 1, each ROI with a voxel at least.
    """

    parcel: Tensor
    roi_size: Tensor

    def __init__(self, parcel: Int64[Tensor, " voxel"], side: int, config: BackboneConfig) -> None:
        super().__init__()
        n_voxel, n_roi, width = len(parcel), int(parcel.max()) + 1, config.width
        self.side = side
        self.register_buffer("parcel", parcel.clone())
        self.register_buffer("roi_size", torch.bincount(parcel, minlength=n_roi).float())
        self.roi_cls = nn.Parameter(torch.randn(n_roi, width) / width)
        self.roi_patch = nn.Parameter(torch.randn(n_roi, width) / width)
        self.roi_bias = nn.Parameter(torch.zeros(2, n_roi))
        self.roi_place = nn.Parameter(torch.full((n_roi, 2), 0.5))
        self.roi_log_size = nn.Parameter(torch.full((n_roi,), INITIAL_SIZE).log())
        self.roi_gate = nn.Parameter(torch.zeros(n_roi, config.n_gate))
        self.roi_gate_bias = nn.Parameter(torch.zeros(n_roi))
        self.roi_embedding = nn.Parameter(0.02 * torch.randn(n_roi, width))
        self.voxel_component = nn.Parameter(torch.randn(n_voxel, config.n_component) / config.n_component)
        self.voxel_local = nn.Parameter(torch.randn(n_voxel, config.n_local) / config.n_local)
        self.voxel_residual = nn.Parameter(torch.zeros(n_voxel, config.n_residual))
        self.voxel_bias = nn.Parameter(torch.zeros(n_voxel))
        self.voxel_place = nn.Parameter(torch.full((n_voxel, 2), 0.5))
        self.voxel_log_size = nn.Parameter(torch.full((n_voxel,), INITIAL_SIZE).log())

    @property
    def n_voxel(self) -> int:
        """Number of voxels."""
        return len(self.parcel)

    @property
    def n_roi(self) -> int:
        """Number of ROIs."""
        return len(self.roi_size)

    def roi_means(self, responses: Float[Tensor, "b voxel"]) -> Float[Tensor, "b roi"]:
        """Return Stage 1's targets: the mean response of each ROI's voxels."""
        total = responses.new_zeros(len(responses), self.n_roi).index_add(1, self.parcel, responses)
        return total / self.roi_size

    def roi_values(self, streams: Streams) -> RoiValues:
        """Read the ROIs from both streams, and mix them by a gate of their own."""
        field = gaussian_field(self.roi_place, self.roi_log_size, self.side)
        where = (torch.einsum("kp,bpw->bkw", field, streams.patch) * self.roi_patch).sum(-1)
        share = torch.sigmoid(streams.gate @ self.roi_gate.T + self.roi_gate_bias)
        what = streams.cls @ self.roi_cls.T
        return RoiValues(cls=what + self.roi_bias[0], patch=where + self.roi_bias[1], share=share)

    def holistic(self, components: Float[Tensor, "b component"]) -> Float[Tensor, "b voxel"]:
        """Read the voxels from the shared response components."""
        return components @ self.voxel_component.T + self.voxel_bias

    def local(
        self,
        roi: Float[Tensor, "b roi"],
        local: Float[Tensor, "b patch local"],
        residual: Float[Tensor, "b roi residual"],
    ) -> Float[Tensor, "b voxel"]:
        """Add to its ROI's value what a voxel sees through its receptive field and what its ROI token says."""
        field = gaussian_field(self.voxel_place, self.voxel_log_size, self.side)
        seen = torch.einsum("bpc,vp->bvc", local, field)
        said = residual[:, self.parcel]
        return roi[:, self.parcel] + (seen * self.voxel_local).sum(-1) + (said * self.voxel_residual).sum(-1)

"""What a subject owns: readouts of its ROIs and voxels, closed-form paths beside it, and what is left as noise.

Everything here is per subject and light: `Adapter.n_numbers` counts it, closed-form parts included.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.config import BackboneConfig
from foundation.model.dual_stream import Streams
from foundation.model.linear_path import LinearPath, LinearShape
from foundation.model.lora import LowRankUpdate
from foundation.model.population import PopulationPath
from foundation.model.spatial import CandidateFields, Field, make_field


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

    def __getitem__(self, rows: slice) -> "RoiValues":
        """Return some of the images."""
        return RoiValues(cls=self.cls[rows], patch=self.patch[rows], share=self.share[rows])


class Adapter(nn.Module):
    """One subject's parameters.

    Parameters
    ----------
    parcel : ROI of each voxel, 0 to n_roi - 1, each ROI with a voxel at least.
    side : cells along a side of the patch stream's grid.
    linear : sizes of the closed-form path.
    """

    parcel: Tensor
    target_weight: Tensor
    network_share: Tensor
    noise_sd: Tensor
    lora: LowRankUpdate | None
    population: PopulationPath | None

    def __init__(self, parcel: Int64[Tensor, " voxel"], side: int, linear: LinearShape, config: BackboneConfig) -> None:
        super().__init__()
        n_voxel, n_roi, width = len(parcel), int(parcel.max()) + 1, config.width
        self.config, self.n_roi = config, n_roi
        self.register_buffer("parcel", parcel.clone())
        self.register_buffer("target_weight", 1 / torch.bincount(parcel)[parcel].float())
        if "cls" in config.read_at:
            self.roi_cls = nn.Parameter(torch.randn(n_roi, width) / width)
        if "patch" in config.read_at:
            self.roi_patch = nn.Parameter(torch.randn(n_roi, width) / width)
            self.roi_field: Field = make_field(config.readout, n_roi, side)
        self.roi_bias = nn.Parameter(torch.zeros(2, n_roi))
        if config.gate == "roi" and len(config.streams) == 2:
            self.roi_gate = nn.Parameter(torch.zeros(n_roi, config.n_gate))
            self.roi_gate_bias = nn.Parameter(torch.zeros(n_roi))
        if config.n_contrast is not None:
            self.roi_align = nn.Parameter(torch.randn(n_roi, width) / n_roi**0.5)
        self.roi_embedding = nn.Parameter(0.02 * torch.randn(n_roi, width))
        if "holistic" in config.decoders:
            self.voxel_component = nn.Parameter(torch.randn(n_voxel, config.n_component) / config.n_component)
            if "patch" in config.read_at:
                self.voxel_local = nn.Parameter(torch.randn(n_voxel, config.n_local) / config.n_local)
                self.voxel_field: Field = make_field(config.readout, n_voxel, side)
        if "residual" in config.decoders:
            self.voxel_residual = nn.Parameter(torch.zeros(n_voxel, config.n_residual))
        self.voxel_bias = nn.Parameter(torch.zeros(n_voxel))
        self.linear = LinearPath(n_voxel, linear)
        self.register_buffer("network_share", torch.ones(n_voxel))
        self.register_buffer("noise_sd", torch.full((n_voxel,), torch.nan))
        self.lora = None
        self.population = None

    @property
    def n_voxel(self) -> int:
        """Number of voxels."""
        return len(self.parcel)

    @property
    def n_numbers(self) -> int:
        """Numbers that are saved, closed-form parts and bookkeeping included."""
        return sum(tensor.numel() for tensor in self.state_dict().values())

    def roi_means(self, responses: Float[Tensor, "b voxel"]) -> Float[Tensor, "b roi"]:
        """Return the mean response of each ROI's voxels."""
        sums = responses.new_zeros(len(responses), self.n_roi).index_add(1, self.parcel, responses)
        return sums / torch.bincount(self.parcel)

    def place_fields(
        self, candidates: CandidateFields, *, voxel: Int64[Tensor, " voxel"] | None, roi: Int64[Tensor, " roi"] | None
    ) -> None:
        """Let ROIs and voxels see through the candidates that are told; None leaves their fields as they are."""
        if "patch" not in self.config.streams:
            return
        if roi is not None:
            self.roi_field.choose(candidates, roi)
        if voxel is not None and "holistic" in self.config.decoders:
            self.voxel_field.choose(candidates, voxel)

    def roi_values(self, streams: Streams) -> RoiValues:
        """Read the ROIs from both streams, and mix them by a gate."""
        zeros = streams.cls.new_zeros(len(streams), self.n_roi)
        what = F.linear(streams.cls, self.roi_cls) + self.roi_bias[0] if "cls" in self.config.read_at else zeros
        where = zeros
        if "patch" in self.config.read_at:
            seen = torch.einsum("kp,bpw->bkw", self.roi_field(), streams.patch)
            where = (seen * self.roi_patch).sum(-1) + self.roi_bias[1]
        return RoiValues(cls=what, patch=where, share=self._share(streams) + zeros)

    def _share(self, streams: Streams) -> Float[Tensor, "b roi"] | Float[Tensor, "b 1"]:
        if len(self.config.streams) == 1:
            return streams.gate.new_full((len(streams), 1), float(self.config.read_at == ("cls",)))
        if self.config.gate == "image":
            return torch.sigmoid(streams.gate)
        return torch.sigmoid(F.linear(streams.gate, self.roi_gate) + self.roi_gate_bias)

    def roi_tokens(
        self, value: Float[Tensor, "b roi"], direction: Float[Tensor, " width"]
    ) -> Float[Tensor, "b roi width"]:
        """Return Stage 2's tokens: each ROI's embedding, moved by its value along `direction`, which all share."""
        return self.roi_embedding + value[..., None] * direction

    def aligned(self, roi: Float[Tensor, "b roi"]) -> Float[Tensor, "b width"]:
        """Return measured ROI values in the space that all subjects share, to be compared with the image's streams."""
        return roi @ self.roi_align

    def holistic(
        self, components: Float[Tensor, "b component"], local: Float[Tensor, "b patch local"]
    ) -> Float[Tensor, "b voxel"]:
        """Read the voxels from the shared response components, and from the patches through their own fields."""
        voxel = F.linear(components, self.voxel_component)
        if "patch" in self.config.read_at:
            seen = torch.einsum("bpc,vp->bvc", local, self.voxel_field())
            voxel = voxel + (seen * self.voxel_local).sum(-1)
        return voxel + self.voxel_bias

    def residual(
        self, roi: Float[Tensor, "b roi"], residual: Float[Tensor, "b roi residual"]
    ) -> Float[Tensor, "b voxel"]:
        """Add to its ROI's value what the ROI's token says of a voxel."""
        said = residual[:, self.parcel] * self.voxel_residual
        return roi[:, self.parcel] + said.sum(-1) + (0 if "holistic" in self.config.decoders else self.voxel_bias)

    def mixed(
        self, network: Float[Tensor, "b voxel"], closed_form: Float[Tensor, "b voxel"]
    ) -> Float[Tensor, "b voxel"]:
        """Return the network's prediction and that of the closed-form paths, each with its share."""
        return self.network_share * network + (1 - self.network_share) * closed_form

    @property
    def alone(self) -> bool:
        """Whether the network predicts without the closed-form paths."""
        return bool((self.network_share == 1).all())

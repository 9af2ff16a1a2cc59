"""The whole model: frozen encoder's tokens in, every voxel's response out, for several subjects in one forward pass."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from foundation.config import BackboneConfig
from foundation.model.adapter import Adapter, RoiValues
from foundation.model.dual_stream import DualStream, Streams, TokenShape
from foundation.model.mamba_vae import Decoded, MambaVae


@dataclass(frozen=True, kw_only=True)
class SubjectOutput:
    """One subject's share of a forward pass."""

    roi: RoiValues
    voxel: Float[Tensor, "b voxel"]


@dataclass(frozen=True, kw_only=True)
class Output:
    """A forward pass over a mixed batch."""

    subjects: dict[str, SubjectOutput]
    mu: Float[Tensor, "b latent"]
    log_variance: Float[Tensor, "b latent"]


@dataclass(frozen=True, kw_only=True)
class VoxelFeatures:
    """What a subject's voxel readout sees; a voxel is linear in it once its receptive field is set."""

    components: Float[Tensor, "b component"]
    local: Float[Tensor, "b patch local"]
    offset: Float[Tensor, "b voxel"]
    holistic_gain: Float[Tensor, "b 1"]
    local_gain: Float[Tensor, "b 1"]


def adapter_key(subject: str) -> str:
    """Return the key of a subject's adapter in a `ModuleDict`, which refuses dots and the names of its own methods."""
    key = subject.replace(".", "%2E")
    return f"%{key}" if hasattr(nn.ModuleDict(), key) else key


class EncodingModel(nn.Module):
    """A shared backbone (both streams and the Mamba-VAE) and adapters keyed by the subjects' names."""

    def __init__(
        self, shape: TokenShape, config: BackboneConfig, parcels: Mapping[str, Int64[Tensor, " voxel"]]
    ) -> None:
        super().__init__()
        self.shape, self.config = shape, config
        self.streams = DualStream(shape, config)
        self.vae = MambaVae(config)
        self.adapters = nn.ModuleDict()
        for name, parcel in parcels.items():
            self.add_subject(name, parcel)

    @property
    def subjects(self) -> list[str]:
        """Names of the subjects that have an adapter."""
        return [key.removeprefix("%").replace("%2E", ".") for key in self.adapters]

    def adapter(self, subject: str) -> Adapter:
        """Return a subject's adapter.

        Raises
        ------
        ValueError
            If the model has none.
        """
        key = adapter_key(subject)
        if key not in self.adapters:
            raise ValueError(f"the model has no adapter for {subject!r}; it has {', '.join(self.subjects) or 'none'}")
        adapter = self.adapters[key]
        assert isinstance(adapter, Adapter)
        return adapter

    def add_subject(self, name: str, parcel: Int64[Tensor, " voxel"]) -> Adapter:
        """Give a subject a fresh adapter, in place of one it may have."""
        self.adapters[adapter_key(name)] = Adapter(parcel, self.shape.side, self.config)
        return self.adapter(name)

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that all subjects share."""
        return [*self.streams.parameters(), *self.vae.parameters()]

    def forward(
        self,
        cls: Float[Tensor, "b depth width"],
        patch: Float[Tensor, "b depth patch width"],
        rows: Mapping[str, slice],
        sample: bool = False,
    ) -> Output:
        """Predict each subject's voxels for its rows of the batch; with `sample` the latent is drawn, else its mean.

        `rows` cover the batch in order; a subject may have none of them.
        """
        return self.decode(self.streams(cls, patch), rows, sample=sample)

    def decode(self, streams: Streams, rows: Mapping[str, slice], *, sample: bool = False) -> Output:
        """Predict from the streams' outputs: everything but the part that no adapter changes."""
        rois = {name: self.adapter(name).roi_values(streams[where]) for name, where in rows.items()}
        decoded = self._decode(streams, rois, sample=sample)
        subjects = {}
        for name, where in rows.items():
            adapter = self.adapter(name)
            share, scale = torch.sigmoid(self.vae.holistic_share), decoded.scale[where]
            residual = decoded.residual[where, decoded.residual.shape[1] - adapter.n_roi :]
            local = adapter.local(rois[name].value, decoded.local[where], residual)
            voxel = scale * (share * adapter.holistic(decoded.components[where]) + (1 - share) * local)
            if not len(voxel):  # every parameter gets a gradient, be it zero, so that ranks reduce the same tensors
                voxel = voxel + 0 * sum(parameter.sum() for parameter in adapter.parameters())
            subjects[name] = SubjectOutput(roi=rois[name], voxel=voxel)
        return Output(subjects=subjects, mu=decoded.mu, log_variance=decoded.log_variance)

    def voxel_features(self, streams: Streams, subject: str, roi: RoiValues | None = None) -> VoxelFeatures:
        """Return what `subject`'s voxels are read from, so that their readout can be solved in closed form.

        `roi` are its ROI values, if they aren't to be those that its adapter reads.
        """
        adapter = self.adapter(subject)
        roi = adapter.roi_values(streams) if roi is None else roi
        decoded = self._decode(streams, {subject: roi}, sample=False)
        share = torch.sigmoid(self.vae.holistic_share)
        return VoxelFeatures(
            components=decoded.components,
            local=decoded.local,
            offset=decoded.scale * (1 - share) * roi.value[:, adapter.parcel],
            holistic_gain=decoded.scale * share,
            local_gain=decoded.scale * (1 - share),
        )

    def _decode(self, streams: Streams, rois: Mapping[str, RoiValues], *, sample: bool) -> Decoded:
        """Run Stage 2 over all subjects' ROI tokens at once, padded on the left to the most ROIs."""
        tokens, real = [], []
        for name, roi in rois.items():
            embedded = self.adapter(name).roi_embedding + roi.value[..., None] * self.vae.value
            tokens += list(embedded)
            real += list(torch.ones(embedded.shape[:2], dtype=torch.bool, device=embedded.device))
        padded = pad_sequence(tokens, batch_first=True, padding_side="left")
        mask = pad_sequence(real, batch_first=True, padding_side="left")
        return self.vae(streams.summary, streams.patch, padded, mask, sample=sample)

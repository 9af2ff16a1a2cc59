"""The whole model: frozen encoder's tokens in, every voxel's response out, for several subjects in one forward pass."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from foundation.config import BackboneConfig
from foundation.model.adapter import Adapter, RoiValues
from foundation.model.dual_stream import DualStream, Streams, TokenShape, concatenated
from foundation.model.linear_path import LinearFeatures, LinearShape, linear_features
from foundation.model.lora import LowRankUpdate
from foundation.model.mamba_vae import Decoded, MambaVae
from foundation.model.population import PopulationPath

Held = TypeVar("Held", Streams, RoiValues)


@dataclass(frozen=True, kw_only=True)
class SubjectOutput:
    """One subject's share of a forward pass."""

    roi: RoiValues
    voxel: Float[Tensor, "b voxel"]


@dataclass(frozen=True, kw_only=True)
class Output:
    """A forward pass over a mixed batch: the network's part of the prediction."""

    subjects: dict[str, SubjectOutput]
    rows: dict[str, slice]
    summary: Float[Tensor, "b twice_width"]
    mu: Float[Tensor, "b latent"]
    log_variance: Float[Tensor, "b latent"]


@dataclass(frozen=True, kw_only=True)
class VoxelFeatures:
    """What a subject's voxels are read from; ``voxel = gain * adapter.holistic(components, local) + offset``."""

    components: Float[Tensor, "b component"]
    local: Float[Tensor, "b patch local"]
    offset: Float[Tensor, "b voxel"]
    gain: Float[Tensor, "b 1"]


def _held(values: Held) -> Held:
    """Return the same values with a gradient of zero: parameters behind them keep one, so that ranks reduce alike."""
    return dataclasses.replace(values, **{key: x.detach() + 0 * x for key, x in vars(values).items()})


def adapter_key(subject: str) -> str:
    """Return the key of a subject's adapter in a `ModuleDict`, which refuses dots and the names of its own methods."""
    key = subject.replace(".", "%2E")
    return f"%{key}" if hasattr(nn.ModuleDict(), key) else key


class EncodingModel(nn.Module):
    """A shared backbone (both streams and the Mamba-VAE) and adapters keyed by the subjects' names.

    Calling the model gives the network's prediction, which is what trains; `predict` gives the model's, the network
    mixed with each subject's closed-form path.
    """

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

    # -- subjects ------------------------------------------------------------------------------------------------------

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
        linear = LinearShape.of(
            self.shape,
            grid=self.config.linear_grid,
            rank_whole=self.config.n_linear_whole,
            rank_field=self.config.n_linear_field,
        )
        self.adapters[adapter_key(name)] = Adapter(parcel, self.streams.side, linear, self.config)
        return self.adapter(name)

    def drop_subject(self, name: str) -> None:
        """Take a subject's adapter away.

        Raises
        ------
        ValueError
            If the model has none, or another subject's population path has landmarks among its voxels.
        """
        self.adapter(name)
        number = self.subjects.index(name)
        paths = {other: self.adapter(other).population for other in self.subjects if other != name}
        landmarks = {other: path.landmark[:, 0] for other, path in paths.items() if path is not None}
        for other, of_subject in landmarks.items():
            if (of_subject == number).any():
                raise ValueError(f"{other!r} is predicted from voxels of {name!r}; drop {other!r} first")
        for of_subject in landmarks.values():
            of_subject -= (of_subject > number).long()  # subjects are named by their place, which changes
        del self.adapters[adapter_key(name)]

    def rename_subject(self, name: str, new: str) -> None:
        """Call a subject by another name; the order of subjects stays.

        Raises
        ------
        ValueError
            If the model has no adapter for `name`, or has one for `new`.
        """
        self.adapter(name)
        if new in self.subjects:
            raise ValueError(f"the model has an adapter for {new!r} already; drop it first, or choose another name")
        kept = [(new if subject == name else subject, self.adapter(subject)) for subject in self.subjects]
        self.adapters = nn.ModuleDict({adapter_key(subject): adapter for subject, adapter in kept})

    def add_lora(self, subject: str, rank: int) -> LowRankUpdate:
        """Give a subject low-rank updates of the streams' blocks, in place of those it may have; zero at first."""
        update = LowRankUpdate(self.streams, rank).to(self.streams.cls_mean.device)
        self.adapter(subject).lora = update
        return update

    def add_population(self, subject: str, n_landmark: int, rank: int) -> PopulationPath:
        """Give a subject a population path, in place of one it may have; it gives zeros until it is solved."""
        adapter = self.adapter(subject)
        adapter.population = PopulationPath(adapter.n_voxel, n_landmark, rank).to(self.streams.cls_mean.device)
        return adapter.population

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that all subjects share."""
        return [*self.streams.parameters(), *self.vae.parameters()]

    # -- prediction ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        cls: Float[Tensor, "b depth width"],
        patch: Float[Tensor, "b depth patch width"],
        rows: Mapping[str, slice],
        sample: bool = False,
        hold_stage1: bool = False,
    ) -> Output:
        """Predict each subject's voxels by the network; with `sample` the latent is drawn, else its mean.

        `rows` cover the batch in order; a subject may have none of them. With `hold_stage1` the voxels' gradient by
        whatever Stage 1 owns is zero.
        """
        return self.decode(self.streams_of(cls, patch, rows), rows, sample=sample, hold_stage1=hold_stage1)

    def predict(
        self, cls: Float[Tensor, "b depth width"], patch: Float[Tensor, "b depth patch width"], subject: str
    ) -> Float[Tensor, "b voxel"]:
        """Return the expected response of each voxel: the network's prediction mixed with the closed-form paths'."""
        network = self(cls, patch, {subject: slice(0, len(cls))}).subjects[subject].voxel
        adapter = self.adapter(subject)
        return network if adapter.alone else adapter.mixed(network, self.closed_form(cls, patch, subject))

    def closed_form(
        self, cls: Float[Tensor, "b depth width"], patch: Float[Tensor, "b depth patch width"], subject: str
    ) -> Float[Tensor, "b voxel"]:
        """Return what the subject's closed-form paths predict, that of the population if it has one."""
        adapter = self.adapter(subject)
        predicted = adapter.linear(self.linear_features(cls, patch))
        if adapter.population is None:
            return predicted
        return predicted + adapter.population(self.population(cls, patch, adapter.population))

    def population(
        self,
        cls: Float[Tensor, "b depth width"],
        patch: Float[Tensor, "b depth patch width"],
        path: PopulationPath,
    ) -> Float[Tensor, "b landmark"]:
        """Return what the backbone's own subjects are predicted to respond at the landmarks of `path`."""
        streams, features = self.streams(cls, patch), self.linear_features(cls, patch)
        predicted = cls.new_zeros(len(cls), len(path.landmark))
        for number in path.landmark[:, 0].unique().tolist():
            subject = self.subjects[number]
            adapter = self.adapter(subject)
            network = self.decode(streams, {subject: slice(0, len(cls))}).subjects[subject].voxel
            voxel = network if adapter.alone else adapter.mixed(network, adapter.linear(features))
            predicted[:, path.landmark[:, 0] == number] = voxel[:, path.of_subject(number)].to(predicted.dtype)
        return predicted

    def sample(
        self,
        cls: Float[Tensor, "b depth width"],
        patch: Float[Tensor, "b depth patch width"],
        subject: str,
        n: int,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "sample b voxel"]:
        """Draw single trials: the latent is drawn, and each voxel gets the noise that was left of measured trials.

        Raises
        ------
        ValueError
            If the noise of the subject's voxels hasn't been fitted.
        """
        adapter, rows = self.adapter(subject), {subject: slice(0, len(cls))}
        if adapter.noise_sd.isnan().any():
            raise ValueError(f"the noise of {subject!r} hasn't been fitted; finish its adapter first (adapt, pretrain)")
        streams = self.streams_of(cls, patch, rows)
        closed_form = None if adapter.alone else self.closed_form(cls, patch, subject)
        drawn = []
        for _ in range(n):
            voxel = self.decode(streams, rows, sample=True, generator=generator).subjects[subject].voxel
            voxel = voxel if closed_form is None else adapter.mixed(voxel, closed_form)
            noise = torch.randn(voxel.shape, generator=generator, dtype=voxel.dtype, device=voxel.device)
            drawn.append(voxel + adapter.noise_sd * noise)
        return torch.stack(drawn)

    def linear_features(
        self, cls: Float[Tensor, "b depth width"], patch: Float[Tensor, "b depth patch width"]
    ) -> LinearFeatures:
        """Return what the subjects' closed-form paths see."""
        return linear_features(*self.streams.standardised(cls, patch), grid=self.config.linear_grid)

    def streams_of(
        self,
        cls: Float[Tensor, "b depth width"],
        patch: Float[Tensor, "b depth patch width"],
        rows: Mapping[str, slice],
    ) -> Streams:
        """Return the streams' outputs; a subject with updates of the backbone has its rows run through its own."""
        updates = {name: self.adapter(name).lora for name in rows}
        if not any(updates.values()):
            return self.streams(cls, patch)
        parts = []
        for name, where in rows.items():
            update = updates[name]
            weights = {} if update is None else update.updated(self.streams)
            parts.append(functional_call(self.streams, weights, (cls[where], patch[where])))
        return concatenated(parts)

    def decode(
        self,
        streams: Streams,
        rows: Mapping[str, slice],
        *,
        sample: bool = False,
        generator: torch.Generator | None = None,
        hold_stage1: bool = False,
    ) -> Output:
        """Predict from the streams' outputs, by the network."""
        of_stage1 = {name: self.adapter(name).roi_values(streams[where]) for name, where in rows.items()}
        summary, rois = streams.summary, of_stage1
        if hold_stage1:
            streams, rois = _held(streams), {name: _held(roi) for name, roi in of_stage1.items()}
        tokens = self._roi_tokens(rois)
        decoded = self._decode(streams, tokens, sample=sample, generator=generator)
        share = self.vae.holistic_share
        subjects = {}
        for name, where in rows.items():
            adapter = self.adapter(name)
            voxel = torch.zeros(())
            if "holistic" in self.config.decoders:
                voxel = share * adapter.holistic(decoded.components[where], decoded.local[where])
            if "residual" in self.config.decoders:
                residual = decoded.residual[where, decoded.residual.shape[1] - adapter.n_roi :]
                voxel = voxel + (1 - share) * adapter.residual(rois[name].value, residual)
            voxel = decoded.scale[where] * voxel
            if not len(voxel):  # every parameter gets a gradient, be it zero, so that ranks reduce the same tensors
                voxel = voxel + 0 * tokens[name].sum()
            subjects[name] = SubjectOutput(roi=of_stage1[name], voxel=voxel)
        return Output(
            subjects=subjects,
            mu=decoded.mu,
            log_variance=decoded.log_variance,
            summary=summary,
            rows=dict(rows),
        )

    def voxel_features(self, streams: Streams, subject: str, roi: RoiValues | None = None) -> VoxelFeatures:
        """Return what `subject`'s voxels are read from, so that their holistic readout can be solved in closed form.

        `roi` are its ROI values, if they aren't to be those that its adapter reads.
        """
        adapter = self.adapter(subject)
        roi = adapter.roi_values(streams) if roi is None else roi
        decoded = self._decode(streams, self._roi_tokens({subject: roi}), sample=False)
        gain = decoded.scale * self.vae.holistic_share
        return VoxelFeatures(
            components=decoded.components,
            local=decoded.local,
            offset=(decoded.scale - gain) * roi.value[:, adapter.parcel],
            gain=gain,
        )

    def _roi_tokens(self, rois: Mapping[str, RoiValues]) -> dict[str, Tensor]:
        return {name: self.adapter(name).roi_tokens(roi.value, self.vae.value) for name, roi in rois.items()}

    def _decode(
        self,
        streams: Streams,
        tokens: Mapping[str, Tensor],
        *,
        sample: bool,
        generator: torch.Generator | None = None,
    ) -> Decoded:
        """Run Stage 2 over all subjects' ROI tokens at once, padded on the left to the most ROIs."""
        rows = [row for of_subject in tokens.values() for row in of_subject]
        real = [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in rows]
        padded = pad_sequence(rows, batch_first=True, padding_side="left")
        mask = pad_sequence(real, batch_first=True, padding_side="left")
        more = max(of_subject.shape[1] for of_subject in tokens.values()) - padded.shape[1]  # of a subject without rows
        padded, mask = F.pad(padded, (0, 0, more, 0)), F.pad(mask, (more, 0))
        return self.vae(streams.summary, streams.patch, padded, mask, sample=sample, generator=generator)

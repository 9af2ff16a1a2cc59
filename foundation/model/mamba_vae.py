"""Stage 2, shared part: a Mamba-VAE from ROI tokens to response components and ROI residuals.

Sequence: padding, one visual token, the ROI tokens; the holistic decoder appends learned queries. Subjects with
different numbers of ROIs share a batch.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foundation.config import BackboneConfig
from foundation.model.mamba import MambaStack


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What Stage 2 gives; `residual` may carry padding on the left. What a model is built without has width 0."""

    mu: Float[Tensor, "b latent"]
    log_variance: Float[Tensor, "b latent"]
    components: Float[Tensor, "b component"]
    local: Float[Tensor, "b patch local"]
    residual: Float[Tensor, "b roi residual"]
    scale: Float[Tensor, "b 1"]


class MambaVae(nn.Module):
    """Encoder to a latent, holistic decoder to response components, residual decoder per ROI token."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.visual = nn.Linear(2 * width, width)
        self.value = nn.Parameter(0.02 * torch.randn(width))
        if config.latent is not None:
            self.encoder = MambaStack(width, config.n_encoder_layer, config.mamba)
            self.to_latent = nn.Linear(width, 2 * config.latent)
            self.from_latent = nn.Linear(config.latent, width)
            with torch.no_grad():
                self.to_latent.bias[config.latent :].fill_(-4.0)
        if "holistic" in config.decoders:
            self.queries = nn.Parameter(0.02 * torch.randn(config.n_query, width))
        self.decoder = MambaStack(width, config.n_decoder_layer, config.mamba)
        if "holistic" in config.decoders:
            self.to_components = nn.Linear(config.n_query * width, config.n_component)
            if "patch" in config.read_at:
                self.to_local = nn.Linear(width, config.n_local)
        if "residual" in config.decoders:
            self.to_residual = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.n_residual))
        if config.amplitude:
            self.to_scale = nn.Linear(width, 1)
            nn.init.zeros_(self.to_scale.weight)
            nn.init.zeros_(self.to_scale.bias)
        if len(config.decoders) == 2:
            self.holistic_logit = nn.Parameter(torch.zeros(1))

    @property
    def holistic_share(self) -> Tensor | float:
        """Share of the holistic decoder in a voxel."""
        if len(self.config.decoders) == 2:
            return torch.sigmoid(self.holistic_logit)
        return float("holistic" in self.config.decoders)

    def forward(
        self,
        summary: Float[Tensor, "b twice_width"],
        patch: Float[Tensor, "b patch width"],
        roi_tokens: Float[Tensor, "b roi width"],
        real: Bool[Tensor, "b roi"],
        *,
        generator: torch.Generator | None = None,
        sample: bool,
    ) -> Decoded:
        """Decode; `sample` draws the latent, else its mean is taken. Padding in `roi_tokens` is on the left.

        `roi_tokens` hold embeddings plus value times `self.value`; where `real` is False they must be zero.
        """
        visual = self.visual(summary)
        tokens = torch.cat([torch.zeros_like(visual)[:, None], roi_tokens], dim=1)
        first = real.int().argmax(1)
        tokens = tokens.scatter(
            1, first[:, None, None].expand(-1, 1, tokens.shape[-1]), visual[:, None].to(tokens.dtype)
        )
        places = torch.arange(tokens.shape[1], device=real.device)
        mask = places >= first[:, None]
        mu = log_variance = summary.new_zeros(len(summary), 0)
        if self.config.latent is not None:
            encoded = self.encoder(tokens, real=mask)
            pooled = (encoded * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            latent = self.to_latent(pooled)
            latent = latent.to(torch.promote_types(latent.dtype, torch.float32))  # exponentials follow
            mu, log_variance = latent.chunk(2, dim=-1)
            log_variance = log_variance.clamp(-10, 10)
            z = mu
            if sample:
                noise = torch.randn(mu.shape, generator=generator, dtype=mu.dtype, device=mu.device)
                z = mu + (0.5 * log_variance).exp() * noise
            tokens = tokens + self.from_latent(z)[:, None] * mask[..., None]
        holistic, residual = ("holistic" in self.config.decoders), ("residual" in self.config.decoders)
        n_token = tokens.shape[1]
        if holistic:
            queries = self.queries.expand(len(tokens), -1, -1)
            tokens = torch.cat([tokens, queries], dim=1)
            mask = torch.cat([mask, mask.new_ones(queries.shape[:2])], dim=1)
        decoded = self.decoder(tokens, real=mask)
        of_rois, of_queries = decoded[:, 1:n_token], decoded[:, n_token:]
        return Decoded(
            mu=mu,
            log_variance=log_variance,
            components=self.to_components(of_queries.flatten(1)) if holistic else decoded[:, 0, :0],
            local=self.to_local(patch) if holistic and "patch" in self.config.read_at else patch[..., :0],
            residual=self.to_residual(of_rois) if residual else of_rois[..., :0],
            scale=self._scale(visual),
        )

    def _scale(self, visual: Float[Tensor, "b width"]) -> Float[Tensor, "b 1"]:
        if self.config.amplitude:
            return torch.exp(torch.tanh(self.to_scale(visual)))
        return visual.new_ones(len(visual), 1)

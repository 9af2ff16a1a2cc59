"""The training objective (method.md, stages 1 and 2), weighted by nothing that a test repeat touched."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from foundation.config import LossConfig
from foundation.model.adapter import Adapter
from foundation.model.encoding_model import EncodingModel, Output
from foundation.roi_targets import roi_targets, top_p_targets

MIN_ROIS = 3
Stage = Literal["stage1", "stage2"]


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The objective and its terms, each a mean over the batch's images."""

    total: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]


def pearson_loss(prediction: Float[Tensor, "b unit"], target: Float[Tensor, "b unit"]) -> Float[Tensor, " b"]:
    """Return one minus the correlation over units of each image; 1 where a side is constant."""
    p = prediction - prediction.mean(-1, keepdim=True)
    t = target - target.mean(-1, keepdim=True)
    norm = (p.square().sum(-1) + 1e-8).sqrt() * (t.square().sum(-1) + 1e-8).sqrt()
    return 1 - (p * t).sum(-1) / norm


def kl_divergence(mu: Float[Tensor, "b latent"], log_variance: Float[Tensor, "b latent"]) -> Float[Tensor, " b"]:
    """Return the divergence of N(mu, exp(log_variance)) from N(0, 1), summed over the latent (nats)."""
    return 0.5 * (mu.square() + log_variance.exp() - 1 - log_variance).sum(-1)


def info_nce(
    image: Float[Tensor, "b width"],
    rois: Float[Tensor, "b width"],
    *,
    temperature: float,
    same: Int64[Tensor, " b"] | None = None,
) -> Float[Tensor, " b"]:
    """Return the symmetric InfoNCE of each pair among the batch's (van den Oord et al. 2018; Radford et al. 2021).

    Pairs with the same number in `same`, which is one picture seen by several subjects, are no negatives of each other.
    """
    logits = F.normalize(image, dim=-1) @ F.normalize(rois, dim=-1).T / temperature
    own = torch.arange(len(logits), device=logits.device)
    if same is not None:
        others = (same[:, None] == same) & (own[:, None] != own)
        logits = logits.masked_fill(others, -torch.inf)
    return 0.5 * (F.cross_entropy(logits, own, reduction="none") + F.cross_entropy(logits.T, own, reduction="none"))


def roi_target(adapter: Adapter, responses: Float[Tensor, "b voxel"], config: LossConfig) -> Float[Tensor, "b roi"]:
    """Return what Stage 1 should predict of `responses`."""
    if config.roi_target == "top-p":
        return top_p_targets(responses, adapter.parcel, n_roi=adapter.n_roi)
    return roi_targets(responses, adapter.parcel, adapter.target_weight, n_roi=adapter.n_roi)


def subject_losses(
    adapter: Adapter, output: Output, subject: str, responses: Float[Tensor, "b voxel"], config: LossConfig
) -> dict[str, Float[Tensor, " b"]]:
    """Return one subject's terms per image; empty, with a zero gradient, where it has no rows."""
    found = output.subjects[subject]
    target = roi_target(adapter, responses, config)
    roi = found.roi.value
    zeros = 0 * roi.sum(-1)
    return {
        "voxel": (found.voxel - responses).square().mean(-1),
        "roi": (roi - target).square().mean(-1),
        "pearson": pearson_loss(roi, target) if adapter.n_roi >= MIN_ROIS else zeros,
    }


def contrast_loss(
    model: EncodingModel,
    output: Output,
    responses: Mapping[str, Float[Tensor, "b voxel"]],
    config: LossConfig,
    *,
    image: Int64[Tensor, " image"] | None = None,
) -> Float[Tensor, " image"]:
    """Return InfoNCE between the images' streams and the measured ROIs of whoever saw them, within a worker's rows."""
    aligned = [
        model.adapter(name).aligned(roi_target(model.adapter(name), measured, config))
        for name, measured in responses.items()
    ]
    rois = model.streams.align_rois(torch.cat(aligned))
    return info_nce(model.streams.align_image(output.summary), rois, temperature=config.temperature, same=image)


def objective(
    model: EncodingModel,
    output: Output,
    responses: Mapping[str, Float[Tensor, "b voxel"]],
    config: LossConfig,
    *,
    stage: Stage | None = None,
    image: Int64[Tensor, " image"] | None = None,
) -> Losses:
    """Return the objective over a mixed batch: every image counts the same, whatever its subject's number of voxels.

    Parameters
    ----------
    stage : ``stage1`` or ``stage2`` leaves the other stage's terms out of the total, with a zero gradient; None: both.
    image : which image each row is, so that InfoNCE knows one picture seen by two subjects; None: all differ.
    """
    per_subject = [
        subject_losses(model.adapter(name), output, name, target, config) for name, target in responses.items()
    ]
    n = len(output.mu)
    terms = {term: sum((losses[term].sum() for losses in per_subject), torch.zeros(())) / n for term in per_subject[0]}
    terms["kl"] = kl_divergence(output.mu, output.log_variance).mean()
    first = config.roi * terms["roi"] + config.pearson * terms["pearson"]
    if model.config.n_contrast is not None:
        terms["contrast"] = contrast_loss(model, output, responses, config, image=image).mean()
        first = first + config.contrast * terms["contrast"]
    second = terms["voxel"] + config.kl * terms["kl"]
    weight = {None: (1, 1), "stage1": (1, 0), "stage2": (0, 1)}[stage]
    return Losses(total=weight[0] * first + weight[1] * second, terms=terms)

"""The training objective (method.md, stages 1 and 2), weighted by nothing that a test repeat touched."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from foundation.config import LossConfig
from foundation.model.adapter import Adapter
from foundation.model.encoding_model import EncodingModel, Output

MIN_ROIS = 3


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


def subject_losses(
    adapter: Adapter, output: Output, subject: str, responses: Float[Tensor, "b voxel"]
) -> dict[str, Float[Tensor, " b"]]:
    """Return one subject's terms per image; empty, with a zero gradient, where it has no rows."""
    found = output.subjects[subject]
    target = adapter.roi_means(responses)
    roi = found.roi.value
    ones = 0 * roi.sum(-1)
    return {
        "voxel": (found.voxel - responses).square().mean(-1),
        "roi": (roi - target).square().mean(-1),
        "pearson": pearson_loss(roi, target) if adapter.n_roi >= MIN_ROIS else ones,
    }


def objective(
    model: EncodingModel, output: Output, responses: Mapping[str, Float[Tensor, "b voxel"]], config: LossConfig
) -> Losses:
    """Return the objective over a mixed batch: every image counts the same, whatever its subject's number of voxels."""
    per_subject = [subject_losses(model.adapter(name), output, name, target) for name, target in responses.items()]
    n = len(output.mu)
    terms = {term: sum((losses[term].sum() for losses in per_subject), torch.zeros(())) / n for term in per_subject[0]}
    terms["kl"] = kl_divergence(output.mu, output.log_variance).mean()
    total = terms["voxel"] + config.roi * terms["roi"] + config.pearson * terms["pearson"] + config.kl * terms["kl"]
    return Losses(total=total, terms=terms)

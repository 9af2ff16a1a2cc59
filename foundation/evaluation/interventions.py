"""Interventions on a trained model's streams: what a prediction loses when a branch is disabled, and the controls.

The paper zeroes a branch before the fusion. Zeros may lie far from anything that the model has seen, so there are three
controls beside it: the branch's *mean* over images, its outputs *shuffled* among images, and a *random subspace* of
both branches that holds as much variance as the branch. The gate is left as the intact streams set it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from foundation.model.dual_stream import Streams

Branch = Literal["cls", "patch"]
Intervention = Callable[[Streams], Streams]


def zeroed(branch: Branch) -> Intervention:
    """Return the intervention that replaces a branch by zeros."""
    return lambda streams: replace(streams, **{branch: torch.zeros_like(getattr(streams, branch))})


def averaged(branch: Branch, mean: Streams) -> Intervention:
    """Return the intervention that replaces a branch by its mean over images, which `mean` holds as one image."""
    return lambda streams: replace(streams, **{branch: getattr(mean, branch).expand_as(getattr(streams, branch))})


def shuffled(branch: Branch, order: Int64[Tensor, " image"]) -> Intervention:
    """Return the intervention that gives each image another one's branch; for all images at once."""
    return lambda streams: replace(streams, **{branch: getattr(streams, branch)[order]})


def random_subspace(
    branch: Branch, streams: Streams, mean: Streams, *, generator: torch.Generator
) -> tuple[Intervention, int]:
    """Return the intervention that removes random directions which hold as much variance as `branch`, and their number.

    Directions are drawn in the joint space of both branches' channels, the same at every place; what lies along them is
    replaced by its mean. `streams` are the images that variance is measured on, `mean` their mean as one image.
    """
    width = streams.cls.shape[-1]

    def joint(of: Streams) -> Float[Tensor, "b patch twice_width"]:
        return torch.cat([of.cls[:, None].expand(-1, of.patch.shape[1], -1), of.patch], dim=-1)

    apart = joint(streams) - joint(mean)
    columns = slice(0, width) if branch == "cls" else slice(width, None)
    wanted = apart[..., columns].square().sum()
    drawn = torch.randn(2 * width, 2 * width, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(drawn)[0].to(apart.dtype).to(apart.device)
    held = (apart @ basis).square().sum((0, 1)).cumsum(0)
    n = int((held < wanted).sum()) + 1
    removed = basis[:, : min(n, 2 * width)]

    def intervene(of: Streams) -> Streams:
        apart = joint(of) - joint(mean)
        left = joint(of) - apart @ removed @ removed.T
        return replace(of, cls=left[..., :width].mean(1), patch=left[..., width:])

    return intervene, removed.shape[1]


def mean_of(streams: Streams) -> Streams:
    """Return the mean over images, as one image."""
    return Streams(
        cls=streams.cls.mean(0, keepdim=True),
        patch=streams.patch.mean(0, keepdim=True),
        gate=streams.gate.mean(0, keepdim=True),
    )

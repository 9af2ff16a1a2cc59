"""Interventions on a trained model's streams: what a prediction loses when a branch is disabled, and the controls.

The paper zeroes a branch before the fusion. Zeros may lie far from anything that the model has seen, so there are three
controls beside it: the branch's *mean* over images, its outputs *shuffled* among images, and a *random subspace* of
both branches whose removal changes them as much. The gate is left as the intact streams set it. Beside them stand the
*swapped inputs*, each stream fed with the other's tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from foundation.model.dual_stream import Streams

Branch = Literal["cls", "patch"]
CONTROL = "random subspace"
BRANCHES: tuple[Branch, ...] = ("cls", "patch")
Intervention = Callable[[Streams], Streams]


@dataclass(frozen=True, kw_only=True)
class Removed:
    """Directions that the random subspace takes to change the streams as much as a branch does."""

    n: int
    """The mean over draws, rounded."""
    n_all: int
    """All there are: both branches' channels."""


@dataclass(frozen=True, kw_only=True)
class Interventions:
    """All that is done to the branches of some streams."""

    by_name: dict[tuple[str, str], list[Intervention]]
    """By branch and name, a draw each."""
    removed: dict[str, Removed]
    """What the control takes, by branch."""


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
    """Return the intervention that removes random directions until the streams change as much, and their number.

    As much as they would by `branch` at its mean: in sum of squares over images, places and channels, the CLS stream
    counted once a place. Directions are drawn in the joint space of both branches' channels, the same at every place;
    what lies along them is replaced by its mean, and the CLS stream by the average over places of what is left of it.
    `streams` are the images that this is measured on, `mean` their mean as one image.
    """
    width, n_place = streams.cls.shape[-1], streams.patch.shape[1]

    def joint(of: Streams) -> Float[Tensor, "b patch twice_width"]:
        return torch.cat([of.cls[:, None].expand(-1, n_place, -1), of.patch], dim=-1)

    def without(of: Streams, directions: Float[Tensor, "twice_width direction"]) -> Streams:
        left = joint(of) - (joint(of) - joint(mean)) @ directions @ directions.T
        return replace(of, cls=left[..., :width].mean(1), patch=left[..., width:])

    def change(to: Streams) -> float:
        return float(n_place * (to.cls - streams.cls).square().sum() + (to.patch - streams.patch).square().sum())

    drawn = torch.randn(2 * width, 2 * width, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(drawn)[0].to(streams.cls)
    wanted = change(averaged(branch, mean)(streams))
    fewest, most = 1, 2 * width
    while fewest < most:
        middle = (fewest + most) // 2
        if change(without(streams, basis[:, :middle])) < wanted:
            fewest = middle + 1
        else:
            most = middle
    return lambda of: without(of, basis[:, :fewest]), fewest


def swapped_inputs(
    cls: Float[Tensor, "b depth width"], patch: Float[Tensor, "b depth patch width"]
) -> tuple[Float[Tensor, "b depth width"], Float[Tensor, "b depth patch width"]]:
    """Return each stream's tokens made of the other's: the mean patch for the CLS token, that token for every patch."""
    return patch.mean(2), cls[:, :, None].expand_as(patch)


def mean_of(streams: Streams) -> Streams:
    """Return the mean over images, as one image."""
    return Streams(
        cls=streams.cls.mean(0, keepdim=True),
        patch=streams.patch.mean(0, keepdim=True),
        gate=streams.gate.mean(0, keepdim=True),
    )


def interventions(streams: Streams, *, n_draws: int, generator: torch.Generator) -> Interventions:
    """Return all that is done to a branch; what has chance in it `n_draws` times."""
    mean = mean_of(streams)
    found: dict[tuple[str, str], list[Intervention]] = {}
    removed: dict[str, Removed] = {}
    for branch in BRANCHES:
        orders = [torch.randperm(len(streams), generator=generator) for _ in range(n_draws)]
        found[branch, "zero"] = [zeroed(branch)]
        found[branch, "mean"] = [averaged(branch, mean)]
        found[branch, "shuffled"] = [shuffled(branch, order.to(streams.cls.device)) for order in orders]
        drawn = [random_subspace(branch, streams, mean, generator=generator) for _ in range(n_draws)]
        found[branch, CONTROL] = [intervene for intervene, _ in drawn]
        removed[branch] = Removed(n=round(sum(n for _, n in drawn) / n_draws), n_all=2 * streams.cls.shape[-1])
    return Interventions(by_name=found, removed=removed)

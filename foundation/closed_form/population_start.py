"""Closed-form paths of a subject that the backbone hasn't seen, with those that it has seen as a prior.

1. **whole** and **field**: the terms of the path from the tokens (`linear_start`), the second with a prior on the
   weights of a field's channels: those of the backbone's own subjects (`tuning`).
2. **population**: kernel ridge on what the backbone predicts for voxels of its own subjects, the landmarks
   (`foundation.model.population`). A voxel is there a mixture of voxels that are known, so few images tell it.
3. **shares**: these and the network are added with non-negative shares per voxel, settled together on the validation
   images, which none of them was fitted on (`shares`). Images that are left out of a fit, but had a share in choosing
   its kernel or field, favour the members with more to choose from, the more so the fewer they are
   (docs/experiments.md, 2026-11-26).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int

from data.loader import tokens_on
from data.preprocess import Samples
from data.store import TokenReader
from foundation.closed_form.kernel_ridge import best_of, candidate_of_kernel
from foundation.closed_form.linear_start import (
    LinearStart,
    fitted_by_kernel,
    leading_directions,
    share_terms,
    solve_terms,
)
from foundation.closed_form.shares import shares_of
from foundation.closed_form.tuning import tuning_root
from foundation.evaluation.metrics import voxelwise_r
from foundation.model.adapter import Adapter
from foundation.model.encoding_model import EncodingModel
from foundation.model.population import PopulationPath

N_LANDMARKS = 1024
RANK = 32
"""Directions over voxels in which the landmarks are read."""
LARGEST_NETWORK_SHARE = 0.95
"""So that the mean response, which the closed-form paths hold, is never divided by nothing."""
_BATCH = 64
Landmarks = Callable[[PopulationPath, Int[np.ndarray, " image"]], Float32[np.ndarray, "image landmark"]]


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A subject's closed-form paths, each solved by itself, and what they predict for its validation images."""

    start: LinearStart
    members: dict[str, Float32[np.ndarray, "image voxel"]]
    """By name, less the mean response of the training images."""


@dataclass(frozen=True, kw_only=True)
class Members:
    """Mean share of each member over voxels, and its mean voxelwise correlation on validation images."""

    share: dict[str, float]
    validation_r: dict[str, float]


def own_subjects(model: EncodingModel, subject: str) -> list[str]:
    """Return the subjects that may be a prior for `subject`: all others of the model."""
    return [name for name in model.subjects if name != subject]


@torch.no_grad()
def add_landmarks(model: EncodingModel, subject: str, *, seed: int) -> PopulationPath:
    """Give `subject` an unsolved population path with `N_LANDMARKS` of the others' voxels, or all, drawn evenly.

    Raises
    ------
    ValueError
        If there are no others.
    """
    others = own_subjects(model, subject)
    if not others:
        raise ValueError(f"the model has no subject beside {subject!r} to be its population")
    each = -(-N_LANDMARKS // len(others))
    rng, parts = np.random.default_rng(seed), []
    for number, name in enumerate(model.subjects):
        if name == subject:
            continue
        n_voxel = model.adapter(name).n_voxel
        voxels = np.sort(rng.permutation(n_voxel)[:each])
        parts.append(np.column_stack([np.full(len(voxels), number), voxels]))
    landmark = np.concatenate(parts)
    path = model.add_population(subject, len(landmark), min(RANK, model.adapter(subject).n_voxel))
    path.landmark.copy_(torch.from_numpy(landmark))
    return path


@torch.no_grad()
def solve_population(
    path: PopulationPath,
    predicted: Float32[np.ndarray, "image landmark"],
    responses: Float32[np.ndarray, "image voxel"],
) -> None:
    """Solve a population path, with a share of 1, from the landmarks' predicted responses to training images."""
    mean = predicted.mean(0, dtype=np.float64).astype(np.float32)
    centred = predicted - mean
    size = np.float32(np.sqrt(max(np.square(centred).sum(dtype=np.float64) / len(centred), 1e-12)))
    columns = centred / size
    found = best_of([candidate_of_kernel(columns @ columns.T, np.empty((0, len(columns)), np.float32))], responses)
    directions = leading_directions(fitted_by_kernel(found, responses), path.weight.shape[1])
    path.mean.copy_(torch.from_numpy(mean))
    path.basis.copy_(torch.from_numpy(columns.T @ (found.dual @ directions) / size))
    path.weight.copy_(torch.from_numpy(directions))


@torch.no_grad()
def population_start(
    model: EncodingModel,
    subject: str,
    tokens: TokenReader,
    train: Samples,
    validation: Samples,
    *,
    seed: int,
    landmarks: Landmarks | None = None,
) -> Solved:
    """Solve `subject`'s closed-form paths on `train`, each with a share of 1, and predict the images of `validation`.

    Parameters
    ----------
    train
        Mean responses, a row per image; nothing else is looked at.
    landmarks
        Gives what the landmarks of a path are predicted to respond to the images of some rows, if not computed here.

    Raises
    ------
    ValueError
        If there are fewer than three training images.
    """
    predict = landmarks or (lambda path, rows: predicted_landmarks(model, path, tokens, rows))
    others = own_subjects(model, subject)
    start = solve_terms(model, subject, tokens, train, seed=seed, prior=tuning_root(model, others))
    members = _terms(model, subject, tokens, validation.image, start)
    if others:
        path = add_landmarks(model, subject, seed=seed)
        solve_population(path, predict(path, train.image), train.responses)
        members["population"] = path(torch.from_numpy(predict(path, validation.image))).numpy()
    return Solved(start=start, members=members)


@torch.no_grad()
def settle_shares(
    adapter: Adapter, solved: Solved, network: Float32[np.ndarray, "image voxel"], validation: Samples
) -> Members:
    """Give the network and each closed-form path its share, all at once, by the subject's validation images.

    Parameters
    ----------
    network
        What the network predicts for the images of `validation`.
    """
    start = solved.start
    members = solved.members | {"network": network - start.mean}
    found = shares_of(
        list(members.values()),
        validation.responses - start.mean,
        weight=np.asarray(validation.n_repeats, np.float64),
    )
    share = dict(zip(members, found, strict=True))
    of_network = np.minimum(share["network"], LARGEST_NETWORK_SHARE)
    adapter.network_share.copy_(torch.from_numpy(of_network))
    # What is mixed is `s n + (1 - s) l`: the paths' shares are divided by what the network leaves of the mean response.
    share_terms(adapter.linear, start, np.stack([share["whole"], share["field"]]) / (1 - of_network))
    if adapter.population is not None:
        adapter.population.weight.mul_(torch.from_numpy(share["population"] / (1 - of_network))[:, None])
    return Members(
        share={name: float(of_member.mean()) for name, of_member in (share | {"network": of_network}).items()},
        validation_r={
            name: float(np.nan_to_num(voxelwise_r(m, validation.responses)).mean()) for name, m in members.items()
        },
    )


def _terms(
    model: EncodingModel, subject: str, tokens: TokenReader, rows: Int[np.ndarray, " image"], start: LinearStart
) -> dict[str, Float32[np.ndarray, "image voxel"]]:
    """Return what either term of the path predicts for images, less what it gives for the average training image."""
    device, path = model.streams.cls_mean.device, model.adapter(subject).linear
    parts = []
    for at in range(0, len(rows), _BATCH):
        parts.append(path.terms(model.linear_features(*tokens_on(device, tokens, rows[at : at + _BATCH]))))
    whole, field = (torch.cat(of_term).cpu().numpy() for of_term in zip(*parts, strict=True))
    return {"whole": whole - start.offset[0], "field": field - start.offset[1]}


@torch.no_grad()
def predicted_landmarks(
    model: EncodingModel, path: PopulationPath, tokens: TokenReader, rows: Int[np.ndarray, " image"]
) -> Float32[np.ndarray, "image landmark"]:
    """Return what the backbone predicts its own subjects to respond to images, at the landmarks of `path`."""
    device = model.streams.cls_mean.device
    parts = [
        model.population(*tokens_on(device, tokens, rows[at : at + _BATCH]), path).cpu().numpy()
        for at in range(0, len(rows), _BATCH)
    ]
    return np.concatenate(parts)

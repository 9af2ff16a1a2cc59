"""Fitting one subject's adapter on a frozen backbone: what can be solved, then steps while they help.

First come the closed-form paths beside the network (`foundation.closed_form.population_start`); then, of the network:

::

    ridge   its readouts in closed form alone
    head    then steps on the adapter's readouts, the streams' outputs computed once
    lora    then steps on these and on low-rank updates of the streams' blocks, the streams run anew at each step
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from adapters.backbone_outputs import BackboneOutputs
from adapters.ridge_start import ridge_start
from data.loader import ordered_batches, tokens_on
from data.preprocess import Samples
from data.store import TokenReader
from foundation.closed_form.population_start import Members, population_start, settle_shares
from foundation.config import LossConfig
from foundation.evaluation.metrics import voxelwise_r
from foundation.losses import objective
from foundation.model.dual_stream import Streams, concatenated
from foundation.model.encoding_model import EncodingModel, Output

Method = Literal["ridge", "head", "lora"]
Forward = Callable[[Int64[Tensor, " row"]], Output]
"""The model's output to some of a subject's images, by their rows in its samples."""
_SCORED_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How an adapter is refined."""

    lr: float = 1e-3
    """Learning rate of Adam."""
    epochs: int = 40
    """Most passes over the subject's training images."""
    steps: int = 120
    """Most steps; the pass that they end in is completed. The start is near, so more gain little (docs/experiments.md,
    2026-11-26) and cost minutes where there are many voxels."""
    patience: int = 5
    """Passes without a better validation score before it stops."""
    batch_size: int = 32
    """Images per step."""
    lora_rank: int = 4
    """Rank of the updates of the backbone's blocks (method lora)."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What a fit has to say: validation scores (mean voxelwise r) of the network's start and of what is kept."""

    start: float
    kept: float
    kept_epoch: int
    """0: no gradient step beat the closed form, which is what is kept."""
    members: Members
    """What a prediction is made of: the closed-form paths and the network."""


def streams_of(model: EncodingModel, tokens: TokenReader, samples: Samples) -> Streams:
    """Return the frozen streams' outputs to a subject's images, computed once."""
    device = next(model.parameters()).device
    found = []
    with torch.no_grad():
        for batch in ordered_batches(tokens, samples):
            batch = batch.to(device)
            found.append(model.streams(batch.cls, batch.patch))
    return concatenated(found)


def from_streams(model: EncodingModel, subject: str, streams: Streams) -> Forward:
    """Return the forward pass that starts from the streams' outputs."""
    return lambda rows: model.decode(streams[rows], {subject: slice(0, len(rows))})


def from_tokens(model: EncodingModel, tokens: TokenReader, samples: Samples) -> Forward:
    """Return the forward pass that starts from the tokens, read anew each time."""
    device = next(model.parameters()).device

    def forward(rows: Tensor) -> Output:
        return model(*tokens_on(device, tokens, samples.image[rows.numpy()]), {samples.subject: slice(0, len(rows))})

    return forward


def fit_adapter(
    model: EncodingModel,
    subject: str,
    parcel: Tensor,
    tokens: TokenReader,
    train: Samples,
    validation: Samples,
    *,
    method: Method,
    seed: int,
    loss: LossConfig = LossConfig(),
    target_weight: Float[Tensor, " voxel"] | None = None,
    config: FitConfig = FitConfig(),
    outputs: BackboneOutputs | None = None,
    log: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
) -> Fitted:
    """Give `model` an adapter for `subject`, fitted on `train`; `validation` settles shares and decides when to stop.

    The backbone's own weights aren't changed. Epoch 0 in `log` is the network's closed-form start.

    Parameters
    ----------
    loss
        The objective, and with it the ROI targets, that the backbone learned.
    target_weight
        Weights of the voxels in a linear ROI target; None: those of the mean.
    outputs
        The backbone's outputs, where they are kept; None: they are computed.
    """
    torch.manual_seed(seed)
    model.eval().requires_grad_(False)
    adapter = model.add_subject(subject, parcel)
    if target_weight is not None:
        adapter.target_weight.copy_(target_weight)
    landmarks = None if outputs is None else outputs.landmarks
    solved = population_start(model, subject, tokens, train, validation, seed=seed, landmarks=landmarks)
    streams, of_validation = (
        streams_of(model, tokens, of) if outputs is None else outputs.streams(of.image) for of in (train, validation)
    )
    ridge_start(model, subject, streams, torch.from_numpy(train.responses), loss=loss, seed=seed)
    held_out = from_streams(model, subject, of_validation)
    start = _score(held_out, validation)
    log({"validation/voxel_r": start}, 0)
    kept, kept_epoch = start, 0
    if method != "ridge":
        forward = from_streams(model, subject, streams)
        if method == "lora":
            model.add_lora(subject, config.lora_rank)
            forward, held_out = from_tokens(model, tokens, train), from_tokens(model, tokens, validation)
        kept, kept_epoch = _refine(
            model, forward, held_out, train, validation, start=start, seed=seed, loss=loss, config=config, log=log
        )
        if kept_epoch == 0:
            adapter.lora = None  # no update helped: none is kept
    members = settle_shares(adapter, solved, _predicted(held_out, validation), validation)
    return Fitted(start=start, kept=kept, kept_epoch=kept_epoch, members=members)


def _refine(
    model: EncodingModel,
    forward: Forward,
    held_out: Forward,
    train: Samples,
    validation: Samples,
    *,
    start: float,
    seed: int,
    loss: LossConfig,
    config: FitConfig,
    log: Callable[[dict[str, float], int], None],
) -> tuple[float, int]:
    """Step on the adapter's parameters, and leave it as it was when its validation score was highest; return both."""
    subject, responses = train.subject, torch.from_numpy(train.responses)
    adapter, best = model.adapter(subject), start
    kept, kept_epoch = copy.deepcopy(adapter.state_dict()), 0
    adapter.requires_grad_(True)
    optimiser = torch.optim.Adam(adapter.parameters(), lr=config.lr)
    generator = torch.Generator().manual_seed(seed)
    steps_per_epoch = -(-len(train) // config.batch_size)
    for epoch in range(1, min(config.epochs, -(-config.steps // steps_per_epoch)) + 1):
        total = 0.0
        for rows in torch.randperm(len(train), generator=generator).split(config.batch_size):
            cost = objective(model, forward(rows), {subject: responses[rows]}, loss).total
            optimiser.zero_grad()
            cost.backward()
            optimiser.step()
            total += float(cost.detach()) * len(rows)
        score = _score(held_out, validation)
        log({"train/loss": total / len(train), "validation/voxel_r": score}, epoch)
        if score > best:
            best, kept_epoch, kept = score, epoch, copy.deepcopy(adapter.state_dict())
        if epoch - kept_epoch >= config.patience:
            break
    adapter.load_state_dict(kept)
    adapter.requires_grad_(False)
    return best, kept_epoch


def _score(forward: Forward, samples: Samples) -> float:
    """Return the mean voxelwise correlation of the network's prediction."""
    return float(np.nan_to_num(voxelwise_r(_predicted(forward, samples), samples.responses)).mean())


def _predicted(forward: Forward, samples: Samples) -> Float32[np.ndarray, "image voxel"]:
    """Return what the network predicts for a subject's images."""
    with torch.no_grad():
        parts = torch.arange(len(samples)).split(_SCORED_AT_ONCE)
        return torch.cat([forward(rows).subjects[samples.subject].voxel for rows in parts]).numpy()

"""Fitting one subject's adapter on a frozen backbone: the closed-form start, then gradient steps while they help."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from adapters.ridge_start import ridge_start
from data.loader import ordered_batches
from data.preprocess import Samples
from data.store import TokenReader
from foundation.config import LossConfig
from foundation.evaluation.metrics import voxelwise_r
from foundation.losses import objective
from foundation.model.dual_stream import Streams
from foundation.model.encoding_model import EncodingModel

Method = Literal["ridge", "head"]
MANY_NUMBERS = 4_000_000
"""Images times voxels from which several threads pay."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How an adapter is refined."""

    lr: float = 1e-3
    """Learning rate of Adam."""
    epochs: int = 40
    """Most passes over the subject's training images."""
    patience: int = 8
    """Passes without a better validation score before it stops."""
    batch_size: int = 32
    """Images per step."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What a fit has to say: validation scores (mean voxelwise correlation) of the start and of what is kept."""

    start: float
    kept: float
    kept_epoch: int
    """0: no gradient step beat the closed form, which is what is kept."""


def streams_of(model: EncodingModel, tokens: TokenReader, samples: Samples) -> Streams:
    """Return the frozen streams' outputs to a subject's images, computed once."""
    device = next(model.parameters()).device
    found = []
    with torch.no_grad():
        for batch in ordered_batches(tokens, samples):
            batch = batch.to(device)
            found.append(model.streams(batch.cls, batch.patch))
    return Streams(
        cls=torch.cat([f.cls for f in found]),
        patch=torch.cat([f.patch for f in found]),
        gate=torch.cat([f.gate for f in found]),
    )


@contextlib.contextmanager
def threads_for(n_numbers: int) -> Iterator[None]:
    """Compute on one thread where there is little to compute: several then cost more than they give.

    On two cores that others used as well, a subject of 400 voxels took 217 s of CPU on two threads and 25 s on one.
    """
    if n_numbers > MANY_NUMBERS:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(before)


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
    config: FitConfig = FitConfig(),
    log: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
) -> Fitted:
    """Give `model` an adapter for `subject`, fitted on `train`; `validation` decides when to stop.

    The backbone isn't changed. Epoch 0 in `log` is the closed-form start.
    """
    torch.manual_seed(seed)
    model.eval().requires_grad_(False)
    adapter = model.add_subject(subject, parcel)
    streams, held_out = streams_of(model, tokens, train), streams_of(model, tokens, validation)
    responses = torch.from_numpy(train.responses)
    ridge_start(model, subject, streams, responses, seed=seed)
    start = best = _score(model, subject, held_out, validation.responses)
    log({"validation/voxel_r": start}, 0)
    if method == "ridge":
        return Fitted(start=start, kept=start, kept_epoch=0)

    kept, kept_epoch = copy.deepcopy(adapter.state_dict()), 0
    adapter.requires_grad_(True)
    optimiser = torch.optim.Adam(adapter.parameters(), lr=config.lr)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(1, config.epochs + 1):
        total = 0.0
        for rows in torch.randperm(len(train), generator=generator).split(config.batch_size):
            output = model.decode(streams[rows], {subject: slice(0, len(rows))})
            loss = objective(model, output, {subject: responses[rows]}, LossConfig()).total
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += float(loss.detach()) * len(rows)
        score = _score(model, subject, held_out, validation.responses)
        log({"train/loss": total / len(train), "validation/voxel_r": score}, epoch)
        if score > best:
            best, kept_epoch, kept = score, epoch, copy.deepcopy(adapter.state_dict())
        if epoch - kept_epoch >= config.patience:
            break
    adapter.load_state_dict(kept)
    adapter.requires_grad_(False)
    return Fitted(start=start, kept=best, kept_epoch=kept_epoch)


def _score(model: EncodingModel, subject: str, streams: Streams, responses: np.ndarray) -> float:
    with torch.no_grad():
        voxel = model.decode(streams, {subject: slice(0, len(streams))}).subjects[subject].voxel.numpy()
    return float(np.nan_to_num(voxelwise_r(voxel, responses)).mean())

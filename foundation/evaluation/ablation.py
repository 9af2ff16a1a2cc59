"""What a trained model's prediction loses when a stream is disabled, per ROI family and early against higher areas.

Losses, differences and their uncertainty are those of `foundation.evaluation.area_losses`. Choices:

- Interventions with chance in them, shuffling and the random subspace, are averages over draws.
- Test images are all that is seen; the mean that replaces a stream is over them, and no response has a part in it.
- The closed-form path bypasses the streams, so it is left out, except where a model was retrained without a stream:
  there whole predictions are compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int

from data.loader import tokens_on
from data.nifti import written_whole
from data.preprocess import Preprocessing
from data.splits import Split
from data.store import SubjectStore, TokenReader
from foundation.evaluation.area_losses import Ablation, Losses, ResampledR, merged
from foundation.evaluation.interventions import Branch, Intervention, Removed, interventions, swapped_inputs
from foundation.evaluation.measured import measured_part
from foundation.evaluation.model_outputs import model_prediction
from foundation.model.dual_stream import Streams, concatenated
from foundation.model.encoding_model import EncodingModel

RETRAINED = "retrained without"
_BATCH = 64


def ablate(
    model: EncodingModel,
    subject: SubjectStore,
    tokens: TokenReader,
    split: Split,
    *,
    n_sessions: int | None = None,
    preprocessing: Preprocessing = Preprocessing(),
    without: Mapping[Branch, EncodingModel] | None = None,
    n_bootstraps: int = 1000,
    n_draws: int = 10,
    seed: int = 0,
) -> Ablation:
    """Disable each stream of `model` in every way, and swap their inputs, for one subject's test images.

    Parameters
    ----------
    n_sessions, preprocessing
        How the model's trials were prepared.
    without
        Models that were trained without a stream, compared with the whole of `model`.
    n_draws
        Of each intervention that has chance in it.

    Returns
    -------
    ablation
        Without rows, and with a note that says why, if the model has one stream only; without differentials if the
        subject's labels don't tell early from higher areas.
    """
    measured, rows = measured_part(subject, split, n_sessions=n_sessions, preprocessing=preprocessing)
    if len(model.config.streams) < 2:
        only = ", ".join(model.config.streams)
        return Ablation(notes=(f"{subject.name}: ablation n/a, the model has the {only} stream only",))
    adapter = model.adapter(subject.name)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    losses = Losses(measured, adapter.parcel.cpu().numpy(), n_bootstraps=n_bootstraps, rng=rng)

    def network(streams: Streams) -> Float32[np.ndarray, "image voxel"]:
        with torch.inference_mode():
            decoded = model.decode(streams, {subject.name: slice(0, len(streams))})
        return decoded.subjects[subject.name].voxel.cpu().numpy()

    found, removed = ablate_network(
        network, stream_outputs(model, tokens, subject.name, rows), losses, n_draws, generator
    )
    swapped = network(stream_outputs(model, tokens, subject.name, rows, swapped=True))
    found["both", "swapped inputs"] = losses.mean_r([swapped])
    intact = found.pop(("", ""))
    share = float(adapter.network_share.mean())
    notes = [
        f"{subject.name}: the closed-form path bypasses the streams and is left out; "
        f"the network's mean share of a prediction is {share:.2f}"
    ]
    told = losses.told(intact, found, removed=removed)
    if without:
        whole = losses.mean_r([model_prediction(model, tokens, subject.name, rows)])
        retrained = {
            (branch, RETRAINED): losses.mean_r([model_prediction(other, tokens, subject.name, rows)])
            for branch, other in without.items()
        }
        told = merged([told, losses.told(whole, retrained)])
        notes.append(f"{subject.name}: {RETRAINED} compares whole predictions, closed-form path included")
    return Ablation(
        rows=told.rows, differentials=told.differentials, notes=(*notes, *dict.fromkeys(told.notes), *measured.notes)
    )


def ablate_network(
    network: Callable[[Streams], np.ndarray],
    streams: Streams,
    losses: Losses,
    n_draws: int,
    generator: torch.Generator,
) -> tuple[dict[tuple[str, str], ResampledR], dict[str, Removed]]:
    """Return r under each intervention, by branch and intervention, and intact under ``("", "")``; what control takes.

    Parameters
    ----------
    network
        From the streams' outputs to predictions "image voxel".
    """

    def under(several: Sequence[Intervention]) -> ResampledR:
        return losses.mean_r(network(intervene(streams)) for intervene in several)

    done = interventions(streams, n_draws=n_draws, generator=generator)
    intact = {("", ""): losses.mean_r([network(streams)])}
    return intact | {name: under(several) for name, several in done.by_name.items()}, done.removed


def stream_outputs(
    model: EncodingModel, tokens: TokenReader, subject: str, rows: Int[np.ndarray, " image"], *, swapped: bool = False
) -> Streams:
    """Return what the streams make of images; with `swapped`, each of the other's tokens."""
    device = model.streams.cls_mean.device
    model.eval()
    found = []
    with torch.inference_mode():
        for start in range(0, len(rows), _BATCH):
            cls, patch = tokens_on(device, tokens, rows[start : start + _BATCH])
            seen = swapped_inputs(cls, patch) if swapped else (cls, patch)
            found.append(model.streams_of(*seen, {subject: slice(0, len(cls))}))
    return concatenated(found)


def write_ablation(
    path: Path, ablation: Ablation, *, sentences: Sequence[str] = (), more: Mapping[str, Any] | None = None
) -> None:
    """Write everything as JSON; what is undefined is null. The file appears whole or not at all.

    Raises
    ------
    ValueError
        If a number is NaN or infinite, which JSON has no word for.
    """
    told = asdict(ablation) | {"sentences": list(sentences)} | dict(more or {})
    text = json.dumps(told, indent=1, allow_nan=False) + "\n"
    with written_whole(path) as draft:
        draft.write_text(text)

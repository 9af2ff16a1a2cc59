"""What is settled when a subject's network is trained: its share in the prediction, and the noise of single trials."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int

from data.loader import tokens_on
from data.preprocess import Preprocessing, Samples, validation_trials
from data.splits import Split
from data.store import SubjectStore, TokenReader
from foundation.closed_form.mixture import network_share, noise_sd
from foundation.evaluation.metrics import voxelwise_r
from foundation.model.encoding_model import EncodingModel

N_DRAWS = 8
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Settled:
    """Mean voxelwise correlation on the validation images that settled the shares, and the network's mean share."""

    mixture: float
    network: float
    closed_form: float
    """NaN where there is no closed-form path."""
    share: float

    def __str__(self) -> str:
        return (
            f"validation r {self.mixture:.4f} (network alone {self.network:.4f}, closed form alone "
            f"{self.closed_form:.4f}), the network's share {self.share:.2f}"
        )


def predictions(
    model: EncodingModel, subject: str, tokens: TokenReader, rows: Int[np.ndarray, " image"]
) -> tuple[Float32[np.ndarray, "image voxel"], Float32[np.ndarray, "image voxel"]]:
    """Return what the network and the closed-form paths predict for images."""
    network, linear = [], []
    with torch.inference_mode():
        for cls, patch in _tokens(model, tokens, rows):
            network.append(model(cls, patch, {subject: slice(0, len(cls))}).subjects[subject].voxel.cpu().numpy())
            linear.append(model.closed_form(cls, patch, subject).cpu().numpy())
    return np.concatenate(network), np.concatenate(linear)


def finish_adapter(
    model: EncodingModel,
    subject: SubjectStore,
    tokens: TokenReader,
    split: Split,
    validation: Samples,
    *,
    seed: int,
    n_sessions: int | None = None,
    preprocessing: Preprocessing = Preprocessing(),
) -> Settled:
    """Set the network's share and the noise of `subject`'s voxels by its validation images of `n_sessions`.

    Without a solved closed-form path, the network predicts alone. What is returned is for people to read.
    """
    model.eval()
    adapter = model.adapter(subject.name)
    network, linear = predictions(model, subject.name, tokens, validation.image)
    if adapter.linear.solved:
        weight = np.asarray(validation.n_repeats, np.float64)
        share = network_share(linear, network, validation.responses, weight=weight)
        adapter.network_share.copy_(torch.from_numpy(share))
    return settle_noise(
        model, subject, tokens, split, validation, seed=seed, n_sessions=n_sessions, preprocessing=preprocessing
    )


def settle_noise(
    model: EncodingModel,
    subject: SubjectStore,
    tokens: TokenReader,
    split: Split,
    validation: Samples,
    *,
    seed: int,
    n_sessions: int | None = None,
    preprocessing: Preprocessing = Preprocessing(),
) -> Settled:
    """Set the noise of `subject`'s voxels by its validation trials of `n_sessions`, its shares being settled."""
    model.eval()
    adapter = model.adapter(subject.name)
    network, linear = predictions(model, subject.name, tokens, validation.image)
    share = adapter.network_share.cpu().numpy()
    prediction = share * network + (1 - share) * linear

    trials = validation_trials(subject, split, n_sessions=n_sessions, preprocessing=preprocessing)
    place = np.searchsorted(validation.image, trials.image)
    drawn = np.square(share) * _latent_variance(model, subject.name, tokens, validation.image, seed=seed)
    sd = noise_sd(prediction, trials.responses, place, drawn_variance=drawn)
    adapter.noise_sd.copy_(torch.from_numpy(sd))
    mixture_r, network_r, linear_r = (
        float(np.nan_to_num(voxelwise_r(of, validation.responses)).mean()) for of in (prediction, network, linear)
    )
    closed_form = linear_r if adapter.linear.solved else float("nan")
    return Settled(mixture=mixture_r, network=network_r, closed_form=closed_form, share=float(share.mean()))


def _latent_variance(
    model: EncodingModel, subject: str, tokens: TokenReader, rows: np.ndarray, *, seed: int
) -> np.ndarray:
    """Return how much the network's prediction varies with draws of the latent, by voxel, on average over images."""
    if model.config.latent is None:
        return np.zeros(model.adapter(subject).n_voxel)
    device = model.streams.cls_mean.device
    generator = torch.Generator(device).manual_seed(seed)
    total = torch.zeros(model.adapter(subject).n_voxel, dtype=torch.float64, device=device)
    with torch.inference_mode():
        for cls, patch in _tokens(model, tokens, rows):
            everything = {subject: slice(0, len(cls))}
            streams = model.streams_of(cls, patch, everything)
            drawn = [
                model.decode(streams, everything, sample=True, generator=generator).subjects[subject].voxel
                for _ in range(N_DRAWS)
            ]
            total += torch.stack(drawn).var(0).sum(0)
    return (total / len(rows)).cpu().numpy()


def _tokens(model: EncodingModel, tokens: TokenReader, rows: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    device = model.streams.cls_mean.device
    for start in range(0, len(rows), _BATCH):
        yield tokens_on(device, tokens, rows[start : start + _BATCH])

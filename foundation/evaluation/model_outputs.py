"""What a model predicts of a subject, and the single trials that it draws, for images of a store."""

import numpy as np
import torch
from jaxtyping import Float32, Int

from data.loader import tokens_on
from data.preprocess import Samples
from data.store import TokenReader
from foundation.model.encoding_model import EncodingModel
from foundation.training.validation import predict_samples

SAMPLE_BATCH = 64


def model_prediction(
    model: EncodingModel, tokens: TokenReader, subject: str, rows: Int[np.ndarray, " image"]
) -> Float32[np.ndarray, "image voxel"]:
    """Return what `model` predicts for the images in `rows`."""
    n_voxel = model.adapter(subject).n_voxel
    wanted = Samples(
        subject=subject,
        image=rows,
        responses=np.zeros((len(rows), n_voxel), np.float32),
        n_repeats=np.ones(len(rows), np.float32),
    )
    return predict_samples(model, tokens, wanted)


def model_samples(
    model: EncodingModel, tokens: TokenReader, subject: str, rows: Int[np.ndarray, " image"], *, n: int, seed: int
) -> Float32[np.ndarray, "sample image voxel"]:
    """Return `n` single trials that `model` draws for each of the images in `rows`."""
    device = model.streams.cls_mean.device
    generator = torch.Generator(device).manual_seed(seed)
    drawn = np.empty((n, len(rows), model.adapter(subject).n_voxel), np.float32)
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(rows), SAMPLE_BATCH):
            some = slice(start, start + SAMPLE_BATCH)
            cls, patch = tokens_on(device, tokens, rows[some])
            drawn[:, some] = model.sample(cls, patch, subject, n, generator=generator).cpu().numpy()
    return drawn

"""How well a model predicts images that it isn't trained on; the rows are shared out where many ranks train it."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float32

from data.loader import ordered_batches
from data.preprocess import Samples
from data.store import TokenReader
from foundation.evaluation.metrics import voxelwise_r
from foundation.model.encoding_model import EncodingModel
from foundation.training.engine import Engine


def predict_samples(
    model: EncodingModel, tokens: TokenReader, samples: Samples, *, engine: Engine | None = None
) -> Float32[np.ndarray, "image voxel"]:
    """Return the model's prediction for each of a subject's samples, the latent at its mean.

    Parameters
    ----------
    engine : the engine whose ranks, all of which call this, predict a share each; None: this process predicts all.
    """
    n, rank, world = len(samples), engine.rank if engine else 0, engine.world if engine else 1
    share = -(-n // world)  # the same for all: under ZeRO 3 ranks meet in every batch
    mine = np.minimum(np.arange(rank * share, (rank + 1) * share), n - 1)
    device = engine.device if engine else next(model.parameters()).device
    was_training = model.training
    model.eval()
    share_of_samples = replace(samples, image=samples.image[mine], responses=samples.responses[mine])
    found = []
    with torch.no_grad():  # not inference mode: ZeRO 3 gathers parameters meanwhile, which must stay trainable
        for batch in ordered_batches(tokens, share_of_samples):
            batch = batch.to(device)
            found.append(model.predict(batch.cls, batch.patch, samples.subject))
        predicted = torch.cat(found)
        predicted = engine.gather(predicted) if engine else predicted
    model.train(was_training)
    return predicted[:n].cpu().numpy()


def validation_scores(
    model: EncodingModel, tokens: TokenReader, validation: Mapping[str, Samples], *, engine: Engine | None = None
) -> dict[str, float]:
    """Return each subject's mean voxelwise correlation on its validation images, and their mean."""
    scores = {}
    for name, samples in validation.items():
        r = voxelwise_r(predict_samples(model, tokens, samples, engine=engine), samples.responses)
        scores[f"validation/voxel_r/{name}"] = float(np.nan_to_num(r).mean())
    return scores | {"validation/voxel_r": float(np.mean(list(scores.values())))}

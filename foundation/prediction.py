"""From images to voxels: a model, the frozen encoder that it was trained on, and one subject.

Responses are in units of a session's standard deviation, as the models are trained. Tokens are rounded to half
precision, as a store keeps them, so that an image's prediction is the same from pixels and from a store's tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from data.encoders import Encoder
from data.features import load_encoder
from data.schema import json_digest
from foundation.image_files import Pixels
from foundation.model.encoding_model import EncodingModel

UNIT = "standard deviations of the session"
BATCH = 32
_SAMPLE_BYTES = 256 << 20  # of samples that are drawn at once


def encoder_of(lineage: dict[str, Any], source: str | None = None) -> Encoder:
    """Load the encoder that a model was trained on.

    Parameters
    ----------
    lineage : the model's; its `encoder` has name, spec, digest, source and revision.
    source : a directory or hub name to take it from; None: where the lineage says that it came from.

    Raises
    ------
    ValueError
        If the lineage names none, it can't be loaded, or it isn't the one that the model was trained on.
    """
    known = lineage.get("encoder")
    if not isinstance(known, dict) or not {"name", "spec", "digest", "source", "revision"} <= known.keys():
        raise ValueError("the model's lineage doesn't describe its encoder; train it again with this manybrains")
    where = source or (known["name"] if known["spec"].get("name") == "gabor" else known["source"])
    if source is None and where != "gabor" and known["revision"] is None and not Path(where).is_dir():
        raise ValueError(
            f"the model was trained on the encoder {known['name']!r} from a directory {where!r}, which isn't here; "
            "name it by --encoder DIR"
        )
    encoder = load_encoder(where, depths=tuple(known["spec"]["depths"]))
    digest = json_digest(encoder.spec())
    if digest != known["digest"]:
        raise ValueError(
            f"the encoder {where!r} isn't the one that the model was trained on, {known['name']!r}: its digest is "
            f"{digest}, not {known['digest']} (other: {_difference(encoder.spec(), known['spec'])}); name by --encoder "
            "a directory or hub name that has the same weights and preprocessing"
        )
    return encoder


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    return ", ".join(sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))) or "the digest"


class Predictor:
    """Predicts one subject's voxels from images.

    Parameters
    ----------
    subject : the name of one of the model's subjects.

    Raises
    ------
    ValueError
        If the model has no such subject, or tokens of another shape than the encoder gives.
    """

    def __init__(self, model: EncodingModel, encoder: Encoder, subject: str) -> None:
        self.n_voxels = model.adapter(subject).n_voxel
        rows, columns = encoder.grid
        gives, takes = (len(encoder.depths), rows * columns, encoder.width), model.shape
        if gives != (takes.depth, takes.patch, takes.width):
            raise ValueError(
                f"the encoder {encoder.name!r} gives {gives} depths, patches and features, the model takes "
                f"{(takes.depth, takes.patch, takes.width)}; name the encoder that it was trained on"
            )
        self.subject, self._model, self._encoder = subject, model.eval(), encoder

    def tokens(
        self, images: Sequence[Pixels]
    ) -> tuple[Float32[torch.Tensor, "image depth width"], Float32[torch.Tensor, "image depth patch width"]]:
        """Return global and patch tokens as a store keeps them; images of one size are encoded together."""
        shape = self._model.shape
        cls = torch.empty(len(images), shape.depth, shape.width)
        patch = torch.empty(len(images), shape.depth, shape.patch, shape.width)
        for size in dict.fromkeys(image.shape for image in images):
            places = [k for k, image in enumerate(images) if image.shape == size]
            found = self._encoder.encode(np.stack([images[k] for k in places]))
            whole = found.cls if found.cls is not None else found.pooled
            assert whole is not None
            cls[places], patch[places] = _halved(whole), _halved(found.patch)
        if not (cls.isfinite().all() and patch.isfinite().all()):
            raise ValueError(f"the encoder {self._encoder.name!r} gives tokens beyond half precision for these images")
        return cls, patch

    @torch.inference_mode()
    def predict(self, images: Sequence[Pixels]) -> Float32[np.ndarray, "image voxel"]:
        """Return the expected responses to `images`, whose sizes may differ."""
        return self._model.predict(*self.tokens(images), self.subject).numpy()

    @torch.inference_mode()
    def sample(
        self, images: Sequence[Pixels], n: int, *, generator: torch.Generator
    ) -> Float32[np.ndarray, "image sample voxel"]:
        """Return `n` simulated single trials of each image.

        Raises
        ------
        ValueError
            If the noise of the subject's voxels hasn't been fitted.
        """
        drawn = self._model.sample(*self.tokens(images), self.subject, n, generator=generator)
        return drawn.transpose(0, 1).contiguous().numpy()

    def stream(
        self,
        batches: Iterable[Sequence[Pixels]],
        *,
        n_samples: int | None = None,
        seed: int = 0,
    ) -> Iterator[Float32[np.ndarray, "image *voxel"]]:
        """Yield (image, voxel), or (image, sample, voxel), batch by batch.

        Samples come from one generator in the order of the batches: the same images, seed and batch size give the same.
        """
        generator = torch.Generator().manual_seed(seed)
        for images in batches:
            yield self.predict(images) if n_samples is None else self.sample(images, n_samples, generator=generator)

    def batch_size(self, wanted: int, n_samples: int | None) -> int:
        """Return how many images to take at once: `wanted`, or fewer where the samples of so many are too large."""
        of_image = 4 * self.n_voxels * (n_samples or 1)
        return max(1, min(wanted, _SAMPLE_BYTES // of_image))


def _halved(tokens: Float32[np.ndarray, "image *token"]) -> Float32[torch.Tensor, "image *token"]:
    with np.errstate(over="ignore"):
        return torch.from_numpy(tokens.astype(np.float16)).float()

"""A model on the built-in encoder with random weights, saved as a registered version is: for tests of prediction."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.encoders.gabor import GaborEncoder
from data.places import save_place
from data.schema import json_digest
from data.voxels import Volume
from foundation.checkpoint import save_model
from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel
from foundation.tracking.packaging import package
from tests.tiny_store import TINY_BACKBONE

N_VOXELS = {"subj01": 14, "subj02": 9, "subj05": 12}
"""The last is an adapter's subject, the others the backbone's own."""
ADAPTED = "subj05"
SHAPE = (4, 5, 3)


def gabor_lineage() -> dict[str, Any]:
    """What a model's lineage says of the built-in encoder."""
    spec = GaborEncoder().spec()
    return {"name": "gabor", "spec": spec, "digest": json_digest(spec), "source": "gabor", "revision": None}


def random_model(*subjects: str) -> EncodingModel:
    """A model whose every part bears on what it predicts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parcels = {name: torch.arange(N_VOXELS[name]) % 3 for name in subjects}
        model = EncodingModel(TokenShape(depth=4, patch=64, width=48), TINY_BACKBONE, parcels)
        for name in subjects:
            adapter = model.adapter(name)
            for tensor in [*adapter.parameters(), *adapter.linear.buffers()]:
                if tensor.is_floating_point():
                    tensor.data.normal_(std=0.2)
            adapter.network_share.uniform_(0.3, 0.7)
            adapter.noise_sd.uniform_(0.5, 1.0)
    return model.eval()


def volume() -> Volume:
    """Where the adapted subject's voxels lie."""
    index = np.argwhere(np.ones(SHAPE, bool))[::5][: N_VOXELS[ADAPTED]].astype(np.int32)
    affine = np.array([[1.8, 0, 0, -90], [0, 1.8, 0, -126], [0, 0, 1.8, -72], [0, 0, 0, 1.0]])
    return Volume(shape=SHAPE, affine=affine, index=index)


def save_parts(directory: Path, *, encoder: dict[str, Any] | None = None) -> tuple[Path, Path, Path]:
    """Write backbone, adapter and card into a new directory."""
    backbone, adapter, card = (directory / name for name in ("final", "fitted", "card"))
    for path in (backbone, adapter, card):
        path.mkdir(parents=True)
    lineage = {"encoder": encoder or gabor_lineage(), "store": "nowhere"}
    model = random_model(*N_VOXELS)
    save_model(model, adapter, made_from={"subject": ADAPTED, "backbone": "tiny/1", "sessions": 3}, only=ADAPTED)
    save_place(volume(), adapter)
    model.drop_subject(ADAPTED)
    save_model(model, backbone, made_from=lineage)
    (card / "card.json").write_text("{}")
    return backbone, adapter, card


def save_version(directory: Path, *, adapted: bool = True, encoder: dict[str, Any] | None = None) -> Path:
    """Write an adapter's version, or the backbone's, to ``directory/version`` and return that."""
    backbone, adapter, card = save_parts(directory, encoder=encoder)
    package(directory / "version", backbone=backbone, card=card, adapter=adapter if adapted else None)
    return directory / "version"


def picture(seed: int, *, height: int = 40, width: int = 40) -> np.ndarray:
    """A blurred coloured noise, (height, width, 3) uint8."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def png(pixels: np.ndarray) -> bytes:
    """The bytes of a picture file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()

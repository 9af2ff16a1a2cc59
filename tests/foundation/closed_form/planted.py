"""A store of random tokens and one subject whose voxels are linear in them, through planted fields: the truth is known.

Every image is shown once in either session. Voxels 0 and 1 see through a small field, 2 and 3 through a larger one, the
other four see the whole image: its CLS tokens and its first depth's coarse patches.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data.sources import ImageBlock, SubjectData
from data.store import PooledStore, TokenReader
from foundation.config import BackboneConfig
from foundation.model.dual_stream import TokenShape, pool_grid
from foundation.model.encoding_model import EncodingModel
from foundation.model.spatial import PYRAMID, field_pyramid, gaussian_field
from tests.tiny_store import SPEC, TINY_BACKBONE

ENCODER, SUBJECT = "planted", "subj01"
SHAPE = TokenShape(depth=2, patch=64, width=4)
N_IMAGES = {"train": 260, "validation": 80, "test": 60}


def numbered(sd: float, *, column: int, row: int) -> int:
    """Return the number of a field in the pyramid."""
    sizes, places = zip(*PYRAMID, strict=True)
    smaller = places[: sizes.index(sd)]
    return sum(n**2 for n in smaller) + row * places[len(smaller)] + column


CANDIDATES = (numbered(0.12, column=2, row=1), numbered(0.2, column=4, row=6))
"""A small field on the left and above, and a larger one below the middle."""
FIELD = torch.tensor(CANDIDATES).repeat_interleave(2)
"""Of the first four voxels."""
PARCEL = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2])
NOISE_SD = np.linspace(0.3, 0.6, 8)
"""Of single trials, whose signal has standard deviation 1."""


@dataclass(frozen=True)
class Planted:
    """The store, and the responses to each image without noise."""

    store: PooledStore
    truth: np.ndarray

    @property
    def tokens(self) -> TokenReader:
        """The images' tokens."""
        return self.store.tokens(ENCODER)


def rows_of(part: str) -> np.ndarray:
    """Return the rows of a part's images."""
    parts = list(N_IMAGES)
    first = sum(N_IMAGES[before] for before in parts[: parts.index(part)])
    return np.arange(first, first + N_IMAGES[part])


def plant(path: Path) -> Planted:
    """Make the store."""
    rng = np.random.default_rng(0)
    roles = [part for part, n in N_IMAGES.items() for _ in range(n)]
    n_images = len(roles)
    store = PooledStore.create(path, name="planted")
    store.add_images(ImageBlock(ids=[f"image{i:03d}" for i in range(n_images)], roles=roles))
    cls = rng.standard_normal((n_images, SHAPE.depth, SHAPE.width)).astype(np.float16)
    patch = rng.standard_normal((n_images, SHAPE.depth, SHAPE.patch, SHAPE.width)).astype(np.float16)
    store.begin_tokens(ENCODER, SPEC)
    store.write_tokens(ENCODER, "0000", [{"cls": cls, "patch": patch}])

    candidates, seen = field_pyramid(), torch.from_numpy(patch).float()
    fields = gaussian_field(candidates.place, candidates.log_size, SHAPE.side)[FIELD]
    through = torch.einsum("vp,bdpw->bvdw", fields, seen).flatten(2).numpy()
    local = np.einsum("bvc,vc->bv", through, rng.standard_normal(through.shape[1:]))
    coarse = pool_grid(seen, 4)[:, 0].flatten(1).numpy()
    whole = cls.reshape(n_images, -1) @ rng.standard_normal((SHAPE.depth * SHAPE.width, 4))
    whole = whole + coarse @ rng.standard_normal((coarse.shape[1], 4))
    truth = np.hstack([local, whole])
    truth = (truth - truth.mean(0)) / truth.std(0)

    image = np.concatenate([rng.permutation(n_images), rng.permutation(n_images)]).astype(np.int32)
    responses = truth[image] + NOISE_SD * rng.standard_normal((len(image), len(NOISE_SD)))
    session = np.repeat([1, 2], n_images).astype(np.int16)
    store.add_subject(SubjectData(name=SUBJECT, responses=responses.astype(np.float32), image=image, session=session))
    return Planted(store, truth)


def fresh_model(planted: Planted, **of_backbone: int) -> EncodingModel:
    """Return an untrained model of the subject, the tokens' statistics those of the training images."""
    torch.manual_seed(0)
    config: BackboneConfig = replace(TINY_BACKBONE, **of_backbone)
    model = EncodingModel(SHAPE, config, {SUBJECT: PARCEL})
    cls, patch = planted.tokens.read(rows_of("train"))
    model.streams.set_statistics([(torch.from_numpy(cls).float(), torch.from_numpy(patch).float())])
    return model.eval().requires_grad_(False)

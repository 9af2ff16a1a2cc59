"""A pooled store of a few kilobytes and a recipe of a few seconds, for tests of what trains and fits."""

from pathlib import Path
from typing import Any

import numpy as np

from data.sources import ImageBlock, SubjectData
from data.store import PooledStore
from data.voxels import Rois
from foundation.config import BackboneConfig, DataConfig, MambaConfig, OptimConfig, Recipe

ENCODER = "noise"
N_IMAGES = {"train": 44, "validation": 8, "test": 8}
N_VOXELS = {"subj01": 14, "subj02": 9, "subj05": 12}
N_SESSIONS = 3
DEPTHS, PATCHES, WIDTH = [1, 2], 16, 6
SPEC = {"kind": "noise", "depths": DEPTHS, "seed": 0}

TINY_BACKBONE = BackboneConfig(
    width=8,
    n_cls_layer=1,
    n_patch_layer=2,
    n_query=2,
    latent=3,
    amplitude=True,
    n_component=4,
    n_local=3,
    n_residual=2,
    gate="roi",
    n_gate=3,
    mamba=MambaConfig(d_state=4, d_conv=3, headdim=8, chunk_size=8),
)
"""Every part of the model, each as small as it can be."""


def tiny_recipe(store: Path, *, epochs: int = 4, checkpoint_every: int = 3, **of_recipe) -> Recipe:
    """A run of `epochs` x 5 steps over all three subjects."""
    return Recipe(
        name="tiny",
        data=DataConfig(store=str(store), encoder=ENCODER, subjects=tuple(N_VOXELS), parcels="auto:4"),
        backbone=TINY_BACKBONE,
        optim=OptimConfig(lr=1e-2, epochs=epochs, batch_size=24),
        checkpoint_every=checkpoint_every,
        **of_recipe,
    )


def design(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Image and session of each trial: every image once, then some of each part again in a later session."""
    parts = np.split(np.arange(sum(N_IMAGES.values())), np.cumsum(list(N_IMAGES.values()))[:-1])
    image, session = [], []
    for of_part in parts:
        first = rng.permutation(of_part)
        again = first[: len(first) // 2]
        image += [first, again]
        session += [np.arange(len(first)) % N_SESSIONS, (np.arange(len(again)) + 1) % N_SESSIONS]
    image, session = np.concatenate(image), np.concatenate(session) + 1
    order = np.lexsort((rng.random(len(image)), session))
    return image[order].astype(np.int32), session[order].astype(np.int16)


def make_tiny_store(
    path: Path,
    *,
    spoilt: tuple[str | int, ...] = (),
    averaged: bool = False,
    spec: dict[str, Any] = SPEC,
    provenance: dict[str, Any] | None = None,
) -> PooledStore:
    """Three subjects whose responses are linear in the tokens, and noise.

    Parameters
    ----------
    spoilt : parts of the split, and sessions, that get absurd responses, to show that nothing learns from them.
    averaged : the trials are said to be means of three repeats.
    provenance : of each subject.
    spec : description of the encoder that the tokens are said to come from.
    """
    rng = np.random.default_rng(0)
    roles = [part for part, n in N_IMAGES.items() for _ in range(n)]
    store = PooledStore.create(path, name="tiny")
    store.add_images(ImageBlock(ids=[f"image{i:03d}" for i in range(len(roles))], roles=roles))
    cls = rng.standard_normal((len(roles), len(DEPTHS), WIDTH)).astype(np.float16)
    patch = rng.standard_normal((len(roles), len(DEPTHS), PATCHES, WIDTH)).astype(np.float16)
    store.begin_tokens(ENCODER, spec)
    parts = (slice(0, 40), slice(40, None))
    store.write_tokens(ENCODER, "0000", [{"cls": cls[part], "patch": patch[part]} for part in parts])
    seen = np.column_stack([cls[:, -1], patch.mean(2)[:, 0]]).astype(np.float64)
    for name, n_voxels in N_VOXELS.items():
        image, session = design(rng)
        tuning = rng.standard_normal((seen.shape[1], n_voxels))
        responses = seen[image] @ tuning + rng.standard_normal((len(image), n_voxels)) + 3 * session[:, None]
        ill = np.isin(np.array(roles)[image], [of for of in spoilt if isinstance(of, str)])
        ill |= np.isin(session, [of for of in spoilt if isinstance(of, int)])
        responses[ill] = 1e6 * np.random.default_rng(1).standard_normal((ill.sum(), n_voxels))
        labels = (np.arange(n_voxels) % 2).astype(np.int16)
        store.add_subject(
            SubjectData(
                name=name,
                responses=responses.astype(np.float32),
                image=image,
                session=session,
                n_averaged=np.full(len(image), 3, np.float32) if averaged else None,
                upstream_preprocessing="averaged over repeats" if averaged else None,
                coordinates=rng.random((n_voxels, 3)).astype(np.float32) if name == "subj02" else None,
                provenance=provenance or {},
                rois={"prf-visualrois": Rois(labels=labels, names={1: "V1v"})},
            )
        )
    return store

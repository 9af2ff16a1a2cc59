"""The tiny store, and a backbone of two of its subjects."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel
from tests.tiny_store import N_VOXELS, PATCHES, TINY_BACKBONE, WIDTH, make_tiny_store


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three subjects, 60 images and three sessions; read-only by agreement."""
    path = tmp_path_factory.mktemp("store") / "tiny.zarr"
    make_tiny_store(path)
    return path


@pytest.fixture
def make_backbone() -> Callable[[], EncodingModel]:
    """Make the same model of subj01 and subj02 each time; untrained, but with no part left at a neutral start."""

    def make() -> EncodingModel:
        torch.manual_seed(0)
        parcels = {name: torch.arange(N_VOXELS[name]) // 4 for name in ("subj01", "subj02")}
        model = EncodingModel(TokenShape(depth=2, patch=PATCHES, width=WIDTH), TINY_BACKBONE, parcels)
        torch.nn.init.normal_(model.vae.to_scale.weight, std=0.1)
        torch.nn.init.constant_(model.vae.holistic_logit, -0.5)
        return model.eval()

    return make

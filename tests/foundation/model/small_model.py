"""A small model of three subjects with no part left at a neutral start, for tests of the whole model."""

import dataclasses

import torch

from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel
from tests.tiny_store import TINY_BACKBONE

PARCELS = {
    "subj01": torch.arange(11) // 3,
    "subj02": torch.zeros(5, dtype=torch.int64),
    "subj05": torch.arange(13) // 2,
}
ROWS = {"subj01": slice(0, 3), "subj02": slice(3, 4), "subj05": slice(4, 8)}


def perturbed(model: EncodingModel) -> EncodingModel:
    """Leave no parameter at a neutral start."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_log" not in name:
                parameter += 0.2 * torch.randn(parameter.shape)
    return model.eval()


def made_with(**changes) -> EncodingModel:
    torch.manual_seed(0)
    config = dataclasses.replace(TINY_BACKBONE, **changes)
    return perturbed(EncodingModel(TokenShape(depth=2, patch=16, width=5), config, PARCELS))


def tokens(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(3)
    return torch.randn(n, 2, 5, generator=made), torch.randn(n, 2, 16, 5, generator=made)


def solve_path(model: EncodingModel, subject: str) -> None:
    """Give the subject's closed-form path some numbers, and the network a share of each voxel."""
    adapter = model.adapter(subject)
    for name, buffer in adapter.linear.named_buffers():
        buffer.copy_(0.3 * torch.randn(buffer.shape) if name != "place" else torch.rand(buffer.shape))
    adapter.network_share.copy_(torch.linspace(0, 1, adapter.n_voxel))

"""What a population's voxels are tuned to: the second moment of their weights, a prior for those of a new subject."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32

from foundation.model.encoding_model import EncodingModel

_NEGLIGIBLE = 1e-5


@torch.no_grad()
def tuning_root(model: EncodingModel, subjects: Sequence[str]) -> Float32[np.ndarray, "channel rank"] | None:
    """Return a root of the second moment of the channel weights that `subjects`' voxels have in their fields.

    ``root @ root.T`` is the mean over voxels of ``q q'``, ``q`` being a voxel's weights of the standardised channels
    (`foundation.model.linear_path`); its scale says nothing. A receptive field's place is no part of it, so it serves
    for voxels that look elsewhere. None if none of the subjects has such weights.
    """
    paths = [model.adapter(subject).linear for subject in subjects]
    factors = []
    for path in paths:  # the second moment of U w is U (w'w) U', without a (channel, voxel) matrix
        moment = (path.weight_field.T @ path.weight_field).double().cpu()
        values, axes = torch.linalg.eigh(moment)
        factors.append((path.basis_field.double().cpu() @ axes) * values.clamp_min(0).sqrt())
    joined = torch.cat(factors, dim=1) if factors else torch.zeros(1, 1, dtype=torch.float64)
    left, sizes, _ = torch.linalg.svd(joined, full_matrices=False)
    kept = sizes.square() > _NEGLIGIBLE * sizes[0].square()
    if not kept.any():
        return None
    n_voxels = sum(len(path.weight_field) for path in paths)
    return (left[:, kept] * sizes[kept] / n_voxels**0.5).float().numpy()

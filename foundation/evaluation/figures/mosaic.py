"""Axial slices through a voxel vector, in the subject's own space, as people look at them."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from data.nifti import to_volume
from data.voxels import Volume


@dataclass(frozen=True, eq=False)
class AxialSlices:
    """Slices from below to above; rows go from back to front, columns from the subject's left to right."""

    values: Float32[np.ndarray, "slice y x"]
    """NaN where there is no voxel."""
    z_mm: Float[np.ndarray, " slice"]
    """Height of each slice, in its middle."""


def axial_slices(values: Float[np.ndarray, " voxel"], place: Volume, *, n_slices: int) -> AxialSlices:
    """Return at most `n_slices` slices, spread so that each stands for as many voxels, cropped to where voxels are.

    The axes of the volume are turned to the nearest of right, front and up; nothing is resampled.
    """
    turn = io_orientation(place.affine)
    turned = np.asarray(apply_orientation(to_volume(values.astype(np.float32), place), turn))
    inside = apply_orientation(to_volume(np.ones(len(values), np.int32), place), turn)
    found = np.argwhere(inside)
    low, high = found.min(0), found.max(0) + 1
    spread = (np.arange(n_slices) + 0.5) / n_slices
    depths = np.unique(np.quantile(found[:, 2], spread, method="nearest")).astype(int)
    to_mm = place.affine @ inv_ornt_aff(turn, place.shape)
    x, y = (low[:2] + high[:2] - 1) / 2
    z_mm = np.array([(to_mm @ [x, y, z, 1.0])[2] for z in depths])
    cropped = turned[low[0] : high[0], low[1] : high[1], depths]
    return AxialSlices(np.ascontiguousarray(cropped.transpose(2, 1, 0)), z_mm)

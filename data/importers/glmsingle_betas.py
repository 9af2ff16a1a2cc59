"""Files of GLMsingle's single-trial betas, whatever their kind: (x, y, z, trial), read as blocks of trials.

======== ============================================================================================================
nii.gz   LAION-fMRI's statmaps: decompressed once, front to back, a few volumes at a time
hdf5     GLMsingle (Python), `betasmd` (x, y, z, trial): read by slabs of x
npy      GLMsingle (Python), a pickled dict with `betasmd`: has to be loaded whole
======== ============================================================================================================

GLMsingle keeps a 2-D input (voxel, time) as (voxel, 1, 1, trial). A voxel is known here by its place in the C order of
(x, y, z). Readers hold one block, of `BLOCK_BYTES` at most.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64

from data.importers.gzipped_volumes import stream_volumes
from data.importers.hdf5_files import hdf5_shape, open_dataset, open_hdf5
from data.importers.restricted_pickle import load_pickled_dict
from data.nifti import load_image

BLOCK_BYTES = 256 << 20
_REMEDY = "give GLMsingle's own file, or copy it anew"
Stream = Callable[[Int64[np.ndarray, " voxel"], int, int], Iterator[Float32[np.ndarray, "trial voxel"]]]


@dataclass(frozen=True, kw_only=True)
class Betas:
    """A file of betas; `read` yields those of some voxels from one trial up to another."""

    path: Path
    measure: str
    """Which of GLMsingle's models these are the betas of, whatever kind of file they are in."""
    grid: tuple[int, int, int]
    n_trials: int
    read: Stream
    affine: Float64[np.ndarray, "4 4"] | None = None
    bytes_loaded: int = 0
    """What has to be in memory at once, where the file can't be streamed."""


def open_betas(path: Path) -> Betas:
    """Return a file of betas, whose values stay on disk where they can.

    Raises
    ------
    ValueError
        If it can't be read, or holds no betas of (x, y, z, trial).
    """
    if path.suffix == ".npy":
        return _open_pickled(path)
    return _open_nifti(path) if path.name.endswith(".nii.gz") else _open_hdf5(path)


def _shape(path: Path, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], int]:
    if len(shape) == 2:
        shape = (shape[0], 1, 1, shape[1])
    if len(shape) != 4 or 0 in shape:
        raise ValueError(
            f"{path} has betas of shape {shape}; (x, y, z, trial) is expected, so give GLMsingle's own file"
        )
    return (shape[0], shape[1], shape[2]), shape[3]


def _blocks(n_voxels: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK_BYTES // (4 * max(1, n_voxels)))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


# -- nii.gz ------------------------------------------------------------------------------------------------------------


def _open_nifti(path: Path) -> Betas:
    image = load_image(path)
    if image.get_data_dtype().kind not in "iuf":
        raise ValueError(f"{path} holds {image.get_data_dtype()}, not numbers; give GLMsingle's own betas")
    grid, n_trials = _shape(path, image.shape)
    affine = None if image.affine is None else np.asarray(image.affine, np.float64)
    read = partial(_read_nifti, path, grid)
    return Betas(path=path, measure="SingletrialBetas", grid=grid, n_trials=n_trials, affine=affine, read=read)


def _read_nifti(
    path: Path, grid: tuple[int, int, int], voxels: np.ndarray, start: int, stop: int
) -> Iterator[Float32[np.ndarray, "trial voxel"]]:
    data: Any = load_image(path).dataobj
    place = np.ravel_multi_index(np.unravel_index(voxels, grid), grid, order="F")  # NIfTI has x fastest
    first = 0
    for volumes in stream_volumes(path):
        block = volumes[max(start - first, 0) : max(stop - first, 0), place]
        first += len(volumes)
        if (data.slope, data.inter) != (1, 0):
            block = block.astype(np.float64) * data.slope + data.inter
        if len(block):
            yield block.astype(np.float32)


# -- hdf5 --------------------------------------------------------------------------------------------------------------


def _open_hdf5(path: Path) -> Betas:
    shape, _ = hdf5_shape(path, "betasmd", _REMEDY)
    grid, n_trials = _shape(path, shape)
    return Betas(path=path, measure=path.stem, grid=grid, n_trials=n_trials, read=partial(_read_hdf5, path, grid))


def _read_hdf5(
    path: Path, grid: tuple[int, int, int], voxels: np.ndarray, start: int, stop: int
) -> Iterator[Float32[np.ndarray, "trial voxel"]]:
    per_x = grid[1] * grid[2]
    with open_hdf5(path, _REMEDY) as file:
        betas = open_dataset(file, "betasmd", _REMEDY)
        for first, last in _blocks(len(voxels), start, stop):
            block = np.empty((last - first, len(voxels)), np.float32)
            step = max(1, (BLOCK_BYTES // 8) // (4 * per_x * (last - first)))
            for x in range(0, grid[0], step):
                here = np.flatnonzero((voxels >= x * per_x) & (voxels < (x + step) * per_x))
                if len(here):
                    slab = betas[x : x + step, ..., first:last].reshape(-1, last - first)
                    block[:, here] = slab[voxels[here] - x * per_x].T
            yield block


# -- npy ---------------------------------------------------------------------------------------------------------------


def _open_pickled(path: Path) -> Betas:
    betas = _unpickled(path, path.stat().st_mtime_ns)
    grid, n_trials = _shape(path, betas.shape)
    size = path.stat().st_size
    read = partial(_read_pickled, path, grid)
    return Betas(path=path, measure=path.stem, grid=grid, n_trials=n_trials, read=read, bytes_loaded=size)


@lru_cache(maxsize=1)
def _unpickled(path: Path, changed: int) -> np.ndarray:
    """Return the betas; the file read last is kept, as its sessions are read one after another."""
    found = load_pickled_dict(path).get("betasmd")
    if not isinstance(found, np.ndarray):
        raise ValueError(f"{path} has no array 'betasmd'; give GLMsingle's own file, or write it with wanthdf5=1")
    return found


def _read_pickled(
    path: Path, grid: tuple[int, int, int], voxels: np.ndarray, start: int, stop: int
) -> Iterator[Float32[np.ndarray, "trial voxel"]]:
    betas = _unpickled(path, path.stat().st_mtime_ns)
    betas = betas.reshape(*grid, betas.shape[-1])
    x, y, z = np.unravel_index(voxels, grid)
    for first, last in _blocks(len(voxels), start, stop):
        yield np.ascontiguousarray(betas[x, y, z, first:last].T, np.float32)


# -- what can be used --------------------------------------------------------------------------------------------------


def extremes(
    betas: Betas, voxels: Int64[np.ndarray, " voxel"]
) -> tuple[Float32[np.ndarray, " voxel"], Float32[np.ndarray, " voxel"]]:
    """Return each voxel's lowest and highest beta over all trials of a file, NaN where one is NaN; reads all of it."""
    low, high = np.full(len(voxels), np.inf, np.float32), np.full(len(voxels), -np.inf, np.float32)
    for block in betas.read(voxels, 0, betas.n_trials):
        np.minimum(low, block.min(0), out=low)
        np.maximum(high, block.max(0), out=high)
    return low, high

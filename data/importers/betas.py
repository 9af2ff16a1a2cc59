"""Single-trial betas as NSD stores them, a session a file: what the header says, and the trials as a stream.

======== ======= ================================================================================================
nii.gz   int16   (x, y, z, trial): decompressed once, front to back, a few volumes at a time
hdf5     int16   ``betas``, written by MATLAB as (x, y, z, trial), so that h5py sees (trial, z, y, x); a chunk
                 holds all trials of one voxel, so only those of wanted voxels are read
mgh      float32 (vertex, 1, 1, trial), a file per hemisphere: read by frames
======== ======= ================================================================================================

No reader holds more than a session of the wanted voxels and some `BLOCK_BYTES`. The values are those of the file: a
scale that a NIfTI header may carry is not applied.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int, Int16
from nibabel.freesurfer.mghformat import DATA_OFFSET, MGHHeader

from data.importers.gzipped_volumes import stream_volumes
from data.importers.hdf5_files import hdf5_shape, open_dataset, open_hdf5
from data.nifti import UNREADABLE, load_image

BLOCK_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class BetaHeader:
    """What a file of betas says of itself: `shape` is (x, y, z, trial), or (vertex, trial) on a surface."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    affine: Float64[np.ndarray, "4 4"] | None = None
    scaling: tuple[float, float] = (1.0, 0.0)
    """Slope and intercept of a NIfTI header; NSD's own files leave them at 1 and 0."""


def read_header(path: Path) -> BetaHeader:
    """Return what a file of betas says of itself, told by its suffix.

    Raises
    ------
    ValueError
        If it is missing, can't be read, or is shorter than it says.
    """
    if path.name.endswith(".nii.gz"):
        return _nifti_header(path)
    return _mgh_header(path) if path.suffix == ".mgh" else _hdf5_header(path)


def _nifti_header(path: Path) -> BetaHeader:
    image = load_image(path)
    dtype, shape = image.get_data_dtype(), image.shape
    if len(shape) != 4:
        raise ValueError(f"{path} has shape {shape}; betas are (x, y, z, trial): fetch it again")
    n_bytes = int(image.dataobj.offset) + math.prod(shape) * dtype.itemsize
    with path.open("rb") as file:
        file.seek(-4, 2)
        told = int.from_bytes(file.read(4), "little")
    if told != n_bytes % 2**32:  # a gzip file ends with the size of what it holds
        raise ValueError(
            f"{path} is cut off, or not one gzip stream: its end tells of {told} bytes, its header of {n_bytes}; "
            f"fetch it again"
        )
    scaling = (float(image.dataobj.slope), float(image.dataobj.inter))
    return BetaHeader(shape=shape, dtype=dtype, affine=np.asarray(image.affine, np.float64), scaling=scaling)


def _mgh_header(path: Path) -> BetaHeader:
    if not path.exists():
        raise ValueError(f"{path} does not exist; fetch it")
    try:
        with path.open("rb") as file:
            header: Any = MGHHeader.from_fileobj(file)
        dtype, shape = header.get_data_dtype(), (*map(int, header.get_data_shape()), 1)
    except UNREADABLE as error:
        raise ValueError(f"{path} is damaged or no MGH file ({error}); fetch it again") from error
    if shape[1:3] != (1, 1):
        raise ValueError(f"{path} has shape {shape[:-1]}; betas are (vertex, 1, 1, trial): fetch it again")
    there, n_bytes = path.stat().st_size, DATA_OFFSET + math.prod(shape) * dtype.itemsize
    if there < n_bytes:
        raise ValueError(f"{path} is cut off: it has {there} of {n_bytes} bytes; fetch it again")
    return BetaHeader(shape=(shape[0], shape[3]), dtype=dtype)


def _hdf5_header(path: Path) -> BetaHeader:
    shape, dtype = hdf5_shape(path, "betas")
    if len(shape) != 4:
        raise ValueError(f"{path} has 'betas' of shape {shape}; they are (trial, z, y, x): fetch it again")
    return BetaHeader(shape=shape[::-1], dtype=dtype)


# -- streams -----------------------------------------------------------------------------------------------------------


def nifti_trials(path: Path, index: Int[np.ndarray, "voxel 3"]) -> Iterator[Int16[np.ndarray, "trial voxel"]]:
    """Yield blocks of trials of the voxels at `index` (x, y, z) of a ``.nii.gz``.

    Raises
    ------
    ValueError
        If the file is damaged.
    """
    place = np.ravel_multi_index(tuple(index.T), load_image(path).shape[:3], order="F")
    for volumes in stream_volumes(path):
        yield np.asarray(volumes[:, place], np.int16)


def _steps(n_trials: int, trial_bytes: int) -> Iterator[int]:
    """Yield how many trials to read at a time."""
    step = max(1, BLOCK_BYTES // trial_bytes)
    for start in range(0, n_trials, step):
        yield min(step, n_trials - start)


def hdf5_trials(path: Path, index: Int[np.ndarray, "voxel 3"]) -> Iterator[Int16[np.ndarray, "trial voxel"]]:
    """Yield all trials of the voxels at `index` (x, y, z) of an ``.hdf5``, collected row by row of the volume.

    Raises
    ------
    ValueError
        If the file is damaged.
    """
    with open_hdf5(path) as file:
        betas = open_dataset(file, "betas")
        trials = np.empty((betas.shape[0], len(index)), np.int16)
        order = np.lexsort(index.T)  # by z, then y, then x
        rows = np.split(order, np.flatnonzero(np.diff(index[order, 1:], axis=0).any(axis=1)) + 1)
        for voxels in rows:
            x, (_, y, z) = index[voxels, 0], index[voxels[0]]
            trials[:, voxels] = betas[:, z, y, x[0] : x[-1] + 1][:, x - x[0]]
    yield trials


def mgh_trials(
    paths: tuple[Path, Path], vertices: tuple[Int[np.ndarray, " left"], Int[np.ndarray, " right"]]
) -> Iterator[Float32[np.ndarray, "trial voxel"]]:
    """Yield blocks of trials of the `vertices` of the left and right ``.mgh``, left ones first.

    Raises
    ------
    ValueError
        If a file is damaged, or a response isn't finite.
    """
    headers = [read_header(path) for path in paths]
    start = 0
    for n in _steps(headers[0].shape[1], sum(header.shape[0] * header.dtype.itemsize for header in headers)):
        halves = []
        for path, header, wanted in zip(paths, headers, vertices, strict=True):
            half = _frames(path, header, start, n)[:, wanted]
            if not np.isfinite(half).all():
                trial, vertex = np.argwhere(~np.isfinite(half))[0]
                raise ValueError(
                    f"{path}: response {half[trial, vertex]} of trial {start + trial + 1}, vertex {wanted[vertex]} is "
                    f"not finite, though the session's first trial is; fetch it again or leave the session out"
                )
            halves.append(half)
        yield np.concatenate(halves, axis=1)
        start += n


def _frames(path: Path, header: BetaHeader, start: int, n: int) -> Float32[np.ndarray, "trial vertex"]:
    """Return `n` trials of a hemisphere; on disk vertices run fastest."""
    n_vertices = header.shape[0]
    offset = DATA_OFFSET + start * n_vertices * header.dtype.itemsize
    values = np.fromfile(path, header.dtype, n * n_vertices, offset=offset)
    return values.reshape(n, n_vertices).astype(np.float32)


def finite_vertices(path: Path) -> Bool[np.ndarray, " vertex"]:
    """Return where the first trial of an ``.mgh`` is finite: NSD has NaN where a session's field of view ended."""
    return np.isfinite(_frames(path, read_header(path), 0, 1)[0])

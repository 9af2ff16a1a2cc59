"""Voxel vectors as the field's files: volumes as NIfTI, surfaces as GIFTI, and label volumes in a subject's space.

A voxel vector has the order of `data.voxels.Volume.index`; importers make it the C order of a mask. Outside the voxels
of a table a map is NaN, a label map 0.
"""

import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Shaped
from nibabel.filebasedimages import ImageFileError
from nibabel.freesurfer.mghformat import MGHError, MGHImage
from nibabel.gifti.gifti import GiftiDataArray, GiftiImage, GiftiMetaData
from nibabel.spatialimages import HeaderDataError, SpatialImage

from data.voxels import Rois, Surface, Volume

HEMISPHERES = ("lh", "rh")
UNREADABLE = (OSError, EOFError, zlib.error, ImageFileError, HeaderDataError, MGHError, ValueError, TypeError, KeyError)
"""What nibabel and gzip raise on a file that is cut off or something else."""
_LARGEST_LABEL = np.iinfo(np.int16).max


def volume_of_mask(mask: Bool[np.ndarray, "x y z"], affine: Float[np.ndarray, "4 4"]) -> Volume:
    """Return where the voxels of a mask lie, in its C order; `affine` takes indices to mm."""
    shape = (mask.shape[0], mask.shape[1], mask.shape[2])
    return Volume(shape=shape, affine=affine.astype(np.float64), index=np.argwhere(mask).astype(np.int32))


def to_volume(values: Shaped[np.ndarray, " voxel"], volume: Volume) -> Shaped[np.ndarray, "x y z"]:
    """Return a voxel vector in its volume, NaN outside; integers, which are labels, have 0 there."""
    out = np.full(volume.shape, 0 if values.dtype.kind in "iu" else np.nan, values.dtype)
    out[tuple(volume.index.T)] = values
    return out


def from_volume(array: Shaped[np.ndarray, "x y z"], volume: Volume) -> Shaped[np.ndarray, " voxel"]:
    """Return the voxel vector of a volume.

    Raises
    ------
    ValueError
        If the array is of another shape.
    """
    if array.shape != tuple(volume.shape):
        raise ValueError(
            f"the array is {array.shape} but the subject's volume {tuple(volume.shape)}; resample it first"
        )
    return array[tuple(volume.index.T)]


def load_image(path: Path) -> Any:
    """Open a NIfTI file, its data still on disk, or read an MGH file.

    Raises
    ------
    ValueError
        If it is missing or can't be read.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; fetch it, or check the path")
    try:
        if path.suffix in (".mgh", ".mgz"):  # nibabel.load would leave the file open
            raw = path.read_bytes()
            return MGHImage.from_bytes(gzip.decompress(raw) if path.suffix == ".mgz" else raw)
        image = nibabel.load(path)  # pyright: ignore[reportPrivateImportUsage]
    except UNREADABLE as error:
        raise ValueError(f"{path} is damaged or is not a readable NIfTI or MGH file ({error}); get it anew") from error
    if not isinstance(image, SpatialImage):
        raise ValueError(f"{path} holds no volume; give a NIfTI or MGH file")
    return image


def read_volume(path: Path) -> tuple[np.ndarray, Float[np.ndarray, "4 4"]]:
    """Read a single volume (x, y, z) and its affine.

    Raises
    ------
    ValueError
        If the file can't be read, is cut short, or holds several volumes.
    """
    image = load_image(path)
    shape = image.shape[:3] if set(image.shape[3:]) <= {1} else image.shape
    if len(shape) != 3:
        raise ValueError(f"{path} is {image.shape}; a single volume (x, y, z) is needed")
    try:
        array = np.asanyarray(image.dataobj).reshape(shape)
    except UNREADABLE as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); copy it anew") from error
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{path} holds {array.dtype}, not numbers; copy it anew")
    assert image.affine is not None
    return array, np.asarray(image.affine, np.float64)


def same_grid(
    shape: tuple[int, ...], affine: Float[np.ndarray, "4 4"], other: tuple[int, ...], other_affine: np.ndarray
) -> bool:
    """Return whether two volumes have the same voxels, to a hundredth of a millimetre."""
    return tuple(shape) == tuple(other) and np.allclose(affine, other_affine, rtol=0, atol=1e-2)


def read_labels(path: Path, volume: Volume) -> Rois:
    """Read a label volume at a subject's voxels, resampled (nearest neighbour) where its grid is another.

    Names come from a table of the same name (``X.tsv`` for ``X.nii.gz``, columns `index` and `name`, as BIDS has them);
    labels without a name there are called by their number.

    Raises
    ------
    ValueError
        If the file isn't a volume of whole numbers from 0 to 32767, or none of its labels lies on a voxel.
    """
    array, affine = read_volume(path)
    if not np.isin(array % 1, 0).all() or array.min() < 0 or array.max() > _LARGEST_LABEL:
        raise ValueError(
            f"{path} holds {array.min()} to {array.max()}; a label volume has whole numbers from 0 (in none) to 32767"
        )
    array = array.astype(np.int16)
    if not same_grid(array.shape, affine, volume.shape, volume.affine):
        array = _resampled(array, affine, volume)
    labels = from_volume(array, volume)
    found = [int(label) for label in np.unique(labels) if label]
    if not found:
        raise ValueError(f"{path} has no label on any of {len(labels)} voxels; it must be in the subject's own space")
    names = label_names(path) or {}
    return Rois(labels=labels, names={label: names.get(label, f"label-{label}") for label in found})


def _resampled(array: np.ndarray, affine: np.ndarray, volume: Volume) -> np.ndarray:
    """Return the nearest label at each voxel of a volume, 0 everywhere where the two don't meet."""
    from nilearn.image import resample_to_img
    from nilearn.image.resampling import BoundingBoxError

    source = nibabel.Nifti1Image(array, affine)
    target = nibabel.Nifti1Image(np.zeros(volume.shape, np.int16), volume.affine)
    try:
        found = resample_to_img(source, target, interpolation="nearest", force_resample=True, copy_header=True)
    except BoundingBoxError:
        return np.zeros(volume.shape, np.int16)
    return np.asarray(found.dataobj).astype(np.int16)


def label_path(path: Path) -> Path:
    """Return where the table of a label volume's names lies."""
    return path.with_name(stem_of(path) + ".tsv")


def label_names(path: Path) -> dict[int, str] | None:
    """Return the names of a label volume's labels from the table beside it, or None where there is none.

    Raises
    ------
    ValueError
        If the table lacks a column `index` of whole numbers or `name`.
    """
    table = label_path(path)
    if not table.exists():
        return None
    try:
        read = pd.read_csv(table, sep="\t", usecols=["index", "name"], keep_default_na=False)
        return {int(index): str(name) for index, name in zip(read["index"], read["name"], strict=True)}
    except (ValueError, OSError) as error:
        raise ValueError(f"{table} must be a table with columns index and name, as BIDS has it ({error})") from error


def stem_of(path: Path) -> str:
    """Return a file's name without ``.nii``, ``.nii.gz``, ``.func.gii`` or whatever else it ends with."""
    for suffix in (".nii.gz", ".func.gii", ".label.gii"):
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    return path.stem


# -- writing -----------------------------------------------------------------------------------------------------------


def write_volume(path: Path, values: Shaped[np.ndarray, " voxel"], volume: Volume) -> None:
    """Write a voxel vector as NIfTI (``.nii`` or ``.nii.gz``): float32, or int32 where it holds labels."""
    array = to_volume(_as_stored(values), volume)
    image = nibabel.Nifti1Image(array, volume.affine)
    image.header.set_xyzt_units("mm")
    _write(image, path)


def write_surface(path: Path, values: Shaped[np.ndarray, " voxel"], surface: Surface) -> list[Path]:
    """Write a voxel vector as GIFTI, one file per hemisphere (`surface_paths`), and return their paths."""
    written = surface_paths(path)
    stored = _as_stored(values)
    for side, (target, n_vertices) in enumerate(zip(written, surface.n_vertices, strict=True)):
        here = surface.hemisphere == side
        data = np.full(n_vertices, 0 if stored.dtype.kind in "iu" else np.nan, stored.dtype)
        data[surface.vertex[here]] = stored[here]
        meta = {"AnatomicalStructurePrimary": ("CortexLeft", "CortexRight")[side], "Name": stem_of(path)}
        array = GiftiDataArray(data, intent="NIFTI_INTENT_NONE", datatype=_GIFTI_TYPES[stored.dtype.kind])
        _write(GiftiImage(darrays=[array], meta=GiftiMetaData(meta)), target)
    return written


def surface_paths(path: Path) -> list[Path]:
    """Return where `write_surface` puts the hemispheres: ``NAME.lh.func.gii`` and ``NAME.rh.func.gii``."""
    return [path.with_name(f"{stem_of(path)}.{side}.func.gii") for side in HEMISPHERES]


_GIFTI_TYPES = {"f": "NIFTI_TYPE_FLOAT32", "i": "NIFTI_TYPE_INT32"}


def _as_stored(values: np.ndarray) -> np.ndarray:
    return values.astype(np.int32 if values.dtype.kind in "iu" else np.float32)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; the file has its own name once it is whole."""
    draft = path.with_name(f".writing-{os.getpid()}-{path.name}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _write(image: Any, path: Path) -> None:
    with written_whole(path) as draft:
        nibabel.save(image, draft)


def write_label_names(path: Path, names: dict[int, str]) -> Path:
    """Write the table of a label map's names beside it, as `label_names` reads it, and return its path."""
    table = label_path(path)
    with written_whole(table) as draft:
        pd.DataFrame({"index": list(names), "name": list(names.values())}).to_csv(draft, sep="\t", index=False)
    return table

"""Predictions as files, written batch by batch: .npy, .zarr, or NIfTI with one volume per image.

Each has the order (image, voxel), or (image, sample, voxel). Beside an .npy or NIfTI a ``NAME.npy.json`` says which
images they are, whose voxels, of which model, in which unit; a .zarr has it as attributes. All are written under
temporary names.
"""

import contextlib
import gzip
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import zarr
from jaxtyping import Float32

from data.nifti import stem_of, to_volume, written_whole
from data.voxels import Surface, Volume
from foundation.checkpoint import new_directory, write_json

SUFFIXES = (".npy", ".zarr", ".nii", ".nii.gz")
KIND = "manybrains-predictions"
_NIFTI1_MOST = np.iinfo(np.int16).max
Write = Callable[[Float32[np.ndarray, "image *voxel"]], Any]


@dataclass(frozen=True, kw_only=True)
class PredictionFile:
    """A file of predictions that is to be written.

    Parameters
    ----------
    path : its suffix is the format.
    shape : images, voxels; or images, samples, voxels.
    place : where the voxels lie, if that is known.
    overwrite : replace what is there.
    """

    path: Path
    shape: tuple[int, ...]
    place: Volume | Surface | None = None
    overwrite: bool = False

    def check(self) -> None:
        """Raise ValueError where it can't be written, before anything long begins."""
        check_name(self.path, overwrite=self.overwrite)
        if not _is_nifti(self.path):
            return
        npy = self.path.with_name(f"{stem_of(self.path)}.npy")
        if len(self.shape) == 3:
            raise ValueError(f"{self.path} has room for one volume per image, not for samples; write {npy} or a .zarr")
        if self.place is None:
            raise ValueError(f"where these voxels lie in a volume isn't known to the model; write {npy}")
        if isinstance(self.place, Surface):
            raise ValueError(
                f"these voxels lie on a surface ({self.place.space}), which NIfTI doesn't hold; write {npy}"
            )

    @contextlib.contextmanager
    def writing(self, about: Mapping[str, Any], *, rows: int) -> Iterator[Write]:
        """Give a function that appends a batch of `rows` images, the last one perhaps fewer.

        The file is there once the block ends well, and otherwise nothing is.
        """
        self.check()
        if self.path.suffix == ".zarr":
            with new_directory(self.path) as draft:
                yield _appending(zarr_array(draft, self.shape, about, rows=rows))
            return
        with written_whole(sidecar(self.path)) as beside, written_whole(self.path) as draft:
            write_json(beside, {"format": KIND, **about})
            with draft.open("wb") as file:
                yield from self._opened(file)

    def _opened(self, file: io.BufferedIOBase) -> Iterator[Write]:
        if not _is_nifti(self.path):
            header = {"descr": "<f4", "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(file, header)
            yield lambda batch: file.write(batch.astype("<f4").tobytes())
            return
        assert isinstance(self.place, Volume)
        place = self.place
        with contextlib.ExitStack() as stack:
            if self.path.name.endswith(".gz"):
                file = stack.enter_context(
                    gzip.GzipFile("", "wb", 1, file, 0)
                )  # no name and time: the same bytes again
            write_nifti_header(file, place, self.shape[0])

            def write(batch: Float32[np.ndarray, "image voxel"]) -> None:
                for row in batch:  # volume after volume is how the format has it, its first axis fastest
                    file.write(to_volume(row.astype("<f4"), place).tobytes("F"))

            yield write


def check_name(path: Path, *, overwrite: bool) -> None:
    """Raise ValueError where predictions can't be written to a path of this name."""
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"--out {path} must end with one of {', '.join(SUFFIXES)}, which says the format")
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is not a directory; make it first")
    files = [path] if path.suffix == ".zarr" else [path, sidecar(path)]
    for there in (file for file in files if file.exists()):
        if not overwrite:
            raise ValueError(f"{there} exists already; name another file or pass --overwrite")
        if there.is_dir() and not _is_ours(there):
            raise ValueError(f"{there} is a directory that wasn't written by this command; remove it, or name another")


def _is_nifti(path: Path) -> bool:
    return path.name.endswith((".nii", ".nii.gz"))


def _is_ours(path: Path) -> bool:
    try:
        return zarr.open_group(path, mode="r").attrs.get("format") == KIND
    except (OSError, ValueError, KeyError):  # no group of Zarr
        return False


def sidecar(path: Path) -> Path:
    """Return the file that says what the predictions in `path` are of."""
    return path.with_name(f"{path.name}.json")


def zarr_array(directory: Path, shape: tuple[int, ...], about: Mapping[str, Any], *, rows: int) -> zarr.Array:
    """Return a new array ``predictions`` in a Zarr group, in chunks of `rows` images."""
    group = zarr.create_group(directory, attributes={"format": KIND, **about}, overwrite=True)
    dims = ["image", "voxel"] if len(shape) == 2 else ["image", "sample", "voxel"]
    chunks = (min(rows, shape[0]), *shape[1:])
    return group.create_array("predictions", shape=shape, chunks=chunks, dtype=np.float32, dimension_names=dims)


def _appending(array: zarr.Array) -> Write:
    done = 0

    def write(batch: Float32[np.ndarray, "image *voxel"]) -> None:
        nonlocal done
        array[done : done + len(batch)] = batch
        done += len(batch)

    return write


def write_nifti_header(file: io.BufferedIOBase, place: Volume, n_volumes: int) -> None:
    """Write what comes before the volumes of a 4-D float32 NIfTI; it is NIfTI-2 where NIfTI-1 can't count them."""
    shape = (*place.shape, n_volumes)
    kind = nibabel.Nifti1Image if max(shape) <= _NIFTI1_MOST else nibabel.Nifti2Image
    image = kind(np.broadcast_to(np.zeros((), "<f4"), shape), place.affine)  # no data, only their shape
    image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(1, 0)
    image.header["magic"] = image.header.single_magic
    image.header.set_data_offset(image.header.single_vox_offset)
    image.header.write_to(file)
    file.write(b"\0" * (image.header.get_data_offset() - file.tell()))

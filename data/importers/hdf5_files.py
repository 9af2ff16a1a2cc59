"""HDF5 files of a data set, read so that whatever is wrong with one is a line that names it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

FETCH = "fetch it again"


@contextmanager
def open_hdf5(path: Path, remedy: str = FETCH) -> Iterator[h5py.File]:
    """Open a file to read; damage that shows only while it is open is a ValueError that names it, too.

    Raises
    ------
    ValueError
        If it is missing, damaged or something else.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; {remedy}")
    if not path.is_file():
        raise ValueError(f"{path} is a directory, not an HDF5 file; {remedy}")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path} may not be read: permission denied; change its permissions (chmod)")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged, cut off or no HDF5 file ({error}); {remedy}") from error


def open_dataset(file: h5py.File, name: str, remedy: str = FETCH) -> h5py.Dataset:
    """Return a data set of an HDF5 file.

    Raises
    ------
    ValueError
        If the file is damaged or has no such data set.
    """
    try:
        found, names = file.get(name), sorted(file)
    except (RuntimeError, KeyError, OSError) as error:
        raise ValueError(f"{file.filename} is damaged ({error}); {remedy}") from error
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"{file.filename} has no data set {name!r}, it has {names}; {remedy}")
    return found


def hdf5_shape(path: Path, name: str, remedy: str = FETCH) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype of a data set of an HDF5 file.

    Raises
    ------
    ValueError
        If the file can't be read or has no such data set.
    """
    with open_hdf5(path, remedy) as file:
        found = open_dataset(file, name, remedy)
        return found.shape, found.dtype

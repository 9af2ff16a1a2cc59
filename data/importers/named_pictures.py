"""Pictures found by the name that a table of trials gives them.

They lie in a directory, or in LAION-fMRI's ``task-images_stimuli.h5``: `images`, a picture file's bytes each, in the
order of `image_name` in ``task-images_metadata.csv`` beside it. A name may lack its suffix, or a picture's its own.
"""

import io
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import UInt8

from data.importers.files import PICTURES, decode_picture, picture_size
from data.importers.hdf5_files import open_dataset, open_hdf5
from data.schema import pixel_identity

ARCHIVE, METADATA = "task-images_stimuli.h5", "task-images_metadata.csv"
_SHOWN = 3


class NamedPictures:
    """Pictures under `where`, a directory or LAION-fMRI's archive, decoded when they are read.

    Raises
    ------
    ValueError
        If nothing is there.
    """

    def __init__(self, where: Path) -> None:
        self.where = where
        archive = where / ARCHIVE if where.is_dir() else where
        if not archive.exists() and not where.is_dir():
            raise ValueError(f"{where} does not exist; give the directory of the pictures by --images")
        self._archive = archive if archive.is_file() else None
        self._identities: dict[str, str] = {}

    def _opener(self, name: str) -> Callable[[], io.BufferedIOBase] | None:
        """Return what opens the picture of that name, or None where there is none."""
        if self._archive is not None:
            row = self._rows.get(name, self._rows.get(Path(name).stem))
            return None if row is None else lambda: io.BytesIO(self._bytes(row))
        for path in (self.where / name, *(self.where / f"{name}{suffix}" for suffix in sorted(PICTURES))):
            if path.is_file():
                return lambda: path.open("rb")
        return None

    @property
    def files(self) -> tuple[Path, ...]:
        """The archive and its table, where the pictures don't lie in files of their own."""
        return () if self._archive is None else (self._archive, self._archive.with_name(METADATA))

    def has(self, name: str) -> bool:
        """Return whether the picture is there."""
        return self._opener(name) is not None

    def _open(self, name: str) -> io.BufferedIOBase:
        opener = self._opener(name)
        if opener is None:
            raise ValueError(f"{self.where} has no picture {name!r} any more; put it back")
        return opener()

    @cached_property
    def _rows(self) -> dict[str, int]:
        assert self._archive is not None
        table = self._archive.with_name(METADATA)
        try:
            names = pd.read_csv(table, usecols=["image_name"], dtype=str)["image_name"]
        except (OSError, ValueError) as error:
            raise ValueError(f"{table} must be there with a column image_name ({error}); download it anew") from error
        exact = {name: row for row, name in enumerate(names)}
        return {Path(name).stem: row for name, row in exact.items()} | exact

    def _bytes(self, row: int) -> bytes:
        assert self._archive is not None
        with open_hdf5(self._archive) as file:
            images = open_dataset(file, "images")
            if row >= len(images):
                raise ValueError(f"{self._archive} has {len(images)} pictures, {METADATA} more; fetch both again")
            return np.asarray(images[row], np.uint8).tobytes()

    def size(self, name: str) -> tuple[int, int]:
        """Return a picture's height and width."""
        return picture_size(self._open(name), f"{self.where}: {name}")

    def pixels(self, name: str) -> UInt8[np.ndarray, "height width 3"]:
        """Return a picture."""
        return decode_picture(self._open(name), f"{self.where}: {name}")

    def identity(self, name: str) -> str:
        """Return the digest of a picture's pixels; each is decoded once, however many subjects saw it."""
        if name not in self._identities:
            self._identities[name] = pixel_identity(self.pixels(name))
        return self._identities[name]

    def one_size(self, names: Iterable[str]) -> tuple[int, int]:
        """Return the height and width that all of these pictures have, from their headers.

        Raises
        ------
        ValueError
            If one is missing, can't be read, or has another size than most.
        """
        names = list(dict.fromkeys(names))
        if missing := [name for name in names if not self.has(name)]:
            some = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
            raise ValueError(
                f"{self.where} lacks {len(missing)} of the {len(names)} pictures that the trials name ({some}); add "
                f"them, or give another --images"
            )
        sizes = {name: self.size(name) for name in names}
        usual = Counter(sizes.values()).most_common(1)[0][0]
        for name, size in sizes.items():
            if size != usual:
                raise ValueError(f"{self.where}: {name} is {size} but others are {usual}; crop them to one size first")
        return usual

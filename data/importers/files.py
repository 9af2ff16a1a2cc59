"""Files as users have them: an array in an .npy, pictures in a zip, a directory or an .npy."""

import contextlib
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from data.schema import pixel_identity

AT_ONCE = 64
"""Pictures that are decoded at once where all are read."""
_LYING = (5, 6, 7, 8)
"""EXIF's orientations that exchange a picture's axes; of a TIFF, Pillow tells the size as it is shown."""
PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}


def load_array(path: Path, *, in_memory: bool = True) -> np.ndarray:
    """Return an array of real numbers, mapped from the file unless `in_memory`."""
    try:
        array = np.load(path, allow_pickle=False, mmap_mode=None if in_memory else "r")
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a readable .npy of numbers: {error}; save it anew") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(f"{path} is an .npz of several arrays; save the one that is meant as .npy")
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{path} must hold integers or floats, got {array.dtype}; save it as numbers")
    return array


@contextlib.contextmanager
def _picture(source: Any, what: str) -> Iterator[Image.Image]:
    try:
        with source, Image.open(source) as picture:
            yield picture
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        ValueError,
        struct.error,
    ) as error:  # Pillow has no error of its own
        raise ValueError(f"{what} is not a readable picture; replace or remove it ({error})") from error


def decode_picture(source: Any, what: str) -> UInt8[np.ndarray, "height width 3"]:
    """Return a picture in RGB, turned as its EXIF says, as viewers show it; `what` names it in messages."""
    with _picture(source, what) as picture:
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))


def picture_size(source: Any, what: str) -> tuple[int, int]:
    """Return the height and width that `decode_picture` gives, from the header alone."""
    with _picture(source, what) as picture:
        lies = picture.format != "TIFF" and picture.getexif().get(ExifTags.Base.Orientation) in _LYING
        return (picture.width, picture.height) if lies else (picture.height, picture.width)


def _is_picture(name: str) -> bool:
    """Return whether a file is meant as a picture; macOS leaves a hidden ``._name`` beside each in its zips."""
    return Path(name).suffix.lower() in PICTURES and not Path(name).name.startswith(".")


def _check_order(path: Path, names: list[str]) -> None:
    """Refuse image1, image10, image2: their rows would be other images' responses."""
    templates = {re.sub(r"\d+", "#", name) for name in names}
    numbers = [[int(n) for n in re.findall(r"\d+", name)] for name in names]
    if len(templates) == 1 and numbers != sorted(numbers):
        k = next(k for k in range(1, len(names)) if numbers[k] < numbers[k - 1])
        raise ValueError(
            f"{path}: {names[k - 1]!r} comes before {names[k]!r} by name but not by number; pad the numbers with zeros"
        )


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures of one size in the order of their names, decoded when they are read."""

    names: list[str]
    """Where each comes from, for messages."""
    shape: tuple[int, int]
    """Height and width."""
    read: Callable[[np.ndarray], UInt8[np.ndarray, "image height width 3"]]
    """Return the pictures at some places."""

    def __len__(self) -> int:
        return len(self.names)

    def identities(self) -> list[str]:
        """Return the digest of each picture's pixels, which is its identity where the data set gives none."""
        blocks = (np.arange(start, min(start + AT_ONCE, len(self))) for start in range(0, len(self), AT_ONCE))
        return [pixel_identity(picture) for block in blocks for picture in self.read(block)]


def open_pictures(path: Path) -> Pictures:
    """Return the pictures of a zip, a directory or an .npy; they are not in memory.

    Raises
    ------
    ValueError
        If there is none, or their sizes differ. One that can't be decoded is refused when it is read.
    """
    if path.suffix == ".npy":
        return _pictures_of_array(path)
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if _is_picture(f.name))
        _check_order(path, [f.name for f in files])
        return _pictures_of(
            path, [str(f) for f in files], lambda: contextlib.nullcontext(lambda k: files[k].open("rb"))
        )
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted(n for n in archive.namelist() if _is_picture(n))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is neither a directory, an .npy nor a zip of pictures; name one of these") from error
    _check_order(path, members)

    @contextlib.contextmanager
    def opened() -> Iterator[Callable[[int], Any]]:
        with zipfile.ZipFile(path) as archive:
            yield lambda k: archive.open(members[k])

    return _pictures_of(path, [f"{path}:{n}" for n in members], opened)


def _pictures_of_array(path: Path) -> Pictures:
    pixels = load_array(path, in_memory=False)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ValueError(f"{path} must be uint8 (image, height, width, 3), got {pixels.dtype} {pixels.shape}")
    height, width = pixels.shape[1:3]
    names = [f"{path}[{k}]" for k in range(len(pixels))]
    return Pictures(names=names, shape=(height, width), read=lambda rows: np.asarray(pixels[rows]))


def _pictures_of(
    path: Path, names: list[str], opened: Callable[[], AbstractContextManager[Callable[[int], Any]]]
) -> Pictures:
    """Return pictures by what opens them: a context that gives the file of the k-th."""
    if not names:
        raise ValueError(f"{path} holds no picture; put some there ({', '.join(sorted(PICTURES))})")
    with opened() as file_of:
        shape = picture_size(file_of(0), names[0])
        for k, name in enumerate(names):
            if (size := picture_size(file_of(k), name)) != shape:
                raise ValueError(f"{name} is {size} but the others are {shape}; crop them to one size first")

    def read(rows: np.ndarray) -> np.ndarray:
        with opened() as file_of:
            return np.stack([decode_picture(file_of(int(k)), names[int(k)]) for k in rows])

    return Pictures(names=names, shape=shape, read=read)

"""Images as users have them, read lazily: picture files, a directory, a glob, an HDF5 data set, an .npy.

A picture becomes RGB in eight bits as a viewer shows it: turned as its EXIF says, what is transparent on white, 16 bits
scaled to eight. Sizes may differ. Of an animation the first frame is taken.
"""

import glob
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from data.importers.files import PICTURES, load_array
from data.importers.hdf5_files import open_dataset, open_hdf5

Pixels = UInt8[np.ndarray, "_height _width 3"]
"""A picture; in a list of them each has a size of its own."""
MAX_PIXELS = 64_000_000
"""Of one picture: more than any camera gives, and what little memory holds."""
MAX_ASPECT = 50
"""Encoders resize the shorter side to theirs: a strip would become a picture of any length."""
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow has others that run programs or have no end
_HDF5 = {".h5", ".hdf5", ".he5"}
_NSD = "imgBrick"  # of NSD's nsd_stimuli.hdf5
_WORDS = "name picture files, a directory of them, a quoted glob, an .h5 or an .npy"
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning)
"""What Pillow raises on what is no picture, or is cut off, or too large; it has no error of its own."""


def decode(source: Path | bytes, what: str) -> Pixels:
    """Return a picture in RGB; `what` names it in messages.

    Raises
    ------
    ValueError
        If it is no whole picture of a known format, or has more than `MAX_PIXELS`.
    """
    try:
        with _opened(source) as picture:
            return as_rgb(ImageOps.exif_transpose(picture))
    except _UNREADABLE as error:
        raise ValueError(f"{what} is not a readable picture: {_reason(error)}; replace it or leave it out") from error


def check_header(path: Path) -> None:
    """Raise ValueError if a file doesn't begin as a picture does, or is too large a one; pixels aren't decoded."""
    try:
        _opened(path).close()
    except _UNREADABLE as error:
        raise ValueError(f"{path} is not a readable picture: {_reason(error)}; replace it or leave it out") from error


def _reason(error: BaseException) -> str:
    return "no PNG, JPEG, WebP, TIFF, BMP or GIF" if isinstance(error, Image.UnidentifiedImageError) else str(error)


def _opened(source: Path | bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS)
    if max(picture.size) > MAX_ASPECT * min(picture.size):
        picture.close()
        raise ValueError(f"it is {picture.width} x {picture.height}, longer than {MAX_ASPECT} times its other side")
    if picture.width * picture.height > MAX_PIXELS:
        picture.close()
        raise ValueError(f"it has {picture.width} x {picture.height} pixels, more than {MAX_PIXELS:,}")
    return picture


def as_rgb(picture: Image.Image) -> Pixels:
    """Return an opened picture's pixels in RGB, as they lie in the file.

    Raises
    ------
    ValueError
        If they are floating-point numbers.
    """
    if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow's own conversion clips
        grey = np.asarray(picture).astype(np.int64)
        eight = np.clip((grey * 255 + 32767) // 65535, 0, 255).astype(np.uint8)
        return np.repeat(eight[..., None], 3, axis=-1)
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range it doesn't tell")
    if picture.has_transparency_data:
        shown = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown)
    return np.asarray(picture.convert("RGB"))


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images in order: what each is called, and a way to read those from one place up to another."""

    names: tuple[str, ...]
    read: Callable[[int, int], Iterator[Pixels]]

    def __len__(self) -> int:
        return len(self.names)

    def batches(self, size: int) -> Iterator[list[Pixels]]:
        """Yield the images, at most `size` of them in memory at a time."""
        for start in range(0, len(self), size):
            yield list(self.read(start, min(start + size, len(self))))


def open_images(words: Sequence[str]) -> Images:
    """Return the images that the words of a command line name, in their order.

    A word is a picture file; a directory, whose pictures come sorted by name, those of its own directories left out; a
    glob (``"shown/**/*.png"``), what it matches sorted; an HDF5 file, with ``FILE.h5::NAME`` one data set of it; or an
    .npy, (image, height, width, 3) uint8.

    Raises
    ------
    ValueError
        If there is nothing of that name, or a file's beginning isn't what it should be.
    """
    if not words:
        raise ValueError(f"no images are given; {_WORDS}")
    parts = [part for word in words for part in _named(word)]
    return parts[0] if len(parts) == 1 else _joined(parts)


def _joined(parts: Sequence[Images]) -> Images:
    starts = np.cumsum([0] + [len(part) for part in parts])

    def read(start: int, stop: int) -> Iterator[Pixels]:
        first = int(np.searchsorted(starts, start, side="right")) - 1
        for part, begin in zip(parts[first:], starts[first:], strict=False):
            if begin >= stop:
                return
            yield from part.read(max(start - int(begin), 0), min(stop - int(begin), len(part)))

    return Images(names=tuple(name for part in parts for name in part.names), read=read)


def _named(word: str) -> Iterator[Images]:
    file, _, dataset = word.partition("::")
    if os.path.lexists(file):
        yield _source(Path(file), dataset or None)
    elif glob.has_magic(word):
        found = [path for path in map(Path, sorted(glob.glob(word, recursive=True))) if path.is_file()]
        if not found:
            raise ValueError(f"no file matches {word!r}; {_WORDS}")
        yield from (_source(path, None) for path in found)
    else:
        raise ValueError(f"{file} does not exist; {_WORDS}")


def _source(path: Path, dataset: str | None) -> Images:
    if path.is_dir():
        found = [p for p in path.iterdir() if p.suffix.lower() in PICTURES and not p.name.startswith(".")]
        if not found:
            raise ValueError(f"{path} holds no picture ({', '.join(sorted(PICTURES))}); {_WORDS}")
        return _pictures(sorted(found))
    if path.suffix.lower() in _HDF5 or dataset is not None:
        return _hdf5(path, dataset)
    return _array(path) if path.suffix == ".npy" else _pictures([path])


def _pictures(paths: Sequence[Path]) -> Images:
    for path in paths:
        check_header(path)

    def read(start: int, stop: int) -> Iterator[Pixels]:
        return (decode(path, str(path)) for path in paths[start:stop])

    return Images(names=tuple(map(str, paths)), read=read)


def _array(path: Path) -> Images:
    array = load_array(path, in_memory=False)
    _check_rows(str(path), array.shape, array.dtype)

    def read(start: int, stop: int) -> Iterator[Pixels]:
        # Mapped anew: pages of a map that is kept stay in memory once they are read.
        return iter(np.array(load_array(path, in_memory=False)[start:stop]))

    return Images(names=_rows(path, len(array)), read=read)


def _hdf5(path: Path, dataset: str | None) -> Images:
    with open_hdf5(path, "check the path") as file:
        name = dataset or _only_images(file, path)
        found = open_dataset(file, name, "name one of them, as FILE.h5::NAME")
        shape, dtype = found.shape, found.dtype
    where = path if dataset is None else Path(f"{path}::{name}")
    _check_rows(str(where), shape, dtype)

    def read(start: int, stop: int) -> Iterator[Pixels]:
        with open_hdf5(path) as file:
            yield from np.asarray(open_dataset(file, name)[start:stop])

    return Images(names=_rows(where, shape[0]), read=read)


def _only_images(file: h5py.File, path: Path) -> str:
    """Return the name of the data set that holds images: NSD's, or the only one that can."""
    found: list[str] = []

    def look(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim == 4 and item.shape[-1] == 3 and item.dtype == np.uint8:
            found.append(name)

    file.visititems(look)
    if _NSD in found or len(found) == 1:
        return _NSD if _NSD in found else found[0]
    has = f"several: {', '.join(sorted(found))}" if found else "none"
    raise ValueError(
        f"{path} must have one data set of images, uint8 (image, height, width, 3), but has {has}; name one as "
        f"{path}::NAME"
    )


def _check_rows(what: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3:
        raise ValueError(f"{what} must be uint8 (image, height, width, 3), got {dtype} {shape}; convert it")
    if 0 in shape:
        raise ValueError(f"{what} holds no image, its shape is {shape}; name another")
    if shape[1] * shape[2] > MAX_PIXELS:
        raise ValueError(f"{what} has images of {shape[1]} x {shape[2]} pixels, more than {MAX_PIXELS:,}; shrink them")


def _rows(where: Path, n: int) -> tuple[str, ...]:
    return tuple(f"{where}[{k}]" for k in range(n))

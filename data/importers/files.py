"""Files as users have them: an array in an .npy, pictures in a zip, a directory or an .npy."""

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}


def load_array(path: Path) -> np.ndarray:
    """Return an array of real numbers."""
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a readable .npy of numbers: {error}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(f"{path} is an .npz of several arrays; save the one that is meant as .npy")
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{path} must hold integers or floats, got {array.dtype}; save it as numbers")
    return array


def _decode(source: Any, what: str) -> UInt8[np.ndarray, "height width 3"]:
    try:
        with Image.open(source) as picture:
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:  # Pillow has no error of its own
        raise ValueError(f"{what} is not a readable picture; replace or remove it ({error})") from error


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


def read_images(path: Path) -> UInt8[np.ndarray, "image height width 3"]:
    """Return the pictures of a zip, a directory or an .npy, in the order of their names.

    Raises
    ------
    ValueError
        If there is none, one can't be decoded, or their sizes differ.
    """
    if path.suffix == ".npy":
        pixels = load_array(path)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise ValueError(f"{path} must be uint8 (image, height, width, 3), got {pixels.dtype} {pixels.shape}")
        return pixels
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if _is_picture(f.name))
        _check_order(path, [f.name for f in files])
        named = [(str(f), _decode(f, str(f))) for f in files]
    else:
        try:
            with zipfile.ZipFile(path) as archive:
                members = sorted(n for n in archive.namelist() if _is_picture(n))
                _check_order(path, members)
                named = [(f"{path}:{n}", _decode(io.BytesIO(archive.read(n)), f"{path}:{n}")) for n in members]
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is neither a directory, an .npy nor a zip of pictures") from error
    if not named:
        raise ValueError(f"{path} holds no picture; put some there ({', '.join(sorted(PICTURES))})")
    shape = named[0][1].shape
    for name, pixels in named:
        if pixels.shape != shape:
            raise ValueError(
                f"{name} is {pixels.shape[:2]} but the others are {shape[:2]}; crop them to one size first"
            )
    return np.stack([pixels for _, pixels in named])

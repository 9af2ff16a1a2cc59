"""Pictures as users have them: what is decoded is what a viewer shows."""

from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from data.importers.files import decode_picture, open_pictures, picture_size

SHOWN = np.zeros((24, 40, 3), np.uint8)
SHOWN[:, :20] = 255  # black and white halves survive JPEG
SHOWN[:8] = 128
STORED = {
    1: SHOWN,
    2: SHOWN[:, ::-1],
    3: SHOWN[::-1, ::-1],
    4: SHOWN[::-1],
    5: SHOWN.transpose(1, 0, 2),
    6: np.rot90(SHOWN),
    7: SHOWN[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(SHOWN, -1),
}
"""What a camera stores by EXIF's orientation, so that a viewer shows `SHOWN`."""


def write(path: Path, orientation: int) -> Path:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(np.ascontiguousarray(STORED[orientation])).save(path, exif=exif)
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_is_turned_as_its_exif_says(tmp_path, orientation, suffix):
    path = write(tmp_path / f"photo.{suffix}", orientation)
    with path.open("rb") as file:
        pixels = decode_picture(file, "photo")
    with path.open("rb") as file:
        assert picture_size(file, "photo") == pixels.shape[:2] == (24, 40)
    assert np.abs(pixels.astype(int) - SHOWN).mean() < 6


def test_turned_pictures_of_one_size_as_shown_are_of_one_size(tmp_path):
    for orientation in (1, 6):
        write(tmp_path / f"photo{orientation}.jpg", orientation)
    pictures = open_pictures(tmp_path)
    assert pictures.shape == (24, 40)
    assert pictures.read(np.arange(2)).shape == (2, 24, 40, 3)

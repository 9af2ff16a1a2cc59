"""Images come in the order that is told, as viewers show them, from any kind of file; what is no image is named."""

import struct
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from data.importers.files import decode_picture
from foundation.image_files import MAX_PIXELS, decode, open_images
from tests.tiny_version import picture, png


def read(*words: str | Path, size: int = 3) -> list[np.ndarray]:
    return [image for batch in open_images([str(word) for word in words]).batches(size) for image in batch]


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    """Pictures of two sizes, a hidden file, a text, and a directory of more pictures."""
    directory = tmp_path / "shown"
    (directory / "more").mkdir(parents=True)
    for k, name in enumerate(("b.png", "a.bmp", "c.PNG", "more/d.png", "more/e.png")):
        Image.fromarray(picture(k, height=20 + k, width=30)).save(directory / name)
    (directory / "._b.png").write_bytes(b"of macOS")
    (directory / "notes.txt").write_text("no picture")
    return directory


def expected(*numbers: int) -> list[np.ndarray]:
    return [picture(k, height=20 + k, width=30) for k in numbers]


def test_files_come_as_told_and_a_directorys_own_pictures_by_name(shown):
    same(read(shown / "c.PNG", shown / "a.bmp"), expected(2, 1))
    same(read(shown), expected(1, 0, 2))
    assert open_images([str(shown)]).names == tuple(str(shown / name) for name in ("a.bmp", "b.png", "c.PNG"))


def test_a_glob_finds_files_sorted_and_two_stars_go_down(shown):
    same(read(shown / "*.png"), expected(0))
    same(read(shown / "**" / "*.png"), expected(0, 3, 4))
    with pytest.raises(ValueError, match=r"no file matches .*\*\.jpg'; name picture files"):
        read(shown / "*.jpg")
    with pytest.raises(ValueError, match=r"notes\.txt is not a readable picture: no PNG, JPEG"):
        read(shown / "*.txt")


@pytest.mark.parametrize("size", [1, 4, 100])
def test_sources_follow_each_other_whatever_the_batches(shown, tmp_path, size):
    block = np.stack([picture(k) for k in range(10, 17)])
    np.save(tmp_path / "block.npy", block)
    with h5py.File(tmp_path / "block.h5", "w") as file:
        file["deep/down"] = block[:3]
    words = [shown / "b.png", tmp_path / "block.npy", shown / "more", tmp_path / "block.h5", shown / "a.bmp"]
    same(read(*words, size=size), [*expected(0), *block, *expected(3, 4), *block[:3], *expected(1)])
    names = open_images([str(word) for word in words]).names
    assert names[1] == f"{tmp_path / 'block.npy'}[0]"
    assert names[10] == f"{tmp_path / 'block.h5'}[0]"


def test_an_hdf5_files_images_are_nsds_the_only_ones_or_those_named(tmp_path):
    one, other = np.stack([picture(1)]), np.stack([picture(2), picture(3)])
    path = tmp_path / "nsd_stimuli.hdf5"
    with h5py.File(path, "w") as file:
        file["imgBrick"], file["other"], file["labels"] = one, other, np.arange(3)
    same(read(path), list(one))
    same(read(f"{path}::other"), list(other))
    assert open_images([f"{path}::other"]).names[1] == f"{path}::other[1]"
    with pytest.raises(ValueError, match="has no data set 'none', it has"):
        read(f"{path}::none")
    with pytest.raises(ValueError, match=r"labels must be uint8 \(image, height, width, 3\), got int64 \(3,\)"):
        read(f"{path}::labels")
    with h5py.File(path, "a") as file:
        del file["imgBrick"]
        file["third"] = one
    with pytest.raises(ValueError, match="but has several: other, third; name one as"):
        read(path)
    path.write_bytes(b"no HDF5")
    with pytest.raises(ValueError, match="damaged, cut off or no HDF5 file"):
        read(path)


def test_an_npy_of_another_kind_is_refused(tmp_path):
    for array, said in (
        (np.zeros((2, 4, 4, 3), np.float32), "must be uint8"),
        (np.zeros((4, 4, 3), np.uint8), "must be uint8"),
        (np.zeros((0, 4, 4, 3), np.uint8), "holds no image"),
    ):
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(ValueError, match=said):
            read(tmp_path / "x.npy")


def test_opaque_pictures_are_read_as_the_importers_read_them(tmp_path):
    rgb = picture(0, height=24, width=36)
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, image, options in (
        ("rgb.png", Image.fromarray(rgb), {}),
        ("grey.png", Image.fromarray(rgb[..., 0]), {}),
        ("palette.png", Image.fromarray(rgb).quantize(16), {}),
        ("bits.tiff", Image.fromarray(rgb).convert("1"), {}),
        ("cmyk.jpg", Image.fromarray(rgb).convert("CMYK"), {}),
        ("turned.jpg", Image.fromarray(rgb), {"exif": turned}),
        ("lossless.webp", Image.fromarray(rgb), {"lossless": True}),
    ):
        path = tmp_path / name
        image.save(path, **options)
        (found,) = read(path)
        np.testing.assert_array_equal(found, decode_picture(path.open("rb"), name))
    assert read(tmp_path / "turned.jpg")[0].shape == (36, 24, 3)


def test_what_is_transparent_is_white_and_sixteen_bits_are_scaled(tmp_path):
    Image.fromarray(np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 0, 0, 128]]], np.uint8)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read(tmp_path / "a.png")[0], [[[255] * 3, [10, 20, 30], [127] * 3]])
    grey = np.array([[0, 257, 32768, 65535]], np.uint16)
    for name in ("g.png", "g.tiff"):
        Image.fromarray(grey).save(tmp_path / name)
        np.testing.assert_array_equal(read(tmp_path / name)[0][..., 1], [[0, 1, 128, 255]])
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(ValueError, match=r"f\.tiff is not a readable picture: its pixels are floating-point"):
        read(tmp_path / "f.tiff")


def bomb(side: int) -> bytes:
    """The beginning of a PNG of `side` x `side` pixels, and no pixels."""
    chunks = b""
    for kind, body in ((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0"))):
        chunks += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("side", [8001, 10_000, 100_000])
def test_a_picture_that_would_fill_the_memory_is_refused_by_its_header(tmp_path, side):
    assert side * side > MAX_PIXELS
    (tmp_path / "bomb.png").write_bytes(bomb(side))
    with pytest.raises(ValueError, match=r"bomb\.png is not a readable picture: .*pixels"):
        open_images([str(tmp_path / "bomb.png")])


def test_a_file_that_is_cut_off_is_named(tmp_path):
    whole = png(picture(0))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    images = open_images([str(tmp_path / "cut.png")])
    with pytest.raises(ValueError, match=r"cut\.png is not a readable picture"):
        list(images.batches(1))
    (tmp_path / "cut.png").write_bytes(whole[:20])
    with pytest.raises(ValueError, match=r"cut\.png is not a readable picture"):
        open_images([str(tmp_path / "cut.png")])


def test_formats_that_run_programs_are_not_opened():
    with pytest.raises(ValueError, match="no PNG, JPEG"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "row 0")


def test_nothing_and_what_is_not_there_are_said(tmp_path):
    (tmp_path / "empty").mkdir()
    for words, said in (
        ([], "no images are given"),
        ([tmp_path / "none.png"], r"none\.png does not exist"),
        ([tmp_path / "empty"], "holds no picture"),
    ):
        with pytest.raises(ValueError, match=said):
            read(*words)

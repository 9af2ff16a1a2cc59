"""Predictions on disk are what was written, batch by batch, in every format; and nothing is left of what failed."""

import gzip
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import zarr

from data.places import load_place, save_place
from data.voxels import Surface, Volume
from foundation import prediction_files
from foundation.prediction_files import PredictionFile
from tests.tiny_version import volume

ABOUT = {"images": ["a.png", "b.png"], "unit": "sd"}
SURFACE = Surface(
    space="fsaverage", n_vertices=(5, 6), hemisphere=np.array([0, 1], np.int8), vertex=np.array([4, 5], np.int32)
)


def values(n: int, *, samples: int | None = None) -> np.ndarray:
    shape = (n, 12) if samples is None else (n, samples, 12)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def written(path: Path, array: np.ndarray, *, rows: int = 3, **options) -> None:
    with PredictionFile(path=path, shape=array.shape, **options).writing(ABOUT, rows=rows) as write:
        for start in range(0, len(array), rows):
            write(array[start : start + rows])


@pytest.mark.parametrize("samples", [None, 4])
def test_an_npy_and_a_zarr_hold_what_was_written_and_what_it_is(tmp_path, samples):
    array = values(7, samples=samples)
    written(tmp_path / "p.npy", array)
    np.testing.assert_array_equal(np.load(tmp_path / "p.npy"), array)
    assert json.loads((tmp_path / "p.npy.json").read_text()) == {"format": "manybrains-predictions", **ABOUT}
    written(tmp_path / "p.zarr", array)
    group = zarr.open_group(tmp_path / "p.zarr", mode="r")
    found = group["predictions"]
    assert isinstance(found, zarr.Array)
    np.testing.assert_array_equal(found[:], array)
    assert found.metadata.dimension_names == (("image", "voxel") if samples is None else ("image", "sample", "voxel"))
    assert dict(group.attrs) == {"format": "manybrains-predictions", **ABOUT}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.npy", "p.npy.json", "p.zarr"]


@pytest.mark.parametrize("name", ["p.nii", "p.nii.gz"])
def test_a_nifti_has_one_volume_per_image_where_the_voxels_lie(tmp_path, name):
    array, place = values(7), volume()
    written(tmp_path / name, array, place=place)
    image = nibabel.load(tmp_path / name)
    assert isinstance(image, nibabel.Nifti1Image)
    np.testing.assert_allclose(image.affine, place.affine, rtol=1e-7)
    assert image.header.get_xyzt_units()[0] == "mm"
    data = np.asanyarray(image.dataobj)
    assert (data.shape, data.dtype) == ((*place.shape, 7), np.float32)
    np.testing.assert_array_equal(data[tuple(place.index.T)].T, array)
    outside = np.ones(place.shape, bool)
    outside[tuple(place.index.T)] = False
    assert np.isnan(data[outside]).all()
    assert json.loads((tmp_path / f"{name}.json").read_text())["images"] == ABOUT["images"]


def test_the_nifti_is_byte_for_byte_that_of_nibabel(tmp_path):
    array, place = values(2), volume()
    written(tmp_path / "p.nii", array, place=place)
    data = np.full((*place.shape, 2), np.nan, np.float32)
    data[tuple(place.index.T)] = array.T
    reference = nibabel.Nifti1Image(data, place.affine)
    reference.header.set_xyzt_units("mm")
    nibabel.save(reference, tmp_path / "reference.nii")
    assert (tmp_path / "p.nii").read_bytes() == (tmp_path / "reference.nii").read_bytes()


def test_a_compressed_nifti_tells_neither_time_nor_place(tmp_path):
    for name in ("a.nii.gz", "b.nii.gz"):
        written(tmp_path / name, values(2), place=volume())
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_more_volumes_than_nifti_1_counts_are_nifti_2(tmp_path):
    place = Volume(shape=(1, 2, 1), affine=np.eye(4), index=np.array([[0, 1, 0]], np.int32))
    array = np.arange(33_000, dtype=np.float32)[:, None]
    written(tmp_path / "p.nii.gz", array, rows=5000, place=place)
    image = nibabel.load(tmp_path / "p.nii.gz")
    assert isinstance(image, nibabel.Nifti2Image)
    np.testing.assert_array_equal(np.asanyarray(image.dataobj)[0, 1, 0], array[:, 0])


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("p.nii.gz", {}, r"isn't known to the model; write .*p\.npy"),
        ("p.nii", {"place": SURFACE}, r"lie on a surface \(fsaverage\), which NIfTI doesn't hold; write .*p\.npy"),
        ("p.csv", {}, r"must end with one of \.npy, \.zarr, \.nii, \.nii\.gz"),
        ("none/p.npy", {}, "is not a directory; make it first"),
    ],
)
def test_what_a_format_can_not_hold_is_refused_before_the_work(tmp_path, name, options, said):
    with pytest.raises(ValueError, match=said):
        PredictionFile(path=tmp_path / name, shape=(2, 12), **options).check()


def test_samples_do_not_go_into_a_nifti(tmp_path):
    with pytest.raises(ValueError, match=r"one volume per image, not for samples; write .*p\.npy or a \.zarr"):
        PredictionFile(path=tmp_path / "p.nii", shape=(2, 3, 12), place=volume()).check()


@pytest.mark.parametrize("name", ["p.npy", "p.zarr", "p.nii.gz"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing_and_what_was_there_stays(tmp_path, name, error):
    def interrupted(array: np.ndarray, **options) -> None:
        file = PredictionFile(path=tmp_path / name, shape=array.shape, place=volume(), **options)
        with file.writing(ABOUT, rows=3) as write:
            write(array[:3])
            raise error

    with pytest.raises(error):
        interrupted(values(7))
    assert list(tmp_path.iterdir()) == []
    written(tmp_path / name, values(2), place=volume())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(error):
        interrupted(values(7), overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["p.npy", "p.zarr", "p.nii.gz"])
def test_what_is_there_is_overwritten_only_when_told(tmp_path, name):
    written(tmp_path / name, values(2), place=volume())
    with pytest.raises(ValueError, match=r"exists already; name another file or pass --overwrite"):
        written(tmp_path / name, values(3), place=volume())
    written(tmp_path / name, values(3), place=volume(), overwrite=True)


def test_a_directory_that_is_not_ours_is_never_overwritten(tmp_path):
    zarr.create_group(tmp_path / "nsd.zarr", attributes={"format": "manybrains-store"})
    (tmp_path / "plain.zarr").mkdir()
    (tmp_path / "p.npy").mkdir()
    for name in ("nsd.zarr", "plain.zarr", "p.npy"):
        with pytest.raises(ValueError, match="is a directory that wasn't written by this command"):
            prediction_files.check_name(tmp_path / name, overwrite=True)


@pytest.mark.parametrize("place", [volume(), SURFACE], ids=["volume", "surface"])
def test_places_come_back_as_they_were_saved(tmp_path, place):
    assert load_place(tmp_path) is None
    path = save_place(place, tmp_path)
    found = load_place(tmp_path)
    assert type(found) is type(place)
    for name, value in vars(place).items():
        np.testing.assert_array_equal(getattr(found, name), value)
        assert type(getattr(found, name)) is type(value)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_damaged_place_is_refused(tmp_path):
    outside = Volume(shape=(1, 1, 1), affine=np.eye(4), index=np.array([[0, 5, 0]], np.int32))
    path = save_place(outside, tmp_path)
    with pytest.raises(ValueError, match="damaged or holds no voxels' places"):
        load_place(tmp_path)
    path.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(ValueError, match="damaged or holds no voxels' places"):
        load_place(tmp_path)

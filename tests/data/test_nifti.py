"""Voxel vectors and the field's files: every value lies where its affine or vertex says."""

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.nifti import (
    from_volume,
    read_labels,
    to_volume,
    volume_of_mask,
    write_label_names,
    write_surface,
    write_volume,
)
from data.voxels import Surface, Volume

AFFINE = np.array([[-2.0, 0, 0, 10], [0, 2, 0, -20], [0, 0, 2.5, 5], [0, 0, 0, 1]])
SHAPE = (5, 6, 4)


def mask(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(SHAPE) < 0.3


def volume() -> Volume:
    return volume_of_mask(mask(), AFFINE)


def world(place: Volume) -> np.ndarray:
    """Positions in mm, the long way round."""
    return np.array([(AFFINE @ [*index, 1])[:3] for index in place.index])


# -- volumes -----------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000))
def test_voxels_of_a_mask_are_in_its_c_order(seed):
    where = mask(seed)
    place = volume_of_mask(where, AFFINE)
    picture = np.arange(where.size, dtype=np.float32).reshape(SHAPE)
    np.testing.assert_array_equal(from_volume(picture, place), picture.ravel()[where.ravel()])


def test_a_vector_comes_back_from_its_volume_and_is_nan_outside():
    values = np.arange(mask().sum(), dtype=np.float32)
    array = to_volume(values, volume())
    np.testing.assert_array_equal(from_volume(array, volume()), values)
    np.testing.assert_array_equal(np.isnan(array), ~mask())


def test_labels_are_zero_outside():
    array = to_volume(np.full(mask().sum(), 3, np.int16), volume())
    np.testing.assert_array_equal(array, np.where(mask(), 3, 0))


def test_an_array_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"the array is \(2, 2, 2\) but the subject's volume \(5, 6, 4\)"):
        from_volume(np.zeros((2, 2, 2)), volume())


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_written_volume_has_each_value_at_its_millimetres(tmp_path, suffix):
    place = volume()
    values = np.random.default_rng(1).normal(size=len(place.index)).astype(np.float32)
    write_volume(tmp_path / f"map{suffix}", values, place)
    image = nibabel.load(tmp_path / f"map{suffix}")
    for value, mm in zip(values, world(place), strict=True):
        index = np.linalg.inv(image.affine) @ [*mm, 1]
        assert image.dataobj[tuple(np.rint(index[:3]).astype(int))] == value
    assert image.header.get_data_dtype() == np.float32
    assert [p.name for p in tmp_path.iterdir()] == [f"map{suffix}"], "no draft is left"


# -- label volumes -----------------------------------------------------------------------------------------------------


def save(path, array, affine=AFFINE):
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def test_labels_on_the_same_grid_are_read_as_they_are_with_the_names_beside_them(tmp_path):
    labels = np.random.default_rng(2).integers(0, 4, SHAPE).astype(np.int16)
    path = save(tmp_path / "areas_dseg.nii.gz", labels)
    (tmp_path / "areas_dseg.tsv").write_text("index\tname\n1\tV1\n2\tV2\n9\tunused\n")
    found = read_labels(path, volume())
    np.testing.assert_array_equal(found.labels, labels[mask()])
    assert found.names == {1: "V1", 2: "V2", 3: "label-3"}


def test_labels_on_a_finer_shifted_grid_are_those_of_the_nearest_voxel(tmp_path):
    """The oracle looks up each voxel's position in mm in the other grid."""
    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    affine[:3, 3] = (2.3, -18.1, 6.3)
    labels = np.random.default_rng(3).integers(0, 30, (6, 6, 6)).astype(np.int16)
    index = (world(volume()) - affine[:3, 3]) / 1.5
    inside = ((index >= 0) & (index <= np.array(labels.shape) - 1)).all(1)  # between the centres of the outermost
    index = np.rint(index).astype(int)
    assert 0 < inside.sum() < len(inside)
    expected = np.where(inside, labels[tuple(np.clip(index, 0, np.array(labels.shape) - 1).T)], 0)
    found = read_labels(save(tmp_path / "atlas.nii.gz", labels, affine), volume())
    np.testing.assert_array_equal(found.labels, expected)


def test_an_atlas_of_another_space_is_refused(tmp_path):
    affine = AFFINE.copy()
    affine[:3, 3] += 500
    path = save(tmp_path / "atlas.nii", np.ones(SHAPE, np.int16), affine)
    with pytest.raises(
        ValueError, match=r"atlas.nii has no label on any of \d+ voxels; it must be in the subject's own"
    ):
        read_labels(path, volume())


@pytest.mark.parametrize("values", [np.full(SHAPE, 0.5, np.float32), np.full(SHAPE, -1, np.int16)], ids=["half", "-1"])
def test_a_map_that_holds_no_labels_is_refused(tmp_path, values):
    with pytest.raises(ValueError, match="a label volume has whole numbers from 0"):
        read_labels(save(tmp_path / "map.nii.gz", values), volume())


def test_unreadable_volumes_are_one_clear_error(tmp_path):
    (tmp_path / "text.nii.gz").write_text("not a volume")
    whole = save(tmp_path / "whole.nii", np.zeros(SHAPE, np.int16)).read_bytes()
    (tmp_path / "cut.nii").write_bytes(whole[:-50])
    save(tmp_path / "four.nii", np.zeros((*SHAPE, 2), np.int16))
    (tmp_path / "named.tsv").write_text("number\tlabel\n1\tx\n")
    save(tmp_path / "named.nii", np.ones(SHAPE, np.int16))
    for name, message in {
        "none.nii": "none.nii does not exist",
        "text.nii.gz": "text.nii.gz is damaged or is not a readable NIfTI or MGH file",
        "cut.nii": "cut.nii is damaged or cut short",
        "four.nii": r"four.nii is \(5, 6, 4, 2\); a single volume \(x, y, z\) is needed",
        "named.nii": "named.tsv must be a table with columns index and name",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_labels(tmp_path / name, volume())


def test_a_table_of_names_comes_back(tmp_path):
    save(tmp_path / "parts.nii.gz", np.ones(SHAPE, np.int16))
    assert write_label_names(tmp_path / "parts.nii.gz", {1: "a b", 2: "n/a"}).name == "parts.tsv"
    assert read_labels(tmp_path / "parts.nii.gz", volume()).names == {1: "a b"}


# -- surfaces ----------------------------------------------------------------------------------------------------------


def surface() -> Surface:
    hemisphere = np.array([0, 1, 0, 1, 1], np.int8)
    vertex = np.array([3, 0, 1, 5, 2], np.int32)
    return Surface(space="fsaverage-tiny", n_vertices=(6, 7), hemisphere=hemisphere, vertex=vertex)


def test_each_vertex_has_its_value_in_the_file_of_its_hemisphere(tmp_path):
    paths = write_surface(tmp_path / "map.gii", np.arange(1, 6, dtype=np.float32), surface())
    assert [path.name for path in paths] == ["map.lh.func.gii", "map.rh.func.gii"]
    left, right = (nibabel.load(path).agg_data() for path in paths)
    nan = np.nan
    np.testing.assert_array_equal(left, [nan, 3, nan, 1, nan, nan])
    np.testing.assert_array_equal(right, [2, nan, 5, nan, nan, 4, nan])
    assert nibabel.load(paths[0]).meta["AnatomicalStructurePrimary"] == "CortexLeft"

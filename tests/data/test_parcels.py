"""Parcels: every voxel in one, about the size asked for; what they were made from is in their key."""

from dataclasses import replace
from itertools import pairwise

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.nifti import volume_of_mask
from data.parcels import compact, functional, make_parcels, parse_parcels, sequential
from data.preprocess import Samples
from data.voxels import Rois, VoxelTable


@given(n_voxels=st.integers(1, 2000), size=st.integers(1, 100))
def test_sequential_runs_are_consecutive_and_nearly_equal(n_voxels, size):
    found = sequential(n_voxels, size=size)
    counts = np.bincount(found)
    assert len(found) == n_voxels
    assert set(np.diff(found)) <= {0, 1}
    assert found[0] == 0
    assert counts.max() - counts.min() <= 1
    assert len(counts) == max(1, round(n_voxels / size))


def test_compact_parcels_are_compact_and_numbered_by_their_first_voxel():
    rng = np.random.default_rng(0)
    centres = rng.permutation(np.arange(6))[:, None] * np.array([100, 0, 0])
    member = rng.integers(0, 6, 180)
    found = compact((centres[member] + rng.normal(size=(180, 3))).astype(np.float32), size=30)
    _, first = np.unique(found, return_index=True)
    assert list(first) == sorted(first)
    pairs = {(m, f) for m, f in zip(member, found, strict=True)}
    assert len(pairs) == 6, "a parcel is one of the six clouds"


def test_compact_parcels_are_the_same_each_time():
    coordinates = np.random.default_rng(1).normal(size=(200, 3)).astype(np.float32)
    np.testing.assert_array_equal(compact(coordinates, size=20), compact(coordinates, size=20))


def test_auto_is_compact_where_positions_are_known_and_sequential_elsewhere():
    coordinates = np.random.default_rng(2).normal(size=(90, 3)).astype(np.float32)
    with_positions = VoxelTable(n_voxels=90, coordinates=coordinates)
    auto, compact_, sequential_ = (parse_parcels(f"{kind}:30") for kind in ("auto", "compact", "sequential"))
    for voxels, same in ((with_positions, compact_), (VoxelTable(n_voxels=90), sequential_)):
        np.testing.assert_array_equal(make_parcels(auto, voxels).labels, make_parcels(same, voxels).labels)
    assert set(make_parcels(auto, VoxelTable(n_voxels=5, coordinates=coordinates[:5])).labels) == {0}


# -- by name -----------------------------------------------------------------------------------------------------------

AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
SHAPE = (4, 5, 6)


def table(**more) -> VoxelTable:
    """All 120 voxels of a small volume."""
    place = volume_of_mask(np.ones(SHAPE, bool), AFFINE)
    streams = Rois(labels=np.repeat([5, 0, 2], 40).astype(np.int16), names={2: "midventral", 5: "ventral", 7: "none"})
    return VoxelTable(n_voxels=120, **({"place": place, "rois": {"streams": streams}} | more))


def training(seed: int = 0, n_images: int = 50) -> Samples:
    """Voxels that follow one of two time courses, by whether their number is even, and noise."""
    rng = np.random.default_rng(seed)
    course = rng.normal(size=(n_images, 2))
    responses = course[:, np.arange(120) % 2] + 0.3 * rng.normal(size=(n_images, 120))
    image = np.arange(n_images) * 2
    return Samples(
        subject="subj01",
        image=image,
        responses=responses.astype(np.float32),
        n_repeats=np.ones(n_images, np.float32),
        standardised_by=np.append(image, [301, 303]),
    )


def made(text: str, voxels: VoxelTable | None = None, **options):
    return make_parcels(parse_parcels(text), voxels or table(), **options)


def made_functional(**options):
    return made("functional:30", **({"responses": training(), "split_digest": "split", "n_sessions": 2} | options))


def test_each_kind_has_as_many_names_as_parcels():
    for text in ("sequential:30", "compact:30", "roi:streams"):
        found = made(text)
        assert found.labels.dtype == np.int64
        assert set(found.labels) == set(range(len(found.names)))
        assert len(set(found.names)) == len(found.names)
        assert found.used_images is None
        assert found.kind == text.partition(":")[0]
    np.testing.assert_array_equal(made("sequential:30").labels, sequential(120, size=30))
    np.testing.assert_array_equal(made("compact").labels, compact(table().place.coordinates(), size=30))


def test_coordinates_come_before_the_volume():
    coordinates = np.random.default_rng(0).normal(size=(120, 3)).astype(np.float32)
    np.testing.assert_array_equal(
        made("compact:20", table(coordinates=coordinates)).labels, compact(coordinates, size=20)
    )


def test_a_family_gives_a_parcel_per_label_and_one_for_the_voxels_outside():
    found = made("roi:streams")
    assert found.names == ("midventral", "ventral", "outside")
    np.testing.assert_array_equal(found.labels, np.repeat([1, 2, 0], 40))
    full = Rois(labels=np.ones(120, np.int16), names={1: "all"})
    assert made("roi:full", table(rois={"full": full})).names == ("all",)


def test_an_atlas_of_another_grid_labels_the_voxels_by_position(tmp_path):
    """Left and right halves of a volume of twice the resolution."""
    labels = np.zeros((8, 10, 12), np.int16)
    labels[:4], labels[4:] = 11, 12
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = -0.5
    nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / "halves.nii.gz")
    (tmp_path / "halves.tsv").write_text("index\tname\n11\tleft\n12\tright\n")
    found = made(f"atlas:{tmp_path / 'halves.nii.gz'}")
    assert found.names == ("left", "right")
    np.testing.assert_array_equal(found.labels, table().place.index[:, 0] >= 2)


def test_functional_parcels_follow_responses_where_places_say_nothing():
    """Two kinds of voxel in one place: positions alone can't tell them apart."""
    nowhere = np.zeros((120, 3), np.float32)
    found = functional(nowhere, training().responses, size=60)
    np.testing.assert_array_equal(found, np.arange(120) % 2)


def test_functional_parcels_follow_places_where_responses_say_nothing():
    places = np.repeat(np.eye(3), 40, axis=0).astype(np.float32) * 10
    same = np.repeat(np.random.default_rng(0).normal(size=(30, 1)), 120, axis=1).astype(np.float32)
    np.testing.assert_array_equal(functional(places, same, size=40), np.repeat(np.arange(3), 40))


def test_functional_parcels_are_the_same_each_time_and_say_what_they_looked_at():
    found = made_functional()
    np.testing.assert_array_equal(found.labels, made_functional().labels)
    np.testing.assert_array_equal(found.used_images, [*range(0, 100, 2), 301, 303])
    assert found.key == made_functional().key


def test_the_key_tells_apart_whatever_parcels_were_made_from():
    shifted = replace(training(), image=training().image + 1)
    other = table(place=volume_of_mask(np.ones(SHAPE, bool), 2 * AFFINE))
    keys = [
        made_functional().key,
        made_functional(split_digest="other split").key,
        made_functional(n_sessions=None).key,
        made_functional(seed=1).key,
        made_functional(responses=shifted).key,
        made_functional(responses=training(seed=1)).key,
        made("compact:30").key,
        made("compact:30", seed=1).key,
        made("compact:30", other).key,
        made("compact:31").key,
        made("sequential:30").key,
        made("roi:streams").key,
    ]
    assert len(set(keys)) == len(keys)
    assert made("sequential:30", seed=1).key == made("sequential:30").key, "a seed that nothing depends on"


def test_the_key_of_an_atlas_follows_its_content(tmp_path):
    path = tmp_path / "atlas.nii"
    keys = []
    for label in (1, 2):
        nibabel.save(nibabel.Nifti1Image(np.full(SHAPE, label, np.int16), AFFINE), path)
        keys.append(made(f"atlas:{path}").key)
    assert len(set(keys)) == 2


@pytest.mark.parametrize("text", ["sequential:30", "compact:12", "functional:30", "roi:streams", "atlas:/a/b.nii.gz"])
def test_a_spec_is_the_text_that_it_came_from(text):
    assert str(parse_parcels(text)) == text


def test_wrong_asks_are_answered_with_what_there_is():
    bare = VoxelTable(n_voxels=10)
    for text, voxels, message in (
        (
            "schaefer:400",
            bare,
            "parcels 'schaefer:400' are of no known kind; there are sequential, compact, auto, functional",
        ),
        ("compact:0", bare, "need a size in voxels, a whole number from 1; write compact:30"),
        ("compact:few", bare, "need a size in voxels"),
        ("roi", bare, "need a source; write roi:FAMILY or atlas:PATH"),
        ("roi:floc", table(), "has no ROI family 'floc'; it has streams"),
        ("compact:30", bare, "need positions, which these voxels lack; ask for sequential:30"),
        ("atlas:a.nii", bare, "need voxels with a place in a volume"),
        ("atlas:missing.nii", table(), "missing.nii does not exist"),
        ("functional:30", table(), "look at responses; give training samples"),
    ):
        with pytest.raises(ValueError, match=message):
            made(text, voxels)


def test_parcels_are_numbered_by_their_first_voxel():
    for found in (made("compact:10"), made_functional()):
        _, first = np.unique(found.labels, return_index=True)
        assert all(a < b for a, b in pairwise(first))

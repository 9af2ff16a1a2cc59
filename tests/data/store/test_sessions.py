"""Sessions of a subject: appended whole or not at all, in the order of scanning, touching nothing that is there."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.sources import SessionSource
from data.store import PooledStore
from data.voxels import Surface, Volume, VoxelTable
from tests.store_writes import Stop, bytes_of, stops_of


def test_sessions_appended_later_give_the_digest_of_one_import_and_touch_no_file(tmp_path, make_source):
    at_once = PooledStore.create(tmp_path / "once.zarr", name="once")
    at_once.write_subject(make_source())
    bit_by_bit = PooledStore.create(tmp_path / "bits.zarr", name="bits")
    for sessions, new in (((1,), [1]), ((1, 2), [2]), ((1, 2), []), ((2, 3), [3])):
        before = bytes_of(tmp_path / "bits.zarr")
        written = bit_by_bit.write_subject(make_source(sessions))
        assert [s.session for s in written] == new
        after = bytes_of(tmp_path / "bits.zarr")
        if bit_by_bit.subject("subj09").parts.keys() != {"0000"}:
            assert before.items() <= after.items()
    one, other = at_once.subject("subj09"), PooledStore.open(bit_by_bit.path).subject("subj09")
    assert one.digest == other.digest
    np.testing.assert_array_equal(one.responses(), other.responses())
    np.testing.assert_array_equal(one.session, np.repeat([1, 2, 3], 4))
    np.testing.assert_array_equal(other.session, one.session)
    np.testing.assert_array_equal(other.trial_column("image"), one.trial_column("image"))


def test_sessions_stand_in_the_order_of_scanning_whenever_they_came(tmp_path, make_source):
    store = PooledStore.create(tmp_path / "s.zarr", name="s")
    store.write_subject(make_source((3,)))
    store.write_subject(make_source((1, 2)))
    other = PooledStore.create(tmp_path / "other.zarr", name="s")
    other.write_subject(make_source())
    np.testing.assert_array_equal(store.subject("subj09").session, np.repeat([1, 2, 3], 4))
    assert store.subject("subj09").digest == other.subject("subj09").digest
    trials = np.array([11, 0, 5])
    np.testing.assert_array_equal(
        store.subject("subj09").responses(trials), other.subject("subj09").responses()[trials]
    )


def test_an_interrupted_import_shows_neither_subject_nor_images_and_goes_on_where_it_was(
    store, make_source, dying_after, tmp_path
):
    other = PooledStore.create(tmp_path / "uninterrupted.zarr", name="u")
    other.write_subject(make_source())
    for _ in stops_of(dying_after, lambda: store.write_subject(make_source())):
        seen = PooledStore.open(store.path)
        assert (seen.n_images, seen.subjects) == (60, ["subj01", "subj02"])
    assert store.subject("subj09").digest == other.subject("subj09").digest
    assert store.n_images == 66
    pixels = np.concatenate([p for _, _, p in store.pixels(block="0001")])
    np.testing.assert_array_equal(pixels, np.concatenate([p for _, _, p in other.pixels()]))


def test_a_session_that_was_written_is_not_read_again(store, make_source, dying_after):
    source = make_source()
    read = []

    def counted(session: SessionSource) -> SessionSource:
        def read_and_count():
            read.append(session.session)
            if session.session == 3 and read.count(3) == 1:
                raise Stop
            return session.read()

        return replace(session, read=read_and_count)

    source = replace(source, sessions=tuple(counted(s) for s in source.sessions))
    with pytest.raises(Stop):
        store.write_subject(source)
    store.write_subject(source)
    assert read == [1, 2, 3, 3]


def test_a_later_import_of_another_subject_is_not_disturbed_by_an_unfinished_one(store, make_source, dying_after):
    with dying_after(14), pytest.raises(Stop):
        store.write_subject(make_source(name="subj08"))
    store.write_subject(make_source(name="subj09"))
    assert store.n_images == 66
    store.write_subject(make_source(name="subj08"))
    assert store.n_images == 66, "the same pictures"
    np.testing.assert_array_equal(store.subject("subj08").image, store.subject("subj09").image)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"voxels": VoxelTable(n_voxels=6)}, "with other voxels, labels or units"),
        ({"scale": 1.0}, "with other voxels, labels or units"),
        ({"sessions": "other trials"}, "session 0001 of 'subj09' is there already with other trials"),
        ({"sessions": "no index"}, "without a session index nothing can be told apart"),
    ],
)
def test_what_contradicts_a_subject_that_is_there_is_refused(store, make_source, change, message):
    source = make_source()
    store.write_subject(source)
    if change.get("sessions") == "other trials":
        first = source.sessions[0]
        moved = replace(first, columns=first.columns | {"image": first.columns["image"][::-1]})
        change = {"sessions": (moved, *source.sessions[1:])}
    elif change.get("sessions") == "no index":
        change = {"sessions": (replace(source.sessions[0], session=None),)}
    before = bytes_of(Path(store.path))
    with pytest.raises(ValueError, match=message):
        store.write_subject(replace(source, **change))
    assert bytes_of(Path(store.path)) == before


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([np.zeros((3, 5), np.int16)], "3 of 4 trials"),
        ([np.zeros((5, 5), np.int16)], "more than 4 trials"),
        ([np.zeros((4, 6), np.int16)], "int16 of 5 voxels was announced"),
        ([np.zeros((4, 5), np.int32)], "int16 of 5 voxels was announced"),
    ],
)
def test_responses_that_are_not_as_announced_end_the_import_and_leave_no_subject(store, make_source, blocks, message):
    source = make_source()
    spoilt = replace(source.sessions[1], read=lambda: iter(blocks))
    with pytest.raises(ValueError, match=message):
        store.write_subject(replace(source, sessions=(source.sessions[0], spoilt, source.sessions[2])))
    assert PooledStore.open(store.path).subjects == ["subj01", "subj02"]
    assert PooledStore.open(store.path).n_images == 60


def test_places_and_published_maps_come_back(store, make_source):
    index = np.array([[0, 0, 1], [1, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1]], np.int32)
    volume = Volume(shape=(2, 2, 2), affine=np.diag([1.8, 1.8, 1.8, 1.0]), index=index)
    of_volume = VoxelTable(n_voxels=5, place=volume, reliability={"ncsnr": np.arange(5, dtype=np.float32)})
    store.write_subject(replace(make_source(name="v"), voxels=of_volume))
    there = store.subject("v").voxels
    assert isinstance(there.place, Volume)
    np.testing.assert_array_equal(there.place.index, index)
    np.testing.assert_array_equal(there.place.coordinates(), (1.8 * index).astype(np.float32))
    np.testing.assert_array_equal(there.reliability["ncsnr"], np.arange(5))
    side, vertex = np.array([0, 0, 1, 1, 1], np.int8), np.array([3, 9, 0, 1, 9], np.int32)
    surface = Surface(space="fsaverage5", n_vertices=(10, 10), hemisphere=side, vertex=vertex)
    store.write_subject(replace(make_source(name="s"), voxels=VoxelTable(n_voxels=5, place=surface)))
    back = PooledStore.open(store.path).subject("s").voxels.place
    assert isinstance(back, Surface)
    np.testing.assert_array_equal(back.vertex, vertex)
    assert (back.space, back.n_vertices) == ("fsaverage5", (10, 10))


def test_an_interrupted_subject_is_invisible_and_can_be_written_again(store, make_subject, dying_after):
    record = make_subject("subj03", [0, 1, 2], session=np.ones(3, np.int16), coordinates=np.zeros((5, 3), np.float32))
    n_stops = 0
    for _ in stops_of(dying_after, lambda: store.add_subject(record)):
        n_stops += 1
        assert PooledStore.open(store.path).subjects == ["subj01", "subj02"]
    assert n_stops > 8
    assert PooledStore.open(store.path).subject("subj03").digest == record.digest(store.image_ids())


def test_what_an_interrupted_write_left_gives_way_to_another_record(store, make_subject, dying_after):
    record = make_subject("subj03", [0, 1, 2], session=np.ones(3, np.int16), coordinates=np.zeros((5, 3), np.float32))
    with dying_after(9), pytest.raises(Stop):
        store.add_subject(record)
    bare = make_subject("subj03", [2, 1])
    store.add_subject(bare)
    subject = PooledStore.open(store.path).subject("subj03")
    np.testing.assert_array_equal(subject.responses(), bare.responses)
    assert subject.session is None
    assert subject.coordinates is None

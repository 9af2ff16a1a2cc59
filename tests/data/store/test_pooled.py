"""The pooled store: what goes in comes out, and what contradicts itself is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from data.store import PooledStore
from data.voxels import Rois
from tests.store_writes import bytes_of

# -- reading back ------------------------------------------------------------------------------------------------------


def test_a_subject_comes_back_as_it_went_in(tmp_path, make_block, make_subject):
    store = PooledStore.create(tmp_path / "s.zarr", name="s")
    store.add_images(make_block(["a", "b", "c"]))
    given_data = make_subject(
        "subj01",
        [2, 0, 0, 1],
        responses=np.array([[3, -6], [9, 0], [1, 2], [4, 5]], np.int16),
        scale=1 / 300,
        unit="percent signal change",
        session=np.array([1, 1, 2, 2], np.int16),
        run=np.array([1, 2, 1, 2], np.int16),
        repeat=np.array([1, 1, 2, 1], np.int8),
        time_s=np.arange(4, dtype=np.float32),
        coordinates=np.arange(6, dtype=np.float32).reshape(2, 3),
        rois={"streams": Rois(labels=np.array([0, 5], np.int16), names={5: "ventral"})},
        upstream_preprocessing="smoothed",
    )
    store.add_subject(given_data)
    subject = PooledStore.open(tmp_path / "s.zarr").subject("subj01")
    np.testing.assert_allclose(subject.responses(), given_data.responses / 300, rtol=1e-6)
    np.testing.assert_array_equal(subject.responses(np.array([3, 0])), subject.responses()[[3, 0]])
    np.testing.assert_array_equal(subject.responses(np.array([], int)), np.empty((0, 2), np.float32))
    for name, column in given_data.trial_columns().items():
        np.testing.assert_array_equal(subject.trial_column(name), column)
    np.testing.assert_array_equal(subject.coordinates, given_data.coordinates)
    np.testing.assert_array_equal(subject.rois["streams"].mask("ventral"), [False, True])
    assert subject.attrs["unit"] == "percent signal change"
    assert subject.upstream_preprocessing == "smoothed"
    assert (subject.n_trials, subject.n_voxels) == (4, 2)


def test_images_keep_their_pixels_and_roles(tmp_path, make_block):
    store = PooledStore.create(tmp_path / "s.zarr", name="s")
    block = make_block(["ä", "b" * 90, "c"], ["test", "", "train"])
    store.add_images(block)
    assert store.image_ids() == ["ä", "b" * 90, "c"]
    assert store.image_roles() == ["test", "", "train"]
    np.testing.assert_array_equal(np.concatenate([p for _, _, p in store.pixels(batch=2)]), block.pixels)


def test_images_without_pixels_cannot_be_encoded(tmp_path, make_block):
    store = PooledStore.create(tmp_path / "s.zarr", name="s")
    store.add_images(make_block(["a"], pixels=False))
    with pytest.raises(ValueError, match="without pixels"):
        list(store.pixels())


def test_any_fsspec_url_holds_a_store(make_block, make_subject, request):
    url = f"memory://{request.node.name}/s.zarr"
    store = PooledStore.open_or_create(url, name="in memory")
    store.add_images(make_block(["a", "b"]))
    store.add_subject(make_subject("subj01", [0, 1]))
    again = PooledStore.open(url)
    assert again.name == "in memory"
    np.testing.assert_array_equal(again.subject(1).responses(), store.subject(1).responses())
    with pytest.raises(ValueError, match="exists already"):
        PooledStore.create(url, name="other")
    with pytest.raises(ValueError, match="no store at"):
        PooledStore.open(url + "-absent")


@pytest.mark.parametrize(
    ("url", "message"), [("s3://bucket/x.zarr", "Install s3fs"), ("nonsense://x", "Protocol not known: nonsense")]
)
def test_a_url_that_cannot_be_opened_is_told_what_is_missing(url, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for open_ in (PooledStore.open, lambda path: PooledStore.create(path, name="x")):
        with pytest.raises(ValueError, match=f"can't be opened: {message}.*; install what it needs"):
            open_(url)


# -- opening -----------------------------------------------------------------------------------------------------------


def test_creating_over_anything_is_refused(tmp_path, store):
    for path in (Path(store.path), tmp_path):
        with pytest.raises(ValueError, match="exists already"):
            PooledStore.create(path, name="x")


@pytest.mark.parametrize("writable", [False, True])
def test_an_absent_store_says_how_to_make_one_and_is_not_made(tmp_path, writable):
    with pytest.raises(ValueError, match=r"no store at .*python -m data phantom"):
        PooledStore.open(tmp_path / "nothing.zarr", writable=writable)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "directory", "array", "group", "zarr v2", "broken"])
def test_what_is_not_a_store_is_said_to_be_none_and_left_alone(tmp_path, kind):
    path = tmp_path / "thing"
    if kind == "file":
        path.write_text("hello")
    elif kind == "directory":
        path.mkdir()
        (path / "notes.txt").write_text("hello")
    elif kind == "array":
        zarr.create_array(path, shape=(2,), dtype="i4")
    elif kind == "broken":
        path.mkdir()
        (path / "zarr.json").write_text("{broken")
    else:
        zarr.open_group(path, mode="w", zarr_format=2 if kind == "zarr v2" else 3)
    before = bytes_of(tmp_path)
    with pytest.raises(ValueError, match="not a manybrains store"):
        PooledStore.open(path)
    with pytest.raises(ValueError, match="not a manybrains store"):
        PooledStore.open_or_create(path, name="x")
    assert bytes_of(tmp_path) == before


def test_a_store_of_a_newer_format_is_refused(store):
    metadata = Path(store.path) / "zarr.json"
    text = json.loads(metadata.read_text())
    text["attributes"]["format_version"] = 99
    metadata.write_text(json.dumps(text))
    for open_ in (PooledStore.open, lambda path: PooledStore.open_or_create(path, name="x")):
        with pytest.raises(ValueError, match="store format 99; this manybrains reads up to 1: update it"):
            open_(store.path)


def test_an_opened_store_is_read_only_unless_asked(store, make_subject):
    with pytest.raises(ValueError, match="read-only"):
        PooledStore.open(store.path).add_subject(make_subject("subj03", [0]))


# -- subjects ----------------------------------------------------------------------------------------------------------


def test_an_unknown_subject_is_told_who_is_there(store):
    with pytest.raises(ValueError, match=r"subject 'subj09' is not in .*pooled.zarr; it has subj01, subj02"):
        store.subject("subj09")
    with pytest.raises(ValueError, match=r"subject '9' is not in .*; it has subj01, subj02"):
        store.subject(9)


def test_a_subject_is_a_number_or_a_name(store, make_subject):
    store.add_subject(make_subject("190923", [0, 1]))
    assert store.subject(2).name == store.subject("2").name == store.subject("subj02").name == "subj02"
    assert store.subject("190923").name == "190923"
    store.add_subject(make_subject("sub-07", [0, 1]))
    assert store.subject(7).name == store.subject("07").name == "sub-07"
    store.add_subject(make_subject("subj07", [0, 1]))
    with pytest.raises(ValueError, match="subject '7' could be sub-07 or subj07"):
        store.subject(7)


def test_the_same_subject_twice_is_refused(store, make_subject):
    with pytest.raises(ValueError, match=r"'subj01' is in .* already"):
        store.add_subject(make_subject("subj01", [0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "sub.01"}, "must not contain a dot; write 'sub-01'"),
        ({"name": "../x"}, "must start with a letter or digit"),
        ({"image": np.array([0, 99], np.int32)}, "image row 99 is outside the store's 60 images"),
        ({"image": np.array([-1, 3], np.int32)}, "image row -1 is outside"),
        ({"responses": np.array([[1, np.nan], [0, 1]], np.float32)}, "trial 0, voxel 1 is not finite"),
        ({"responses": np.array([["a"], ["b"]])}, "must be integers or floats"),
        ({"responses": np.zeros((2, 0), np.float32)}, "responses are empty"),
        ({"session": np.array([1], np.int16)}, "2 trials but 1 values of 'session'"),
        ({"session": np.array([0, 1], np.int16)}, "sessions count from 1, got 0"),
        ({"scale": 0.0}, "scale must be a positive number"),
        ({"n_averaged": np.array([1, 0], np.float32)}, "n_averaged must be positive"),
        ({"n_averaged": np.array([3, 3], np.float32)}, "upstream_preprocessing must say how"),
        ({"coordinates": np.full((5, 3), np.nan, np.float32)}, "coordinates must be finite"),
        ({"rois": {"v": Rois(labels=np.zeros(4, np.int16), names={})}}, "5 voxels but 4 labels of 'v'"),
        ({"rois": {"v": Rois(labels=np.full(5, 2, np.int16), names={1: "a"})}}, "label 2 of 'v' has no name"),
    ],
)
def test_a_contradictory_subject_is_refused_and_leaves_nothing(store, make_subject, change, message):
    record = make_subject("subj03", [0, 1])
    for name, value in change.items():
        object.__setattr__(record, name, value)  # past the shape checks, which production doesn't have
    before = bytes_of(Path(store.path))
    with pytest.raises(ValueError, match=message):
        store.add_subject(record)
    assert bytes_of(Path(store.path)) == before


def test_appending_leaves_the_other_subjects_bytes_and_digests_alone(store, make_block, make_subject):
    before, digests = bytes_of(Path(store.path)), [store.subject(n).digest for n in store.subjects]
    rows = store.add_images(make_block(["new-1", "image-3"]))
    store.add_subject(make_subject("subj03", rows))
    after = bytes_of(Path(store.path))
    assert {name: after[name] for name in before} == before
    assert [store.subject(n).digest for n in ("subj01", "subj02")] == digests


@given(order=st.permutations(range(6)))
def test_a_subjects_digest_does_not_depend_on_the_rows_of_its_images(order, make_subject_of):
    ids = [f"image-{k}" for k in range(6)]
    shown = np.array([3, 1, 1, 5])
    shuffled = [ids[k] for k in order]
    rows = np.array([shuffled.index(ids[k]) for k in shown])
    assert make_subject_of(rows).digest(shuffled) == make_subject_of(shown).digest(ids)


@pytest.fixture(scope="module")
def make_subject_of():
    from data.sources import SubjectData

    responses = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    return lambda rows: SubjectData(name="subj01", responses=responses, image=np.asarray(rows, np.int32))


def test_a_subjects_digest_sees_all_of_its_content(make_subject):
    ids = ["a", "b", "c"]
    base = dict(session=np.array([1, 1], np.int16), coordinates=np.zeros((5, 3), np.float32))
    rois = {"v": Rois(labels=np.ones(5, np.int16), names={1: "a"})}
    variants = [
        make_subject("subj01", [0, 1], **base),
        make_subject("subj01", [0, 2], **base),
        make_subject("subj02", [0, 1], **base),
        make_subject("subj01", [0, 1], seed=1, **base),
        make_subject("subj01", [0, 1], scale=2.0, **base),
        make_subject("subj01", [0, 1], unit="z", **base),
        make_subject("subj01", [0, 1], rois=rois, **base),
        make_subject("subj01", [0, 1], **(base | {"session": np.array([1, 2], np.int16)})),
        make_subject("subj01", [0, 1], **(base | {"coordinates": np.ones((5, 3), np.float32)})),
    ]
    assert len({variant.digest(ids) for variant in variants}) == len(variants)

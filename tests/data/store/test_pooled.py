"""The pooled store: what goes in comes out, writes are whole or not at all, and appending touches nothing else."""

import contextlib
import hashlib
import itertools
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.storage import LocalStore

import data.store.zarr_arrays
from data.schema import check_name, pixel_identity
from data.sources import ImageBlock, SessionSource, SubjectSource
from data.store import PooledStore
from data.store.validate import validate
from data.voxels import Rois, Surface, Volume, VoxelTable


def bytes_of(path: Path) -> dict[str, str]:
    files = (f for f in path.rglob("*") if f.is_file())
    return {str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def token_batches(n: int, *, depth: int = 2, patch: int = 4, width: int = 3, size: int = 16, seed: int = 0):
    rng = np.random.default_rng(seed)
    cls = rng.normal(size=(n, depth, width)).astype(np.float16)
    patches = rng.normal(size=(n, depth, patch, width)).astype(np.float16)
    batches = ({"cls": cls[k : k + size], "patch": patches[k : k + size]} for k in range(0, n, size))
    return cls, patches, batches


class Stop(Exception):
    pass


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


@pytest.fixture
def dying_after(monkeypatch):
    """Make the n-th write of a file fail, as a kill between two writes would."""

    @contextlib.contextmanager
    def after(n: int):
        left = itertools.count(n, -1)

        def dying(write):
            async def write_or_die(self, key, value):
                if next(left) <= 0:
                    raise Stop
                await write(self, key, value)

            return write_or_die

        with monkeypatch.context() as patch:
            for name in ("set", "set_if_not_exists"):
                patch.setattr(LocalStore, name, dying(getattr(LocalStore, name)))
            yield

    return after


def stops_of(dying_after, write) -> Iterator[int]:
    """Interrupt `write` at each of its writes in turn; the last time it gets through."""
    for n in itertools.count():
        with dying_after(n):
            try:
                write()
            except Stop:
                yield n
            else:
                return


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


def test_a_lost_shard_is_an_error_and_never_zeros(tmp_path, make_source):
    """Zarr gives zeros where a file is missing, as after a copy that was broken off."""
    store = PooledStore.create(tmp_path / "s.zarr", name="s")
    store.write_subject(make_source())
    store.begin_tokens("enc", {"depths": [1]})
    store.write_tokens("enc", "0000", token_batches(6, depth=1)[2])

    def read(path: str) -> None:
        opened = PooledStore.open(path)
        subject = opened.subject("subj09")
        subject.responses(), subject.image, subject.trial_column("run"), opened.image_ids(), opened.image_roles()
        list(opened.pixels())
        opened.picture_digests()
        opened.tokens("enc").read(np.arange(6))

    read(store.path)
    shards = sorted(file for file in Path(store.path).rglob("c/*") if file.is_file()) + sorted(
        file for file in Path(store.path).rglob("c/*/**/*") if file.is_file()
    )
    assert len(shards) >= 10
    for shard in shards:
        content = shard.read_bytes()
        shard.unlink()
        with pytest.raises(ValueError, match=r"lacks 1 of its 1 shards|can't be read"):
            read(store.path)
        shard.write_bytes(content)
    read(store.path)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("parts/0000:provenance", "subj09/parts/0000 lacks the attribute 'provenance'; restore it"),
        (":head_digest", "subj09 lacks the attribute 'head_digest'; restore it"),
        ("parts/0000/responses/0002", "parts/0000/responses/0002 is missing; restore it"),
        ("voxels/index", "subj09/voxels/index is missing; restore it"),
    ],
)
def test_a_lost_attribute_or_array_is_named(tmp_path, make_source, lost, message):
    store = PooledStore.create(tmp_path / "s.zarr", name="s")
    index = np.array([[0, 0, k] for k in range(5)], np.int32)
    place = Volume(shape=(1, 1, 5), affine=np.eye(4), index=index)
    store.write_subject(replace(make_source(), voxels=VoxelTable(n_voxels=5, place=place)))
    path, _, name = lost.partition(":")
    where = tmp_path / "s.zarr" / "subjects" / "subj09" / path
    if name:
        text = json.loads((where / "zarr.json").read_text())
        del text["attributes"][name]
        (where / "zarr.json").write_text(json.dumps(text))
        assert any(name in line for line in validate(store.path))
    else:
        shutil.rmtree(where)
        assert any(path in line for line in validate(store.path))

    def read() -> None:
        subject = PooledStore.open(store.path).subject("subj09")
        subject.responses(), subject.voxels

    with pytest.raises(ValueError, match=message):
        read()


def test_a_lost_image_block_is_an_error_and_never_shifts_the_others(store, make_block):
    store.add_images(make_block(["more-1", "more-2"]))
    (Path(store.path) / "images" / "0000" / "zarr.json").unlink()
    with pytest.raises(ValueError, match="image block 0000 is missing, though 0001 is there; restore it"):
        PooledStore.open(store.path).image_ids()


def test_what_a_picture_looks_like_is_kept_by_digest(tmp_path, make_source):
    store = PooledStore.create(tmp_path / "s.zarr", name="s")
    store.add_images(ImageBlock(ids=["without"], roles=[""]))
    store.write_subject(make_source())
    pixels = np.concatenate([found for _, _, found in store.pixels(block="0001")])
    assert store.picture_digests() == {k + 1: pixel_identity(picture) for k, picture in enumerate(pixels)}


def test_a_block_that_another_writer_took_is_not_committed(make_source, request):
    """Where there are no file locks: the last look before the commit."""
    url = f"memory://{request.node.name}/s.zarr"
    store, other = PooledStore.create(url, name="s"), make_source(name="subj08")
    source = make_source()

    def read_while_another_writes():
        other_images = ImageBlock(ids=["x", "y"], roles=["", ""], pixels=np.zeros((2, 8, 8, 3), np.uint8)).source()
        columns = {"image": np.zeros(4, np.int32), "run": np.ones(4, np.int16)}
        sessions = (replace(other.sessions[0], columns=columns),)
        PooledStore.open(url, writable=True).write_subject(replace(other, images=other_images, sessions=sessions))
        return source.sessions[0].read()

    first = replace(source.sessions[0], read=read_while_another_writes)
    with pytest.raises(ValueError, match="another process added images to the store meanwhile; run the import again"):
        store.write_subject(replace(source, sessions=(first, *source.sessions[1:])))
    assert store.subjects == ["subj08"]
    store.write_subject(source)
    assert [store.image_ids()[row] for row in store.subject("subj09").image[:2]] == ["pic-1", "pic-2"]
    assert store.image_ids()[:2] == ["x", "y"]


def test_tokens_that_are_complete_are_left_alone(store):
    store.begin_tokens("enc", {"depths": [1]})
    cls, _, batches = token_batches(60)
    store.write_tokens("enc", "0000", batches)
    store.write_tokens("enc", "0000", (pytest.fail("asked for") for _ in range(1)))
    np.testing.assert_array_equal(store.tokens("enc").read(np.arange(60))[0], cls)


def test_responses_of_another_kind_are_not_appended(store, make_source):
    store.write_subject(replace(make_source((1, 2)), measure="b3"))
    with pytest.raises(ValueError, match="with other responses: b2 and b3; import it into another store"):
        store.write_subject(replace(make_source((1, 2, 3)), measure="b2"))


# -- sessions ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_source():
    """A subject of three sessions of four trials with pictures, as an importer hands it over."""

    def make(sessions: Sequence[int] = (1, 2, 3), *, name: str = "subj09", n_voxels: int = 5) -> SubjectSource:
        def of(number: int) -> SessionSource:
            rng = np.random.default_rng(number)
            responses = rng.integers(-999, 999, (4, n_voxels), dtype=np.int16)
            image = (np.arange(4, dtype=np.int32) + number) % 6
            columns = {"image": image, "run": np.ones(4, np.int16)}
            return SessionSource(session=number, columns=columns, read=lambda: iter([responses[:1], responses[1:]]))

        pixels = np.random.default_rng(9).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
        return SubjectSource(
            name=name,
            dtype=np.dtype(np.int16),
            scale=1 / 300,
            voxels=VoxelTable(n_voxels=n_voxels),
            images=ImageBlock(ids=[f"pic-{k}" for k in range(6)], roles=["train"] * 6, pixels=pixels).source(),
            sessions=tuple(of(number) for number in sessions),
        )

    return make


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


# -- images ------------------------------------------------------------------------------------------------------------


def test_an_image_of_two_recordings_is_one_image(store, make_block):
    rows = store.add_images(make_block(["image-5", "new", "image-2"]))
    np.testing.assert_array_equal(rows, [5, 60, 2])
    np.testing.assert_array_equal(store.add_images(make_block(["new"])), [60])
    assert store.n_images == len(store.image_ids()) == 61


def test_two_roles_for_one_image_are_refused_before_anything_is_written(store, make_block):
    before = bytes_of(Path(store.path))
    with pytest.raises(ValueError, match=r"'image-1' is in .* with role '', not 'test'"):
        store.add_images(make_block(["new", "image-1"], ["", "test"]))
    assert bytes_of(Path(store.path)) == before


@pytest.mark.parametrize(
    ("ids", "roles", "message"),
    [
        ([], [], "at least one image"),
        (["a", "b", "a"], ["", "", ""], "'a' occurs 2 times"),
        (["a", ""], ["", ""], "printable text"),
        (["a\n"], [""], "printable text"),
        (["a"], ["", ""], "got 2 roles"),
        (["a"], ["holdout"], "role 'holdout' is unknown"),
    ],
)
def test_a_contradictory_block_is_refused(store, ids, roles, message):
    pixels = np.zeros((len(ids), 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=message):
        store.add_images(ImageBlock(ids=ids, roles=roles, pixels=pixels))


def test_an_interrupted_image_block_is_invisible_and_can_be_written_again(store, make_block, dying_after):
    for n, _ in enumerate(stops_of(dying_after, lambda: store.add_images(make_block(["x", "y"])))):
        assert PooledStore.open(store.path).n_images == 60, n
    np.testing.assert_array_equal(store.add_images(make_block(["y", "image-0", "x"])), [61, 0, 60])


@given(name=st.text(min_size=1, max_size=8))
def test_a_name_that_passes_is_safe_as_a_path(name):
    try:
        check_name(name, "thing")
    except ValueError:
        return
    assert name == Path(name).name
    assert name not in (".", "..")
    assert name.isascii()


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_tokens_are_read_by_row_across_blocks_in_any_order(store, make_block):
    store.add_images(make_block([f"more-{k}" for k in range(30)]))
    store.begin_tokens("enc", {"depths": [1, 3]})
    first, second = token_batches(60), token_batches(30, seed=1)
    store.write_tokens("enc", "0000", first[2])
    store.write_tokens("enc", "0001", second[2])
    cls, patch = (np.concatenate([a, b]) for a, b in zip(first[:2], second[:2], strict=True))
    reader = PooledStore.open(store.path).tokens("enc")
    assert (reader.shape, reader.depths) == ((2, 4, 3), (1, 3))
    rows = np.array([89, 0, 61, 5, 5, 60, 59, 0])
    got = reader.read(rows)
    np.testing.assert_array_equal(got[0], cls[rows])
    np.testing.assert_array_equal(got[1], patch[rows])


@given(rows=st.lists(st.integers(0, 99), min_size=1))
def test_scattered_rows_equal_the_same_rows_of_the_whole(rows, many_tokens):
    reader, cls, patch = many_tokens
    got = reader.read(np.array(rows))
    np.testing.assert_array_equal(got[0], cls[rows])
    np.testing.assert_array_equal(got[1], patch[rows])


@pytest.fixture(scope="module")
def many_tokens():
    """A hundred images in chunks of a few rows and shards of a few chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.store.zarr_arrays._CHUNK_BYTES, "tokens", 200)
        patch.setattr(data.store.zarr_arrays, "_SHARD_BYTES", 1000)
        store = PooledStore.create("memory://many-tokens.zarr", name="many")
        store.add_images(ImageBlock(ids=[f"i{k}" for k in range(100)], roles=[""] * 100))
        store.begin_tokens("enc", {"depths": [1, 2]})
        cls, patches, batches = token_batches(100, size=7)
        store.write_tokens("enc", "0000", batches)
    return store.tokens("enc"), cls, patches


def test_interrupted_tokens_are_invisible_and_can_be_written_again(store):
    store.begin_tokens("enc", {"depths": [1]})

    def dying():
        yield next(token_batches(60, seed=9)[2])
        raise Stop

    with pytest.raises(Stop):
        store.write_tokens("enc", "0000", dying())
    assert store.missing_tokens("enc") == ["0000"]
    with pytest.raises(ValueError, match="lacks 'enc' tokens of image block 0000"):
        PooledStore.open(store.path).tokens("enc")
    cls, _, batches = token_batches(60)
    store.write_tokens("enc", "0000", batches)
    np.testing.assert_array_equal(store.tokens("enc").read(np.arange(60))[0], cls)


def test_an_encoder_whose_beginning_was_interrupted_is_not_there(store):
    zarr.open_group(store.path, mode="r+").create_group("features/enc")
    assert store.encoders == []
    store.begin_tokens("enc", {"depths": [1]})
    assert store.encoders == ["enc"]


def test_another_encoder_under_the_same_name_is_refused(store):
    store.begin_tokens("enc", {"depths": [1]})
    store.begin_tokens("enc", {"depths": [1]})
    with pytest.raises(ValueError, match="another encoder or other depths; pass --name"):
        store.begin_tokens("enc", {"depths": [2]})


def test_absent_tokens_are_told_what_is_there(store):
    store.begin_tokens("enc", {"depths": [1]})
    with pytest.raises(ValueError, match=r"no tokens of 'other' \(it has: enc\)"):
        store.tokens("other")


def test_a_models_digest_is_made_of_its_encoder_and_its_subjects_only(store, make_subject):
    store.begin_tokens("enc", {"depths": [1]})
    store.write_tokens("enc", "0000", token_batches(60)[2])
    before = store.digest(["subj01"], "enc")
    store.add_subject(make_subject("subj03", [0]))
    assert store.digest(["subj01"], "enc") == before
    assert store.digest(["subj01", "subj03"], "enc") != before

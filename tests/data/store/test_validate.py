"""A valid store has no findings; damage of every kind is named, down to the file and rows; nothing is a traceback."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from data.sources import ImageBlock, ImageSource, SessionSource, SubjectSource
from data.store import PooledStore
from data.store.validate import validate
from data.voxels import Rois, Volume, VoxelTable

N_VOXELS = 6
PART = "subjects/subj01/parts/0000"


def source(name: str = "subj01", *, sessions: int = 2, ids: list[str] | None = None, seed: int = 0) -> SubjectSource:
    """A subject with a place, labels, a reliability map, and pictures some of which are black."""
    ids = ids or [f"{name}-{k}" for k in range(8)]
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (len(ids), 6, 5, 3), np.uint8)
    pictures[:2, 1:] = 0
    index = np.column_stack([np.arange(N_VOXELS), np.ones(N_VOXELS), np.zeros(N_VOXELS)]).astype(np.int32)
    responses = rng.integers(-300, 300, (sessions, 12, N_VOXELS)).astype(np.int16)
    responses[0] = 0

    def session(number: int) -> SessionSource:
        columns = {
            "image": np.arange(12, dtype=np.int32) % len(ids),
            "repeat": (np.arange(12) // len(ids)).astype(np.int8),
        }
        return SessionSource(session=number, columns=columns, read=lambda: iter([responses[number - 1]]))

    return SubjectSource(
        name=name,
        dtype=np.dtype(np.int16),
        voxels=VoxelTable(
            n_voxels=N_VOXELS,
            coordinates=index.astype(np.float32),
            place=Volume(shape=(9, 9, 9), affine=np.eye(4), index=index),
            rois={"streams": Rois(labels=np.array([0, 1, 1, 5, 5, 0], np.int16), names={1: "early", 5: "ventral"})},
            reliability={"ncsnr": np.linspace(0, 1, N_VOXELS, dtype=np.float32)},
        ),
        images=ImageSource(ids=ids, roles=["test", *[""] * (len(ids) - 1)], shape=(6, 5), read=pictures.__getitem__),
        sessions=tuple(session(n + 1) for n in range(sessions)),
        scale=1 / 300,
    )


def fill(path: str | Path) -> PooledStore:
    """A store of two subjects, one of them in two parts, with the tokens of two encoders."""
    store = PooledStore.create(path, name="small")
    store.write_subject(source(sessions=1))
    store.write_subject(source(sessions=2))
    store.write_subject(source("subj02", seed=1))
    rng = np.random.default_rng(2)
    for encoder, token in (("one", "cls"), ("two", "pooled")):
        store.begin_tokens(encoder, {"name": encoder, "depths": [2, 4]})
        for block in store.missing_tokens(encoder):
            tokens = {token: rng.normal(size=(8, 2, 3)), "patch": rng.normal(size=(8, 2, 4, 3))}
            tokens |= {"register": rng.normal(size=(8, 2, 1, 3))} if token == "cls" else {}
            store.write_tokens(encoder, block, [{k: v.astype(np.float16) for k, v in tokens.items()}])
    return store


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("valid") / "small.zarr"
    fill(path)
    return path


@pytest.fixture
def path(pristine, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "small.zarr"))


def edit(path: Path, node: str, change) -> None:
    """Change the metadata of a group or array by hand."""
    file = path / node / "zarr.json"
    text = json.loads(file.read_text())
    change(text)
    file.write_text(json.dumps(text))


def attributes(**new):
    return lambda text: text["attributes"].update(new)


def metadata(**new):
    return lambda text: text.update(new)


def overwrite(path: Path, array: str, change) -> None:
    """Write other values into an array, with checksums that fit."""
    opened = zarr.open_group(str(path), mode="r+")[array]
    assert isinstance(opened, zarr.Array)
    opened[...] = change(np.asarray(opened[...]))


def chunk_files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file() and file.name != "zarr.json")


# -- valid -------------------------------------------------------------------------------------------------------------


def test_a_valid_store_has_no_findings_and_no_remarks(pristine):
    remarks, told = [], []
    assert validate(pristine, remark=remarks.append, progress=lambda *at: told.append(at)) == []
    assert validate(pristine, deep=False) == []
    assert remarks == []
    assert told[-1][0] == told[-1][1] > 0
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_store_at_a_url_is_validated_like_one_on_a_disk(request):
    url = f"memory://{request.node.name}/s.zarr"
    store = fill(url)
    assert validate(url) == []
    sub = store._root.store
    from data.store.shards import files_of

    key = next(key for key in files_of(sub) if key.endswith("pixels/c/0/0/0/0"))
    import fsspec

    fsspec.filesystem("memory").rm(f"/{request.node.name}/s.zarr/{key}")
    assert [line.split(":")[0] for line in validate(url)] == [key]


def test_other_stores_of_the_tests_and_the_phantom_are_valid(store, tmp_path):
    from data.phantom import PhantomConfig, write_phantom

    assert validate(store.path) == []
    write_phantom(tmp_path / "p.zarr", PhantomConfig(subjects=2, sessions=1, trials_per_session=40, voxels=24))
    assert validate(tmp_path / "p.zarr") == []


def test_no_store_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="no store at"):
        validate(tmp_path / "absent")
    (tmp_path / "zarr.json").write_text("{broken")
    with pytest.raises(ValueError, match="not a manybrains store"):
        validate(tmp_path)


# -- bytes -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(data=st.data())
def test_any_flipped_byte_of_any_chunk_file_is_found_and_its_array_named(pristine, data):
    file = data.draw(st.sampled_from(chunk_files(pristine)))
    content = file.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    bits = data.draw(st.integers(1, 255))
    file.write_bytes(content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :])
    try:
        found = validate(pristine)
    finally:
        file.write_bytes(content)
    key = str(file.relative_to(pristine))
    assert [line.split(": ")[0] for line in found] == [key], found
    assert "damaged" in found[0] or "cut" in found[0]


@settings(max_examples=40)
@given(data=st.data())
def test_a_shard_cut_short_anywhere_is_found_and_named(pristine, data):
    file = data.draw(st.sampled_from(chunk_files(pristine)))
    content = file.read_bytes()
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    try:
        found = validate(pristine, deep=data.draw(st.booleans()))
    finally:
        file.write_bytes(content)
    assert [line.split(": ")[0] for line in found] == [str(file.relative_to(pristine))], found
    assert "cut" in found[0]


def test_every_missing_shard_is_found_without_reading_a_chunk(path):
    """Also those of black pictures and zero responses, which zarr by itself wouldn't write."""
    for file in chunk_files(path):
        content = file.read_bytes()
        file.unlink()
        found = validate(path, deep=False)
        assert f"{file.relative_to(path)}: rows 0 to " in found[0], file
        assert "are missing (no such file)" in found[0]
        file.write_bytes(content)
    assert validate(path) == []


def test_a_chunk_missing_in_a_shard_is_named_by_number(path):
    """Zarr would silently read zeros: a writer that leaves out empty chunks has left one out."""
    array = zarr.open_group(str(path), mode="r+").create_array(
        "images/0000/role",
        shape=(8,),
        dtype=np.uint8,
        chunks=(2,),
        shards=(8,),
        compressors=zarr.codecs.Crc32cCodec(),
        overwrite=True,
        config={"write_empty_chunks": False},
    )
    array[...] = np.array([2, 2, 2, 2, 0, 0, 2, 2], np.uint8)
    found = validate(path)
    assert found[0].startswith("images/0000/role/c/0: chunk 2 is missing (1 of 4 are)")


def test_a_damaged_chunk_is_named_by_its_rows(tmp_path):
    store = PooledStore.create(tmp_path / "s.zarr", name="s")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 200, 200, 3), np.uint8)  # 8 pictures a chunk, 5 chunks
    store.add_images(ImageBlock(ids=[str(k) for k in range(40)], roles=[""] * 40, pixels=pixels))
    file = tmp_path / "s.zarr/images/0000/pixels/c/0/0/0/0"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    found = validate(store.path)
    assert len(found) == 1
    assert "pixels/c/0/0/0/0: chunk 2 (rows 16 to 23) is damaged: its CRC-32C doesn't fit; restore it" in found[0]
    assert validate(store.path, deep=False) == []


# -- what a store says of itself ---------------------------------------------------------------------------------------

DAMAGE = {
    "name of the store": ("", attributes(name=None), "zarr.json: attribute 'name' must be a str"),
    "shape": (
        f"{PART}/responses/0001",
        metadata(shape=[13, N_VOXELS]),
        "0001: shape (13, 6), which should begin with 12",
    ),
    "more voxels": (f"{PART}/responses/0001", metadata(shape=[12, 7]), "contradict each other"),
    "fewer voxels": (f"{PART}/responses/0001", metadata(shape=[12, 5]), "contradict each other"),
    "fewer rows": (f"{PART}/trials/image", metadata(shape=[4]), "trials/image: shape (4,), which should begin with 12"),
    "many rows": ("images/0000/id", metadata(shape=[10**12, 8]), "more shards are missing"),
    "flat": ("images/0000/pixels", metadata(shape=[8, 6, 15]), "images/0000/pixels"),
    "pixels": ("images/0000/pixels", metadata(data_type="int8"), "images/0000/pixels: dtype int8 instead of uint8"),
    "responses": (f"{PART}/responses/0001", metadata(data_type="uint16"), f"{PART}/responses/0001"),
    "tokens": ("features/one/0000/patch", metadata(data_type="int16"), "patch: dtype int16 instead of float16"),
    "trial column": (f"{PART}/trials/image", metadata(data_type="float32"), "image: dtype float32 instead of int32"),
    "unknown dtype": (f"{PART}/trials/image", metadata(data_type="complex7"), "trials/image/zarr.json: unreadable"),
    "scale": ("subjects/subj01", attributes(scale=1.0), "subjects/subj01: scale, unit, places or labels"),
    "unit": ("subjects/subj01", attributes(unit="z"), "subjects/subj01: scale, unit, places or labels"),
    "affine": (
        "subjects/subj01",
        attributes(place={"kind": "volume", "shape": [9, 9, 9], "affine": (2 * np.eye(4)).tolist()}),
        "subjects/subj01: scale, unit, places or labels",
    ),
    "volume": (
        "subjects/subj01",
        attributes(place={"kind": "volume", "shape": [2, 2, 2], "affine": np.eye(4).tolist()}),
        "subjects/subj01: 6 voxels need an index each within the volume (2, 2, 2)",
    ),
    "head without scale": (
        "subjects/subj01",
        lambda text: text["attributes"].pop("scale"),
        "lacks the attribute 'scale'; restore it",
    ),
    "head digest": ("subjects/subj01", attributes(head_digest="sha256:0"), "subjects/subj01: scale, unit"),
    "session digest": (f"{PART}/responses/0001", attributes(digest="sha256:0"), "0001: the attribute 'digest' differs"),
    "part's digest": (PART, attributes(digests={"0001": "sha256:0"}), "0001: the attribute 'digest' differs"),
    "number of trials": (PART, attributes(n_trials={"0001": 11}), "0001: shape (12, 6), which should begin with 11"),
    "a session twice": (
        "subjects/subj01/parts/0001",
        attributes(n_trials={"0001": 12}, digests={"0001": "sha256:0"}),
        "parts/0001: session 0001 is in subjects/subj01/parts/0000 already",
    ),
    "image block of a part": (PART, attributes(image_block="0007"), "images/0007, are missing or not complete"),
    "ids' digest": ("images/0000", attributes(digest="sha256:0"), "images/0000: the ids and roles are not"),
    "swapped roles": (
        "images/0000",
        attributes(role_names=["", "test", "validation", "train"]),
        "images/0000: the ids and roles are not",
    ),
    "role names": ("images/0000", attributes(role_names=["", "holdout"]), "images/0000: attribute 'role_names'"),
    "few role names": ("images/0000", attributes(role_names=[""]), "images/0000/role: role 3 of row 0 is not among"),
    "picture shape": (
        "images/0000",
        attributes(pixel_shape=[5, 6]),
        "images/0000/pixels: shape (8, 6, 5, 3) instead of",
    ),
    "spec": ("features/one", attributes(spec={"depths": [1, 2]}), "features/one: attribute 'spec' is not what"),
    "depths": ("features/one", attributes(spec={"depths": [1]}), "patch: 2 depths, but the encoder has [1]"),
    "ROI names": (
        "subjects/subj01/rois/streams",
        attributes(names={"1": "early"}),
        "subjects/subj01: label 5 of 'streams' has no name",
    ),
    "renamed ROI": (
        "subjects/subj01/rois/streams",
        attributes(names={"1": "early", "5": "dorsal"}),
        "subjects/subj01: scale, unit, places or labels",
    ),
    "no ROI names": ("subjects/subj01/rois/streams", metadata(attributes={}), "streams: attribute 'names' is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_changed_metadata_is_found(path, kind):
    node, change, message = DAMAGE[kind]
    edit(path, node, change)
    found = validate(path)
    assert any(message in line for line in found), found
    assert all("\n" not in line for line in found)


CONTENT = {
    "an id twice": ("images/0001/id", lambda ids: ids[[0, 0, *range(2, 8)]], "'subj02-0' occurs 2 times"),
    "an id of another block": ("images/0001/id", lambda ids: ids - (ids == ord("2")).astype(np.uint8), "is on rows"),
    "an id that is no text": ("images/0000/id", lambda ids: ids * 0 + 255, "images/0000"),
    "a role": ("images/0000/role", lambda role: role + 3, "images/0000/role: role 6 of row 0 is not among"),
    "image out of range": (
        f"{PART}/trials/image",
        lambda image: image + 9,
        "trials/image: trial 7 shows image 16 of 16",
    ),
    "negative image": (f"{PART}/trials/image", lambda image: image - 1, "trials/image: trial 0 shows image -1 of 16"),
    "another image": (f"{PART}/trials/image", lambda image: image[::-1], "0001: responses or trials are not what"),
    "another repeat": (f"{PART}/trials/repeat", lambda repeat: repeat + 1, "0001: responses or trials are not what"),
    "a response": (f"{PART}/responses/0001", lambda betas: betas + 1, "0001: responses or trials are not what"),
    "a voxel's place": (
        "subjects/subj01/voxels/index",
        lambda index: index + 1,
        "subjects/subj01: scale, unit, places",
    ),
    "a label": ("subjects/subj01/rois/streams", lambda labels: labels[::-1], "subjects/subj01: scale, unit, places"),
    "a label without name": ("subjects/subj01/rois/streams", lambda labels: labels + 1, "of 'streams' has no name"),
}


@pytest.mark.parametrize("kind", CONTENT)
def test_changed_content_with_fitting_checksums_is_found(path, kind):
    array, change, message = CONTENT[kind]
    overwrite(path, array, change)
    found = validate(path)
    assert any(message in line for line in found), found


def arrays_of(pristine: Path) -> list[str]:
    return sorted(str(c.parent.relative_to(pristine)) for c in pristine.rglob("c") if c.is_dir())


def test_every_removed_array_is_found_and_named(pristine, tmp_path):
    arrays = arrays_of(pristine)
    assert len(arrays) > 20
    for array in arrays:
        path = Path(shutil.copytree(pristine, tmp_path / "x.zarr"))
        shutil.rmtree(path / array)
        found = validate(path)
        owner = array.rsplit("/", 2 if "/trials/" in array or "/rois/" in array or "/voxels/" in array else 1)[0]
        assert found, array
        assert any(line.startswith((array, owner)) for line in found), (array, found)
        shutil.rmtree(path)


def test_every_broken_or_missing_metadata_file_is_found_and_named(pristine, tmp_path):
    path = Path(shutil.copytree(pristine, tmp_path / "x.zarr"))
    files = sorted(path.rglob("zarr.json"))
    assert len(files) > 40
    breaks = itertools.cycle([b"{broken", b"", b"[]", b'{"zarr_format": 3, "node_type": "array"}'])
    for file in files:
        if file.parent == path:
            continue
        content = file.read_bytes()
        node = str(file.parent.relative_to(path))
        for damage in (next(breaks), None):
            file.unlink() if damage is None else file.write_bytes(damage)
            found = validate(path, deep=False)
            assert any(line.startswith(node) for line in found), (node, damage, found)
            file.write_bytes(content)
    assert validate(path) == []


def leaves(value, at=()):
    """Every place in a JSON value."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from leaves(item, (*at, key))


JSON = (
    st.none() | st.booleans() | st.integers(-2, 2**40) | st.text(max_size=3) | st.just([]) | st.just({}) | st.just([0])
)


@settings(max_examples=40)
@given(data=st.data())
def test_whatever_is_edited_in_metadata_gives_findings_or_one_error_and_no_traceback(pristine, data):
    file = data.draw(st.sampled_from(sorted(pristine.rglob("zarr.json"))))
    content = file.read_bytes()
    text = json.loads(content)
    *way, last = data.draw(st.sampled_from([at for at in leaves(text) if at]))
    node = text
    for key in way:
        node = node[key]
    node[last] = data.draw(JSON)
    file.write_text(json.dumps(text))
    try:
        found = validate(pristine)
    except ValueError:
        assert file.parent == pristine  # no store any more
    else:
        assert all(len(line.splitlines()) == 1 for line in found), found
    finally:
        file.write_bytes(content)


def test_a_lost_block_of_images_is_found_though_its_rows_close_up(path):
    shutil.rmtree(path / "images/0000")
    found = validate(path)
    assert any(line.startswith("images/0000: missing or not complete, though images/0001 is there") for line in found)


def test_tokens_of_unequal_blocks_are_found(path):
    array = zarr.open_group(str(path), mode="r+").create_array(
        "features/one/0001/register", shape=(8, 2, 2, 3), dtype=np.float16, chunks=(8, 2, 2, 3), overwrite=True
    )
    array[...] = 1
    found = validate(path)
    assert any(line.startswith("features/one: tokens ") for line in found), found


def test_one_picture_under_two_identities_in_two_parts_is_found(tmp_path, make_block):
    store = PooledStore.create(tmp_path / "s.zarr", name="s")
    block = make_block(["a", "b", "c"], ["train", "test", "train"])
    block.pixels[1] = block.pixels[0]
    store.add_images(block)
    assert len(validate(store.path)) == 1
    assert "images 'a' (train) and 'b' (test) are one picture" in validate(store.path)[0]


# -- what does no harm -------------------------------------------------------------------------------------------------


def test_remains_and_strangers_are_remarked_upon_and_do_no_harm(path):
    root = zarr.open_group(str(path), mode="r+")
    root.create_group("subjects/subj03")
    root.create_group("subjects/subj02/parts/0001/responses")
    root.create_group("features/one/0002")
    root.create_group("images/0002/id")
    root.create_group("notes")
    (path / "subjects" / "zarr.0123.partial").write_bytes(b"x")
    (path / "images/0000/pixels/c/0/0/0/0.0123.partial").write_bytes(b"x")
    (path / "readme.txt").write_text("mine")
    root.create_array("subjects/subj01/extra", shape=(3,), dtype="i4")[...] = 1
    remarks = []
    assert validate(path, remark=remarks.append) == []
    named = {line.split(": ")[0] for line in remarks}
    assert named == {
        "subjects/subj03",
        "subjects/subj02/parts/0001",
        "features/one/0002",
        "images/0002",
        "notes",
        "subjects/zarr.0123.partial",
        "images/0000/pixels/c/0/0/0/0.0123.partial",
        "readme.txt",
        "subjects/subj01/extra",
    }
    store = PooledStore.open(path)  # and none of it disturbs a reader
    assert (store.subjects, store.n_images, store.encoders) == (["subj01", "subj02"], 16, ["one", "two"])

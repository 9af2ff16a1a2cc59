"""What is lost or was taken by another is an error that names it, and never zeros."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.schema import pixel_identity
from data.sources import ImageBlock
from data.store import PooledStore
from data.store.validate import validate
from data.voxels import Volume, VoxelTable
from tests.store_writes import token_batches


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

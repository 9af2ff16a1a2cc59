"""Tokens by image row, written whole or not at all, never mixed with another encoder's."""

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

import data.store.zarr_arrays
from data.sources import ImageBlock
from data.store import PooledStore
from tests.store_writes import Stop, token_batches


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

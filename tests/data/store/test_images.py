"""Images by identity, in blocks that count whole or not at all."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.schema import check_name
from data.sources import ImageBlock
from data.store import PooledStore
from tests.store_writes import bytes_of, stops_of


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

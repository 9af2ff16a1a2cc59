"""Test images that a backbone has learned from, in another store, are found by their pictures or names."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data.splits import split_of
from data.store import PooledStore
from foundation import seen_images
from foundation.seen_images import check_images


def test_test_images_that_a_backbone_of_another_store_has_seen_are_refused(tiny_store, tmp_path, monkeypatch):
    store = PooledStore.open(tiny_store)
    other = Path(shutil.copytree(tiny_store, tmp_path / "other.zarr"))
    backbone = {"store": str(other), "subject_digests": dict.fromkeys(("subj01", "subj02"), "")}
    assert check_images(store, "subj05", backbone, label="b/1") == "no test image among the backbone's"
    assert check_images(store, "subj05", backbone | {"store": str(store.path)}, label="b/1") == "one split"
    gone = backbone | {"store": str(tmp_path / "gone.zarr")}
    assert check_images(store, "subj05", gone, label="b/1").startswith("not checked: ")

    trained_on_all = SimpleNamespace(select=lambda images, part: np.zeros(len(images), bool))
    splits = {str(other): trained_on_all}
    monkeypatch.setattr(seen_images, "split_of", lambda of: splits.get(str(of.path)) or split_of(of))
    with pytest.raises(ValueError, match=r"backbone b/1 was trained on \d+ test images of .*, such as .*; take one"):
        check_images(store, "subj05", backbone, label="b/1")

"""ROI families come from labels, the retinotopic ones first."""

import numpy as np
import pytest

from data.rois import families
from data.store import PooledStore
from data.voxels import Rois

RETINOTOPIC = {1: "V1v", 2: "V1d", 3: "V2v", 4: "V2d", 5: "V3v", 6: "V3d", 7: "hV4"}
STREAMS = {1: "early", 2: "midventral", 3: "midlateral", 4: "midparietal", 5: "ventral", 6: "lateral", 7: "parietal"}


@pytest.fixture
def with_rois(make_block, make_subject, request):
    def make(**labels):
        names = {"prf-visualrois": RETINOTOPIC, "streams": STREAMS}
        rois = {k: Rois(labels=np.array(v, np.int16), names=names.get(k, {1: "x"})) for k, v in labels.items()}
        store = PooledStore.create(f"memory://{request.node.name}", name="x")
        store.add_images(make_block(["a"]))
        n_voxels = len(next(iter(labels.values()))) if labels else 3
        store.add_subject(make_subject("subj01", [0], n_voxels=n_voxels, rois=rois))
        return families(store.subject(1))

    return make


def test_retinotopic_labels_have_the_first_word_and_families_are_disjoint(with_rois):
    found = with_rois(**{"prf-visualrois": [1, 6, 7, 0, 0, 0, 1, 0], "streams": [5, 2, 6, 2, 5, 7, 0, 0]})
    assert list(found) == ["early", "mid", "higher"]
    np.testing.assert_array_equal(np.flatnonzero(found["early"]), [0, 1, 6])
    np.testing.assert_array_equal(np.flatnonzero(found["mid"]), [2, 3])
    np.testing.assert_array_equal(np.flatnonzero(found["higher"]), [4, 5])


def test_one_table_alone_gives_the_families_that_it_knows(with_rois):
    assert set(with_rois(**{"prf-visualrois": [1, 7, 0]})) == {"early", "mid"}


def test_streams_alone_give_mid_and_higher(with_rois):
    found = with_rois(streams=[1, 3, 6, 0])
    assert {name: list(np.flatnonzero(mask)) for name, mask in found.items()} == {"mid": [1], "higher": [2]}


def test_without_labels_there_are_no_families(with_rois):
    assert with_rois() == {}


def test_other_labels_make_no_family(with_rois):
    assert with_rois(faces=[1, 1, 0]) == {}

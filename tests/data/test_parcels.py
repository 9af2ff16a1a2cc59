"""Parcels: every voxel in one, about the size asked for, from positions alone."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.parcels import compact, parcels, sequential


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


def test_positions_decide_where_they_are_known():
    coordinates = np.random.default_rng(2).normal(size=(90, 3)).astype(np.float32)
    np.testing.assert_array_equal(parcels(90, coordinates, size=30), compact(coordinates, size=30))
    np.testing.assert_array_equal(parcels(90, None, size=30), sequential(90, size=30))
    assert set(parcels(5, coordinates[:5], size=30)) == {0}

"""Shares of several predictions: non-negative least squares per voxel, leaning on all voxels where images are few."""

import numpy as np
import pytest
from scipy.optimize import nnls

from foundation.closed_form import shares as module
from foundation.closed_form.shares import nonnegative, shares_of


def problem(
    n_members: int, *, alike: float = 0.0, n_images: int = 30, n_voxels: int = 150
) -> tuple[list[np.ndarray], np.ndarray]:
    """Members with something in common, and responses that are mixtures of them, of both signs, and noise."""
    rng = np.random.default_rng(0)
    common = rng.standard_normal((n_images, n_voxels))
    members = [(alike * common + rng.standard_normal(common.shape)).astype(np.float32) for _ in range(n_members)]
    mixed = sum(rng.normal(0.2, 1, n_voxels) * member for member in members)
    return members, (mixed + rng.standard_normal(common.shape)).astype(np.float32)


def nnls_per_voxel(members: list[np.ndarray], responses: np.ndarray) -> np.ndarray:
    columns = range(responses.shape[1])
    found = [nnls(np.column_stack([m[:, v] for m in members]).astype(float), responses[:, v])[0] for v in columns]
    return np.stack(found, axis=1)


@pytest.mark.parametrize("alike", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("n_members", [1, 2, 3, 4])
def test_the_search_over_supports_is_non_negative_least_squares(n_members, alike):
    members, responses = problem(n_members, alike=alike)
    m = np.stack(members).astype(np.float64)
    found = nonnegative(np.einsum("aiv,biv->vab", m, m), np.einsum("aiv,iv->va", m, responses))
    np.testing.assert_allclose(found.T, nnls_per_voxel(members, responses), atol=1e-6)
    assert len({tuple(row) for row in (found > 0).tolist()}) == 2**n_members  # every support is the best of some voxel


def test_with_many_images_a_voxels_shares_are_its_own():
    members, responses = problem(3, n_images=20_000, n_voxels=8)
    np.testing.assert_allclose(shares_of(members, responses), nnls_per_voxel(members, responses), atol=0.02)


def test_with_few_images_a_voxels_shares_are_those_of_all_voxels():
    members, responses = problem(2, n_images=3, n_voxels=400)
    joined = [member.reshape(-1, 1) for member in members]
    of_all = nnls_per_voxel(joined, responses.reshape(-1, 1))
    found = shares_of(members, responses)
    own = nnls_per_voxel(members, responses)
    assert np.abs(found - of_all).mean() < 0.1 * np.abs(own - of_all).mean()


def test_the_prior_is_worth_its_images_of_an_average_voxel_and_member(monkeypatch):
    """Shares minimise the sum of squares that is written, here as least squares with a row more for each member."""
    monkeypatch.setattr(module, "PRIOR_IMAGES", 12)
    members, responses = problem(2)
    m = np.stack(members).astype(np.float64)
    of_all = nnls_per_voxel([member.reshape(-1, 1) for member in members], responses.reshape(-1, 1))
    pull = np.sqrt(12 * np.square(m).mean())
    padded = [np.vstack([member, np.zeros((2, 150))]) for member in m]
    for number, member in enumerate(padded):
        member[30 + number] = pull
    expected = nnls_per_voxel(padded, np.vstack([responses, np.tile(pull * of_all, 150)]))
    np.testing.assert_allclose(shares_of(members, responses), expected, atol=1e-4)


def test_a_weight_is_a_number_of_repeats(monkeypatch):
    monkeypatch.setattr(module, "PRIOR_IMAGES", 0)
    members, responses = problem(2)
    times = np.arange(30) % 3
    repeated = shares_of([m.repeat(times, axis=0) for m in members], responses.repeat(times, axis=0))
    np.testing.assert_allclose(shares_of(members, responses, weight=times.astype(float)), repeated, atol=1e-5)
    assert np.abs(shares_of(members, responses) - repeated).max() > 0.1


def test_weights_that_are_all_the_same_change_nothing():
    members, responses = problem(3)
    np.testing.assert_allclose(
        shares_of(members, responses, weight=np.full(30, 4.0)), shares_of(members, responses), atol=1e-6
    )


def test_members_that_say_nothing_or_the_opposite_have_no_share():
    (member,), noise = problem(1)
    silent = np.zeros_like(member)
    assert (shares_of([silent, silent], noise) == 0).all()
    assert (shares_of([member, silent], -member) == 0).all()
    found = shares_of([silent, member], member)
    assert (found[0] == 0).all()
    np.testing.assert_allclose(found[1], 1, atol=1e-5)


def test_a_member_twice_shares_what_it_would_have_alone():
    (member,), noise = problem(1, n_images=5000, n_voxels=6)
    responses = 0.8 * member + 0.3 * noise / noise.std()
    once, twice = shares_of([member], responses)[0], shares_of([member, member], responses)
    assert np.isfinite(twice).all()
    assert (twice >= 0).all()
    np.testing.assert_allclose(twice.sum(0), once, atol=0.02)

"""Variance partitioning finds a partition that was planted."""

import numpy as np
import pytest

from foundation.evaluation.partition import PARTS, SETS, explained, kernels_of, partition, parts_of, predictions
from foundation.evaluation.score import Measured

N_TRAIN, N_NEW, N_VOXEL = 400, 300, 60


@pytest.fixture(scope="module")
def planted() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Half of either set's features are common: .3 of the variance; .2 are either's own."""
    rng = np.random.default_rng(0)
    common, own_cls, own_patch = (rng.standard_normal((N_TRAIN + N_NEW, 8)) for _ in range(3))
    weights = [rng.standard_normal((8, N_VOXEL)) for _ in range(3)]
    weights = [w / np.linalg.norm(w, axis=0) for w in weights]
    scale = np.sqrt([0.3, 0.2, 0.2, 0.3])
    noise = rng.standard_normal((N_TRAIN + N_NEW, N_VOXEL))
    responses = sum(s * x @ w for s, x, w in zip(scale, (common, own_cls, own_patch), weights, strict=False))
    responses = (responses + scale[3] * noise).astype(np.float32)
    cls, patch = (np.hstack([common, own]).astype(np.float32) for own in (own_cls, own_patch))
    found = predictions(*(kernels_of([x], n_train=N_TRAIN) for x in (cls, patch)), responses[:N_TRAIN])
    return found, responses[N_TRAIN:]


def measured_as(responses: np.ndarray) -> Measured:
    families = {"early": np.arange(N_VOXEL) < 20, "higher": np.arange(N_VOXEL) >= 40}
    return Measured(
        subject="subj01",
        trials=responses,
        image=np.arange(len(responses)),
        ceiling=None,
        ceiling_reason="not repeated",
        families=families,
    )


def test_the_planted_partition_is_found(planted):
    predicted, responses = planted
    found = partition(predicted, measured_as(responses), n_bootstraps=200, rng=np.random.default_rng(0))
    rows = {(row.roi, row.part): row for row in found.rows}
    truth = {"unique cls": 0.2, "unique patch": 0.2, "shared": 0.3, "both": 0.7, "preference": 0.0}
    for part, value in truth.items():
        row = rows["all", part]
        assert row.value == pytest.approx(value, abs=0.03)
        assert row.low < row.value < row.high
    assert rows["early", "both"].n_voxels == 20
    assert found.preference.shape == (N_VOXEL,)


def test_what_only_patches_hold_is_preferred_to_patches(planted):
    predicted, responses = planted
    nothing = {**predicted, "cls": np.zeros_like(predicted["cls"]), "both": predicted["patch"]}
    found = partition(nothing, measured_as(responses), n_bootstraps=0, rng=np.random.default_rng(0))
    np.testing.assert_allclose(found.voxelwise["unique patch"] - found.voxelwise["unique cls"], found.preference)
    assert (found.preference > 0.2).all()
    np.testing.assert_allclose(found.voxelwise["unique cls"], 0)
    assert found.rows[0].low is None


def test_parts_add_up_to_all_that_is_explained(planted):
    predicted, responses = planted
    counts = np.ones((1, N_NEW))
    parts = parts_of({name: explained(predicted[name], responses, counts) for name in SETS})
    assert tuple(parts) == PARTS
    np.testing.assert_allclose(parts["unique cls"] + parts["unique patch"] + parts["shared"], parts["both"])


def test_a_resample_is_the_repeated_rows(planted):
    predicted, responses = planted
    counts = np.random.default_rng(1).multinomial(N_NEW, np.full(N_NEW, 1 / N_NEW), size=2).astype(np.float64)
    for row, count in zip(explained(predicted["both"], responses, counts), counts.astype(int), strict=True):
        y, x = (np.repeat(values, count, axis=0).astype(np.float64) for values in (responses, predicted["both"]))
        np.testing.assert_allclose(row, 1 - ((y - x) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0), rtol=1e-6)


def test_a_voxel_that_never_varies_is_undefined_and_has_no_part_in_means(planted):
    predicted, responses = planted
    still = responses.copy()
    still[:, 0] = 1
    found = partition(predicted, measured_as(still), n_bootstraps=5, rng=np.random.default_rng(0))
    assert np.isnan(found.preference[0])
    assert np.isfinite(found.preference[1:]).all()
    assert all(np.isfinite(row.value) for row in found.rows)

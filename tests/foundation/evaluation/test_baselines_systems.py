"""The baselines by name, over a store whose voxels' tuning is known."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from himalaya.kernel_ridge import solve_multiple_kernel_ridge_random_search

from data.preprocess import Samples
from data.sources import ImageBlock
from data.store import PooledStore, TokenReader
from foundation.closed_form.kernel_ridge import best_of, standardised_pair
from foundation.closed_form.token_features import cells, patches_under, ridge_features
from foundation.evaluation.baselines import BASELINES, predict, predict_out_of_fold
from foundation.evaluation.baselines.banded import _mixed, bands, mixtures
from foundation.evaluation.baselines.ridge import image_folds
from foundation.evaluation.baselines.spatial import pyramid_weights, spatial
from foundation.evaluation.metrics import voxelwise_r
from foundation.model.spatial import PYRAMID

N_TRAIN, N_NEW = 300, 60
ROWS = np.arange(N_TRAIN, N_TRAIN + N_NEW)
DEPTH, SIDE, WIDTH = 2, 8, 4


def reader(path, *, n_patches: int = SIDE**2, n_images: int = N_TRAIN + N_NEW) -> TokenReader:
    rng = np.random.default_rng(0)
    store = PooledStore.create(path, name="random")
    store.add_images(ImageBlock(ids=[f"image{i:03d}" for i in range(n_images)], roles=["train"] * n_images))
    store.begin_tokens("noise", {"kind": "noise", "depths": list(range(1, DEPTH + 1)), "seed": 0})
    cls = rng.standard_normal((n_images, DEPTH, WIDTH)).astype(np.float16)
    patch = rng.standard_normal((n_images, DEPTH, n_patches, WIDTH)).astype(np.float16)
    store.write_tokens("noise", "0000", [{"cls": cls, "patch": patch}])
    return store.tokens("noise")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> TokenReader:
    return reader(tmp_path_factory.mktemp("systems") / "store.zarr")


def planted(tokens: TokenReader, signal: Callable, *, noise: float = 0.3) -> tuple[Samples, np.ndarray]:
    """Training samples of voxels that respond with `signal(cls, patch)`, of variance 1, and their truth for `ROWS`."""
    cls, patch = (x.astype(np.float64) for x in tokens.read(np.arange(N_TRAIN + N_NEW)))
    responses = signal(cls, patch)
    responses = responses / responses.std(0)
    rng = np.random.default_rng(1)
    noisy = responses[:N_TRAIN] + noise * rng.standard_normal(responses[:N_TRAIN].shape)
    train = Samples(
        subject="subj01",
        image=np.arange(N_TRAIN),
        responses=noisy.astype(np.float32),
        n_repeats=np.ones(N_TRAIN, np.float32),
    )
    return train, responses[N_TRAIN:]


def through(field: np.ndarray, patch: np.ndarray, *, seed: int, n_voxels: int = 3) -> np.ndarray:
    tuning = np.random.default_rng(seed).standard_normal((DEPTH * WIDTH, n_voxels))
    return np.einsum("idpw,p->idw", patch, field).reshape(len(patch), -1) @ tuning


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_finds_the_tuning_that_it_can_express(tokens, name):
    train, truth = planted(tokens, lambda cls, patch: cls[:, -1] @ np.random.default_rng(2).standard_normal((WIDTH, 3)))
    if name in ("spatial", "roi-transformer"):  # which know nothing of global tokens
        train, truth = planted(tokens, lambda cls, patch: through(np.full(SIDE**2, SIDE**-2), patch, seed=2))
    found = predict(name, tokens, train, ROWS, seed=0)
    assert found.dtype == np.float32
    assert voxelwise_r(found, truth).min() > 0.9


def test_a_band_of_its_own_penalty_beats_one_penalty_for_all(tokens):
    train, truth = planted(
        tokens, lambda cls, patch: cls[:, -1] @ np.random.default_rng(2).standard_normal((WIDTH, 9)), noise=1
    )
    r = {name: voxelwise_r(predict(name, tokens, train, ROWS, seed=0), truth) for name in ("ridge", "banded-ridge")}
    assert (r["banded-ridge"] > r["ridge"]).all()


def test_a_receptive_field_is_found_at_its_place_and_beats_ridge(tokens):
    pyramid = ((0.06, 8), (0.12, 8))
    fields, planted_at = pyramid_weights(SIDE, pyramid=pyramid), [9, 50, 64 + 30]
    train, truth = planted(
        tokens, lambda cls, patch: np.hstack([through(fields[k], patch, seed=k, n_voxels=2) for k in planted_at])
    )
    best = spatial(tokens, train.image, train.responses, ROWS, pyramid=pyramid)
    np.testing.assert_array_equal(best.candidate, np.repeat(planted_at, 2))
    assert (
        voxelwise_r(best.prediction, truth) > voxelwise_r(predict("ridge", tokens, train, ROWS, seed=0), truth)
    ).all()


def test_stacking_keeps_the_better_of_banded_ridge_and_fields_and_gains_where_a_voxel_needs_both(tokens):
    field = pyramid_weights(SIDE, pyramid=((0.12, 8),))[18]

    def signal(cls: np.ndarray, patch: np.ndarray) -> np.ndarray:
        whole = cls.reshape(len(cls), -1) @ np.random.default_rng(2).standard_normal((DEPTH * WIDTH, 8))
        local = through(field, patch, seed=3, n_voxels=8)
        whole, local = whole / whole.std(0), local / local.std(0)
        return np.hstack([whole[:, :4], local[:, :4], whole[:, 4:] + local[:, 4:]])

    train, truth = planted(tokens, signal)
    r = {
        name: voxelwise_r(predict(name, tokens, train, ROWS, seed=0), truth)
        for name in ("banded-ridge", "spatial", "stacked")
    }
    either = np.maximum(r["banded-ridge"], r["spatial"])
    assert (r["stacked"] > either - 0.01).all()
    assert r["stacked"][8:].mean() > either[8:].mean() + 0.01
    assert r["banded-ridge"][:4].min() > r["spatial"][:4].max() + 0.5  # fields know nothing of global tokens
    assert r["spatial"][4:8].min() > r["banded-ridge"][4:8].max()


def test_fields_are_those_of_the_pyramid_written_out_and_the_last_is_the_plain_mean():
    found, centre, row = pyramid_weights(7, pyramid=((0.05, 3), (0.3, 2))), (np.arange(7) + 0.5) / 7, 0
    for size, n_places in ((0.05, 3), (0.3, 2)):
        for y in (np.arange(n_places) + 0.5) / n_places:
            for x in (np.arange(n_places) + 0.5) / n_places:
                bump = np.exp(-(np.square(centre - y)[:, None] + np.square(centre - x)) / (2 * size**2))
                np.testing.assert_allclose(found[row], (bump / bump.sum()).ravel(), atol=1e-6)
                row += 1
    np.testing.assert_allclose(found[row:], 1 / 49, rtol=1e-6)
    assert len(found) == row + 1


def test_fields_are_averages_and_the_whole_image_is_one():
    fields = pyramid_weights(16)
    assert fields.shape == (sum(n**2 for _, n in PYRAMID) + 1, 256)
    np.testing.assert_allclose(fields.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(fields[-1], np.full(256, 1 / 256, np.float32))
    first = fields[0].reshape(16, 16)
    assert np.unravel_index(first.argmax(), first.shape) in {(0, 0), (0, 1), (1, 0), (1, 1)}
    np.testing.assert_allclose(fields[1].reshape(16, 16), fields[PYRAMID[0][1]].reshape(16, 16).T, atol=1e-7)


def test_groups_of_fields_do_not_change_what_is_found(tokens, monkeypatch):
    train, _ = planted(tokens, lambda cls, patch: through(pyramid_weights(SIDE)[9], patch, seed=0))
    whole = spatial(tokens, train.image, train.responses, ROWS, pyramid=((0.2, 3),))
    monkeypatch.setattr("foundation.evaluation.baselines.spatial.FIELDS_BYTES", 1)
    one_by_one = spatial(tokens, train.image, train.responses, ROWS, pyramid=((0.2, 3),))
    np.testing.assert_allclose(one_by_one.prediction, whole.prediction, atol=1e-4)


def test_a_mixture_of_bands_predicts_as_himalaya_does(tokens):
    train, _ = planted(tokens, lambda cls, patch: through(np.full(SIDE**2, SIDE**-2), patch, seed=2))
    pairs = [standardised_pair(b[:N_TRAIN], b[N_TRAIN:]) for b in bands(tokens, np.arange(N_TRAIN + N_NEW))]
    kernels, crossed = [x @ x.T for x, _ in pairs], [new @ x.T for x, new in pairs]
    mixture = mixtures(len(pairs), seed=3)[-1:]
    best = best_of(_mixed(kernels, crossed, mixture), train.responses, alphas=(2.0,))
    mean = train.responses.mean(0)
    deltas, dual, _ = solve_multiple_kernel_ridge_random_search(
        np.stack(kernels), train.responses - mean, n_iter=mixture, alphas=np.array([2.0], np.float32),
        return_weights="dual", progress_bar=False,
    )  # fmt: skip
    expected = sum(k @ (dual * np.exp(d)) for k, d in zip(crossed, deltas, strict=True)) + mean
    np.testing.assert_allclose(best.prediction, expected, atol=1e-3)


def test_bands_are_global_tokens_each_depth_coarse_and_the_middle_depths_fine(tokens, tmp_path):
    rows = np.array([4, 2])
    cls, patch = (x.astype(np.float32) for x in tokens.read(rows))
    found = list(bands(tokens, rows))
    assert [b.shape[1] for b in found] == [DEPTH * WIDTH, *[16 * WIDTH] * DEPTH, *[64 * WIDTH] * DEPTH]
    np.testing.assert_array_equal(found[0], cls.reshape(2, -1))
    np.testing.assert_allclose(found[-1], patch[:, 1].reshape(2, -1), rtol=1e-6)
    small = reader(tmp_path / "small.zarr", n_patches=9, n_images=5)
    assert [b.shape[1] for b in bands(small, rows)] == [DEPTH * WIDTH, *[9 * WIDTH] * DEPTH]


def test_mixtures_begin_with_the_even_one_and_each_band_alone_and_follow_the_seed():
    found = mixtures(3, n_mixtures=20, seed=1)
    np.testing.assert_allclose(found[0], 1 / 3, rtol=1e-6)
    np.testing.assert_array_equal(found[1:4], np.eye(3))
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(found, mixtures(3, n_mixtures=20, seed=1))
    assert not np.array_equal(found, mixtures(3, n_mixtures=20, seed=2))


@pytest.mark.parametrize(("side", "n_cells"), [(8, 4), (7, 3), (4, 1), (3, 3)])
def test_patches_are_pooled_as_torch_pools_them(side, n_cells):
    patch = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 1, side, side)).astype(np.float32))
    expected = torch.nn.functional.adaptive_avg_pool2d(patch, n_cells).reshape(3, -1)
    found = patch.reshape(3, -1).numpy() @ cells(side, n_cells).T
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_ridge_sees_global_tokens_then_patches_by_depth_and_cell(tokens):
    rows = np.array([7, 1, 1])
    cls, patch = (x.astype(np.float32) for x in tokens.read(rows))
    pooled = patch.reshape(3, DEPTH, 4, 2, 4, 2, WIDTH).mean((3, 5))
    expected = np.concatenate([cls.reshape(3, -1), pooled.reshape(3, -1)], axis=1)
    np.testing.assert_allclose(ridge_features(tokens, rows), expected, atol=1e-6)


def test_features_do_not_depend_on_the_batch_and_depths_can_be_chosen(tokens, monkeypatch):
    rows, fields = np.arange(11), cells(SIDE, 2)
    whole = patches_under(tokens, rows, fields)
    monkeypatch.setattr("foundation.closed_form.token_features.BATCH", 4)
    np.testing.assert_allclose(patches_under(tokens, rows, fields), whole, atol=1e-6)
    np.testing.assert_allclose(patches_under(tokens, rows, fields, depths=[1]), whole[:, :, 1:], atol=1e-6)


@pytest.mark.parametrize("name", ["ridge", "spatial"])
def test_out_of_fold_predictions_are_those_of_a_fit_without_the_fold(tokens, name):
    train, _ = planted(tokens, lambda cls, patch: through(np.full(SIDE**2, SIDE**-2), patch, seed=2))
    found = predict_out_of_fold(name, tokens, train, seed=0, n_folds=3)
    held = image_folds(train.image, n_folds=3, seed=0) == 1
    spoilt = replace(train, responses=np.where(held[:, None], 1e4, train.responses).astype(np.float32))
    np.testing.assert_array_equal(predict_out_of_fold(name, tokens, spoilt, seed=0, n_folds=3)[held], found[held])
    assert voxelwise_r(found, train.responses).min() > 0.8


def test_what_cannot_be_predicted_is_refused_by_name(tokens, tmp_path):
    train, _ = planted(tokens, lambda cls, patch: cls[:, -1])
    with pytest.raises(
        ValueError,
        match=r"no baseline 'lasso'; there are ridge, banded-ridge, cls-probe, spatial, stacked, roi-transformer$",
    ):
        predict("lasso", tokens, train, ROWS, seed=0)
    twice = replace(train, image=np.zeros_like(train.image))
    with pytest.raises(ValueError, match="300 rows show 1 images; average the repeats of an image first"):
        predict("ridge", tokens, twice, ROWS, seed=0)
    oblong = reader(tmp_path / "oblong.zarr", n_patches=12, n_images=20)
    with pytest.raises(ValueError, match="'noise' has 12 patches, which is no square grid"):
        ridge_features(oblong, np.arange(3))

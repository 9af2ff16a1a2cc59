"""The transformer of ROI queries: where it looks, what it is trained on, and which voxels share a query."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.preprocess import Samples
from data.sources import ImageBlock, SubjectData
from data.store import PooledStore, SubjectStore, TokenReader
from data.voxels import Rois
from foundation.evaluation.baselines import roi_transformer as module
from foundation.evaluation.baselines.ridge import image_folds
from foundation.evaluation.baselines.roi_transformer import RoiTransformer, RoiTransformerSettings, roi_transformer
from foundation.evaluation.metrics import voxelwise_r

N_TRAIN, N_NEW, DEPTH, SIDE, WIDTH = 300, 50, 2, 6, 4
NEW = np.arange(N_TRAIN, N_TRAIN + N_NEW)
QUICK = RoiTransformerSettings(width=16, rates=(3e-3,), decays=(1.0,), epochs=3)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenReader:
    rng, n = np.random.default_rng(0), N_TRAIN + N_NEW
    store = PooledStore.create(tmp_path_factory.mktemp("rois") / "store.zarr", name="random")
    store.add_images(ImageBlock(ids=[f"image{i:03d}" for i in range(n)], roles=["train"] * n))
    store.begin_tokens("noise", {"kind": "noise", "depths": [1, 2], "seed": 0})
    cls = rng.standard_normal((n, DEPTH, WIDTH)).astype(np.float16)
    patch = rng.standard_normal((n, DEPTH, SIDE**2, WIDTH)).astype(np.float16)
    store.write_tokens("noise", "0000", [{"cls": cls, "patch": patch}])
    return store.tokens("noise")


def planted(tokens: TokenReader, places: list[int], *, n_voxels: int = 4) -> tuple[Samples, np.ndarray, np.ndarray]:
    """Samples of one ROI a place, whose voxels are tuned to the patch there; the new images' truth; the ROIs."""
    rng, patch = np.random.default_rng(1), tokens.read(np.arange(N_TRAIN + N_NEW))[1].astype(np.float64)
    truth = np.hstack([patch[:, 1, place] @ rng.standard_normal((WIDTH, n_voxels)) / 2 for place in places])
    noisy = (truth + 0.3 * rng.standard_normal(truth.shape)).astype(np.float32)
    train = Samples(
        subject="subj01",
        image=np.arange(N_TRAIN),
        responses=noisy[:N_TRAIN],
        n_repeats=np.ones(N_TRAIN, np.float32),
    )
    return train, truth[N_TRAIN:], np.repeat(np.arange(len(places)), n_voxels)


def test_each_roi_finds_the_place_that_its_voxels_respond_to(tokens):
    train, truth, roi = planted(tokens, [7, 28])
    found = roi_transformer(tokens, train, NEW, roi=roi, seed=0)
    assert voxelwise_r(found, truth).min() > 0.8
    mixed = roi_transformer(tokens, train, NEW, roi=np.zeros_like(roi), seed=0)
    assert voxelwise_r(found, truth).mean() > voxelwise_r(mixed, truth).mean() - 0.05


def test_the_seed_decides_the_numbers_and_the_callers_generator_is_left_alone(tokens):
    train, _, roi = planted(tokens, [7, 28])
    found = []
    for state, seed in ((5, 0), (6, 0), (5, 1)):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        found.append(roi_transformer(tokens, train, NEW, roi=roi, seed=seed, settings=QUICK))
        assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_the_held_out_tenth_chooses_and_is_never_fitted(tokens, monkeypatch):
    train, _, roi = planted(tokens, [7])
    held = image_folds(train.image, n_folds=10, seed=0) == 0
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def spy(model, fit, wanted, check, wanted_check, **_) -> float:
        seen.append((wanted, wanted_check))
        return 1.0

    monkeypatch.setattr(module, "_train", spy)
    roi_transformer(tokens, train, NEW, roi=roi, seed=0, settings=QUICK)
    ((wanted, wanted_check),) = seen
    level = train.responses[~held].mean(0)
    np.testing.assert_array_equal(wanted, train.responses[~held] - level)
    np.testing.assert_array_equal(wanted_check, train.responses[held] - level)


def test_the_rate_and_decay_of_least_held_out_error_predict(tokens, monkeypatch):
    train, _, roi = planted(tokens, [7])
    error = {(1e-3, 0.1): 2.0, (1e-3, 1.0): 4.0, (3e-3, 0.1): 3.0, (3e-3, 1.0): 1.0}

    def constant(model, *_, rate: float, decay: float, settings) -> float:
        with torch.no_grad():
            for weight in model.readout:
                weight.zero_()
            model.bias.fill_(rate + decay)
        return error[rate, decay]

    monkeypatch.setattr(module, "_train", constant)
    settings = RoiTransformerSettings(rates=(1e-3, 3e-3), decays=(0.1, 1.0))
    found = roi_transformer(tokens, train, NEW, roi=roi, seed=0, settings=settings)
    held = image_folds(train.image, n_folds=10, seed=0) == 0
    expected = np.broadcast_to(train.responses[~held].mean(0) + np.float32(1.003), found.shape)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_training_ends_at_the_weights_of_least_held_out_error(tokens):
    train, _, roi = planted(tokens, [7])
    torch.manual_seed(0)
    patch = torch.from_numpy(module._pooled(tokens, train.image))
    wanted = torch.from_numpy(train.responses)
    errors = []
    for epochs in (0, 1, 30):
        settings = RoiTransformerSettings(width=16, epochs=epochs, patience=2)
        torch.manual_seed(0)
        model = RoiTransformer((DEPTH, SIDE**2, WIDTH), roi, settings)
        parts = (patch[30:], wanted[30:], patch[:30], wanted[:30])
        told = module._train(model, *parts, rate=1e-2, decay=1.0, settings=settings)
        errors.append(float((module._predicted(model, patch[:30]) - wanted[:30]).square().mean()))
        assert epochs == 0 or told == pytest.approx(errors[-1], rel=1e-6)
    assert errors[2] <= errors[1] < errors[0]


def test_voxels_are_read_from_their_own_rois_query_in_whatever_order_they_come():
    torch.manual_seed(0)
    roi = np.array([2, 0, 1, 0, 2])
    model = RoiTransformer((DEPTH, 9, WIDTH), roi, QUICK).eval()
    patch = torch.randn(3, DEPTH, 9, WIDTH)
    with torch.no_grad():
        before = model(patch)
        for k in range(3):
            model.query[k] += 5
            changed = (model(patch) - before).abs().amax(0) > 1e-6
            model.query[k] -= 5
            np.testing.assert_array_equal(changed, roi == k)


def subject(path: Path, n_voxels: int, **given: Any) -> SubjectStore:
    store = PooledStore.create(path / "subject.zarr", name="one")
    store.add_images(ImageBlock(ids=["a"], roles=["train"]))
    responses = np.zeros((1, n_voxels), np.float32)
    store.add_subject(SubjectData(name="subj01", responses=responses, image=np.zeros(1, np.int32), **given))
    return store.subject("subj01")


def test_rois_are_the_retinotopic_labels_then_the_streams_then_the_rest(tmp_path):
    retinotopic = Rois(labels=np.array([1, 0, 0, 2, 0], np.int16), names={1: "V1v", 2: "V1d"})
    streams = Rois(labels=np.array([1, 5, 5, 1, 0], np.int16), names={1: "early", 5: "ventral"})
    of = subject(tmp_path, 5, rois={"prf-visualrois": retinotopic, "streams": streams})
    found = module.rois_of(of)
    assert len(np.unique(found)) == 4
    assert found[1] == found[2]
    np.testing.assert_array_equal(np.unique(found), np.arange(4))


def test_a_subject_without_labels_has_parcels_of_thirty_voxels(tmp_path):
    found = module.rois_of(subject(tmp_path, 90))
    np.testing.assert_array_equal(found, np.arange(90) // 30)


def test_a_finer_grid_is_averaged_to_eight_cells_a_side(tmp_path: Path):
    rng = np.random.default_rng(0)
    store = PooledStore.create(tmp_path / "store.zarr", name="fine")
    store.add_images(ImageBlock(ids=["a", "b"], roles=["train"] * 2))
    store.begin_tokens("noise", {"kind": "noise", "depths": [1], "seed": 0})
    patch = rng.standard_normal((2, 1, 256, 3)).astype(np.float16)
    cls = np.zeros((2, 1, 3), np.float16)
    store.write_tokens("noise", "0000", [{"cls": cls, "patch": patch}])
    expected = patch.astype(np.float32).reshape(2, 1, 8, 2, 8, 2, 3).mean((3, 5)).reshape(2, 1, 64, 3)
    found = module._pooled(store.tokens("noise"), np.array([1, 0]))
    np.testing.assert_allclose(found, expected[::-1], atol=2e-3)


def test_tokens_are_held_once_and_standardised_as_by_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rng, n, shape = np.random.default_rng(0), 600, (2, 36, 64)
    store = PooledStore.create(tmp_path / "store.zarr", name="wide")
    store.add_images(ImageBlock(ids=[f"image{i:03d}" for i in range(n)], roles=["train"] * n))
    store.begin_tokens("noise", {"kind": "noise", "depths": [1, 2], "seed": 0})
    patch = (5 + 3 * rng.standard_normal((n, *shape))).astype(np.float16)
    store.write_tokens("noise", "0000", [{"cls": patch[:, :, 0], "patch": patch}])
    train = Samples(
        subject="subj01",
        image=np.arange(500),
        responses=np.zeros((500, 2), np.float32),
        n_repeats=np.ones(500, np.float32),
    )
    tokens, found = store.tokens("noise"), {}

    def spy(model, fit, wanted, check, wanted_check, **_) -> float:
        found.update(fit=fit, check=check)
        return 1.0

    monkeypatch.setattr(module, "_train", spy)
    monkeypatch.setattr(module, "_READ", 16)
    tracemalloc.start()
    try:
        roi_transformer(tokens, train, np.arange(500, n), roi=np.zeros(2, np.int64), seed=0, settings=QUICK)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * patch.nbytes

    held = image_folds(train.image, n_folds=10, seed=0) == 0
    seen = patch[:500].astype(np.float64)
    mean, sd = (of(seen[~held], axis=(0, 2), keepdims=True) for of in (np.mean, np.std))
    for name, rows in (("fit", ~held), ("check", held)):
        np.testing.assert_allclose(found[name].numpy(), (seen[rows] - mean) / sd, rtol=1e-3, atol=1e-5)

"""The solved path: a planted model comes back, the reduction loses nothing it needn't, each step against an oracle."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from data.preprocess import Samples, samples
from data.splits import split_of
from foundation.closed_form import linear_start as module
from foundation.closed_form.kernel_ridge import (
    best_of,
    candidate_of_features,
    candidate_of_kernel,
    mixtures,
    standardised_pair,
)
from foundation.closed_form.linear_start import cut, leading_directions, linear_start, stack
from foundation.evaluation.metrics import voxelwise_r
from foundation.model.encoding_model import EncodingModel
from foundation.model.linear_path import LinearFeatures
from foundation.model.spatial import PYRAMID, field_pyramid, gaussian_field
from tests.foundation.closed_form.planted import CANDIDATES, FIELD, SHAPE, SUBJECT, Planted, fresh_model, rows_of


@pytest.fixture
def train(planted: Planted) -> Samples:
    return samples(planted.store.subject(SUBJECT), split_of(planted.store), "train")


def features_of(model: EncodingModel, planted: Planted, rows: np.ndarray) -> LinearFeatures:
    cls, patch = (torch.from_numpy(tokens).float() for tokens in planted.tokens.read(rows))
    return model.linear_features(cls, patch)


def predicted(model: EncodingModel, planted: Planted, rows: np.ndarray) -> np.ndarray:
    return model.adapter(SUBJECT).linear(features_of(model, planted, rows)).numpy()


def test_planted_fields_and_weights_predict_new_images(planted, train):
    model = fresh_model(planted)
    linear_start(model, SUBJECT, planted.tokens, train, seed=0)
    rows = rows_of("test")
    assert (voxelwise_r(predicted(model, planted, rows), planted.truth[rows]) > 0.9).all()


def test_the_planted_fields_are_chosen_and_handed_to_the_network(planted, train):
    model = fresh_model(planted)
    start = linear_start(model, SUBJECT, planted.tokens, train, seed=0)
    assert start.voxel_field[:4].tolist() == FIELD.tolist()
    assert start.roi_field[:2].tolist() == list(CANDIDATES)
    adapter, candidates = model.adapter(SUBJECT), field_pyramid()
    for field in (adapter.linear, adapter.voxel_field):
        torch.testing.assert_close(field.place, candidates.place[start.voxel_field])
        torch.testing.assert_close(field.log_size, candidates.log_size[start.voxel_field])
    torch.testing.assert_close(adapter.roi_field.place, candidates.place[start.roi_field])


def test_candidates_cover_the_image_at_every_size_and_as_a_whole():
    candidates = field_pyramid()
    each = torch.column_stack([candidates.place, candidates.log_size])
    assert len(each.unique(dim=0)) == len(candidates)
    for sd, n in PYRAMID:
        places = candidates.place[torch.isclose(candidates.log_size.exp(), torch.tensor(sd))]
        assert len(places) == n**2
        np.testing.assert_allclose(places.mean(0), 0.5, atol=1e-6)
    whole = gaussian_field(candidates.place[-1:], candidates.log_size[-1:], 16)
    assert whole.max() < 1.5 * whole.min()


def test_with_ranks_that_suffice_the_path_is_the_unreduced_kernel_solution(planted, train, monkeypatch):
    monkeypatch.setattr(module, "stack", lambda members, responses: np.ones((2, responses.shape[1]), np.float32))
    model, rows = fresh_model(planted), rows_of("test")
    linear_start(model, SUBJECT, planted.tokens, train, seed=0)
    seen, new = (features_of(model, planted, of) for of in (train.image, rows))

    bands = np.split(np.arange(seen.whole.shape[1]), [8, 8 + 64])  # CLS tokens, coarse patches of either depth
    pairs = [standardised_pair(seen.whole[:, band].numpy(), new.whole[:, band].numpy()) for band in bands]

    def mixed(weights: np.ndarray, which: int) -> np.ndarray:
        return sum(g * (pair[which] @ pair[0].T) for g, pair in zip(weights, pairs, strict=True))

    drawn = mixtures(len(pairs), n_mixtures=module.N_MIXTURES, seed=0)
    whole = best_of((candidate_of_kernel(mixed(w, 0), mixed(w, 1)) for w in drawn), train.responses)

    candidates = field_pyramid()
    fields = gaussian_field(candidates.place, candidates.log_size, SHAPE.side)
    local = best_of(
        (candidate_of_features(*standardised_pair(*((f @ of.patch).numpy() for of in (seen, new)))) for f in fields),
        train.responses,
    )
    expected = whole.prediction + local.prediction - whole.mean
    np.testing.assert_allclose(predicted(model, planted, rows), expected, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_path_that_is_cut_keeps_the_mean_response(planted, train, rank):
    model = fresh_model(planted, n_linear_whole=rank, n_linear_field=rank)
    linear_start(model, SUBJECT, planted.tokens, train, seed=0)
    found = predicted(model, planted, train.image)
    np.testing.assert_allclose(found.mean(0), train.responses.mean(0), atol=1e-4)
    assert model.adapter(SUBJECT).linear.weight_field.shape == (8, rank)


def test_a_low_rank_keeps_most_of_the_prediction(planted, train):
    rows, found = rows_of("test"), []
    for rank in (1, 4, 8):
        model = fresh_model(planted, n_linear_whole=rank, n_linear_field=rank)
        linear_start(model, SUBJECT, planted.tokens, train, seed=0)
        found.append(voxelwise_r(predicted(model, planted, rows), planted.truth[rows]).mean())
    assert found[0] < found[1] < found[2]
    assert found[1] > 0.7 * found[2]


def test_left_out_images_are_predicted_about_as_well_as_new_ones(planted, train):
    model, rows = fresh_model(planted), rows_of("test")
    start = linear_start(model, SUBJECT, planted.tokens, train, seed=0)
    left_out = np.square(start.left_out - train.responses).mean()
    fitted = np.square(predicted(model, planted, train.image) - train.responses).mean()
    test = samples(planted.store.subject(SUBJECT), split_of(planted.store), "test")
    new = np.square(predicted(model, planted, rows) - test.responses).mean()
    assert left_out == pytest.approx(new, rel=0.2)
    assert fitted < 0.9 * left_out


def test_the_network_keeps_its_numbers_but_for_its_fields(planted, train):
    model = fresh_model(planted)
    before = {name: value.clone() for name, value in model.named_parameters()}
    linear_start(model, SUBJECT, planted.tokens, train, seed=0)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    fields = {f"{of}_field.{what}" for of in ("voxel", "roi") for what in ("place", "log_size")}
    assert moved == {f"adapters.{SUBJECT}.{name}" for name in fields}


def test_too_few_images_are_refused(planted, train):
    few = replace(train, image=train.image[:2], responses=train.responses[:2], n_repeats=train.n_repeats[:2])
    with pytest.raises(ValueError, match="2 training images are too few"):
        linear_start(fresh_model(planted), SUBJECT, planted.tokens, few, seed=0)


# -- the steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alike", [0.0, 0.9, -0.9], ids="alike {}".format)
def test_stacking_weights_are_those_of_non_negative_least_squares(alike):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((30, 200))
    b = alike * a + rng.standard_normal((30, 200))
    y = rng.normal(size=200) * a + rng.normal(size=200) * b + rng.standard_normal((30, 200)) + 5
    found = stack([a.astype(np.float32), b.astype(np.float32) - 3], y.astype(np.float32))
    for v in range(200):
        design = np.column_stack([m[:, v] - m[:, v].mean() for m in (a, b)])
        np.testing.assert_allclose(found[:, v], nnls(design, y[:, v] - y[:, v].mean())[0], atol=1e-4)
    assert {tuple(row) for row in (found > 0).T.tolist()} == {
        (False, False), (True, False), (False, True), (True, True)
    }  # fmt: skip


def test_stacking_a_prediction_with_itself_is_least_squares():
    a, noise = np.random.default_rng(0).standard_normal((2, 30, 5)).astype(np.float32)
    np.testing.assert_allclose(stack([a, a], a + 0.1 * noise).sum(0), 1, atol=0.1)
    assert (stack([0 * a, 0 * a], noise) == 0).all()


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_cut_is_the_best_of_its_rank_for_inputs_of_that_covariance(rank):
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((500, 6)) @ rng.standard_normal((6, 6)) * np.logspace(-1, 1, 6)
    covariance, weights = inputs.T @ inputs / 500, rng.standard_normal((6, 9))
    basis, weight = cut(weights.astype(np.float32), covariance.astype(np.float32), rank)
    error = np.square(inputs @ (weights - basis @ weight.T)).sum(1).mean()
    values, axes = np.linalg.eigh(covariance)
    singular = np.linalg.svd((axes * np.sqrt(values)) @ axes.T @ weights, compute_uv=False)
    assert error == pytest.approx(np.square(singular[rank:]).sum(), rel=1e-3, abs=1e-3)


def test_a_rank_beyond_the_channels_changes_nothing():
    rng = np.random.default_rng(0)
    weights, spread = rng.standard_normal((4, 9)).astype(np.float32), rng.standard_normal((20, 4)).astype(np.float32)
    basis, weight = cut(weights, spread.T @ spread / 20, 7)
    assert (basis.shape, weight.shape) == ((4, 7), (9, 7))
    np.testing.assert_allclose(basis @ weight.T, weights, atol=1e-4)


@pytest.mark.parametrize(("n_images", "rank"), [(50, 4), (3, 5)])
def test_leading_directions_are_orthonormal_and_those_of_most_variance(n_images, rank):
    predictions = np.random.default_rng(0).standard_normal((n_images, 12)) * np.logspace(0, -1, 12)
    found = leading_directions(predictions.astype(np.float32), rank)
    real = min(n_images, rank)
    _, _, axes = np.linalg.svd(predictions, full_matrices=False)
    np.testing.assert_allclose(found @ found.T, axes[:real].T @ axes[:real], atol=1e-4)
    assert found.shape == (12, rank)

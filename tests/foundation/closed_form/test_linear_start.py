"""The solved path: a planted model comes back, the reduction loses nothing it needn't, each step against an oracle."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.preprocess import Samples, samples
from data.splits import split_of
from data.store import TokenReader
from foundation.closed_form import linear_start as module
from foundation.closed_form.kernel_ridge import (
    best_of,
    candidate_of_features,
    candidate_of_kernel,
    mixtures,
    standardised_pair,
)
from foundation.closed_form.linear_start import cut, leading_directions, linear_start, share_terms, solve_terms
from foundation.closed_form.stacking import stack
from foundation.evaluation.metrics import voxelwise_r
from foundation.model.encoding_model import EncodingModel
from foundation.model.linear_path import LinearFeatures
from foundation.model.spatial import field_pyramid, gaussian_field
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


def features_under(prior: np.ndarray | None, seen: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Channels in a field, standardised; with a prior, four fifths of the kernel's trace come from its axes."""
    plain = standardised_pair(seen, new)
    if prior is None:
        return plain
    along = [(x - seen.mean(0)) @ prior for x in (seen, new)]
    size = np.sqrt(0.8 * len(seen) / np.square(along[0]).sum())
    return tuple(np.hstack([np.sqrt(0.2) * z, size * a]).astype(np.float32) for z, a in zip(plain, along, strict=True))


PRIOR = np.random.default_rng(4).standard_normal((8, 3)).astype(np.float32) * np.array([3, 1, 0.3], np.float32)
"""Axes of 8 channels in which a population's weights are known to lie."""


@pytest.mark.parametrize("prior", [None, PRIOR], ids=["plain", "prior"])
def test_with_ranks_that_suffice_the_terms_are_the_unreduced_kernel_solutions(planted, train, prior):
    model, rows = fresh_model(planted), rows_of("test")
    solve_terms(model, SUBJECT, planted.tokens, train, seed=0, prior=prior)
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
        (
            candidate_of_features(*features_under(prior, *((f @ of.patch).numpy() for of in (seen, new))))
            for f in fields
        ),
        train.responses,
    )
    expected = whole.prediction + local.prediction - whole.mean
    np.testing.assert_allclose(predicted(model, planted, rows), expected, atol=1e-4)


def test_a_population_that_is_tuned_alike_lets_fields_be_learnt_from_fewer_images(planted, train):
    """All voxels are tuned to one direction of the channels, as the population that is told of: 40 images suffice."""
    rng, rows = np.random.default_rng(0), rows_of("test")
    tuning = rng.standard_normal((8, 1)).astype(np.float32)
    fields = gaussian_field(field_pyramid().place, field_pyramid().log_size, SHAPE.side)[list(CANDIDATES) * 4]
    model, few = fresh_model(planted), train.image[:40]

    def truth(of: np.ndarray) -> np.ndarray:
        found = ((fields @ features_of(model, planted, of).patch).numpy() @ tuning)[..., 0]
        return found / found.std(0)

    noisy = (truth(few) + rng.standard_normal((40, 8))).astype(np.float32)
    samples = replace(first_of(train, 40), responses=noisy)
    found = []
    for prior in (None, tuning):
        start = solve_terms(model, SUBJECT, planted.tokens, samples, seed=0, prior=prior)
        _, field = model.adapter(SUBJECT).linear.terms(features_of(model, planted, rows))
        found.append(voxelwise_r(field.numpy(), truth(rows)).mean())
        assert len(start.voxel_field) == 8
    assert found[1] > found[0] + 0.1


def test_terms_with_any_shares_leave_the_mean_response_of_the_training_images(planted, train):
    model = fresh_model(planted)
    start = solve_terms(model, SUBJECT, planted.tokens, train, seed=0)
    path, features = model.adapter(SUBJECT).linear, features_of(model, planted, train.image)
    alone = [term.numpy() for term in path.terms(features)]
    np.testing.assert_allclose([term.mean(0) for term in alone], start.offset, atol=1e-4)
    shares = np.random.default_rng(0).uniform(0, 2, (2, 8)).astype(np.float32)
    share_terms(path, start, shares)
    expected = start.mean + sum(s * (t - o) for s, t, o in zip(shares, alone, start.offset, strict=True))
    np.testing.assert_allclose(path(features), expected, atol=1e-4)
    np.testing.assert_allclose(path(features).mean(0), train.responses.mean(0), atol=1e-4)


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


def test_left_out_images_are_predicted_about_as_well_as_new_ones(planted, train, monkeypatch):
    model, rows, stacked = fresh_model(planted), rows_of("test"), []

    def spy(members: list[np.ndarray], responses: np.ndarray) -> np.ndarray:
        shares, mean = stack(members, responses), responses.mean(0)
        stacked.append(mean + sum(s * (m - mean) for s, m in zip(shares, members, strict=True)))
        return shares

    monkeypatch.setattr(module, "stack", spy)
    linear_start(model, SUBJECT, planted.tokens, train, seed=0)
    left_out = np.square(stacked[0] - train.responses).mean()
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


def first_of(train: Samples, n: int) -> Samples:
    return replace(train, image=train.image[:n], responses=train.responses[:n], n_repeats=train.n_repeats[:n])


@pytest.mark.parametrize("n", [0, 1, 2])
def test_too_few_images_are_refused_by_number_with_what_can_be_done(planted, train, n):
    expected = f"^{SUBJECT} has {n} training images; the closed-form path needs 3 or more .*: take more sessions"
    with pytest.raises(ValueError, match=expected):
        linear_start(fresh_model(planted), SUBJECT, planted.tokens, first_of(train, n), seed=0)


def test_three_images_are_enough_for_a_path_of_finite_predictions(planted, train):
    model = fresh_model(planted)
    linear_start(model, SUBJECT, planted.tokens, first_of(train, 3), seed=0)
    assert model.adapter(SUBJECT).linear.solved
    assert np.isfinite(predicted(model, planted, rows_of("test"))).all()


def test_patches_that_never_vary_leave_the_cls_tokens_to_predict(planted, train, monkeypatch):
    read = TokenReader.read

    def still(tokens: TokenReader, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cls, patch = read(tokens, rows)
        return cls, np.full_like(patch, 0.3)

    monkeypatch.setattr(TokenReader, "read", still)
    model, rows = fresh_model(planted), rows_of("test")
    cls = planted.tokens.read(np.concatenate([train.image, rows]))[0].astype(np.float32)
    signal = cls.reshape(len(cls), -1) @ np.random.default_rng(3).standard_normal((8, 8)).astype(np.float32)
    linear_start(model, SUBJECT, planted.tokens, replace(train, responses=signal[: len(train)]), seed=0)
    np.testing.assert_allclose(predicted(model, planted, rows), signal[len(train) :], atol=0.2)


# -- the steps -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("rank", [3, 7])
@pytest.mark.parametrize("varies", [0, 2])
def test_channels_that_never_vary_have_finite_factors_and_the_others_are_kept(varies, rank):
    rng = np.random.default_rng(0)
    spread = np.zeros((20, 4), np.float32)
    spread[:, :varies] = rng.standard_normal((20, varies))
    weights = rng.standard_normal((4, 9)).astype(np.float32)
    basis, weight = cut(weights, spread.T @ spread / 20, rank)
    assert np.isfinite(basis).all()
    assert np.isfinite(weight).all()
    np.testing.assert_allclose(spread @ (basis @ weight.T), spread @ weights, atol=1e-4)
    basis, weight = cut(np.zeros_like(weights), spread.T @ spread / 20, rank)
    assert np.isfinite(basis).all()
    assert (basis @ weight.T == 0).all()


@pytest.mark.parametrize(("n_images", "rank"), [(50, 4), (3, 5)])
def test_leading_directions_are_orthonormal_and_those_of_most_variance(n_images, rank):
    predictions = np.random.default_rng(0).standard_normal((n_images, 12)) * np.logspace(0, -1, 12)
    found = leading_directions(predictions.astype(np.float32), rank)
    real = min(n_images, rank)
    _, _, axes = np.linalg.svd(predictions, full_matrices=False)
    np.testing.assert_allclose(found @ found.T, axes[:real].T @ axes[:real], atol=1e-4)
    assert found.shape == (12, rank)

"""The closed-form start against linear algebra by hand, scikit-learn, and planted tuning."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from adapters import ridge_start as module
from adapters.ridge_start import ridge_start, solve
from foundation.config import LossConfig
from foundation.evaluation.metrics import voxelwise_r
from foundation.model.dual_stream import Streams, TokenShape
from foundation.model.encoding_model import EncodingModel
from foundation.model.spatial import BLUR, COARSE_PYRAMID, field_pyramid, gaussian_field
from tests.tiny_store import TINY_BACKBONE

SIDE = 8
PARCEL = torch.arange(8) // 4


def problem(n: int = 80, n_feature: int = 6, n_target: int = 4, noise: float = 0.5) -> tuple[np.ndarray, ...]:
    """Features of unequal scale and mean, targets linear in them, weights and intercepts."""
    rng = np.random.default_rng(0)
    features = (rng.standard_normal((n, n_feature)) + rng.standard_normal(n_feature)) * np.logspace(-2, 2, n_feature)
    weights = rng.standard_normal((n_feature, n_target)) / np.logspace(-2, 2, n_feature)[:, None]
    intercept = rng.standard_normal(n_target)
    targets = features @ weights + intercept + noise * rng.standard_normal((n, n_target))
    return features, targets, weights, intercept


@pytest.mark.parametrize("alpha", [0.1, 10.0, 1e4, 1e6])
def test_under_one_penalty_the_solution_is_ridge_on_standardised_features(monkeypatch, alpha):
    monkeypatch.setattr(module, "ALPHAS", np.array([alpha]))
    features, targets, _, _ = problem()
    solved = solve(features, targets, constant=np.ones(len(features)))
    scale = features.std(0)
    expected = Ridge(alpha=alpha, solver="svd").fit(features / scale, targets)
    np.testing.assert_allclose(solved.weights[:-1] * scale[:, None], expected.coef_.T, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(solved.weights[-1], expected.intercept_, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 1e6])
def test_the_constants_weight_is_not_penalised_whatever_the_constant(monkeypatch, alpha):
    monkeypatch.setattr(module, "ALPHAS", np.array([alpha]))
    features, targets, _, _ = problem()
    constant = np.random.default_rng(1).uniform(0.2, 2.0, len(features))
    solved = solve(features, targets, constant=constant)
    scale = features.std(0)
    design = np.column_stack([features / scale, constant])
    penalty = alpha * np.diag([1.0] * features.shape[1] + [0.0])
    expected = np.linalg.solve(design.T @ design + penalty, design.T @ targets)
    np.testing.assert_allclose(solved.weights[:-1] * scale[:, None], expected[:-1], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(solved.weights[-1], expected[-1], rtol=1e-4)


def test_with_little_noise_planted_weights_and_intercepts_come_back():
    features, targets, weights, intercept = problem(n=300, noise=1e-3)
    solved = solve(features, targets, constant=np.ones(300))
    np.testing.assert_allclose(solved.weights[:-1], weights, rtol=0.02)
    np.testing.assert_allclose(solved.weights[-1], intercept, atol=0.03)
    assert (solved.score > -1e-3).all()  # minus the error on held-out folds: next to nothing, of variances above 1
    assert (solved.score <= 0).all()


def test_noise_scores_its_variance_and_is_shrunk_away():
    features, _, _, _ = problem()
    noise = np.random.default_rng(5).standard_normal((len(features), 50))
    solved = solve(features, noise, constant=np.ones(len(features)))
    np.testing.assert_allclose(solved.score, -noise.var(0), rtol=0.15)
    prediction = features @ solved.weights[:-1] + solved.weights[-1]
    assert prediction.std(0).mean() < 0.35


def test_a_feature_that_never_varies_has_no_weight():
    features, targets, _, _ = problem()
    features[:, 2] = 3.0
    solved = solve(features, targets, constant=np.ones(len(features)))
    assert (solved.weights[2] == 0).all()
    assert np.isfinite(solved.weights).all()


def test_more_features_than_images_are_solved_too():
    rng = np.random.default_rng(0)
    features, targets = rng.standard_normal((20, 50)), rng.standard_normal((20, 3))
    solved = solve(features, targets, constant=np.ones(20))
    assert solved.weights.shape == (51, 3)
    assert np.isfinite(solved.weights).all()


CANDIDATES = field_pyramid(COARSE_PYRAMID)
FIELDS = gaussian_field(CANDIDATES.place, torch.hypot(CANDIDATES.log_size.exp(), torch.tensor(BLUR / SIDE)).log(), SIDE)
"""As an adapter sees through them: blurred by half a cell."""
SMALL, LARGE = 0, len(CANDIDATES) - 2
"""A small field and a large one, in opposite corners; the whole image comes last."""
PLANTED = (SMALL, LARGE)


def test_candidates_cover_the_image_at_several_sizes_and_as_a_whole():
    places, sizes = CANDIDATES.place.tolist(), CANDIDATES.log_size.tolist()
    assert len({(*place, size) for place, size in zip(places, sizes, strict=True)}) == len(CANDIDATES)
    for size in sorted(set(sizes))[:-1]:
        corners = [place for place, its in zip(places, sizes, strict=True) if its == size]
        assert all([a, b] in corners for a in (1 / 8, 7 / 8) for b in (1 / 8, 7 / 8))
    assert places[-1] == [0.5, 0.5]
    assert FIELDS[-1].max() < 1.5 * FIELDS[-1].min()
    assert sizes[SMALL] < sizes[LARGE]
    assert places[SMALL] == [1 - coordinate for coordinate in places[LARGE]]


@pytest.fixture
def model() -> EncodingModel:
    """A backbone of one subject and a fresh adapter for another, eight voxels in two ROIs."""
    torch.manual_seed(0)
    made = EncodingModel(
        TokenShape(depth=2, patch=SIDE * SIDE, width=5), TINY_BACKBONE, {"old": torch.arange(12) // 4, "new": PARCEL}
    )
    torch.nn.init.normal_(made.vae.to_scale.weight, std=0.1)
    torch.nn.init.constant_(made.vae.holistic_logit, -0.5)
    return made.eval().requires_grad_(False)


def streams(n: int = 150) -> Streams:
    made = torch.Generator().manual_seed(2)
    width = TINY_BACKBONE.width
    return Streams(
        cls=torch.randn(n, width, generator=made),
        patch=torch.randn(n, SIDE * SIDE, width, generator=made),
        gate=torch.tanh(torch.randn(n, TINY_BACKBONE.n_gate, generator=made)),
    )


def through(candidate: int, seen: torch.Tensor) -> torch.Tensor:
    """What a receptive field sees of (image, patch, channel), scaled to unit variance."""
    found = torch.einsum("p,bpc->bc", FIELDS[candidate], seen)
    return found / found.std(0)


def assert_sees_through(field: torch.nn.Module, units: list[int], candidate: int) -> None:
    """Assert that these units' place and size are the candidate's."""
    for name in ("place", "log_size"):
        found, expected = getattr(field, name)[units], getattr(CANDIDATES, name)[candidate]
        torch.testing.assert_close(found, expected.expand_as(found))


def test_a_planted_receptive_field_of_an_roi_is_found(model):
    given = streams()
    tuning = torch.randn(2, TINY_BACKBONE.width, generator=torch.Generator().manual_seed(4))
    signal = torch.stack([through(k, given.patch) @ w for k, w in zip(PLANTED, tuning, strict=True)], dim=1)
    noise = 0.3 * torch.randn(len(signal), 8, generator=torch.Generator().manual_seed(5))
    ridge_start(model, "new", given, signal[:, PARCEL] + noise, seed=0)
    adapter = model.adapter("new")
    for roi, candidate in enumerate(PLANTED):
        assert_sees_through(adapter.roi_field, [roi], candidate)


def test_a_planted_receptive_field_of_a_voxel_is_found(model):
    given = streams()
    local = model.voxel_features(given, "new").local
    tuning = torch.randn(2, TINY_BACKBONE.n_local, generator=torch.Generator().manual_seed(4))
    signal = torch.stack([through(k, local) @ w for k, w in zip(PLANTED, tuning, strict=True)], dim=1)
    sign = torch.tensor([1.0, -1.0]).repeat(4)  # an ROI's voxels cancel, so that its mean tells nothing
    planted = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    noise = 0.1 * torch.randn(len(signal), 8, generator=torch.Generator().manual_seed(5))
    ridge_start(model, "new", given, sign * signal[:, planted] + noise, seed=0)
    adapter = model.adapter("new")
    for which, candidate in enumerate(PLANTED):
        assert_sees_through(adapter.voxel_field, torch.nonzero(planted == which).flatten().tolist(), candidate)


def test_the_models_prediction_is_the_one_that_was_solved_for(model, monkeypatch):
    solved = []

    def spy(*args, **options):
        solved.append(find(*args, **options))
        return solved[-1]

    find = module._best_field
    monkeypatch.setattr(module, "_best_field", spy)
    given = streams()
    responses = torch.randn(150, 8, generator=torch.Generator().manual_seed(6)) + given.cls[:, :1]
    ridge_start(model, "new", given, responses, seed=0)
    choice, weights = solved[-1]  # the voxels come last
    features = model.voxel_features(given, "new")
    predicted = model.decode(given, {"new": slice(0, 150)}).subjects["new"].voxel
    for voxel, k in enumerate(choice):
        local = torch.einsum("p,bpc->bc", FIELDS[k], features.local)
        seen = features.gain * torch.cat([features.components, local, torch.ones(150, 1)], dim=1)
        expected = features.offset[:, voxel] + seen @ torch.from_numpy(weights[:, voxel]).float()
        torch.testing.assert_close(predicted[:, voxel], expected, rtol=1e-3, atol=1e-4)


def test_planted_linear_responses_are_predicted_for_images_that_were_not_fitted(model):
    given = streams(400)
    tuning = torch.randn(TINY_BACKBONE.width, 8, generator=torch.Generator().manual_seed(7))
    signal = through(LARGE, given.patch) @ tuning
    ridge_start(model, "new", given[slice(0, 300)], signal[:300] + 0.2 * torch.randn(300, 8), seed=0)
    held_out = model.decode(given[slice(300, 400)], {"new": slice(0, 100)}).subjects["new"].voxel
    assert voxelwise_r(held_out.numpy(), signal[300:].numpy()).mean() > 0.6


def test_each_roi_takes_the_embedding_of_the_most_alike_roi_of_the_others(model):
    given = streams()
    old = model.adapter("old")
    with torch.no_grad():
        old.roi_patch.zero_()
    responses = (given.cls @ old.roi_cls[[2, 0]].T)[:, PARCEL]
    ridge_start(model, "new", given, responses / responses.std(0), seed=0)
    adapter = model.adapter("new")
    with torch.no_grad():
        adapter.roi_patch.zero_()
    module._lend_embeddings(model, "new")
    torch.testing.assert_close(adapter.roi_embedding, old.roi_embedding[[2, 0]], rtol=0, atol=0)


def test_the_first_subject_of_a_backbone_keeps_its_own_embeddings():
    torch.manual_seed(0)
    shape = TokenShape(depth=2, patch=SIDE * SIDE, width=5)
    model = EncodingModel(shape, TINY_BACKBONE, {"new": PARCEL}).eval().requires_grad_(False)
    before = model.adapter("new").roi_embedding.clone()
    ridge_start(model, "new", streams(), torch.randn(150, 8), seed=0)
    torch.testing.assert_close(model.adapter("new").roi_embedding, before, rtol=0, atol=0)


def test_rois_learn_the_target_that_the_backbone_learned(model):
    given, tuning = streams(), torch.randn(TINY_BACKBONE.width, 2, generator=torch.Generator().manual_seed(4))
    responses = torch.randn(150, 8, generator=torch.Generator().manual_seed(5))
    first = torch.tensor([0, 4])  # one voxel of each ROI is tuned, and has all the weight in its ROI's target
    responses[:, first] = 3 * given.cls @ tuning
    adapter = model.adapter("new")
    adapter.target_weight.zero_()[first] = 1
    ridge_start(model, "new", given, responses, loss=LossConfig(roi_target="low-rank"), seed=0)
    found = adapter.roi_values(given).cls
    torch.testing.assert_close(found, responses[:, first], rtol=0.05, atol=0.2)

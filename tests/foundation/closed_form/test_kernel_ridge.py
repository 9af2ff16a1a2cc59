"""Kernel ridge by one decomposition: against scikit-learn, the hat matrix and refits without an image."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from foundation.closed_form.kernel_ridge import (
    best_of,
    candidate_of_features,
    candidate_of_kernel,
    gcv,
    standardised_pair,
)


def problem(n_features: int, *, n_images: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features and new ones on training images' scale, and voxels from well to hardly predictable."""
    rng = np.random.default_rng(0)
    x, new = standardised_pair(*(rng.standard_normal((n, n_features)).astype(np.float32) + 3 for n in (n_images, 9)))
    y = x @ rng.standard_normal((n_features, 6)) + np.logspace(-1.5, 1, 6) * rng.standard_normal((n_images, 6)) + 2
    return x, new, y.astype(np.float32)


def hat_matrix(x: np.ndarray, alpha: float) -> np.ndarray:
    """What maps responses to fitted ones, the intercept free."""
    n, x = len(x), x.astype(np.float64)
    return np.full((n, n), 1 / n) + x @ np.linalg.solve(x.T @ x + alpha * np.eye(x.shape[1]), x.T)


@pytest.mark.parametrize("n_features", [7, 90], ids=["primal", "kernel"])
def test_the_prediction_is_scikit_learns_ridge_under_the_chosen_penalty(n_features):
    x, new, y = problem(n_features)
    best = best_of([candidate_of_features(x, new)], y)
    assert best.prediction.dtype == np.float32
    assert len(np.unique(best.alpha)) > 2
    for v, alpha in enumerate(best.alpha):
        expected = Ridge(alpha=alpha).fit(x.astype(np.float64), y[:, v]).predict(new)
        np.testing.assert_allclose(best.prediction[:, v], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n_features", [7, 90], ids=["primal", "kernel"])
def test_the_error_is_generalised_cross_validation_of_the_hat_matrix(n_features):
    x, new, y = problem(n_features)
    alphas = np.array([0.1, 1, 10], np.float32)
    centred = y - y.mean(0)
    candidate = candidate_of_features(x, new)
    found = gcv(candidate, candidate.vectors.T @ centred, np.square(centred).sum(0), alphas=alphas)
    for k, alpha in enumerate(alphas):
        hat, n = hat_matrix(x, alpha), len(y)
        expected = n * np.square(y - hat @ y).sum(0) / (n - np.trace(hat)) ** 2
        np.testing.assert_allclose(found[k], expected, rtol=1e-3)


def test_the_error_is_close_to_that_of_predicting_each_image_without_it():
    x, new, y = problem(90, n_images=120)
    best = best_of([candidate_of_features(x, new)], y)
    for v, alpha in enumerate(best.alpha):
        errors = []
        for i in range(120):
            left = np.arange(120) != i
            errors.append(Ridge(alpha=alpha).fit(x[left], y[left, v]).predict(x[i : i + 1])[0] - y[i, v])
        assert best.error[v] == pytest.approx(np.mean(np.square(errors)), rel=0.1)


@pytest.mark.parametrize("n_features", [7, 90], ids=["primal", "kernel"])
def test_what_is_left_out_is_predicted_as_by_a_refit_without_it(n_features):
    x, new, y = problem(n_features)
    best = best_of([candidate_of_features(x, new)], y)
    for v, alpha in enumerate(best.alpha):
        for i in range(0, len(y), 7):
            left = np.arange(len(y)) != i
            refit = Ridge(alpha=alpha).fit(x[left].astype(np.float64), y[left, v]).predict(x[i : i + 1])
            np.testing.assert_allclose(best.left_out[i, v], refit[0], rtol=1e-3, atol=1e-3)


def test_dual_weights_of_the_training_images_are_those_of_the_features():
    x, new, y = problem(90)
    best = best_of([candidate_of_features(x, new)], y)
    np.testing.assert_allclose(new @ (x.T @ best.dual) + best.mean, best.prediction, rtol=1e-3, atol=1e-3)


def test_each_voxel_takes_the_candidate_that_explains_it():
    rng = np.random.default_rng(0)
    pairs = [standardised_pair(*(rng.standard_normal((n, 30)).astype(np.float32) for n in (150, 40))) for _ in range(3)]
    tuning = [rng.standard_normal((30, 1)) for _ in pairs]
    y = np.hstack([x @ w for (x, _), w in zip(pairs, tuning, strict=True)]).astype(np.float32)
    truth = np.hstack([new @ w for (_, new), w in zip(pairs, tuning, strict=True)])
    best = best_of((candidate_of_features(*pair) for pair in pairs), y)
    assert best.candidate.tolist() == [0, 1, 2]
    np.testing.assert_allclose(best.prediction, truth, atol=0.1)


def test_a_kernel_and_its_features_are_one_candidate():
    x, new, y = problem(90)
    from_features, from_kernel = (
        best_of([candidate], y)
        for candidate in (candidate_of_features(x, new), candidate_of_kernel(x @ x.T, new @ x.T))
    )
    np.testing.assert_allclose(from_features.prediction, from_kernel.prediction, atol=1e-4)


def test_voxels_do_not_depend_on_their_neighbours(monkeypatch):
    x, new, y = problem(7)
    together = best_of([candidate_of_features(x, new)], y)
    monkeypatch.setattr("foundation.closed_form.kernel_ridge.VOXEL_BLOCK", 4)
    apart = best_of([candidate_of_features(x, new)], y)
    np.testing.assert_allclose(apart.prediction, together.prediction, atol=1e-5)
    np.testing.assert_array_equal(apart.alpha, together.alpha)


def test_standardised_features_have_a_kernel_of_mean_diagonal_one_and_constant_ones_are_zero():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((20, 5)).astype(np.float32) * 7 + 2
    features[:, 2] = 0.1
    x, new = standardised_pair(features, features[:3] + 1)
    assert np.square(x).sum(1).mean() == pytest.approx(1, abs=1e-5)
    assert (x[:, 2] == 0).all()
    assert (new[:, 2] == 0).all()
    best = best_of([candidate_of_features(*standardised_pair(np.ones_like(features), np.ones_like(features[:3])))], x)
    np.testing.assert_allclose(best.prediction, np.tile(x.mean(0), (3, 1)), atol=1e-6)


def test_responses_that_cannot_be_fitted_are_refused():
    x, new, y = problem(7)
    y[3, 2] = np.nan
    with pytest.raises(ValueError, match="responses hold NaN or infinite values"):
        best_of([candidate_of_features(x, new)], y)
    with pytest.raises(ValueError, match="2 training images are too few"):
        best_of([], y[:2])

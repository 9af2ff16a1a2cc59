"""Ridge against scikit-learn and the normal equations."""

import numpy as np
import pytest
from himalaya.backend import get_backend
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, PredefinedSplit

from foundation.evaluation.baselines.ridge import fit_ridge, image_folds

ALPHAS = np.logspace(-1, 4, 8)


def problem(n_images: int, n_features: int, *, dtype="float64", seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Voxels from well to hardly predictable, so that their best penalties differ; features of uneven scale."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_images, n_features)) * rng.uniform(0.1, 5, n_features) + rng.uniform(-9, 9, n_features)
    y = (x - x.mean(0)) / x.std(0) @ rng.standard_normal((n_features, 10)) / np.sqrt(n_features)
    y = y + np.logspace(-2, 1.5, 10) * rng.standard_normal((n_images, 10)) + 4
    return x.astype(dtype), y.astype(dtype)


@pytest.mark.parametrize(("n_images", "n_features"), [(80, 12), (40, 150)], ids=["primal", "kernel"])
def test_alpha_and_prediction_per_voxel_are_scikit_learns(n_images, n_features):
    x, y = problem(n_images, n_features)
    model = fit_ridge(x, y, alphas=ALPHAS, n_folds=4, seed=3)
    new, _ = problem(20, n_features, seed=1)
    standard = (x - x.mean(0)) / x.std(0)
    split = PredefinedSplit(image_folds(np.arange(n_images), n_folds=4, seed=3))
    for v in range(y.shape[1]):
        search = GridSearchCV(Ridge(), {"alpha": ALPHAS}, cv=split, scoring="neg_mean_squared_error")
        search.fit(standard, y[:, v])
        assert model.alphas[v] == pytest.approx(search.best_params_["alpha"])
        expected = search.predict((new - x.mean(0)) / x.std(0))
        np.testing.assert_allclose(model.predict(new)[:, v], expected, rtol=1e-6, atol=1e-8)
    assert len(np.unique(model.alphas)) > 2


@pytest.mark.parametrize("n_features", [12, 150])
def test_weights_solve_the_normal_equations(n_features):
    x, y = problem(60, n_features)
    model = fit_ridge(x, y, alphas=ALPHAS)
    z = (x - x.mean(0)) / x.std(0)
    for v in range(y.shape[1]):
        gradient = z.T @ (z @ model.coefficients[:, v] - (y[:, v] - y[:, v].mean()))
        np.testing.assert_allclose(gradient, -model.alphas[v] * model.coefficients[:, v], atol=1e-7)


def test_factored_weights_predict_as_multiplied_ones_do():
    x, y = problem(30, 400)
    wide = np.tile(y, 20)
    factored = fit_ridge(x, wide, alphas=ALPHAS)
    assert factored.basis is not None
    plain = fit_ridge(x, y[:, :1], alphas=ALPHAS)
    np.testing.assert_allclose(factored.predict(x)[:, :1], plain.predict(x), rtol=1e-8)
    np.testing.assert_allclose(
        (x - factored.mean) / factored.scale @ factored.coefficients + factored.intercept,
        factored.predict(x),
        rtol=1e-8,
    )


@pytest.mark.parametrize("n_features", [40, 600], ids=["primal", "kernel"])
def test_single_precision_predicts_as_double_does(n_features):
    x, y = problem(200, n_features)
    double = fit_ridge(x, y)
    single = fit_ridge(x.astype(np.float32), y.astype(np.float32))
    assert single.predict(x).dtype == np.float32
    same = np.isclose(double.alphas, single.alphas, rtol=1e-3)
    assert same.mean() > 0.8
    np.testing.assert_allclose(single.predict(x)[:, same], double.predict(x)[:, same], atol=2e-3)


def test_rows_of_one_image_share_a_fold_and_folds_follow_the_seed():
    image = np.repeat(np.arange(30), 3)
    folds = image_folds(image, n_folds=5, seed=0)
    assert all(len(set(folds[image == i])) == 1 for i in range(30))
    assert np.bincount(folds).tolist() == [18] * 5
    assert np.array_equal(folds, image_folds(image, n_folds=5, seed=0))
    assert not np.array_equal(folds, image_folds(image, n_folds=5, seed=1))


def test_repeats_in_other_folds_would_choose_too_small_a_penalty():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((30, 200)), rng.standard_normal((30, 8))
    rows = np.repeat(np.arange(30), 3)
    apart = fit_ridge(x[rows], y[rows], alphas=ALPHAS)
    together = fit_ridge(x[rows], y[rows], alphas=ALPHAS, image=rows)
    assert np.median(together.alphas) > 100 * np.median(apart.alphas)


def test_a_constant_feature_gets_no_weight_and_the_backend_stays():
    x, y = problem(50, 8)
    x[:, 3] = 0.1
    backend = get_backend().name
    model = fit_ridge(x, y, alphas=ALPHAS)
    assert get_backend().name == backend == "numpy"
    np.testing.assert_allclose(model.coefficients[3], 0, atol=1e-12)
    assert np.isfinite(model.predict(x)).all()


def test_fit_refuses_what_it_cannot_fit():
    x, y = problem(20, 4)
    with pytest.raises(ValueError, match="n_folds is 30; 20 images allow 2 to 20"):
        fit_ridge(x, y, n_folds=30)
    with pytest.raises(ValueError, match="alphas must be positive"):
        fit_ridge(x, y, alphas=[0.0, 1.0])
    y[3, 2] = np.nan
    with pytest.raises(ValueError, match="responses hold NaN"):
        fit_ridge(x, y)
    with pytest.raises(ValueError, match="features have 5 columns; the model was fitted on 4"):
        fit_ridge(x, x).predict(np.ones((2, 5)))

"""Controls on a phantom: the ceiling is the true one, the truth reaches it, and shuffled labels score nothing.

The truth that was simulated is opened here, and by nothing that fits or scores.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from data.encoders.gabor import GaborEncoder
from data.features import compute_features
from data.phantom import PhantomConfig, read_truth, write_phantom
from data.preprocess import Samples, samples
from data.splits import split_of
from data.store import PooledStore
from foundation.closed_form.token_features import ridge_features
from foundation.evaluation.baselines.ridge import fit_ridge
from foundation.evaluation.measured import measured_part
from foundation.evaluation.metrics import patternwise_r, voxelwise_r
from foundation.evaluation.permutation import draw_orders
from foundation.evaluation.score import Measured, Row, score

N_SHUFFLES, N_PERMUTATIONS = 16, 20


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """One phantom subject as the pipeline sees it, and what was simulated of its test images."""

    store: PooledStore
    measured: Measured
    train: Samples
    rows: np.ndarray
    signal: np.ndarray
    ncsnr: np.ndarray

    def scores(self, prediction: np.ndarray, *, seed: int = 0) -> dict[tuple[str, ...], Row]:
        found = score(
            {"system": prediction.astype(np.float32)},
            self.measured,
            training_mean=self.train.responses.mean(0),
            rng=np.random.default_rng(seed),
        )
        return {(r.system, r.axis, r.target, r.metric): r for r in found.rows if r.roi == "all"}


def make_world(directory: Path, *, seed: int) -> World:
    """Sessions as long as NSD's: standardising each by its own statistics costs little of the ceiling, at 300 trials a
    session up to 2 %, whatever the number of sessions.
    """
    path = directory / "phantom.zarr"
    write_phantom(path, PhantomConfig(subjects=1, sessions=4, trials_per_session=750, voxels=200, seed=seed))
    store = PooledStore.open(path, writable=True)
    subject, split = store.subject("subj01"), split_of(store)
    measured, rows = measured_part(subject, split)
    truth = read_truth(path).subjects["subj01"]
    place = {int(row): k for k, row in enumerate(truth.image)}
    return World(
        store=store,
        measured=measured,
        train=samples(subject, split, "train"),
        rows=rows,
        signal=truth.signal[[place[int(row)] for row in rows]],
        ncsnr=truth.ncsnr,
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("controls"), seed=0)


def assert_true_ceiling(world: World) -> None:
    truth = world.ncsnr**2 / (world.ncsnr**2 + np.mean(1 / world.measured.n_repeats))
    assert world.measured.ceiling is not None
    assert world.measured.ceiling.mean() == pytest.approx(truth.mean(), rel=0.02)
    assert np.sqrt(world.measured.ceiling).mean() == pytest.approx(np.sqrt(truth).mean(), rel=0.02)


def test_the_ceiling_is_within_two_percent_of_the_truth(world):
    assert_true_ceiling(world)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_the_ceiling_of_other_phantoms_is_within_two_percent_of_the_truth(tmp_path, seed):
    assert_true_ceiling(make_world(tmp_path, seed=seed))


def oracle(world: World) -> np.ndarray:
    """The true signal in the unit of standardised trials: their variance is 1, the signal's the ceiling of trials."""
    return world.signal * np.sqrt(world.ncsnr**2 / (world.ncsnr**2 + 1))


@pytest.mark.parametrize("target", ["trial", "mean"])
@pytest.mark.parametrize(("axis", "metric"), [("voxel", "r"), ("pattern", "r"), ("voxel", "mse"), ("pattern", "mse")])
def test_the_true_signal_reaches_the_ceiling_within_the_interval(world, target, axis, metric):
    """The ceiling of patterns comes from the same images' repeats and has an interval of its own."""
    rows = world.scores(oracle(world))
    found, ceiling = rows["system", axis, target, metric], rows["ceiling", axis, target, metric]
    own = 0.0 if ceiling.low is None else (ceiling.high - ceiling.low) / 2
    assert abs(found.value - ceiling.value) <= np.hypot((found.high - found.low) / 2, own)
    assert (found.high - found.low) / 2 < 0.1 * ceiling.value


@pytest.mark.parametrize("target", ["trial", "mean"])
def test_the_true_signal_explains_all_that_is_explainable_but_for_the_bias_of_a_mean_of_ratios(world, target):
    """Noise in r^2 and in a low ceiling that it is divided by lifts the mean ratio; clipped, it can't reach 1."""
    rows = world.scores(oracle(world))
    unclipped, clipped = (rows["system", "voxel", target, m].value for m in ("r2_ceiling_unclipped", "r2_ceiling"))
    assert unclipped == pytest.approx(1, abs=0.1)
    assert 0.8 < clipped < 1


@pytest.fixture(scope="module")
def fitted(world) -> tuple[np.ndarray, np.ndarray]:
    """Ridge on the true labels "image voxel", and on as many shuffles of them "shuffle image voxel"."""
    compute_features(world.store, GaborEncoder(), name="gabor")
    tokens, train = world.store.tokens("gabor"), world.train
    rng = np.random.default_rng(0)
    shuffles = [train.responses[rng.permutation(len(train.responses))] for _ in range(N_SHUFFLES)]
    model = fit_ridge(ridge_features(tokens, train.image), np.concatenate([train.responses, *shuffles], axis=1))
    true, *shuffled = np.split(model.predict(ridge_features(tokens, world.rows)), N_SHUFFLES + 1, axis=1)
    return true, np.stack(shuffled)


@pytest.mark.parametrize(("axis", "of_axis"), [("voxel", voxelwise_r), ("pattern", patternwise_r)])
def test_a_fit_on_shuffled_labels_scores_zero_within_the_interval_over_shuffles(world, fitted, axis, of_axis):
    """Voxels share their noise and the shuffle, so one shuffled fit has a direction of its own, which correlates by
    chance and which an interval over images, given the fit, doesn't cover. Over shuffles it averages to zero.
    """
    true, shuffled = fitted
    r = np.array([of_axis(x, world.measured.mean).mean() for x in shuffled])
    half = stats.t.ppf(0.975, N_SHUFFLES - 1) * r.std(ddof=1) / np.sqrt(N_SHUFFLES)
    assert abs(r.mean()) <= half
    real = world.scores(true)["system", axis, "mean", "r"].value
    assert half < 0.1 * real
    assert np.abs(r).max() < 0.5 * real


@pytest.fixture(scope="module")
def permuted(world, fitted) -> list[dict[tuple[str, ...], Row]]:
    """Scores of the true fit's predictions, given to other images."""
    true, _ = fitted
    orders = draw_orders(len(true), N_PERMUTATIONS, rng=np.random.default_rng(1))
    return [world.scores(true[order]) for order in orders]


@pytest.mark.parametrize("target", ["trial", "mean"])
@pytest.mark.parametrize("axis", ["voxel", "pattern"])
def test_predictions_of_other_images_score_zero_within_the_interval(world, fitted, permuted, axis, target):
    """As many of the 20 miss 0 as an interval of 95 % lets: more than 4 only three times in a thousand."""
    rows = [scores["system", axis, target, "r"] for scores in permuted]
    assert sum(not row.low <= 0 <= row.high for row in rows) <= 4
    own = world.scores(fitted[0])["system", axis, target, "r"]
    assert own.low > max(row.high for row in rows)

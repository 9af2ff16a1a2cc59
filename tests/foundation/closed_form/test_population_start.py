"""A new subject's closed-form paths: the solver against numpy, a planted population, and what may see which images."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.preprocess import Samples
from foundation.closed_form import population_start as module
from foundation.closed_form.kernel_ridge import ALPHAS
from foundation.closed_form.population_start import (
    Members,
    add_landmarks,
    own_subjects,
    population_start,
    predicted_landmarks,
    settle_shares,
    solve_population,
)
from foundation.evaluation.metrics import voxelwise_r
from foundation.model.encoding_model import EncodingModel
from foundation.model.population import PopulationPath
from tests.foundation.closed_form.planted import SHAPE, Planted, rows_of
from tests.tiny_store import TINY_BACKBONE

NEW = "new"
N_VOXELS = {"old1": 40, "old2": 25, NEW: 9}
N_TRAIN = 24
FEW = rows_of("train")[:N_TRAIN]


@pytest.fixture
def model(planted: Planted) -> EncodingModel:
    """A backbone of two subjects whose voxels are far from linear in the tokens, and a fresh adapter for a third."""
    torch.manual_seed(0)
    parcels = {name: torch.arange(n) // 4 for name, n in N_VOXELS.items()}
    made = EncodingModel(SHAPE, TINY_BACKBONE, parcels)
    cls, patch = planted.tokens.read(rows_of("train"))
    made.streams.set_statistics([(torch.from_numpy(cls).float(), torch.from_numpy(patch).float())])
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "A_log" not in name and NEW not in name:
                parameter += 0.3 * torch.randn(parameter.shape)
    return made.eval().requires_grad_(False)


@torch.no_grad()
def known(model: EncodingModel, planted: Planted, rows: np.ndarray) -> np.ndarray:
    """What the backbone predicts for every voxel of its own two subjects, each in units of its own spread."""
    cls, patch = (torch.from_numpy(tokens).float() for tokens in planted.tokens.read(rows))
    return np.hstack([model.predict(cls, patch, name).numpy() for name in ("old1", "old2")])


def mixtures_of_known(model: EncodingModel, planted: Planted, rows: np.ndarray) -> np.ndarray:
    """Responses of the new subject without noise: each voxel a mixture of a few known ones."""
    every = known(model, planted, np.arange(400))
    rng = np.random.default_rng(1)
    weights = np.where(rng.random((every.shape[1], N_VOXELS[NEW])) < 0.1, rng.standard_normal((65, 9)), 0)
    mixed = ((every - every.mean(0)) / every.std(0)) @ weights
    return ((mixed - mixed.mean(0)) / mixed.std(0)).astype(np.float32)[rows]


@pytest.fixture
def made(model: EncodingModel, planted: Planted) -> Callable[..., Samples]:
    """Make samples of the planted new subject."""

    def make(rows: np.ndarray, *, noise: float = 0.3, seed: int = 0) -> Samples:
        truth = mixtures_of_known(model, planted, rows)
        noisy = truth + noise * np.random.default_rng(seed).standard_normal(truth.shape).astype(np.float32)
        return Samples(subject=NEW, image=rows, responses=noisy, n_repeats=np.ones(len(rows), np.float32))

    return make


def start(model: EncodingModel, planted: Planted, train: Samples, validation: Samples, **options) -> Members:
    """Solve, and settle shares beside a network that says nothing but the mean response."""
    solved = population_start(model, NEW, planted.tokens, train, validation, seed=0, **options)
    silent = np.tile(solved.start.mean, (len(validation), 1))
    return settle_shares(model.adapter(NEW), solved, silent, validation)


@torch.no_grad()
def closed_form(model: EncodingModel, planted: Planted, rows: np.ndarray) -> np.ndarray:
    cls, patch = (torch.from_numpy(tokens).float() for tokens in planted.tokens.read(rows))
    return model.closed_form(cls, patch, NEW).numpy()


# -- the solver --------------------------------------------------------------------------------------------------------


def ridge_by_hand(predicted: np.ndarray, new: np.ndarray, responses: np.ndarray) -> np.ndarray:
    """Kernel ridge on centred predictions, each voxel's penalty by the whole hat matrix; less the mean response."""
    predicted, new, n = predicted - predicted.mean(0), new - predicted.mean(0), len(predicted)
    scale = np.trace(predicted @ predicted.T) / n
    kernel, of_new = predicted @ predicted.T / scale, new @ predicted.T / scale
    centred = responses - responses.mean(0)
    errors, found = [], []
    for alpha in ALPHAS:
        solved = np.linalg.inv(kernel + alpha * np.eye(n))
        hat = 1 / n + kernel @ solved
        errors.append(n * np.square(responses - hat @ responses).sum(0) / np.trace(np.eye(n) - hat) ** 2)
        found.append(of_new @ solved @ centred)
    return np.take_along_axis(np.stack(found), np.argmin(errors, axis=0)[None, None], axis=0)[0]


@pytest.mark.parametrize(("n_images", "n_landmarks"), [(60, 8), (20, 90)])
def test_with_a_rank_that_suffices_the_path_is_kernel_ridge_on_the_landmarks(n_images, n_landmarks):
    rng = np.random.default_rng(0)
    predicted, new = rng.standard_normal((n_images, n_landmarks)) + 3, rng.standard_normal((30, n_landmarks)) + 3
    weights = rng.standard_normal((n_landmarks, 7)) / n_landmarks**0.5
    noise = np.linspace(0.1, 5, 7) * rng.standard_normal((n_images, 7))  # so that penalties differ between voxels
    responses = (predicted @ weights + noise - 2).astype(np.float32)
    path = PopulationPath(7, n_landmarks, 7)
    solve_population(path, predicted.astype(np.float32), responses)
    found = path(torch.from_numpy(new.astype(np.float32)))
    np.testing.assert_allclose(found, ridge_by_hand(predicted, new, responses), rtol=1e-3, atol=1e-3)


def test_a_lower_rank_reads_the_directions_that_carry_most():
    rng = np.random.default_rng(0)
    predicted = rng.standard_normal((80, 12)).astype(np.float32)
    weights = rng.standard_normal((12, 2)) @ rng.standard_normal((2, 30))  # the voxels have two directions
    responses = (predicted @ weights + 0.01 * rng.standard_normal((80, 30))).astype(np.float32)
    two, full = PopulationPath(30, 12, 2), PopulationPath(30, 12, 30)
    for path in (two, full):
        solve_population(path, predicted, responses)
    new = torch.from_numpy(rng.standard_normal((50, 12)).astype(np.float32))
    np.testing.assert_allclose(two(new), full(new), atol=0.05)
    assert full(new).std() > 1


def test_landmarks_that_never_vary_predict_nothing():
    path = PopulationPath(4, 6, 3)
    responses = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    solve_population(path, np.full((20, 6), 2.5, np.float32), responses)
    assert (path(torch.full((5, 6), 2.5)) == 0).all()


# -- landmarks ---------------------------------------------------------------------------------------------------------


def test_landmarks_are_drawn_evenly_from_the_others_each_voxel_once(model, monkeypatch):
    monkeypatch.setattr(module, "N_LANDMARKS", 30)
    path = add_landmarks(model, NEW, seed=0)
    number, voxel = path.landmark.T.numpy()
    assert np.bincount(number).tolist() == [15, 15]
    for of_subject, name in enumerate(("old1", "old2")):
        voxels = voxel[number == of_subject]
        assert len(set(voxels)) == 15
        assert voxels.max() < N_VOXELS[name]
    other = add_landmarks(model, NEW, seed=1)
    assert not torch.equal(other.landmark, path.landmark)
    assert torch.equal(add_landmarks(model, NEW, seed=0).landmark, path.landmark)


def test_all_voxels_are_landmarks_where_there_are_few(model):
    path = add_landmarks(model, NEW, seed=0)
    assert path.landmark.tolist() == [[0, v] for v in range(40)] + [[1, v] for v in range(25)]


def test_a_subject_in_the_middle_is_no_landmark_of_its_own_and_the_numbers_are_the_models(model):
    path = add_landmarks(model, "old2", seed=0)
    assert own_subjects(model, "old2") == ["old1", NEW]
    assert path.landmark[:, 0].unique().tolist() == [0, 2]


def test_a_subject_without_others_has_no_population(planted):
    alone = EncodingModel(SHAPE, TINY_BACKBONE, {NEW: torch.arange(9) // 4})
    with pytest.raises(ValueError, match="no subject beside 'new' to be its population"):
        add_landmarks(alone, NEW, seed=0)


def test_landmarks_are_predicted_alike_in_batches_of_any_size(model, planted, monkeypatch):
    path = add_landmarks(model, NEW, seed=0)
    expected = known(model, planted, FEW)
    for size in (5, 64):
        monkeypatch.setattr(module, "_BATCH", size)
        np.testing.assert_allclose(predicted_landmarks(model, path, planted.tokens, FEW), expected, atol=1e-4)


# -- the whole start ---------------------------------------------------------------------------------------------------


def test_a_planted_population_is_learnt_from_few_images_that_tell_ridge_on_tokens_little(model, planted, made):
    members = start(model, planted, made(FEW), made(rows_of("validation")))
    rows = rows_of("test")
    truth = mixtures_of_known(model, planted, rows)
    found = voxelwise_r(closed_form(model, planted, rows), truth).mean()
    cls, patch = (torch.from_numpy(tokens).float() for tokens in planted.tokens.read(rows))
    by_tokens = voxelwise_r(model.adapter(NEW).linear(model.linear_features(cls, patch)).numpy(), truth).mean()
    assert found > 0.8
    assert by_tokens < 0.5
    assert members.validation_r["population"] > 0.2 + max(members.validation_r[name] for name in ("whole", "field"))
    assert members.share["population"] > 0.5
    assert members.share["network"] == 0


def test_members_of_a_subject_without_others_are_the_paths_two_terms(planted, made):
    torch.manual_seed(0)
    alone = EncodingModel(SHAPE, TINY_BACKBONE, {NEW: torch.arange(9) // 4}).eval()
    members = start(alone, planted, made(rows_of("train")), made(rows_of("validation")))
    assert members.share.keys() == members.validation_r.keys() == {"whole", "field", "network"}
    assert alone.adapter(NEW).population is None


def test_the_prediction_is_the_mean_response_and_each_member_by_its_share(model, planted, made, monkeypatch):
    seen, settle = [], module.shares_of

    def spy(members: list[np.ndarray], responses: np.ndarray, **options) -> np.ndarray:
        shares = settle(members, responses, **options)
        seen.append((np.stack(members), shares))
        return shares

    monkeypatch.setattr(module, "shares_of", spy)
    train, validation = made(rows_of("train")[:100]), made(rows_of("validation"))
    members = start(model, planted, train, validation)
    ((parts, shares),) = seen
    expected = train.responses.mean(0) + (shares[:, None] * parts).sum(0)
    np.testing.assert_allclose(closed_form(model, planted, validation.image), expected, atol=1e-4)
    assert list(members.share) == ["whole", "field", "population", "network"]
    np.testing.assert_allclose(list(members.share.values()), shares.mean(1), rtol=1e-5)
    alone = [np.nan_to_num(voxelwise_r(part, validation.responses)).mean() for part in parts]
    np.testing.assert_allclose(list(members.validation_r.values()), alone, rtol=1e-5)


def test_a_network_that_knows_the_responses_gets_most_of_the_prediction(model, planted, made):
    train, validation = made(FEW), made(rows_of("validation"))
    solved = population_start(model, NEW, planted.tokens, train, validation, seed=0)
    adapter, network = model.adapter(NEW), mixtures_of_known(model, planted, validation.image).astype(np.float32)
    members = settle_shares(adapter, solved, network, validation)
    assert members.share["network"] > 0.8
    assert float(adapter.network_share.max()) <= module.LARGEST_NETWORK_SHARE
    rows = validation.image
    mixed = adapter.mixed(torch.from_numpy(network), torch.from_numpy(closed_form(model, planted, rows))).numpy()
    assert np.abs(mixed - network).mean() < 0.2 * network.std()


def test_validation_images_settle_shares_by_repeats_and_nothing_else(model, planted, made):
    train, validation = made(FEW), made(rows_of("validation"))

    def found(held_out: Samples) -> dict[str, torch.Tensor]:
        model.adapter(NEW).population = None
        start(model, planted, train, held_out)
        return {key: value.clone() for key, value in model.adapter(NEW).state_dict().items()}

    plain = found(validation)
    shares = {"linear.weight_whole", "linear.weight_field", "linear.bias", "population.weight", "network_share"}
    repeats = np.where(np.arange(80) % 2, 9, 1).astype(np.float32)
    for other in (replace(validation, responses=-validation.responses), replace(validation, n_repeats=repeats)):
        after = found(other)
        changed = {key for key in plain if not torch.equal(plain[key].nan_to_num(), after[key].nan_to_num())}
        assert "population.weight" in changed
        assert changed <= shares


def test_voxels_that_no_member_predicts_get_their_mean_response(model, planted, made):
    train, validation = made(FEW), made(rows_of("validation"))
    opposite = -mixtures_of_known(model, planted, validation.image)
    members = start(model, planted, train, replace(validation, responses=opposite))
    assert members.share["population"] < 0.05
    found = closed_form(model, planted, rows_of("test"))
    assert np.sqrt(np.square(found - train.responses.mean(0)).mean()) < 0.1


def test_landmarks_predictions_that_are_handed_in_are_those_that_are_used(model, planted, made):
    train, validation = made(FEW), made(rows_of("validation"))
    asked: list[np.ndarray] = []

    def handed(path: PopulationPath, rows: np.ndarray) -> np.ndarray:
        asked.append(rows)
        return known(model, planted, rows)

    start(model, planted, train, validation, landmarks=handed)
    given = closed_form(model, planted, rows_of("test"))
    assert [rows.tolist() for rows in asked] == [train.image.tolist(), validation.image.tolist()]
    start(model, planted, train, validation)
    np.testing.assert_allclose(closed_form(model, planted, rows_of("test")), given, atol=1e-3)


def test_the_others_and_the_backbone_stay_as_they_were(model, planted, made):
    before = {key: value.clone() for key, value in model.state_dict().items() if NEW not in key}
    start(model, planted, made(FEW), made(rows_of("validation")))
    after = model.state_dict()
    torch.testing.assert_close({key: after[key] for key in before}, before, rtol=0, atol=0, equal_nan=True)


def test_too_few_training_images_are_refused(model, planted, made):
    with pytest.raises(ValueError, match="new has 2 training images; the closed-form path needs 3 or more"):
        start(model, planted, made(FEW[:2]), made(rows_of("validation")))

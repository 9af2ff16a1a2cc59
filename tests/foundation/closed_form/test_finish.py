"""What validation images settle: the share that a right network gets, and noise by which samples cover new trials."""

import numpy as np
import pytest
import torch

from data.preprocess import Samples, samples, standardised_trials
from data.splits import Part, Split, split_of
from data.store import SubjectStore
from foundation.closed_form import finish as module
from foundation.closed_form.finish import finish_adapter, predictions
from foundation.closed_form.linear_start import linear_start
from foundation.evaluation.sampling import coverage
from foundation.model.encoding_model import EncodingModel
from tests.foundation.closed_form.planted import NOISE_SD, SUBJECT, Planted, fresh_model, rows_of


def samples_of(planted: Planted, part: str, n_sessions: int | None = None) -> Samples:
    return samples(planted.store.subject(SUBJECT), split_of(planted.store), part, n_sessions=n_sessions)


def finish(planted: Planted, model: EncodingModel, *, n_sessions: int | None = None) -> dict[str, torch.Tensor]:
    """Finish `SUBJECT`'s adapter, and return what was settled."""
    held_out = samples_of(planted, "validation", n_sessions)
    subject, split = planted.store.subject(SUBJECT), split_of(planted.store)
    finish_adapter(model, subject, planted.tokens, split, held_out, seed=0, n_sessions=n_sessions)
    adapter = model.adapter(SUBJECT)
    return {"share": adapter.network_share.clone(), "noise": adapter.noise_sd.clone()}


@pytest.fixture
def solved(planted: Planted) -> EncodingModel:
    """A model whose path is solved and whose network is untrained."""
    model = fresh_model(planted)
    linear_start(model, SUBJECT, planted.tokens, samples_of(planted, "train"), seed=0)
    return model


@pytest.fixture
def alone(planted: Planted) -> EncodingModel:
    """An untrained network without a path, whose latent's draws vary a good deal."""
    model = fresh_model(planted)
    with torch.no_grad():
        model.vae.to_latent.bias[3:] = 2.0
    return model


def trials_of(planted: Planted, part: str) -> tuple[np.ndarray, np.ndarray]:
    """A part's trials, and the place of each one's image among the part's."""
    trials, rows = standardised_trials(planted.store.subject(SUBJECT), split_of(planted.store)), rows_of(part)
    keep = np.isin(trials.image, rows)
    return trials.responses[keep], trials.image[keep] - rows[0]


@pytest.mark.parametrize("kind", ["solved", "alone"])
def test_samples_cover_new_trials_as_often_as_they_say(planted, kind, request):
    model, (trials, image) = request.getfixturevalue(kind), trials_of(planted, "test")
    finish(planted, model)
    cls, patch = (torch.from_numpy(tokens).float() for tokens in planted.tokens.read(rows_of("test")))
    with torch.inference_mode():
        drawn = model.sample(cls, patch, SUBJECT, 99, generator=torch.Generator().manual_seed(0)).numpy()
    for level in (0.5, 0.9):
        assert coverage(drawn, trials, level=level, image=image).mean() == pytest.approx(level, abs=0.04)


def test_what_the_latents_draws_vary_is_no_noise_too(planted, alone):
    settled = finish(planted, alone)
    network, _ = predictions(alone, SUBJECT, planted.tokens, rows_of("validation"))
    trials, image = trials_of(planted, "validation")
    left = np.square(trials - network[image]).mean()
    cls, patch = (torch.from_numpy(tokens).float() for tokens in planted.tokens.read(rows_of("validation")))
    torch.manual_seed(1)
    rows = {SUBJECT: slice(0, len(cls))}
    with torch.inference_mode():
        drawn = torch.stack([alone(cls, patch, rows, sample=True).subjects[SUBJECT].voxel for _ in range(60)])
    varied = float(drawn.var(0).mean())
    assert varied > 0.02
    assert float(settled["noise"].square().mean()) == pytest.approx(left - varied, rel=0.02)


def test_an_untrained_network_has_next_to_no_share_beside_a_solved_path(planted, solved):
    assert finish(planted, solved)["share"].max() < 0.1


def test_a_network_that_is_right_has_most_of_the_prediction(planted, solved, monkeypatch):
    def right(model, subject, tokens, rows):
        truth = (planted.truth[rows] / np.sqrt(1 + NOISE_SD**2)).astype(np.float32)  # trials have variance 1
        return truth, 0.5 * truth

    monkeypatch.setattr(module, "predictions", right)
    found = finish(planted, solved)
    assert found["share"].min() > 0.8
    np.testing.assert_allclose(found["noise"], NOISE_SD / np.sqrt(1 + NOISE_SD**2), rtol=0.15)


def test_without_a_path_the_network_predicts_alone(planted, alone):
    assert (finish(planted, alone)["share"] == 1).all()
    assert alone.adapter(SUBJECT).alone


def test_trials_of_later_sessions_settle_nothing(planted, solved, monkeypatch):
    expected, responses = finish(planted, solved, n_sessions=1), SubjectStore.responses

    def spoilt(subject: SubjectStore, trials: np.ndarray) -> np.ndarray:
        late = (subject.session[trials] > 1) & np.isin(subject.image[trials], rows_of("validation"))
        return np.where(late[:, None], np.float32(1e3), responses(subject, trials))

    monkeypatch.setattr(SubjectStore, "responses", spoilt)
    torch.testing.assert_close(finish(planted, solved, n_sessions=1), expected, rtol=0, atol=0)
    assert finish(planted, solved)["noise"].min() > 100  # all sessions: they count, then


@pytest.mark.parametrize("n_images", [1, 2])
def test_of_one_or_two_validation_images_share_and_noise_are_finite_and_mostly_those_of_all_voxels(
    planted, solved, monkeypatch, n_images
):
    select = Split.select

    def few(split: Split, image: np.ndarray, *parts: Part) -> np.ndarray:
        left = rows_of("validation")[n_images:]
        return select(split, image, *parts) & ~np.isin(image, left)

    monkeypatch.setattr(Split, "select", few)
    assert len(samples_of(planted, "validation")) == n_images
    found = finish(planted, solved)
    assert float(found["share"].std()) < 0.05
    assert float(found["noise"].min()) > 0.1
    assert float(found["noise"].max()) < 2


def test_finishing_twice_settles_the_same(planted, solved):
    torch.testing.assert_close(finish(planted, solved), finish(planted, solved), rtol=0, atol=0)


def test_predictions_are_the_networks_and_the_paths_alone(planted, solved):
    network, linear = predictions(solved, SUBJECT, planted.tokens, rows_of("test"))
    cls, patch = (torch.from_numpy(tokens).float() for tokens in planted.tokens.read(rows_of("test")))
    adapter = solved.adapter(SUBJECT)
    with torch.inference_mode():
        for share, expected in ((1.0, network), (0.0, linear)):
            adapter.network_share.fill_(share)
            found = solved.predict(cls, patch, SUBJECT)
            np.testing.assert_allclose(found, expected, atol=1e-4)


def test_what_is_told_are_the_scores_of_the_mixture_and_its_halves(planted, solved, monkeypatch):
    held_out = samples_of(planted, "validation")
    subject, split = planted.store.subject(SUBJECT), split_of(planted.store)
    told = finish_adapter(solved, subject, planted.tokens, split, held_out, seed=0)
    network, linear = predictions(solved, SUBJECT, planted.tokens, held_out.image)
    share = solved.adapter(SUBJECT).network_share.numpy()
    for found, prediction in (
        (told.network, network),
        (told.closed_form, linear),
        (told.mixture, share * network + (1 - share) * linear),
    ):
        r = [np.corrcoef(a, b)[0, 1] for a, b in zip(prediction.T, held_out.responses.T, strict=True)]
        assert found == pytest.approx(np.mean(r), abs=1e-4)
    assert told.share == pytest.approx(share.mean())

"""Models beside baselines on one subject: the same sessions for all, test images for none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.preprocess import Samples, samples, standardised_trials
from data.splits import split_of
from data.store import PooledStore
from foundation.evaluation import evaluated
from foundation.evaluation.baselines import BASELINES, predict
from foundation.evaluation.compare import headline, score_subject
from foundation.evaluation.figures import bars_per_roi
from foundation.evaluation.measured import measured_part
from foundation.evaluation.metrics import voxelwise_r
from foundation.evaluation.model_outputs import model_prediction
from foundation.evaluation.score import Row, Scores, merge_scores
from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel
from tests.tiny_store import ENCODER, N_IMAGES, N_VOXELS, TINY_BACKBONE, make_tiny_store


@pytest.fixture
def store(tiny_store: Path) -> PooledStore:
    return PooledStore.open(tiny_store)


@pytest.fixture
def model() -> EncodingModel:
    torch.manual_seed(0)
    parcels = {name: torch.arange(n) // 4 for name, n in N_VOXELS.items()}
    return EncodingModel(TokenShape(depth=2, patch=16, width=6), TINY_BACKBONE, parcels).eval()


def scored(store: PooledStore, models: dict[str, EncodingModel], **options) -> Scores:
    subject, tokens = store.subject("subj05"), store.tokens(ENCODER)
    given = {"pictures": store.picture_digests(), "n_bootstraps": 20} | options
    return score_subject(models, subject, tokens, split_of(store), **given)


def value(scores: Scores, system: str, metric: str = "r", *, target: str = "mean", roi: str = "all") -> float | None:
    (found,) = [
        row.value
        for row in scores.rows
        if (row.system, row.axis, row.metric, row.target, row.roi) == (system, "voxel", metric, target, roi)
    ]
    return found


def test_ridge_learns_from_the_training_images_of_the_first_sessions_alone(store, monkeypatch):
    seen: list[Samples] = []

    def spy(name, subject, tokens, train: Samples, rows, *, seed: int, **_):
        seen.append(train)
        return predict(name, tokens, train, rows, seed=seed)

    monkeypatch.setattr(evaluated, "kept_prediction", spy)
    scored(store, {}, n_sessions=2)
    (train,) = seen
    subject, split = store.subject("subj05"), split_of(store)
    early = np.isin(subject.session, (1, 2)) & split.select(subject.image, "train")
    assert set(train.image) == set(subject.image[early])
    trials = standardised_trials(subject, split, n_sessions=2)
    first = subject.image == train.image[0]
    np.testing.assert_allclose(train.responses[0], trials.responses[early & first].mean(0), rtol=1e-5)


@pytest.mark.parametrize("name", BASELINES)
def test_later_sessions_test_and_validation_responses_do_not_reach_a_baseline(store, tmp_path, name):
    make_tiny_store(tmp_path / "spoilt.zarr", spoilt=("validation", "test"))
    spoilt = PooledStore.open(tmp_path / "spoilt.zarr")
    rows = np.arange(5)
    found = []
    for one in (store, spoilt):
        train = samples(one.subject("subj05"), split_of(one), "train", n_sessions=1)
        found.append(predict(name, one.tokens(ENCODER), train, rows, seed=0))
    np.testing.assert_array_equal(*found)


def never(*_, **__):
    raise AssertionError("fitted all the same")


def test_what_ridge_learns_from_is_audited_before_it_is_fitted(store, monkeypatch):
    """A test picture stands among the training images, under another identity."""
    monkeypatch.setattr(evaluated, "kept_prediction", never)
    split, image = split_of(store), store.subject("subj05").image
    train, test = (int(image[split.select(image, part)][0]) for part in ("train", "test"))
    message = rf"leakage audit: 1 found: images 'image0?{train}' \(train\) and 'image0?{test}' \(test\) are one picture"
    with pytest.raises(ValueError, match=message):
        scored(store, {}, pictures={train: "sha256:same", test: "sha256:same"})


def test_samples_of_held_out_images_do_not_reach_ridge(store, monkeypatch):
    monkeypatch.setattr(evaluated, "kept_prediction", never)
    given = samples(store.subject("subj05"), split_of(store), "test")
    monkeypatch.setattr(evaluated, "samples", lambda *_, **__: given)
    with pytest.raises(ValueError, match="leakage audit: 1 found: subj05: train samples show 8 images of another part"):
        scored(store, {})


def test_trials_standardised_by_what_they_test_are_not_scored(store, monkeypatch):
    subject, split = store.subject("subj05"), split_of(store)
    honest = standardised_trials(subject, split, n_sessions=1)
    for change, message in (
        ({"later_standardised_by": honest.image}, "trials of later sessions are standardised by 8 images"),
        ({"standardised_by": None}, "trials of the first N sessions are standardised by images of unknown origin"),
    ):
        monkeypatch.setattr(
            "foundation.evaluation.measured.standardised_trials", lambda *_, c=change, **__: replace(honest, **c)
        )
        with pytest.raises(ValueError, match=f"leakage audit: 1 found: subj05: {message}"):
            scored(store, {}, n_sessions=1)


def test_ridge_finds_planted_tuning_and_beats_a_model_that_learned_nothing(store, model):
    scores = scored(store, {"untrained": model})
    assert {row.system for row in scores.rows} == {"untrained", "ridge", "zero", "mean", "ceiling"}
    ridge, untrained, ceiling = (value(scores, system) for system in ("ridge", "untrained", "ceiling"))
    assert ridge is not None
    assert untrained is not None
    assert ceiling is not None
    assert max(0.3, untrained) < ridge


def test_an_oracle_reaches_what_the_noise_allows_and_the_same_score_twice(store, monkeypatch, model):
    subject, split = store.subject("subj05"), split_of(store)
    measured, rows = measured_part(subject, split)
    truth = np.stack([measured.trials[measured.image == i].mean(0) for i in range(len(rows))])
    monkeypatch.setattr(evaluated, "model_prediction", lambda *_: truth.astype(np.float32))
    scores = [scored(store, {"oracle": model}) for _ in range(2)]
    assert value(scores[0], "oracle") == pytest.approx(1)
    assert value(scores[0], "oracle", "mse") == pytest.approx(0, abs=1e-6)
    assert scores[0] == scores[1]


def test_a_models_prediction_is_its_forward_pass_in_the_order_of_the_rows(store, model):
    tokens, rows = store.tokens(ENCODER), np.array([59, 3, 3, 17])
    cls, patch = tokens.read(rows)
    with torch.inference_mode():
        out = model(torch.from_numpy(cls).float(), torch.from_numpy(patch).float(), {"subj05": slice(0, 4)})
    expected = out.subjects["subj05"].voxel.numpy()
    np.testing.assert_allclose(model_prediction(model, tokens, "subj05", rows), expected, rtol=1e-4, atol=1e-5)


def test_baselines_stand_in_the_scores_by_their_names(store):
    scores = scored(store, {}, baselines=("ridge", "spatial"))
    assert {row.system for row in scores.rows} == {"ridge", "spatial", "zero", "mean", "ceiling"}


def test_a_baseline_that_does_not_exist_or_whose_name_is_taken_is_refused(store, model):
    with pytest.raises(
        ValueError, match=r"there is no baseline 'lasso'; there are ridge, banded-ridge, cls-probe, spa"
    ):
        scored(store, {}, baselines=("ridge", "lasso"))
    with pytest.raises(ValueError, match="a model can't be named 'ridge' beside the baseline of that name"):
        scored(store, {"ridge": model})


def test_the_test_trials_are_all_repeats_of_the_test_images_whatever_the_sessions(store):
    subject, split = store.subject("subj05"), split_of(store)
    for n_sessions in (1, None):
        measured, rows = measured_part(subject, split, n_sessions=n_sessions)
        assert len(rows) == N_IMAGES["test"]
        assert (split.parts[rows] == "test").all()
        np.testing.assert_array_equal(rows[measured.image], subject.image[split.select(subject.image, "test")])
        assert measured.normalisation == "session-standardised"
        assert measured.ceiling is not None
        assert measured.ceiling_reason is None
        assert measured.families.keys() == {"early"}


def test_averaged_data_have_no_ceiling_and_no_trial_scores_and_say_why(tmp_path):
    store = make_tiny_store(tmp_path / "averaged.zarr", averaged=True)
    measured, rows = measured_part(store.subject("subj05"), split_of(store))
    assert len(measured.trials) == len(rows) == N_IMAGES["test"]  # rows of one image are averaged on
    assert measured.ceiling is None
    assert "came averaged over repeats" in measured.ceiling_reason
    assert "came averaged over repeats" in measured.trial_reason
    assert "upstream preprocessing: averaged over repeats" in measured.notes
    scores = scored(store, {})
    assert value(scores, "ridge") is not None
    assert value(scores, "ridge", target="trial") is None
    assert value(scores, "ceiling") is None


def test_without_any_repeat_there_is_no_ceiling_and_a_reason(store, monkeypatch):
    subject, split = store.subject("subj05"), split_of(store)
    whole = standardised_trials(subject, split)
    _, first = np.unique(whole.image, return_index=True)
    once = replace(
        whole, image=whole.image[first], responses=whole.responses[first], n_averaged=whole.n_averaged[first]
    )
    monkeypatch.setattr("foundation.evaluation.measured.standardised_trials", lambda *_, **__: once)
    measured, _ = measured_part(subject, split)
    assert measured.ceiling is None
    assert measured.ceiling_reason == "no image was repeated"


def test_a_subject_without_test_images_cannot_be_scored(store):
    split = split_of(store)
    nothing = replace(split, parts=np.where(split.parts == "test", "train", split.parts))
    with pytest.raises(ValueError, match="subj05 saw no test image; it can't be scored on this split"):
        measured_part(store.subject("subj05"), nothing)


def row(**given) -> Row:
    usual = {"system": "ours", "subject": "subj01", "roi": "all", "protocol": "strict", "axis": "voxel"}
    usual |= {"target": "mean", "metric": "r", "value": 0.5, "low": None, "high": None, "n_images": 9, "n_voxels": 9}
    return Row(**(usual | given))


def test_the_headline_is_means_over_subjects_with_baselines_and_ceiling_beside():
    rows = (
        row(value=0.5),
        row(subject="subj02", value=0.3),
        row(roi="early", value=0.9),
        row(subject="subj02", roi="early", value=0.7),
        row(axis="pattern", value=0.2),
        row(metric="mse", value=0.8),
        row(subject="subj02", metric="r2_ceiling", value=0.4),
        row(metric="r2_ceiling", value=None),
        row(metric="r_median", value=0.45),
        row(target="trial", value=0.1),
        row(system="ridge", value=0.7),
        row(system="ridge", roi="early", value=0.6),
        row(system="banded-ridge", value=0.75),
        row(system="ceiling", value=0.9),
        row(system="zero", metric="mse", value=1.0),
    )
    assert headline(Scores(rows=rows, comparisons=()), "ours") == {
        "test/voxel_r": pytest.approx(0.4),
        "test/voxel_r/subject/subj01": 0.5,
        "test/voxel_r/subject/subj02": 0.3,
        "test/voxel_r/roi/early": pytest.approx(0.8),
        "test/voxel_r_ridge": 0.7,
        "test/voxel_r_banded-ridge": 0.75,
        "test/voxel_r_ceiling": 0.9,
        "test/pattern_r": 0.2,
        "test/mse": 0.8,
        "test/r2_ceiling": 0.4,
    }


def test_the_figure_shows_several_subjects_and_systems_even_with_gaps(store, model, tmp_path):
    subjects = [
        score_subject(
            {"ours": model}, store.subject(name), store.tokens(ENCODER), split_of(store), pictures={}, n_bootstraps=20
        )
        for name in ("subj01", "subj02")
    ]
    scores = merge_scores(subjects)
    gaps = replace(scores, rows=tuple(r if r.roi == "all" else replace(r, value=None) for r in scores.rows))
    for name, given in {"whole": scores, "gaps": gaps}.items():
        path = tmp_path / f"{name}.png"
        bars_per_roi(given, path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_ridge_recovers_more_with_more_sessions(store):
    subject, split, tokens = store.subject("subj01"), split_of(store), store.tokens(ENCODER)
    measured, rows = measured_part(subject, split)
    truth = np.stack([measured.trials[measured.image == i].mean(0) for i in range(len(rows))])
    found = []
    for n_sessions in (1, 3):
        train = samples(subject, split, "train", n_sessions=n_sessions)
        found.append(voxelwise_r(predict("ridge", tokens, train, rows, seed=0), truth).mean())
    assert found[0] < found[1]


def test_blocks_that_stand_in_for_sessions_are_told_in_the_notes(tmp_path):
    told = "successive blocks of 200 images, not scan sessions"
    store = make_tiny_store(tmp_path / "blocks.zarr", provenance={"sessions": told})
    measured, _ = measured_part(store.subject("subj01"), split_of(store))
    assert f"sessions: {told}" in measured.notes

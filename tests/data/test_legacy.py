"""What published work does before it scores: z-scores over all trials, test trials included."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from data.legacy import legacy_trials
from data.preprocess import standardised_trials
from data.splits import split_of
from data.store import PooledStore
from tests.tiny_store import make_tiny_store


@pytest.fixture
def store(tmp_path: Path) -> PooledStore:
    return make_tiny_store(tmp_path / "tiny.zarr")


def test_trials_are_z_scored_over_every_trial_of_the_subject(store):
    subject, split = store.subject("subj01"), split_of(store)
    keep = split.select(subject.image, "test")
    found = legacy_trials(subject, split, keep)
    expected = stats.zscore(subject.responses().astype(np.float64), axis=0)
    np.testing.assert_allclose(found.responses, expected[keep], atol=1e-5)
    train = split.select(subject.image, "train")
    np.testing.assert_allclose(found.training_mean, expected[train].mean(0), atol=1e-5)


def test_a_prediction_keeps_its_meaning_in_the_legacy_unit(store):
    """Within a session z-scored trials are linear in session-standardised ones; what converts is the mean slope."""
    subject, split = store.subject("subj01"), split_of(store)
    train = split.select(subject.image, "train")
    strict, session = standardised_trials(subject, split).responses[train], subject.session[train]
    legacy = legacy_trials(subject, split, train)
    slopes = []
    for number in np.unique(session):
        mine = session == number
        fits = [np.polyfit(a, b, 1) for a, b in zip(strict[mine].T, legacy.responses[mine].T, strict=True)]
        slopes.append([slope for slope, _ in fits])
    np.testing.assert_allclose(legacy.converted(np.ones_like(strict[:1]))[0], legacy.training_mean + legacy.scale)
    np.testing.assert_allclose(legacy.scale, np.mean(slopes, axis=0), atol=1e-4)


def test_a_voxel_that_never_varies_is_zero(store, monkeypatch):
    subject, split = store.subject("subj01"), split_of(store)
    whole = subject.responses()
    whole[:, 3] = 0.1
    monkeypatch.setattr(type(subject), "responses", lambda self, trials=None: whole[trials].copy())
    found = legacy_trials(subject, split, split.select(subject.image, "test"))
    assert (found.responses[:, 3] == 0).all()
    assert np.isfinite(found.responses).all()

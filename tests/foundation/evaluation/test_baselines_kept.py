"""Baselines' predictions are fitted once: what is kept is the fresh one, and nothing else is taken for it."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.home import home
from data.preprocess import Samples, samples
from data.splits import split_of
from data.store import PooledStore
from foundation.evaluation.baselines import BASELINES, kept_prediction
from foundation.evaluation.baselines import kept as kept_module
from foundation.evaluation.baselines.kept import kept
from tests.tiny_store import ENCODER

ROWS = np.array([59, 55, 52])


@pytest.fixture
def store(tiny_store: Path) -> PooledStore:
    return PooledStore.open(tiny_store)


@pytest.fixture
def fits(monkeypatch) -> list[str]:
    """Names of the baselines that were fitted."""
    fitted, fit = [], kept_module.predict

    def counted(name: str, *given, **options) -> np.ndarray:
        fitted.append(name)
        return fit(name, *given, **options)

    monkeypatch.setattr(kept_module, "predict", counted)
    return fitted


def training(store: PooledStore) -> Samples:
    return samples(store.subject("subj05"), split_of(store), "train")


def ask(store: PooledStore, name: str = "ridge", **changes) -> np.ndarray:
    given = {
        "subject": store.subject("subj05"),
        "tokens": store.tokens(ENCODER),
        "train": training(store),
        "rows": ROWS,
        "images": split_of(store).ids,
        "pictures": {},
        "seed": 0,
    }
    return kept_prediction(name, **(given | changes))


def files() -> list[Path]:
    return sorted((home() / "cache" / "baselines").iterdir())


@pytest.mark.parametrize("name", BASELINES)
def test_what_is_kept_is_the_fresh_prediction_bit_for_bit(store, fits, name):
    fresh, again = ask(store, name), ask(store, name)
    assert fits == [name]
    assert (fresh.dtype, fresh.shape) == (again.dtype, again.shape)
    np.testing.assert_array_equal(fresh.view(np.uint32), again.view(np.uint32))
    assert [path.suffix for path in files()] == [".npy"]
    np.testing.assert_array_equal(np.load(files()[0], allow_pickle=False), fresh)


def test_whatever_decides_the_numbers_makes_an_entry_of_its_own(store, fits, monkeypatch):
    train, ids = training(store), split_of(store).ids
    responses = train.responses.copy()
    responses[3, 2] = np.nextafter(responses[3, 2], np.float32(9))
    tokens = store.tokens(ENCODER)
    tokens.digest = "sha256:other"
    changes = [
        {},
        {"seed": 1},
        {"rows": ROWS[::-1].copy()},
        {"train": replace(train, responses=responses)},
        {"train": replace(train, image=train.image[::-1].copy())},
        {"images": [f"other-{name}" for name in ids]},
        {"pictures": {int(ROWS[0]): "sha256:picture"}},
        {"tokens": tokens},
        {"name": "cls-probe"},
    ]
    for change in changes:
        ask(store, **change)
    monkeypatch.setattr(kept_module, "VERSION", kept_module.VERSION + 1)
    ask(store)
    assert len(fits) == len(files()) == len(changes) + 1


@pytest.mark.parametrize("package", ["torch", "himalaya", "numpy", "scikit-learn"])
def test_another_version_of_what_computes_it_makes_an_entry_of_its_own(store, fits, monkeypatch, package):
    installed = kept_module.version
    ask(store)
    monkeypatch.setattr(kept_module, "version", lambda name: "99" if name == package else installed(name))
    ask(store)
    assert len(fits) == len(files()) == 2


def test_only_the_baseline_that_looks_at_rois_is_fitted_anew_for_others(store, fits, monkeypatch):
    for name in BASELINES:
        ask(store, name)
    monkeypatch.setattr(kept_module, "rois_of", lambda subject: np.zeros(subject.n_voxels, np.int64))
    for name in BASELINES:
        ask(store, name)
    assert fits == [*BASELINES, "roi-transformer"]


def test_a_prediction_beyond_the_limit_of_an_entry_is_given_and_not_kept(home, monkeypatch):
    values = np.ones((2, 3), np.float32)
    for limit, there in ((values.nbytes - 1, False), (values.nbytes, True)):
        monkeypatch.setattr(kept_module, "ENTRY_BYTES", limit)
        assert kept(home / "entry.npy", lambda: values) is values
        assert (home / "entry.npy").exists() == there


def test_of_a_full_cache_the_entries_used_longest_ago_are_removed(home, monkeypatch):
    paths = [home / "cache" / f"{name}.npy" for name in "abcd"]
    for age, path in zip((30, 20, 10), paths, strict=False):
        kept(path, lambda: np.ones(100, np.float32))
        os.utime(path, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(kept_module, "CACHE_BYTES", 3 * paths[0].stat().st_size)
    kept(paths[0], lambda: np.zeros(100, np.float32))  # the oldest is used again
    kept(paths[3], lambda: np.ones(100, np.float32))
    assert sorted(paths[0].parent.iterdir()) == [paths[0], paths[2], paths[3]]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_fitted_anew_and_said_so(store, fits, caplog, damage):
    fresh = ask(store)
    (path,) = files()
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes({"cut": path.read_bytes()[:-7], "flipped": bytes(data), "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(ask(store), fresh)
    assert f"{path} is damaged" in caplog.text
    caplog.clear()
    np.testing.assert_array_equal(ask(store), fresh)
    assert (len(fits), caplog.text) == (2, "")


def test_where_nothing_can_be_written_it_is_said_and_the_prediction_is_given(home, caplog):
    (home / "cache").write_text("a file where the directory should be")
    values = np.ones((2, 3), np.float32)
    with caplog.at_level(logging.WARNING):
        assert kept(home / "cache" / "baselines" / "entry.npy", lambda: values) is values
    assert "the baseline's prediction isn't kept" in caplog.text


def test_a_fit_that_fails_leaves_nothing_behind(home):
    def fails() -> np.ndarray:
        raise ValueError("too few images")

    with pytest.raises(ValueError, match="too few images"):
        kept(home / "entry.npy", fails)
    assert list(home.iterdir()) == []

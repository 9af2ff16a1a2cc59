"""Cross-validation: folds scored as test sets are, against a loop by hand and against scikit-learn."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data.preprocess import samples
from data.sources import ImageBlock, SubjectData
from data.splits import fold_split, hash_fold, hash_part, split_of
from data.store import PooledStore
from foundation.closed_form.token_features import ridge_features
from foundation.evaluation import evaluated
from foundation.evaluation.baselines import predict
from foundation.evaluation.folds import average_folds, cross_validate
from foundation.evaluation.measured import measured_part
from foundation.evaluation.metrics import voxelwise_r
from foundation.evaluation.score import Row, Scores
from tests.tiny_store import ENCODER, SPEC

N_FOLDS = 3


def validated(store: PooledStore, name: str, **options):
    given = {"pictures": store.picture_digests(), "n_folds": N_FOLDS} | options
    return cross_validate(store.subject(name), store.tokens(ENCODER), split_of(store), **given)


def of(rows, system: str, *, axis: str = "voxel", target: str = "mean", metric: str = "r", roi: str = "all") -> Row:
    (found,) = [r for r in rows if (r.system, r.axis, r.target, r.metric, r.roi) == (system, axis, target, metric, roi)]
    return found


def test_the_mean_and_its_error_are_those_of_a_loop_by_hand(tiny_store):
    store = PooledStore.open(tiny_store)
    subject, tokens, split = store.subject("subj05"), store.tokens(ENCODER), split_of(store)
    expected = []
    for k in range(N_FOLDS):
        fold = fold_split(split, k, N_FOLDS)
        measured, rows = measured_part(subject, fold)
        found = predict("ridge", tokens, samples(subject, fold, "train"), rows, seed=0)
        expected.append(voxelwise_r(found, measured.mean).mean())
    found = validated(store, "subj05")
    row = of(found.rows, "ridge")
    error = np.std(expected, ddof=1) / np.sqrt(N_FOLDS)
    assert found.values(row) == pytest.approx(expected)
    assert row.value == pytest.approx(np.mean(expected))
    assert (row.low, row.high) == pytest.approx((row.value - error, row.value + error))
    assert row.n_images == len(np.unique(subject.image))
    assert {r.system for r in found.rows} == {"ridge", "zero", "mean", "ceiling"}
    assert found.notes[0] == (
        "subj05: mean over 3 folds of all images, [ ]: less and plus one standard error over folds"
    )


@pytest.fixture
def once(tmp_path) -> PooledStore:
    """A subject that saw 120 images once, in one session: what scikit-learn can cross-validate as it is."""
    rng = np.random.default_rng(0)
    store = PooledStore.create(tmp_path / "once.zarr", name="once")
    store.add_images(ImageBlock(ids=[f"image{k:03d}" for k in range(120)], roles=[""] * 120))
    cls, patch = (rng.standard_normal(shape).astype(np.float16) for shape in ((120, 2, 6), (120, 2, 16, 6)))
    store.begin_tokens(ENCODER, SPEC)
    store.write_tokens(ENCODER, "0000", [{"cls": cls, "patch": patch}])
    responses = cls[:, -1] @ rng.standard_normal((6, 4)) + 2 * rng.standard_normal((120, 4))
    image = np.arange(120, dtype=np.int32)
    session = np.ones(120, np.int16)
    store.add_subject(SubjectData(name="subj01", responses=responses.astype(np.float32), image=image, session=session))
    return store


def test_ridge_of_one_penalty_has_scikit_learns_scores(once, monkeypatch):
    """Correlations don't see that responses are standardised in each fold, so scikit-learn may have the raw ones."""
    model = make_pipeline(StandardScaler(), Ridge(alpha=100.0))

    def plain(name, subject, tokens, train, rows, **_):
        fitted = model.fit(ridge_features(tokens, train.image).astype(np.float64), train.responses)
        return fitted.predict(ridge_features(tokens, rows).astype(np.float64)).astype(np.float32)

    monkeypatch.setattr(evaluated, "kept_prediction", plain)
    found = validated(once, "subj01")
    ids, subject = once.image_ids(), once.subject("subj01")
    fold = np.array([hash_fold(identity, N_FOLDS) for identity in ids])
    learned = np.array([hash_part(identity) != "validation" for identity in ids])
    cv = [(np.flatnonzero((fold != k) & learned), np.flatnonzero(fold == k)) for k in range(N_FOLDS)]
    features = ridge_features(once.tokens(ENCODER), np.arange(120)).astype(np.float64)

    def r(fitted, x, y) -> float:
        return float(np.corrcoef(fitted.predict(x), y)[0, 1])

    theirs = [cross_val_score(model, features, subject.responses()[:, v], cv=cv, scoring=r) for v in range(4)]
    assert found.values(of(found.rows, "ridge")) == pytest.approx(np.mean(theirs, axis=0), abs=1e-5)


def test_a_leak_within_any_fold_is_refused(once):
    """Two identities of one picture that are in different folds."""
    ids = once.image_ids()
    folds = [hash_fold(identity, N_FOLDS) for identity in ids]
    one, other = folds.index(0), folds.index(1)
    with pytest.raises(ValueError, match=rf"leakage audit: 1 found: images .*{ids[one]}.* are one picture"):
        validated(once, "subj01", pictures={one: "same", other: "same"})


def test_each_fold_is_told(once):
    told: list[str] = []
    validated(once, "subj01", baselines=(), tell=told.append)
    assert told == [f"subj01: fold {k} of 3" for k in (1, 2, 3)]


def row(value: float | None, **given) -> Row:
    usual = {"system": "ridge", "subject": "subj01", "roi": "all", "protocol": "strict", "axis": "voxel"}
    usual |= {"target": "mean", "metric": "r", "value": value, "low": None, "high": None}
    return Row(**(usual | {"n_images": 10, "n_voxels": 5} | given))


def test_what_is_undefined_in_a_fold_is_undefined_and_never_a_mean_of_the_others():
    folds = [Scores((row(0.1), row(v, roi="V1", n_voxels=n)), ()) for v, n in ((0.4, 3), (None, 2))]
    found = average_folds(folds)
    assert found.rows[0] == replace(row(0.1, n_images=20), low=0.1, high=0.1)
    assert found.rows[1] == row(None, roi="V1", n_images=20, n_voxels=2)
    assert found.values(found.rows[1]) == (0.4, None)


def test_folds_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="needs at least 2 of them, got 1"):
        average_folds([Scores((row(0.1),), ())])
    with pytest.raises(ValueError, match="rows of other systems, ROIs or metrics"):
        average_folds([Scores((row(0.1),), ()), Scores((row(0.1, roi="V1"),), ())])

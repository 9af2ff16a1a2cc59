"""A store seeded with a leak: the honest pipeline refuses it, and a dishonest one would have scored high.

Some test pictures stand again among the training images under another identity. Most of what a voxel answers to a
picture is that picture's own and in no token, so a test picture is predicted well only by who has seen it.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.preprocess import samples, standardised_trials
from data.sources import ImageBlock, SubjectData
from data.splits import split_of
from data.store import PooledStore
from foundation import pretrain
from foundation.closed_form.token_features import global_tokens
from foundation.evaluation import evaluated
from foundation.evaluation.compare import score_subject
from foundation.evaluation.measured import measured_part
from foundation.evaluation.metrics import voxelwise_r
from tests.tiny_store import ENCODER, SPEC

N_IMAGES = {"train": 120, "validation": 20, "test": 40}
N_LEAKED, N_VOXELS, N_REPEATS, WIDTH = 20, 30, 2, 8
FEATURE_SD, OWN_SD, NOISE_SD = 0.5, 1.0, 0.3
HONEST_CEILING = FEATURE_SD / np.sqrt(FEATURE_SD**2 + OWN_SD**2 + NOISE_SD**2 / N_REPEATS)
"""Correlation with repeat means that the part of the responses which tokens predict allows."""


def make_store(path: Path, *, leak: bool) -> PooledStore:
    """The first training images show, with a leak, the first test images' pictures, and are answered alike."""
    rng = np.random.default_rng(0)
    roles = [part for part, n in N_IMAGES.items() for _ in range(n)]
    picture = np.arange(len(roles))
    if leak:
        picture[:N_LEAKED] = roles.index("test") + np.arange(N_LEAKED)
    pixels = rng.integers(0, 256, size=(len(roles), 8, 8, 3), dtype=np.uint8)[picture]
    cls = rng.standard_normal((len(roles), 2, WIDTH))[picture]
    patch = rng.standard_normal((len(roles), 2, 16, WIDTH))[picture]
    own = rng.standard_normal((len(roles), N_VOXELS))[picture]
    tuning = rng.standard_normal((WIDTH, N_VOXELS)) / np.sqrt(WIDTH)
    store = PooledStore.create(path, name="canary")
    store.add_images(ImageBlock(ids=[f"picture{k:03d}" for k in range(len(roles))], roles=roles, pixels=pixels))
    store.begin_tokens(ENCODER, SPEC)
    store.write_tokens(ENCODER, "0000", [{"cls": cls.astype(np.float16), "patch": patch.astype(np.float16)}])
    image = np.concatenate([rng.permutation(len(roles)) for _ in range(N_REPEATS)]).astype(np.int32)
    signal = FEATURE_SD * cls[:, -1] @ tuning + OWN_SD * own
    responses = signal[image] + NOISE_SD * rng.standard_normal((len(image), N_VOXELS))
    session = np.repeat(np.arange(1, N_REPEATS + 1), len(roles)).astype(np.int16)
    store.add_subject(SubjectData(name="subj01", responses=responses.astype(np.float32), image=image, session=session))
    return store


@pytest.fixture(scope="module")
def leaking(tmp_path_factory) -> PooledStore:
    return make_store(tmp_path_factory.mktemp("leaking") / "canary.zarr", leak=True)


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> PooledStore:
    return make_store(tmp_path_factory.mktemp("clean") / "canary.zarr", leak=False)


def honest(store: PooledStore):
    return score_subject(
        {},
        store.subject("subj01"),
        store.tokens(ENCODER),
        split_of(store),
        pictures=store.picture_digests(),
        n_bootstraps=200,
    )


def memorised(store: PooledStore) -> tuple[np.ndarray, np.ndarray]:
    """What a pipeline without an audit finds: to each test image, the response to the training image nearest by tokens.

    Voxelwise r, over the test pictures that can stand in training and over the others.
    """
    subject, split, tokens = store.subject("subj01"), split_of(store), store.tokens(ENCODER)
    train = samples(subject, split, "train")
    measured, rows = measured_part(subject, split)
    learned, asked = (global_tokens(tokens, r).reshape(len(r), -1) for r in (train.image, rows))
    nearest = np.square(asked[:, None] - learned[None]).sum(-1).argmin(axis=1)
    prediction = train.responses[nearest]
    return tuple(
        voxelwise_r(prediction[some], measured.mean[some]) for some in (slice(0, N_LEAKED), slice(N_LEAKED, None))
    )


def test_a_pipeline_that_memorises_pictures_beats_the_honest_ceiling_on_exactly_those_that_leak(leaking, clean):
    on_leaked, on_others = (r.mean() for r in memorised(leaking))
    assert HONEST_CEILING < 0.45
    assert on_leaked > 0.9
    assert abs(on_others) < 0.1
    without = [r.mean() for r in memorised(clean)]
    np.testing.assert_allclose(without, 0, atol=0.1)


def test_the_honest_pipeline_scores_the_clean_store_below_the_honest_ceiling(clean):
    (row,) = [
        r
        for r in honest(clean).rows
        if (r.system, r.axis, r.target, r.metric, r.roi) == ("ridge", "voxel", "mean", "r", "all")
    ]
    assert row.value is not None
    assert row.low is not None
    assert row.low > 0
    assert row.value < HONEST_CEILING


def never(*_, **__):
    raise AssertionError("fitted all the same")


def test_the_honest_pipeline_refuses_the_leak_before_it_fits_and_names_the_pictures(leaking, monkeypatch):
    monkeypatch.setattr(evaluated, "kept_prediction", never)
    first = N_IMAGES["train"] + N_IMAGES["validation"]
    with pytest.raises(ValueError, match=f"leakage audit: {N_LEAKED} found") as refused:
        honest(leaking)
    for k in range(N_LEAKED):
        named = f"images 'picture{k:03d}' (train) and 'picture{first + k:03d}' (test) are one picture"
        assert named in str(refused.value)


def test_pretraining_refuses_the_leak_by_the_command_itself(leaking, monkeypatch, capsys, home, empty_database):
    (home / "mlflow.db").write_bytes(empty_database.read_bytes())
    monkeypatch.setattr(pretrain, "set_threads", lambda n_workers_here: None)
    monkeypatch.setattr(pretrain, "train_run", never)
    words = f"phantom-tiny --encoder {ENCODER} --subjects 1 --parcels auto:4 --cluster.engine local --store".split()
    monkeypatch.setattr(sys, "argv", ["command", *words, str(leaking.path)])
    with pytest.raises(SystemExit) as ended:
        pretrain.main()
    assert ended.value.code not in (0, None)
    told = capsys.readouterr()
    message = " ".join((told.out + told.err).split())
    assert f"leakage audit: {N_LEAKED} found" in message
    assert "'picture000' (train) and 'picture140' (test) are one picture" in message


# -- other leaks -------------------------------------------------------------------------------------------------------


def test_statistics_from_test_trials_are_refused(clean, monkeypatch):
    monkeypatch.setattr(evaluated, "kept_prediction", never)
    subject, split = clean.subject("subj01"), split_of(clean)
    train = samples(subject, split, "train")
    monkeypatch.setattr(evaluated, "samples", lambda *_, **__: replace(train, standardised_by=subject.image))
    message = r"subj01: train samples are standardised by 60 images of another part: 'picture120' \(validation\)"
    with pytest.raises(ValueError, match=f"leakage audit: 1 found: {message}"):
        honest(clean)


def test_test_trials_that_standardise_themselves_are_not_scored(clean, monkeypatch):
    monkeypatch.setattr(evaluated, "kept_prediction", never)
    subject = clean.subject("subj01")
    trials = standardised_trials(subject, split_of(clean))
    monkeypatch.setattr(
        "foundation.evaluation.measured.standardised_trials",
        lambda *_, **__: replace(trials, standardised_by=subject.image),
    )
    with pytest.raises(ValueError, match="trials of the first N sessions are standardised by 60 images of another"):
        honest(clean)


def test_repeats_that_straddle_train_and_test_are_refused(clean, monkeypatch):
    """One identity on two rows: what a careless import of two tables of trials would make."""
    monkeypatch.setattr(evaluated, "kept_prediction", never)
    split = split_of(clean)
    ids = list(split.ids)
    ids[N_IMAGES["train"] + N_IMAGES["validation"]] = ids[0]
    with pytest.raises(ValueError, match="leakage audit: 1 found: image 'picture000' is in test and train"):
        score_subject({}, clean.subject("subj01"), clean.tokens(ENCODER), replace(split, ids=tuple(ids)), pictures={})


def test_test_images_among_the_training_samples_are_refused(clean, monkeypatch):
    monkeypatch.setattr(evaluated, "kept_prediction", never)
    whole = samples(clean.subject("subj01"), split_of(clean), "test")
    monkeypatch.setattr(evaluated, "samples", lambda *_, **__: whole)
    with pytest.raises(ValueError, match="train samples show 40 images of another part"):
        honest(clean)

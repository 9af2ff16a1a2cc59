"""Standardisation looks at what the protocol lets it look at, and repeats are averaged with their weights."""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.noise_ceiling import ncsnr, noise_ceiling
from data.preprocess import (
    MIN_TRIALS,
    Preprocessing,
    average_repeats,
    n_sessions_of,
    samples,
    standardise,
    standardised_trials,
    standardised_voxels,
    training_reliability,
    validation_trials,
)
from data.preprocess import test_trials as trials_of_test_images
from data.splits import split_images, split_of
from data.store import PooledStore, SubjectStore

N_IMAGES, PER_SESSION, N_SESSIONS = 60, 40, 3


@pytest.fixture
def remade(make_block, make_subject, request):
    """Return subj01 of a store like `store`, its responses changed by a function of (responses, split, session)."""
    made = []

    def make(change=lambda responses, part, session: responses, **more):
        store = PooledStore.create(f"memory://{request.node.name}-{len(made)}", name="x")
        made.append(store)
        store.add_images(make_block([f"image-{k}" for k in range(N_IMAGES)]))
        rng = np.random.default_rng(7)
        image = np.tile(rng.permutation(N_IMAGES), 2)
        session = np.repeat(np.arange(1, N_SESSIONS + 1), PER_SESSION).astype(np.int16)
        split = split_of(store)
        responses = rng.normal(3, 2, size=(len(image), 4)).astype(np.float32)
        responses = change(responses.copy(), split.parts[image], session)
        store.add_subject(make_subject("subj01", image, **({"responses": responses, "session": session} | more)))
        return store.subject("subj01"), split

    return make


# -- standardise -------------------------------------------------------------------------------------------------------


def test_each_session_has_mean_0_and_sd_1_over_the_trials_in_use():
    rng = np.random.default_rng(0)
    responses = rng.normal(rng.normal(size=5) * 100, 7, size=(90, 5)).astype(np.float32)
    session, use = np.repeat([3, 1, 9], 30), rng.random(90) < 0.7
    z = standardise(responses, session, use)
    for number in (1, 3, 9):
        basis = z[(session == number) & use]
        np.testing.assert_allclose(basis.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(basis.std(0), 1, rtol=1e-5)


@given(value=st.floats(-1e4, 1e4, width=32), n=st.integers(MIN_TRIALS, 80))
def test_a_voxel_that_does_not_vary_becomes_0(value, n):
    responses = np.full((n, 2), value, np.float32)
    np.testing.assert_array_equal(standardise(responses, np.ones(n, int), np.ones(n, bool)), 0)


def test_a_session_with_too_few_trials_is_refused():
    use = np.arange(30) < MIN_TRIALS - 1
    with pytest.raises(ValueError, match=f"session 4 has {MIN_TRIALS - 1} trials to standardise by"):
        standardise(np.zeros((30, 1), np.float32), np.full(30, 4), use)


def old_formula(responses, use):
    mean, sd = responses[use].mean(0, dtype=np.float64), responses[use].std(0, dtype=np.float64)
    return np.where(sd > 0, (responses - mean) / np.where(sd > 0, sd, 1), 0).astype(np.float32)


def test_blocks_of_voxels_give_the_numbers_of_all_voxels_at_once():
    rng = np.random.default_rng(3)
    responses = rng.normal(rng.normal(size=2500) * 100, 7, size=(60, 2500)).astype(np.float32)
    responses[:, [0, 1023, 2048]] = 0.1
    session, use = np.repeat([1, 2], 30), rng.random(60) < 0.8
    z = standardise(responses, session, use)
    for number in (1, 2):
        here = session == number
        np.testing.assert_allclose(z[here], old_formula(responses[here], use[here]), rtol=1e-6, atol=1e-6)


# -- averaging ---------------------------------------------------------------------------------------------------------


def test_unequal_repeats_average_to_the_closed_form():
    responses = np.array([[1, 10], [2, 20], [6, 60], [5, 50]], np.float32)
    rows, mean, count = average_repeats(responses, np.array([8, 3, 8, 8]), np.ones(4, np.float32))
    np.testing.assert_array_equal(rows, [3, 8])
    np.testing.assert_allclose(mean, [[2, 20], [4, 40]])
    np.testing.assert_array_equal(count, [1, 3])


def test_rows_that_are_averages_weigh_by_their_repeats():
    responses = np.array([[1], [4]], np.float32)
    _, mean, count = average_repeats(responses, np.array([0, 0]), np.array([2, 1], np.float32))
    np.testing.assert_allclose(mean, [[2]])
    np.testing.assert_array_equal(count, [3])


@given(image=st.lists(st.integers(0, 5), min_size=1, max_size=40), seed=st.integers(0, 9))
def test_averages_are_those_of_a_loop(image, seed):
    rng = np.random.default_rng(seed)
    image = np.array(image)
    responses = rng.normal(size=(len(image), 3)).astype(np.float32)
    weight = rng.integers(1, 4, len(image)).astype(np.float32)
    rows, mean, count = average_repeats(responses, image, weight)
    for k, row in enumerate(rows):
        at = image == row
        np.testing.assert_allclose(mean[k], np.average(responses[at], axis=0, weights=weight[at]), atol=1e-5)
        assert count[k] == weight[at].sum()


# -- what may look at what ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["test", "validation"])
def test_held_out_responses_change_no_training_value(remade, part):
    def change(responses, parts, session):
        responses[parts == part] *= -50
        return responses

    (plain, split), (changed, _) = remade(), remade(change)
    for n_sessions in (None, 2):
        before = samples(plain, split, "train", n_sessions=n_sessions)
        after = samples(changed, split, "train", n_sessions=n_sessions)
        np.testing.assert_array_equal(after.responses, before.responses)
        np.testing.assert_array_equal(after.image, before.image)
        assert set(split.parts[before.standardised_by]) == {"train"}


@pytest.mark.parametrize("part", ["train", "validation"])
def test_later_sessions_change_nothing_for_the_first_n(remade, part):
    def change(responses, parts, session):
        responses[session > 2] = 1e6 * np.random.default_rng(1).normal(size=responses[session > 2].shape)
        return responses

    (plain, split), (changed, _) = remade(), remade(change)
    before, after = (samples(subject, split, part, n_sessions=2) for subject in (plain, changed))
    np.testing.assert_array_equal(after.responses, before.responses)


def test_a_short_later_session_does_not_hinder_the_first_n(remade):
    session = np.repeat([1, 2, 3], [50, 66, 4]).astype(np.int16)
    subject, split = remade(session=session)
    assert len(samples(subject, split, "train", n_sessions=2)) > 0
    with pytest.raises(ValueError, match=r"subj01: session 3 has . trials to standardise by"):
        samples(subject, split, "train")


def test_test_trials_of_later_sessions_use_that_sessions_other_trials(remade):
    subject, split = remade()
    raw, session = subject.responses(), subject.session
    part = split.parts[subject.image]
    trials = trials_of_test_images(subject, split, n_sessions=1)
    later = session[part == "test"] == 3
    basis = raw[(session == 3) & (part != "test")]  # validation trials too: no image's identity is used
    expected = (raw[(part == "test") & (session == 3)] - basis.mean(0)) / basis.std(0)
    np.testing.assert_allclose(trials.responses[later], expected, rtol=1e-4, atol=1e-5)
    first = session[part == "test"] == 1
    basis = raw[(session == 1) & (part == "train")]
    expected = (raw[(part == "test") & (session == 1)] - basis.mean(0)) / basis.std(0)
    np.testing.assert_allclose(trials.responses[first], expected, rtol=1e-4, atol=1e-5)


def test_test_trials_of_later_sessions_may_use_the_first_n_sessions_alone(remade):
    def change(responses, parts, session):
        responses[(session == 3) & (parts != "test")] += 100
        return responses

    first_n = Preprocessing(later_sessions="first-n")
    (plain, split), (changed, _) = remade(), remade(change)
    before, after = (
        trials_of_test_images(subject, split, n_sessions=2, preprocessing=first_n) for subject in (plain, changed)
    )
    np.testing.assert_array_equal(after.responses, before.responses)
    raw, session, train = plain.responses(), plain.session, split.select(plain.image, "train")
    bases = [raw[(session == number) & train] for number in (1, 2)]
    mean = np.concatenate(bases).mean(0)
    variance = sum(basis.var(0) * len(basis) for basis in bases) / sum(map(len, bases))
    later = (session == 3) & split.select(plain.image, "test")
    got = before.responses[session[split.select(plain.image, "test")] == 3]
    np.testing.assert_allclose(got, (raw[later] - mean) / np.sqrt(variance), rtol=1e-4, atol=1e-5)


def test_a_preprocessing_is_known_by_its_digest():
    assert Preprocessing().digest == Preprocessing().digest
    assert Preprocessing(later_sessions="first-n").digest != Preprocessing().digest


def peak_of(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_standardising_needs_little_memory_beside_the_session(remade, monkeypatch):
    """What `samples` needs beside its result is the session itself, and a block of it in double precision."""
    n_voxels = 40_000
    session = np.repeat([1, 2], 60).astype(np.int16)
    rng = np.random.default_rng(0)
    raw = rng.normal(3, 2, size=(120, n_voxels)).astype(np.float32)
    subject, split = remade(lambda responses, part, session: raw, session=session)
    assert subject.n_voxels == n_voxels
    monkeypatch.setattr(SubjectStore, "responses", lambda self, trials: raw[trials])  # reading is another's business
    one_session = raw.nbytes / 2
    results = []
    for part in ("train", "validation"):
        peak = peak_of(lambda part=part: results.append(samples(subject, split, part)))
        assert peak < results[-1].responses.nbytes + 1.6 * one_session, part
    peak = peak_of(lambda: results.append(trials_of_test_images(subject, split, n_sessions=1)))
    assert peak < results[-1].responses.nbytes + 1.6 * one_session
    train = split.select(subject.image, "train")
    expected = np.concatenate([old_formula(raw[session == k], train[session == k]) for k in (1, 2)])
    rows, mean, _ = average_repeats(expected[train], subject.image[train], np.ones(train.sum(), np.float32))
    np.testing.assert_array_equal(results[0].image, rows)
    np.testing.assert_allclose(results[0].responses, mean, rtol=1e-6, atol=1e-6)


def test_some_voxels_have_the_numbers_of_all(remade):
    subject, split = remade()
    every = standardised_trials(subject, split).responses
    for voxels in ([2], [0, 3], [0, 1, 2, 3]):
        found = standardised_voxels(subject, split, np.array(voxels))
        np.testing.assert_allclose(found, every[:, voxels], rtol=1e-6, atol=1e-6)
    few, split = remade(session=np.repeat([1, 2, 3], [50, 66, 4]).astype(np.int16))
    with pytest.raises(ValueError, match=r"subj01: session 3 has . trials to standardise by"):
        standardised_voxels(few, split, np.array([0]))


def test_one_session_is_in_memory_at_a_time(remade, monkeypatch):
    subject, split = remade()
    read = []
    responses = SubjectStore.responses

    def counted(self, trials=None):
        read.append(self.n_trials if trials is None else len(trials))
        return responses(self, trials)

    monkeypatch.setattr(SubjectStore, "responses", counted)
    samples(subject, split, "train")
    standardised_trials(subject, split)
    assert read == [PER_SESSION] * 2 * N_SESSIONS


def test_all_trials_are_the_same_as_each_selection_of_them(remade):
    subject, split = remade()
    every = standardised_trials(subject, split, n_sessions=2)
    assert len(every.image) == subject.n_trials
    test = split.select(subject.image, "test")
    np.testing.assert_array_equal(trials_of_test_images(subject, split, n_sessions=2).responses, every.responses[test])
    held_out = split.select(subject.image, "validation") & (subject.session <= 2)
    validation = validation_trials(subject, split, n_sessions=2)
    np.testing.assert_array_equal(validation.responses, every.responses[held_out])
    np.testing.assert_array_equal(validation.image, subject.image[held_out])
    train = split.select(subject.image, "train") & (subject.session <= 2)
    mean = average_repeats(every.responses[train], every.image[train], every.n_averaged[train])
    got = samples(subject, split, "train", n_sessions=2)
    np.testing.assert_array_equal(got.image, mean[0])
    np.testing.assert_allclose(got.responses, mean[1], atol=1e-6)
    np.testing.assert_array_equal(got.n_repeats, mean[2])


def test_a_session_of_any_number_counts_by_its_order(remade):
    session = np.repeat([2, 5, 11], PER_SESSION).astype(np.int16)
    (plain, split), (renumbered, _) = remade(), remade(session=session)
    assert n_sessions_of(renumbered) == 3
    before, after = (samples(subject, split, "train", n_sessions=2) for subject in (plain, renumbered))
    np.testing.assert_array_equal(after.responses, before.responses)


def test_rows_that_came_averaged_count_as_their_repeats(remade):
    subject, split = remade(n_averaged=np.full(120, 4, np.float32), upstream_preprocessing="averaged")
    assert set(samples(subject, split, "train").n_repeats) == {8.0}
    assert set(standardised_trials(subject, split).n_averaged) == {4.0}


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_sessions", [0, 4])
def test_sessions_that_do_not_exist_are_refused(remade, n_sessions):
    subject, split = remade()
    with pytest.raises(ValueError, match=f"subj01 has 3 sessions; --sessions {n_sessions} must be 1 to 3"):
        samples(subject, split, "train", n_sessions=n_sessions)


def test_without_a_session_index_the_first_n_are_refused_and_all_are_one(store):
    subject, split = store.subject("subj02"), split_of(store)
    assert n_sessions_of(subject) is None
    with pytest.raises(ValueError, match="subj02 has no session index"):
        samples(subject, split, "train", n_sessions=1)
    train = split.select(subject.image, "train")
    z = standardised_trials(subject, split).responses
    np.testing.assert_allclose(z[train].mean(0), 0, atol=1e-6)


def test_a_part_that_was_not_seen_is_refused(remade):
    subject, _ = remade()
    everything = split_images([f"image-{k}" for k in range(N_IMAGES)], ["train"] * N_IMAGES)
    with pytest.raises(ValueError, match="subj01 saw no validation image in the first 2 sessions"):
        samples(subject, everything, "validation", n_sessions=2)
    with pytest.raises(ValueError, match="subj01 saw no test image; it can't be scored"):
        trials_of_test_images(subject, everything)


# -- reliability -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_sessions", [None, 2])
def test_reliability_is_the_single_trial_ceiling_of_training_repeats(remade, n_sessions):
    subject, split = remade()
    every = standardised_trials(subject, split, n_sessions=n_sessions)
    train = split.select(subject.image, "train") & (subject.session <= (n_sessions or N_SESSIONS))
    expected = noise_ceiling(ncsnr(every.responses[train], every.image[train]), np.ones(1, int))
    reliability, reason = training_reliability(subject, split, n_sessions=n_sessions)
    assert reliability is not None, reason
    np.testing.assert_array_equal(reliability, expected)
    assert (reliability > 0).any()


@pytest.mark.parametrize("part", ["test", "validation"])
@pytest.mark.parametrize("later_sessions", ["session", "first-n"])
def test_permuted_held_out_responses_leave_the_reliability(remade, part, later_sessions):
    def change(responses, parts, session):
        held_out = np.flatnonzero(parts == part)
        responses[held_out] = 9 * responses[np.random.default_rng(1).permutation(held_out)]
        return responses

    preprocessing = Preprocessing(later_sessions=later_sessions)
    (plain, split), (changed, _) = remade(), remade(change)
    for n_sessions in (None, 2):
        before, after = (
            training_reliability(subject, split, n_sessions=n_sessions, preprocessing=preprocessing)[0]
            for subject in (plain, changed)
        )
        np.testing.assert_array_equal(after, before)
    before, after = (ncsnr(s.responses(), s.image) for s in (plain, changed))
    assert not np.array_equal(after, before)  # the change is one that an estimate from all trials would see


def test_later_sessions_leave_the_reliability_of_the_first_n(remade):
    def change(responses, parts, session):
        responses[session > 2] *= np.random.default_rng(1).normal(size=responses[session > 2].shape)
        return responses

    (plain, split), (changed, _) = remade(), remade(change)
    before, after = (training_reliability(subject, split, n_sessions=2)[0] for subject in (plain, changed))
    np.testing.assert_array_equal(after, before)


def test_without_training_repeats_there_is_no_reliability_but_a_reason(remade):
    subject, split = remade()
    assert training_reliability(subject, split, n_sessions=1) == (
        None,
        "subj01 saw no training image twice in the first 1 sessions",
    )
    averaged, split = remade(n_averaged=np.full(120, 4, np.float32), upstream_preprocessing="averaged")
    assert training_reliability(averaged, split) == (
        None,
        "subj01 came averaged over repeats, so their noise can't be told",
    )

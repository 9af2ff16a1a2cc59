"""The sampler: the same global order for any number of ranks, each sample once an epoch, subjects mixed throughout."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.sampler import Sampler, epoch_order

SIZES = {"subj01": 300, "subj02": 100, "subj03": 200}
sizes_of = st.lists(st.integers(1, 40), min_size=1, max_size=4).map(lambda n: {f"s{k}": v for k, v in enumerate(n)})
blocks = st.integers(1, 9)
shuffles = st.one_of(
    st.just({}),
    st.builds(lambda block, more: {"buffer": block + more, "block": block}, blocks, st.integers(0, 30)),
)


def sampler_of(sizes=SIZES, *, seed=5, batch_size=12, **more) -> Sampler:
    return Sampler(sizes=sizes, seed=seed, batch_size=batch_size, **more)


def pairs(taken: dict[str, np.ndarray]) -> list[tuple[str, int]]:
    return [(name, int(index)) for name, found in taken.items() for index in found]


def of_step(step: int, sizes=SIZES, **more) -> list[tuple[str, int]]:
    return pairs(sampler_of(sizes, **more).step(step))


@given(sizes=sizes_of, seed=st.integers(0, 99), epoch=st.integers(0, 9), shuffle=shuffles)
def test_an_epoch_has_every_sample_once(sizes, seed, epoch, shuffle):
    order = epoch_order(sizes, seed=seed, epoch=epoch, **shuffle)
    every = {(s, k) for s, n in enumerate(sizes.values()) for k in range(n)}
    assert len(order.subject) == len(every)
    assert set(zip(order.subject.tolist(), order.sample.tolist(), strict=True)) == every


@given(sizes=sizes_of, step=st.integers(0, 30), world=st.sampled_from([1, 2, 3, 4, 6]), shuffle=shuffles)
def test_ranks_are_disjoint_and_together_the_global_batch(sizes, step, world, shuffle):
    if sum(sizes.values()) < 12:
        return
    whole = of_step(step, sizes, **shuffle)
    shares = [of_step(step, sizes, rank=rank, world=world, **shuffle) for rank in range(world)]
    assert [len(share) for share in shares] == [12 // world] * world
    together = [pair for share in shares for pair in share]
    assert len(set(together)) == 12
    assert set(together) == set(whole)


@pytest.mark.parametrize("shuffle", [{}, {"buffer": 32, "block": 4}], ids=["whole", "buffer"])
def test_the_steps_of_an_epoch_share_no_sample(shuffle):
    seen = [pair for step in range(sampler_of().steps_per_epoch) for pair in of_step(step, **shuffle)]
    assert len(seen) == len(set(seen)) == 600


@pytest.mark.parametrize("shuffle", [{}, {"buffer": 32, "block": 4}], ids=["whole", "buffer"])
def test_any_step_can_be_asked_for_at_once(shuffle):
    in_order = [of_step(step, **shuffle) for step in range(120)]
    backwards = [of_step(step, **shuffle) for step in reversed(range(120))]
    assert in_order == backwards[::-1]


def test_epochs_and_seeds_differ():
    assert of_step(0) != of_step(50), "the same place in another epoch"
    assert of_step(0) != of_step(0, seed=6)
    buffered = {"buffer": 32, "block": 4}
    assert (
        len({tuple(of_step(0, **buffered)), tuple(of_step(50, **buffered)), tuple(of_step(0, seed=6, **buffered))}) == 3
    )


@pytest.mark.parametrize("shuffle", [{}, {"buffer": 40, "block": 5}], ids=["whole", "buffer"])
def test_every_step_mixes_the_subjects_in_proportion(shuffle):
    for step in range(100):
        counts = {name: len(found) for name, found in sampler_of(seed=1, batch_size=60, **shuffle).step(step).items()}
        for name, expected in (("subj01", 30), ("subj02", 10), ("subj03", 20)):
            assert abs(counts[name] - expected) <= 2, (step, counts)


def test_without_a_buffer_the_order_is_the_plain_permutation_that_older_runs_had():
    rng = np.random.default_rng([3, 2])
    permuted = [rng.permutation(n) for n in SIZES.values()]
    place = np.concatenate([(np.arange(n) + rng.random(n)) / n for n in SIZES.values()])
    order = np.argsort(place, kind="stable")
    found = epoch_order(SIZES, seed=3, epoch=2)
    np.testing.assert_array_equal(found.sample, np.concatenate(permuted)[order])
    np.testing.assert_array_equal(found.subject, np.repeat([0, 1, 2], list(SIZES.values()))[order])


@given(n=st.integers(1, 200), block=blocks, more=st.integers(0, 40), seed=st.integers(0, 20))
def test_a_window_is_of_whole_blocks_that_fit_the_buffer_and_windows_come_one_after_the_other(n, block, more, seed):
    buffer = block + more
    order = epoch_order({"s": n}, seed=seed, epoch=0, buffer=buffer, block=block)
    assert (np.diff(order.window) >= 0).all()
    of_window = [order.sample[order.window == w] for w in np.unique(order.window)]
    in_blocks = [set((samples // block).tolist()) for samples in of_window]
    assert all(len(samples) <= buffer for samples in of_window)
    assert all(len(found) <= buffer // block for found in in_blocks)
    assert sum(map(len, in_blocks)) == len(set().union(*in_blocks)) == -(-n // block), "a block is in one window only"
    assert all(len(found) == buffer // block for found in in_blocks[:-1]), "all but the last window are full"


def test_a_buffer_shuffles_blocks_and_the_samples_within_a_window():
    order = epoch_order({"s": 1000}, seed=0, epoch=0, buffer=100, block=10)
    first = order.sample[:100]
    places = np.unique(first // 10)
    assert len(places) == 10
    assert places.max() - places.min() > 30, "the blocks of a window are from all over"
    runs = np.count_nonzero(np.diff(first) == 1)
    assert runs < 10, "neighbours are taken apart"


@given(
    sizes=sizes_of,
    start=st.integers(0, 20),
    n=st.integers(0, 25),
    world=st.sampled_from([1, 2, 3]),
    shuffle=shuffles,
)
def test_the_windows_of_some_steps_hold_what_the_steps_take_in_their_order(sizes, start, n, world, shuffle):
    if sum(sizes.values()) < 12:
        return
    sampler = sampler_of(sizes, rank=world - 1, world=world, **shuffle)
    for name in sizes:
        found = list(sampler.windows(name, start, start + n))
        taken = [sampler.step(step)[name] for step in range(start, start + n)]
        np.testing.assert_array_equal(np.concatenate([w.samples for w in found] or [[]]), np.concatenate(taken or [[]]))
        places = [(window.epoch, window.number) for window in found]
        assert places == sorted(set(places))
        assert all(len(window.samples) for window in found)


def test_a_subject_without_samples_in_a_step_is_there_and_empty():
    sampler = Sampler(sizes={"a": 50, "b": 1}, seed=0, batch_size=2)
    assert list(sampler.step(0)) == ["a", "b"]
    assert sum(sampler.step(k)["b"].size == 0 for k in range(25)) >= 24


def test_the_kept_order_cannot_be_changed_by_who_reads_it():
    for array in epoch_order(SIZES, seed=0, epoch=0):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 10, "world": 4}, "10 is not a multiple of 4 workers"),
        ({"batch_size": 601}, "601 is more than the 600 training samples"),
        ({"buffer": 4, "block": 5}, "buffer of 4 samples can't hold a block of 5"),
        ({"block": 0}, "blocks of 0 neighbouring samples"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    sampler_of(batch_size=600, world=4, buffer=5, block=5)
    with pytest.raises(ValueError, match=message):
        sampler_of(**settings)

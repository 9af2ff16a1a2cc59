"""The sampler: the same global order for any number of ranks, each sample once an epoch, subjects mixed throughout."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.sampler import check_batch_size, epoch_order, step_samples, steps_per_epoch

SIZES = {"subj01": 300, "subj02": 100, "subj03": 200}
sizes_of = st.lists(st.integers(1, 40), min_size=1, max_size=4).map(lambda n: {f"s{k}": v for k, v in enumerate(n)})


def pairs(taken: dict[str, np.ndarray]) -> list[tuple[str, int]]:
    return [(name, int(index)) for name, found in taken.items() for index in found]


def of_step(step: int, sizes=SIZES, *, batch_size=12, **more) -> list[tuple[str, int]]:
    return pairs(step_samples(sizes, seed=more.pop("seed", 5), step=step, batch_size=batch_size, **more))


@given(sizes=sizes_of, seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_an_epoch_has_every_sample_once(sizes, seed, epoch):
    subject, sample = epoch_order(sizes, seed=seed, epoch=epoch)
    every = {(s, k) for s, n in enumerate(sizes.values()) for k in range(n)}
    assert len(subject) == len(every)
    assert set(zip(subject.tolist(), sample.tolist(), strict=True)) == every


@given(sizes=sizes_of, step=st.integers(0, 30), world=st.sampled_from([1, 2, 3, 4, 6]))
def test_ranks_are_disjoint_and_together_the_global_batch(sizes, step, world):
    batch_size = 12
    if sum(sizes.values()) < batch_size:
        return
    whole = of_step(step, sizes, batch_size=batch_size)
    shares = [of_step(step, sizes, batch_size=batch_size, rank=rank, world=world) for rank in range(world)]
    assert [len(share) for share in shares] == [batch_size // world] * world
    together = [pair for share in shares for pair in share]
    assert len(set(together)) == batch_size
    assert set(together) == set(whole)


def test_the_steps_of_an_epoch_share_no_sample():
    seen = [pair for step in range(steps_per_epoch(SIZES, batch_size=12)) for pair in of_step(step)]
    assert len(seen) == len(set(seen)) == 600


def test_any_step_can_be_asked_for_at_once():
    in_order = [of_step(step) for step in range(120)]
    backwards = [of_step(step) for step in reversed(range(120))]
    assert in_order == backwards[::-1]


def test_epochs_and_seeds_differ():
    assert of_step(0) != of_step(50), "the same place in another epoch"
    assert of_step(0) != of_step(0, seed=6)


def test_every_step_mixes_the_subjects_in_proportion():
    for step in range(100):
        counts = {name: len(found) for name, found in step_samples(SIZES, seed=1, step=step, batch_size=60).items()}
        for name, expected in (("subj01", 30), ("subj02", 10), ("subj03", 20)):
            assert abs(counts[name] - expected) <= 2, (step, counts)


def test_a_subject_without_samples_in_a_step_is_there_and_empty():
    taken = step_samples({"a": 50, "b": 1}, seed=0, step=0, batch_size=2)
    empty = [step_samples({"a": 50, "b": 1}, seed=0, step=k, batch_size=2)["b"].size == 0 for k in range(25)]
    assert list(taken) == ["a", "b"]
    assert sum(empty) >= 24


def test_the_kept_order_cannot_be_changed_by_who_reads_it():
    subject, _ = epoch_order(SIZES, seed=0, epoch=0)
    with pytest.raises(ValueError, match="read-only"):
        subject[0] = 1


@pytest.mark.parametrize(
    ("batch_size", "world", "message"),
    [(10, 4, "10 is not a multiple of 4 workers"), (601, 1, "601 is more than the 600 training samples")],
)
def test_a_batch_size_that_cannot_be_is_refused(batch_size, world, message):
    check_batch_size(SIZES, batch_size=600, world=4)
    with pytest.raises(ValueError, match=message):
        check_batch_size(SIZES, batch_size=batch_size, world=world)

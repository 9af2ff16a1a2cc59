"""The loader: a batch's tokens are its images', its responses its samples', at whatever step one begins."""

import numpy as np
import pytest
import torch

from data.loader import Loader, ordered_batches
from data.preprocess import samples
from data.splits import split_of

N_IMAGES, SHAPE = 60, (2, 4, 3)


@pytest.fixture
def loaded(store):
    """A token reader whose tokens spell their image's row, and the training samples of both subjects."""
    depth, _, width = SHAPE
    rows = np.arange(N_IMAGES, dtype=np.float16)
    cls = np.broadcast_to(rows[:, None, None], (N_IMAGES, depth, width))
    patches = np.broadcast_to(-rows[:, None, None, None], (N_IMAGES, *SHAPE))
    store.begin_tokens("enc", {"depths": [1, 2]})
    store.write_tokens("enc", "0000", [{"cls": cls, "patch": patches}])
    split = split_of(store)
    return store.tokens("enc"), {name: samples(store.subject(name), split, "train") for name in store.subjects}


def check(batch, train):
    for name, part in batch.parts.items():
        image = batch.cls[part.rows][:, 0, 0].numpy().astype(int)
        assert (batch.cls[part.rows].numpy() == image[:, None, None]).all()
        assert (batch.patch[part.rows].numpy() == -image[:, None, None, None]).all()
        at = np.searchsorted(train[name].image, image)
        np.testing.assert_array_equal(train[name].image[at], image)
        np.testing.assert_array_equal(part.responses.numpy(), train[name].responses[at])


def same(a, b) -> bool:
    parts = all(torch.equal(a.parts[n].responses, b.parts[n].responses) for n in a.parts)
    return torch.equal(a.cls, b.cls) and torch.equal(a.patch, b.patch) and parts


def test_tokens_and_responses_belong_together(loaded):
    tokens, train = loaded
    loader = Loader(tokens, train, batch_size=8, seed=0)
    for batch in loader.steps(0, 2 * loader.steps_per_epoch):
        assert len(batch) == 8
        assert list(batch.parts) == ["subj01", "subj02"]
        assert batch.cls.dtype == batch.patch.dtype == torch.float32
        check(batch, train)


def test_beginning_at_a_step_gives_what_an_uninterrupted_run_has_there(loaded):
    loader = Loader(*loaded, batch_size=8, seed=0)
    whole, resumed = list(loader.steps(0, 15)), list(loader.steps(9, 15))
    assert all(same(a, b) for a, b in zip(whole[9:], resumed, strict=True))
    assert same(whole[4], loader.batch(4))
    assert list(loader.steps(3, 3)) == []


def test_ranks_share_out_the_global_batch(loaded):
    whole = Loader(*loaded, batch_size=8, seed=0).batch(3)
    shares = [Loader(*loaded, batch_size=8, seed=0, rank=rank, world=2).batch(3) for rank in range(2)]
    rows = sorted(int(v) for share in shares for v in share.cls[:, 0, 0])
    assert rows == sorted(int(v) for v in whole.cls[:, 0, 0])


def test_a_consumer_that_stops_early_leaves_nothing_running(loaded):
    import threading

    steps = Loader(*loaded, batch_size=8, seed=0).steps(0, 10)
    next(steps)
    steps.close()
    assert not any("ThreadPoolExecutor" in thread.name for thread in threading.enumerate())


def test_ordered_batches_are_the_samples_in_order(loaded):
    tokens, train = loaded
    given = train["subj01"]
    batches = list(ordered_batches(tokens, given, size=10))
    np.testing.assert_array_equal(np.concatenate([b.parts["subj01"].responses for b in batches]), given.responses)
    np.testing.assert_array_equal(np.concatenate([b.cls[:, 0, 0] for b in batches]), given.image)


def test_a_batch_that_cannot_be_shared_out_is_refused(loaded):
    with pytest.raises(ValueError, match="not a multiple of 3 workers"):
        Loader(*loaded, batch_size=8, seed=0, world=3)

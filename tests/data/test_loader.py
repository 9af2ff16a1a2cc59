"""The loader: a batch's tokens are its images', its responses its samples', at whatever step one begins."""

import multiprocessing
import os
import signal
import threading
import time
import weakref
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

from data.loader import Loader, ordered_batches
from data.preprocess import samples
from data.splits import split_of
from data.store import TokenReader

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


def test_ordered_batches_are_the_samples_in_order(loaded):
    tokens, train = loaded
    given = train["subj01"]
    batches = list(ordered_batches(tokens, given, size=10))
    np.testing.assert_array_equal(np.concatenate([b.parts["subj01"].responses for b in batches]), given.responses)
    np.testing.assert_array_equal(np.concatenate([b.cls[:, 0, 0] for b in batches]), given.image)


def test_a_batch_that_cannot_be_shared_out_is_refused(loaded):
    with pytest.raises(ValueError, match="not a multiple of 3 workers"):
        Loader(*loaded, batch_size=8, seed=0, world=3)


BUFFERED = {"shuffle_buffer": 12}


class Watched(TokenReader):
    """A token reader that counts the bytes it has handed out and somebody still holds."""

    def __init__(self, tokens):
        vars(self).update(vars(tokens))
        self._out, self.most, self.reads = [], 0, []
        self._lock = threading.Lock()

    def read(self, rows, *, out=None):
        with self._lock:
            self.reads.append(np.array(rows))
            found = super().read(rows, out=out)
            self._out = [held for held in self._out if held() is not None]
            self._out += [weakref.ref(array) for array in found]
            alive = {id(array): array.nbytes for held in self._out if (array := held()) is not None}
            self.most = max(self.most, sum(alive.values()))
            return found


@pytest.fixture
def small_blocks(monkeypatch, loaded):
    """Blocks of three images."""
    monkeypatch.setattr("data.loader.READ_BYTES", 3 * loaded[0].image_bytes)


def test_a_batch_keeps_half_precision_until_it_is_moved(loaded):
    batch = Loader(*loaded, batch_size=8, seed=0).batch(0)
    assert batch.cls.dtype == batch.patch.dtype == torch.float16
    moved = batch.to(torch.device("cpu"))
    assert moved.cls.dtype == moved.patch.dtype == torch.float32
    assert torch.equal(moved.patch, batch.patch.float())
    assert torch.equal(moved.cls, batch.cls.float())


@pytest.mark.parametrize("world", [1, 2])
def test_batches_out_of_a_buffer_are_those_read_at_once(loaded, small_blocks, world):
    for rank in range(world):
        loader = Loader(*loaded, batch_size=8, seed=0, rank=rank, world=world, **BUFFERED)
        assert loader.samplers[0].block == 3
        for start, stop in ((0, 3 * loader.steps_per_epoch), (5, 17), (4, 4)):
            found = list(loader.steps(start, stop))
            assert len(found) == stop - start
            assert all(same(batch, loader.batch(start + k)) for k, batch in enumerate(found))
            for batch in found:
                check(batch, loaded[1])


def test_a_buffer_changes_the_order_but_an_epoch_has_the_same_samples(loaded, small_blocks):
    def images(loader):
        return [b.cls[:, 0, 0].tolist() for b in loader.steps(0, loader.steps_per_epoch)]

    one = {"batch_size": 5, "seed": 0}
    tokens, train = loaded
    alone = {"subj01": train["subj01"]}
    n = len(alone["subj01"]) // 5 * 5
    whole, buffered = images(Loader(tokens, alone, **one)), images(Loader(tokens, alone, **one, **BUFFERED))
    assert whole != buffered
    flat = [image for batch in buffered for image in batch]
    assert len(set(flat)) == len(flat) == n


def test_with_a_buffer_each_image_is_read_once_an_epoch_by_neighbours(loaded, small_blocks):
    tokens, train = loaded
    watched = Watched(tokens)
    alone = {"subj01": train["subj01"]}
    loader = Loader(watched, alone, batch_size=4, seed=0, **BUFFERED)
    list(loader.steps(0, loader.steps_per_epoch))
    rows = np.concatenate(watched.reads)
    assert len(rows) == len(set(rows.tolist())) == 4 * loader.steps_per_epoch
    assert all((np.diff(read) > 0).all() for read in watched.reads)
    assert max(map(len, watched.reads)) == 12
    assert len(watched.reads) == -(-len(alone["subj01"]) // 12)


@pytest.mark.parametrize("buffer", [6, 12, 24])
def test_memory_is_bounded_by_the_buffer(loaded, small_blocks, buffer):
    tokens, train = loaded
    watched = Watched(tokens)
    loader = Loader(watched, train, batch_size=8, seed=0, shuffle_buffer=buffer)
    for _ in loader.steps(0, 5 * loader.steps_per_epoch):
        pass
    bound = 2 * buffer * len(train) * tokens.image_bytes
    assert bound / 4 < watched.most <= bound


def test_memory_without_a_buffer_is_bounded_by_the_batches_ahead(loaded):
    tokens, train = loaded
    watched = Watched(tokens)
    loader = Loader(watched, train, batch_size=8, seed=0, prefetch=3)
    for _ in loader.steps(0, 10 * loader.steps_per_epoch):
        pass
    assert watched.most <= (3 + 2) * 8 * tokens.image_bytes


def test_a_batch_that_is_kept_is_never_written_to_again(loaded):
    batches = [(batch, batch.patch.clone()) for batch in Loader(*loaded, batch_size=8, seed=0).steps(0, 30)]
    assert all(torch.equal(batch.patch, patch) for batch, patch in batches)


def read_in_child(loader, start, stop):
    return [(batch.cls.numpy(), batch.patch.numpy()) for batch in loader.steps(start, stop)]


@pytest.mark.parametrize("settings", [{}, BUFFERED], ids=["whole", "buffer"])
def test_a_pickled_loader_reads_the_same_in_a_spawned_process(loaded, settings):
    loader = Loader(*loaded, batch_size=8, seed=0, **settings)
    expected = read_in_child(loader, 2, 9)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(read_in_child, loader, 2, 9).result()
    for mine, theirs in zip(expected, found, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_fork_while_batches_are_read_ahead_reads_on(loaded, monkeypatch):
    """The child has no read-ahead threads, and whatever lock one of them held would stay locked."""
    tokens, train = loaded
    at_once = tokens.room

    def slow(n):
        time.sleep(0.02)
        return at_once(n)

    monkeypatch.setattr(tokens, "room", slow)
    loader = Loader(tokens, train, batch_size=8, seed=0)
    expected, kept = loader.batch(3), []
    for batch in loader.steps(0, 10):
        kept.append(batch)
        child = os.fork()
        if child == 0:  # no test framework in here: leave at once
            signal.alarm(10)
            os._exit(0 if same(loader.batch(3), expected) else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize("settings", [{}, BUFFERED], ids=["whole", "buffer"])
def test_an_error_in_reading_is_raised_to_the_consumer_as_it_is(loaded, monkeypatch, settings):
    tokens, train = loaded
    error = ValueError("row 3 of x can't be read")
    whole, calls = tokens.read, iter(range(100))

    def failing(rows, *, out=None):
        if next(calls) == 5:
            raise error
        return whole(rows, out=out)

    monkeypatch.setattr(tokens, "read", failing)
    loader = Loader(tokens, train, batch_size=8, seed=0, **settings)
    got = []
    with pytest.raises(ValueError, match="row 3") as found:
        got.extend(loader.steps(0, 40))
    assert found.value is error
    assert not reader_threads()


def reader_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("read-ahead", "shuffle-buffer"))]


@pytest.mark.parametrize("settings", [{}, BUFFERED], ids=["whole", "buffer"])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_a_consumer_that_stops_early_leaves_nothing_running(loaded, settings, n):
    steps = Loader(*loaded, batch_size=8, seed=0, **settings).steps(0, 20)
    for _ in range(n):
        next(steps)
    assert bool(reader_threads()) == (n > 0)
    steps.close()
    assert not reader_threads()


def test_the_wait_for_data_is_measured_and_the_time_of_the_consumer_is_not(loaded, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("data.loader.perf_counter", lambda: clock[0])

    def slow(make, keys, **_):
        """Read nothing ahead, and take two seconds for each batch."""
        for key in keys:
            clock[0] += 2
            yield make(key)

    monkeypatch.setattr("data.loader.read_ahead", slow)
    loader = Loader(*loaded, batch_size=8, seed=0)
    for _ in loader.steps(0, 4):
        clock[0] += 100
    assert loader.wait_s == 8


@pytest.mark.parametrize("settings", [{"prefetch": 0}, {"shuffle_buffer": 0}])
def test_a_setting_that_cannot_be_is_refused(loaded, settings):
    with pytest.raises(ValueError, match="use 1 or more"):
        Loader(*loaded, batch_size=8, seed=0, **settings)


def test_tokens_are_read_over_several_blocks_of_images_in_any_order(store, make_block):
    store.add_images(make_block([f"more-{k}" for k in range(7)]))
    store.begin_tokens("enc", {"depths": [1]})
    values = np.arange(67, dtype=np.float16)
    for block, (start, stop) in {"0000": (0, 60), "0001": (60, 67)}.items():
        part = values[start:stop, None, None]
        store.write_tokens("enc", block, [{"cls": part, "patch": np.repeat(part[..., None], 2, axis=2)}])
    tokens = store.tokens("enc")
    assert tokens.how == {"0000": "byte ranges", "0001": "byte ranges"}
    assert tokens.image_bytes == 2 * 3
    for rows in ([66, 0, 59, 60, 0], [3], [], list(range(67))):
        cls, patch = tokens.read(np.array(rows, int))
        assert (cls.shape, patch.shape) == ((len(rows), 1, 1), (len(rows), 1, 2, 1))
        np.testing.assert_array_equal(cls[:, 0, 0], values[rows] if rows else [])
        np.testing.assert_array_equal(patch[:, 0, 1, 0], values[rows] if rows else [])

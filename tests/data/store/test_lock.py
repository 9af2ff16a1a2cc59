"""One writer at a time: a second one is told so at once, and a dead one holds nothing."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection

import numpy as np
import pytest

from data.store import PooledStore
from data.store.lock import one_writer


def hold(path: str, parent: Connection) -> None:
    """Hold the store for writing until the parent hangs up, in a process of its own."""
    with PooledStore.open(path, writable=True)._writing():
        parent.send("held")
        parent.poll(60)


@pytest.fixture
def holder(store):
    """A process that is writing to `store`. It is told to end through a pipe: an Event would wait for one that died."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(store.path, there))
    process.start()
    there.close()
    assert here.poll(60)
    assert here.recv() == "held"
    yield process
    here.close()
    process.join()
    process.close()


def test_a_second_writer_is_refused_and_a_reader_is_not(store, make_block, make_subject, holder):
    for write in (
        lambda: store.add_images(make_block(["new"])),
        lambda: store.add_subject(make_subject("subj03", [0, 1])),
        lambda: store.write_subject(make_subject("subj03", [0, 1]).source(store.image_ids())),
    ):
        with pytest.raises(ValueError, match=r"another process is writing to .*pooled.zarr; wait until it is done"):
            write()
    assert PooledStore.open(store.path).subjects == ["subj01", "subj02"]


def test_tokens_may_be_computed_while_a_subject_is_imported(store, holder):
    store.begin_tokens("enc", {"depths": [1]})
    cls, patch = np.zeros((60, 1, 3), np.float16), np.zeros((60, 1, 4, 3), np.float16)
    store.write_tokens("enc", "0000", [{"cls": cls, "patch": patch}])
    assert store.missing_tokens("enc") == []


def test_a_killed_writer_holds_nothing(store, make_block, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert list(store.add_images(make_block(["new"]))) == [60]


def test_tokens_of_one_encoder_have_one_writer(store):
    store.begin_tokens("enc", {"depths": [1]})
    with one_writer(store._features("enc")), pytest.raises(ValueError, match=r"another process is writing to .*enc;"):
        store.write_tokens("enc", "0000", [])

"""Killed at any moment, an import leaves the store valid and as it was, and the rerun ends as if nothing had been."""

import multiprocessing
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from data.store import PooledStore
from data.store.validate import validate
from tests.dying_import import counted, import_and_die, import_into, picture, shown, source

BOTH = ("subj01", "subj02")


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[PooledStore, int]:
    """An import that nothing interrupted, and how many file operations it took."""
    path = tmp_path_factory.mktemp("whole") / "s.zarr"
    with counted() as done:
        import_into(path, BOTH)
    return PooledStore.open(path), len(done)


@pytest.fixture(scope="module")
def killed():
    """Import in a process of its own, and be killed with signal 9 in the middle of a file operation."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.dying_import"])

    def run(path: Path, names: tuple[str, ...], at: int) -> None:
        child = context.Process(target=import_and_die, args=(str(path), names, at))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        child.close()

    return run


def moments(n_operations: int, n: int, seed: int) -> list[int]:
    """Return the first operation, the last, and others drawn between them."""
    drawn = np.random.default_rng(seed).choice(np.arange(1, n_operations - 1), n - 2, replace=False)
    return [0, *sorted(drawn.tolist()), n_operations - 1]


def check(store: PooledStore, reference: PooledStore) -> None:
    """Whole subjects only, with the images that came with them and no others."""
    assert store.subjects == reference.subjects[: len(store.subjects)]
    n_images = [0, 20, 30][len(store.subjects)]
    assert store.n_images == n_images
    assert store.image_ids() == reference.image_ids()[:n_images]
    for name in store.subjects:
        ours, theirs = store.subject(name), reference.subject(name)
        assert ours.digest == theirs.digest
        np.testing.assert_array_equal(ours.image, theirs.image)
        np.testing.assert_array_equal(ours.responses(), theirs.responses())


def check_pictures(store: PooledStore) -> None:
    stored = np.concatenate([pixels for _, _, pixels in store.pixels()])
    np.testing.assert_array_equal(stored, [picture(identity) for identity in store.image_ids()])


def test_an_import_killed_at_ten_moments_leaves_a_valid_store_and_its_rerun_the_same_one(reference, killed, tmp_path):
    whole, n_operations = reference
    assert n_operations > 100
    there = []
    for at in moments(n_operations, 10, seed=3):
        path = tmp_path / f"{at}.zarr"
        killed(path, BOTH, at)
        if (path / "zarr.json").exists():
            assert validate(path) == [], at
            store = PooledStore.open(path)
            check(store, whole)
            there.append(len(store.subjects))
        again = import_into(path, BOTH)
        assert validate(path) == [], at
        assert again.subjects == whole.subjects
        check(again, whole)
        check_pictures(again)
    assert set(there) == {0, 1}  # each moment before a subject's last write leaves the subjects before it


def test_a_rerun_goes_on_where_it_was_interrupted(killed, tmp_path):
    """Killed in the middle of the pictures or of a session, the rerun writes fewer files than a whole import."""
    with counted() as done:
        import_into(tmp_path / "whole.zarr", ("subj01",))
    pixels = [k for k, what in enumerate(done) if "/pixels/c/" in what]
    responses = [k for k, what in enumerate(done) if "/responses/0002/c/" in what]
    assert len(pixels) > 3
    killed(tmp_path / "a.zarr", ("subj01",), pixels[-1])
    with counted() as after:
        import_into(tmp_path / "a.zarr", ("subj01",))
    assert sum("/pixels/c/" in what for what in after) == 1
    killed(tmp_path / "b.zarr", ("subj01",), responses[0])
    with counted() as after:
        import_into(tmp_path / "b.zarr", ("subj01",))
    assert not any("/pixels/" in what or "/responses/0001/" in what for what in after)


@pytest.mark.parametrize("share", [0.2, 0.45, 0.7, 0.9, 0.99])
def test_someone_elses_import_in_between_disturbs_nothing(reference, killed, tmp_path, share):
    """The second subject is interrupted, a third comes, and the second comes again: images keep their identities."""
    whole, _ = reference
    path = tmp_path / "s.zarr"
    import_into(path, ("subj01",))
    with counted() as done:
        import_into(shutil.copytree(path, tmp_path / "dry.zarr"), ("subj02",))
    killed(path, ("subj02",), int(share * len(done)))
    import_into(path, ("subj03",))
    assert validate(path) == []
    assert PooledStore.open(path).subjects == ["subj01", "subj03"]
    store = import_into(path, ("subj02",))
    assert validate(path) == []
    assert store.subjects == ["subj01", "subj02", "subj03"]
    check_pictures(store)
    ids = np.array(store.image_ids())
    assert sorted(ids) == sorted({identity for name in store.subjects for identity in shown(name)})
    for name in store.subjects:
        given = np.concatenate([session.columns["image"] for session in source(name).sessions])
        np.testing.assert_array_equal(ids[store.subject(name).image], np.array(shown(name))[given])
    assert [store.subject(name).digest for name in BOTH] == [whole.subject(name).digest for name in BOTH]


def test_clearing_remains_away_can_be_interrupted_too(killed, tmp_path):
    """Remains half cleared away for another subject's import are never taken up again as if they were whole."""
    with counted() as done:
        import_into(tmp_path / "whole.zarr", ("subj02",))
    base = tmp_path / "base.zarr"
    killed(base, ("subj02",), len(done) - 1)  # its pictures are complete, it is not
    with counted() as done:
        import_into(shutil.copytree(base, tmp_path / "dry.zarr"), ("subj03",))
    clearing = [k for k, what in enumerate(done) if what.startswith("remove") and "images/0000" in what][:4]
    assert clearing
    for at in clearing:
        path = Path(shutil.copytree(base, tmp_path / f"{at}.zarr"))
        killed(path, ("subj03",), at)
        assert validate(path) == []
        store = import_into(path, ("subj02", "subj03"))
        assert validate(path) == []
        check_pictures(store)

"""Outputs kept by digest: what is read is what would be computed, whatever was killed, removed or can't be written."""

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters import backbone_outputs as module
from adapters.backbone_outputs import BackboneOutputs
from data.store import PooledStore
from foundation.closed_form.population_start import add_landmarks, predicted_landmarks
from foundation.model.encoding_model import EncodingModel
from foundation.model.population import PopulationPath
from tests.tiny_store import ENCODER, N_VOXELS

NEW = "subj05"
DIGEST = "sha256:0123"
ROWS = np.array([7, 2, 31, 40, 59])
"""Of 60 images; neither in order nor all."""


@pytest.fixture
def store(tiny_store: Path) -> PooledStore:
    return PooledStore.open(tiny_store)


@pytest.fixture
def model(make_backbone: Callable[[], EncodingModel]) -> EncodingModel:
    """A frozen backbone with a new subject that has landmarks."""
    made = make_backbone().requires_grad_(False)
    made.add_subject(NEW, torch.arange(N_VOXELS[NEW]) // 4)
    add_landmarks(made, NEW, seed=0)
    return made


@pytest.fixture
def path(model: EncodingModel) -> PopulationPath:
    found = model.adapter(NEW).population
    assert found is not None
    return found


@pytest.fixture
def outputs(model: EncodingModel, store: PooledStore) -> Callable[..., BackboneOutputs]:
    """Make the outputs of the same backbone and images, or of others if told."""

    def make(**other) -> BackboneOutputs:
        options = {"backbone": DIGEST, "images": store.image_ids()} | other
        return BackboneOutputs(model, store.tokens(ENCODER), **options)

    return make


@pytest.fixture
def computed(model: EncodingModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many images the backbone's streams have computed, in each call."""
    counted: list[int] = []
    handle = model.streams.register_forward_hook(lambda _, args, __: counted.append(len(args[0])))
    yield counted
    handle.remove()


@torch.no_grad()
def expected_streams(model: EncodingModel, store: PooledStore, rows: np.ndarray = ROWS) -> dict[str, torch.Tensor]:
    return vars(model.streams(*(torch.from_numpy(t).float() for t in store.tokens(ENCODER).read(rows))))


def kept_files(home: Path) -> dict[str, Path]:
    return {file.name: file for file in (home / "cache").rglob("*") if file.is_file()}


def test_streams_are_the_backbones_first_computed_and_then_read(outputs, model, store, computed):
    expected = expected_streams(model, store)
    computed.clear()
    for calls in ([5], [5]):  # nothing is added by the second
        found = vars(outputs().streams(ROWS))
        assert computed == calls
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(vars(outputs().streams(ROWS)), found, rtol=0, atol=0)


def test_landmarks_are_those_that_are_computed_without_keeping_and_read_back_bit_for_bit(
    outputs, model, path, store, computed
):
    expected = predicted_landmarks(model, path, store.tokens(ENCODER), ROWS)
    computed.clear()
    first, second = (outputs().landmarks(path, ROWS) for _ in range(2))
    assert computed == [5]
    np.testing.assert_allclose(first, expected, atol=1e-6)
    np.testing.assert_array_equal(second, first)


def test_only_images_that_are_missing_are_computed_and_all_come_in_the_order_asked(outputs, path, computed):
    first = outputs().landmarks(path, ROWS[:3])
    wanted = ROWS[[4, 1, 3, 0]]
    found = outputs().landmarks(path, wanted)
    assert computed == [3, 2]
    np.testing.assert_array_equal(found[[3, 1]], first[:2])
    np.testing.assert_array_equal(outputs().landmarks(path, wanted), found)
    assert computed == [3, 2]


def test_many_images_are_computed_in_batches_and_each_batch_is_kept(outputs, path, computed, monkeypatch):
    monkeypatch.setattr(module, "_BATCH", 16)
    found = outputs().landmarks(path, np.arange(60))
    assert computed == [16, 16, 16, 12]
    np.testing.assert_array_equal(outputs().landmarks(path, np.arange(60)), found)
    assert len(computed) == 4


def test_another_backbone_encoder_image_or_landmark_is_computed_anew(outputs, path, store, computed):
    outputs().landmarks(path, ROWS)
    others = [
        outputs(backbone="sha256:4567"),
        outputs(images=["another image", *store.image_ids()[1:]]),
        outputs(images=[*store.image_ids(), "one more"]),
    ]
    for number, other in enumerate(others, start=2):
        other.landmarks(path, ROWS)
        assert len(computed) == number
    path.landmark.copy_(path.landmark.flip(0))
    outputs().landmarks(path, ROWS)
    assert len(computed) == 5


def test_an_interruption_keeps_the_batches_that_are_whole(outputs, model, path, computed, monkeypatch):
    monkeypatch.setattr(module, "_BATCH", 2)
    write, calls = module._write_rows, []

    def killed(file: Path, *args) -> None:
        calls.append(file.name)
        if calls.count("done") == 2:  # the second batch's numbers are written, and not yet that they are
            raise KeyboardInterrupt
        write(file, *args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_rows", killed)
        with pytest.raises(KeyboardInterrupt):
            outputs().landmarks(path, ROWS)
    assert computed == [2, 2]
    found = outputs().landmarks(path, ROWS)
    assert computed == [2, 2, 2, 1]
    shutil.rmtree(module.home() / "cache")
    np.testing.assert_allclose(outputs().landmarks(path, ROWS), found, atol=1e-6)


def test_numbers_that_nothing_says_are_whole_are_not_read(outputs, path, home, computed):
    first = outputs().landmarks(path, ROWS)
    file, done = kept_files(home)["landmark.npy"], kept_files(home)["done"]
    values = np.load(file, mmap_mode="r+")
    values[ROWS[1]] = 1e6
    values.flush()
    flags = np.fromfile(done, np.uint8)
    flags[ROWS[1]] = 0
    flags.tofile(done)
    np.testing.assert_allclose(outputs().landmarks(path, ROWS), first, atol=1e-6)
    assert computed == [5, 1]


@pytest.mark.parametrize("lost", ["done", "patch.npy"])
def test_what_is_lost_of_the_cache_is_computed_again(outputs, model, store, home, computed, lost):
    outputs().streams(ROWS)
    kept_files(home)[lost].unlink()
    found = vars(outputs().streams(ROWS))
    assert computed == [5, 5]
    torch.testing.assert_close(found, expected_streams(model, store))
    computed.clear()
    outputs().streams(ROWS)
    assert computed == []


def test_where_nothing_can_be_written_it_is_said_once_and_the_outputs_are_right(
    outputs, model, path, store, home, caplog, monkeypatch
):
    monkeypatch.setattr(module, "_BATCH", 2)
    (home / "cache").write_text("a file where the directory would be")
    with caplog.at_level(logging.WARNING):
        found = outputs().landmarks(path, ROWS)
    np.testing.assert_allclose(found, predicted_landmarks(model, path, store.tokens(ENCODER), ROWS), atol=1e-6)
    (record,) = caplog.records
    assert "can't be written" in record.getMessage()
    assert str(home / "cache") in record.getMessage()


def test_a_disk_that_fills_up_loses_no_output_and_marks_no_half_row(outputs, path, computed, monkeypatch, caplog):
    first = outputs().landmarks(path, ROWS[:2])
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "pwrite", lambda descriptor, data, at: len(data) // 2)
        found = outputs().landmarks(path, ROWS)
    assert "took part of a row only" in caplog.text
    np.testing.assert_array_equal(found[:2], first)
    np.testing.assert_allclose(outputs().landmarks(path, ROWS), found, atol=1e-6)
    assert computed == [2, 3, 3]


def test_two_that_fill_the_cache_at_once_leave_what_one_would(outputs, path, monkeypatch):
    """The second begins and ends between the first's reservation of the file and its first row."""
    reserve, between = module._reserve, []

    def overtaken(file: Path, shape: tuple[int, ...]) -> None:
        if not between:
            between.append(file)
            outputs().landmarks(path, ROWS[::-1])
        reserve(file, shape)

    monkeypatch.setattr(module, "_reserve", overtaken)
    found = outputs().landmarks(path, ROWS)
    np.testing.assert_allclose(outputs().landmarks(path, ROWS), found, atol=1e-6)
    assert not [file for file in between[0].parent.iterdir() if file.name.startswith(".")]


def test_what_is_kept_is_plain_numbers(outputs, home):
    outputs().streams(ROWS)
    files = kept_files(home)
    assert files.keys() == {"cls.npy", "patch.npy", "gate.npy", "done"}
    for name in ("cls.npy", "patch.npy", "gate.npy"):
        assert np.load(files[name], allow_pickle=False).shape[0] == 60
    assert np.flatnonzero(np.fromfile(files["done"], np.uint8)).tolist() == sorted(ROWS)

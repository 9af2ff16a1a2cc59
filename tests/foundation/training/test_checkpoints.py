"""Checkpoints of a run: whole or passed over, named when damaged, kept as many as asked, readable later."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.batch import Batch, Part
from foundation.checkpoint import FORMAT_VERSION as MODEL_FORMAT
from foundation.checkpoint import load_model
from foundation.config import Recipe
from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel
from foundation.training.checkpoints import (
    FORMAT_VERSION,
    Progress,
    checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    read_optimiser_state,
    read_progress,
    write_checkpoint,
)
from foundation.training.engine import LocalEngine
from tests.checkpoints.make import HERE, SUBJECT, tokens
from tests.dying_replacement import SWAP, replace_until_killed
from tests.tiny_store import TINY_BACKBONE

FILES = ["model.safetensors", "model.json", "training.json", "optimiser.safetensors"]


def model() -> EncodingModel:
    torch.manual_seed(0)
    return EncodingModel(TokenShape(depth=2, patch=4, width=5), TINY_BACKBONE, {"subj01": torch.arange(9) // 3})


def checkpoint(run: Path, step: int, **progress) -> Path:
    of = model()
    return write_checkpoint(
        run,
        Progress(step=step, **progress),
        of,
        weights=of.state_dict(),
        optimiser={"step": torch.tensor(float(step))},
        made_from={},
    )


def test_what_is_read_is_what_was_written(tmp_path):
    written = Progress(step=7, best_score=0.1 + 0.2, best_step=5, losses=[1 / 3, 2.5], n_skipped=2)
    path = checkpoint(tmp_path, **vars(written))
    assert read_progress(path) == written
    assert read_optimiser_state(path) == {"step": torch.tensor(7.0)}
    torch.testing.assert_close(load_file(path / "model.safetensors"), dict(model().state_dict()), equal_nan=True)
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("damage", ["cut", "flipped", "a digit", "gone"])
@pytest.mark.parametrize("damaged", FILES)
def test_a_damaged_newest_checkpoint_is_passed_over_and_named(tmp_path, damaged, damage):
    assert newest_checkpoint(tmp_path) is None
    older, newer = checkpoint(tmp_path, 90), checkpoint(tmp_path, 100)
    assert newest_checkpoint(tmp_path) == newer
    whole = (newer / damaged).read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    at = next(i for i, byte in enumerate(whole) if chr(byte) in "23456789" and i > middle)
    digit = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]  # JSON stays JSON
    (newer / damaged).unlink()
    if damage != "gone":
        (newer / damaged).write_bytes({"cut": whole[:-3], "flipped": flipped, "a digit": digit}[damage])
    lines = []
    assert newest_checkpoint(tmp_path, tell=lines.append) == older
    (line,) = lines
    assert line.startswith("passing over a damaged checkpoint: ")
    assert str(newer) in line


def test_without_any_whole_checkpoint_there_is_none(tmp_path):
    for step in (1, 2):
        (checkpoint(tmp_path, step) / "training.json").unlink()
    (tmp_path / "checkpoints" / ".step-0000003.tmp").mkdir()
    assert newest_checkpoint(tmp_path) is None


def test_a_checkpoint_of_a_newer_version_is_refused_by_number(tmp_path):
    path = checkpoint(tmp_path, 1) / "training.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps(described | {"format_version": FORMAT_VERSION + 1}))
    for read in (lambda: read_progress(path.parent), lambda: newest_checkpoint(tmp_path)):
        with pytest.raises(ValueError, match=f"checkpoint format {FORMAT_VERSION + 1}; .* up to {FORMAT_VERSION}"):
            read()


@pytest.mark.parametrize("at", range(len(SWAP)))
def test_a_checkpoint_whose_replacement_was_killed_is_still_one_and_pruned_in_its_turn(tmp_path, at):
    checkpoint(tmp_path, 5)
    replaced = checkpoint(tmp_path, 10)
    files = {name: (replaced / name).read_bytes() for name in FILES}

    def write(directory: Path) -> None:
        for name, content in files.items():
            (directory / name).write_bytes(content)

    replace_until_killed(replaced, write, at)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert read_progress(newest).step == 10
    prune_checkpoints(tmp_path, newest, keep=1)
    assert checkpoints(tmp_path) == [newest]
    last = checkpoint(tmp_path, 20)
    prune_checkpoints(tmp_path, last, keep=1)
    assert checkpoints(tmp_path) == [last]


def test_pruning_keeps_the_newest(tmp_path):
    made = [checkpoint(tmp_path, step) for step in (5, 10, 99, 1000)]
    prune_checkpoints(tmp_path, made[-1], keep=2)
    assert [path.exists() for path in made] == [False, False, True, True]
    prune_checkpoints(tmp_path, made[-1], keep=3)
    assert [path.exists() for path in made] == [False, False, True, True]


def test_pruning_removes_what_was_passed_over_and_never_what_was_just_written(tmp_path):
    damaged = [checkpoint(tmp_path, step) for step in (8, 9)]
    for path in damaged:
        (path / "training.json").unlink()
    written = checkpoint(tmp_path, 3)
    prune_checkpoints(tmp_path, written, keep=1)
    assert checkpoints(tmp_path) == [written] == [newest_checkpoint(tmp_path)]


def test_a_disk_without_room_loses_no_older_checkpoint_and_says_which_is_the_newest(tmp_path):
    older = checkpoint(tmp_path, 10)
    size = (older / "model.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))  # the kernel refuses, as on a full disk
    try:
        with pytest.raises(OSError, match=r"step 20 can't be written .*; the newest whole one is step-0000010: make"):
            checkpoint(tmp_path, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert newest_checkpoint(tmp_path) == older
    assert list((tmp_path / "checkpoints").iterdir()) == [older]


@pytest.mark.parametrize("path", sorted(HERE.glob("checkpoint-*")), ids=lambda path: path.name)
def test_a_checkpoint_of_each_format_is_read_predicts_as_it_did_and_trains_on(path):
    of, made_from = load_model(path)
    with torch.no_grad():
        predicted = of.predict(*tokens(), SUBJECT)
    torch.testing.assert_close(predicted, torch.tensor(json.loads((path / "expected.json").read_text())))
    assert read_progress(path).step == 5
    engine = LocalEngine(of, Recipe.from_json(made_from["recipe"]), device=torch.device("cpu"))
    engine.load_optimiser_state(read_optimiser_state(path))
    before = engine.weights()[f"adapters.{SUBJECT}.voxel_component"].clone()
    cls, patch = tokens()
    parts = {name: Part(rows=slice(0, 0), responses=torch.zeros(0, of.adapter(name).n_voxel)) for name in of.subjects}
    parts[SUBJECT] = Part(rows=slice(0, 2), responses=torch.ones(2, of.adapter(SUBJECT).n_voxel))
    batch = Batch(cls=cls, patch=patch, image=torch.arange(2), parts=parts)
    engine.backward(engine.forward(batch).total, last=True)
    assert np.isfinite(engine.step(lr=0.01))
    assert engine.optimiser_state()["step"] == 6
    assert not torch.equal(engine.weights()[f"adapters.{SUBJECT}.voxel_component"], before)


def test_the_present_format_is_among_those_that_are_kept():
    assert (HERE / f"checkpoint-{FORMAT_VERSION}-model-{MODEL_FORMAT}").is_dir()

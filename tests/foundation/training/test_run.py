"""Which run is resumed, what identifies it, and how a fresh model is built."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.parcels import make_parcels, parse_parcels
from data.preprocess import samples
from data.sources import ImageBlock, SubjectData
from data.splits import split_of
from data.store import PooledStore
from foundation.config import Recipe
from foundation.training import course as course_module
from foundation.training.course import build_model, train_run
from foundation.training.engine import LocalEngine
from foundation.training.loop import Course
from foundation.training.run import (
    Plan,
    code_version,
    describe_run,
    finished_runs,
    held,
    new_run,
    run_to_resume,
    runs_dir,
    unfinished_runs,
)
from tests.tiny_store import ENCODER, N_VOXELS, make_tiny_store, tiny_recipe

RECIPE = tiny_recipe(Path("/somewhere.zarr"))
DATA = "sha256:data"


def made(status: str, *, created: float = 1.0, data: str = DATA, recipe: Recipe = RECIPE) -> Path:
    directory = new_run(recipe)
    described = {"recipe": recipe.to_json(), "data_digest": data, "store": "/somewhere.zarr"}
    describe_run(directory, status=status, created=created, **described)
    return directory


def test_a_new_run_is_named_for_its_recipe_and_lives_in_our_home(home):
    first, second = new_run(RECIPE), new_run(RECIPE)
    assert first != second
    assert first.parent == second.parent == runs_dir() == home / "runs"
    assert first.name.startswith("tiny-")


def test_what_is_told_of_a_run_adds_up(home):
    directory = made("running")
    assert describe_run(directory, status="failed")["created"] == 1.0
    assert json.loads((directory / "run.json").read_text())["status"] == "failed"
    assert describe_run(directory)["status"] == "failed"
    assert describe_run(new_run(RECIPE)) == {}


def test_finished_runs_are_those_of_the_settings_and_data_however_these_were_named():
    named = replace(RECIPE, data=replace(RECIPE.data, store="/elsewhere.zarr", subjects=("1", "2", "5")))
    older, newer = made("finished"), made("finished", created=2.0, recipe=named)
    made("interrupted", created=3.0)
    made("finished", created=3.0, data="sha256:other")
    made("finished", created=3.0, recipe=replace(RECIPE, seed=1))
    assert finished_runs(RECIPE, DATA) == [newer, older]


def test_without_a_name_the_newest_unfinished_run_of_this_recipe_and_data_is_resumed():
    oldest, newest, middle = made("interrupted", created=1), made("failed", created=3), made("running", created=2)
    made("finished", created=4)
    made("interrupted", created=5, data="sha256:other")
    made("interrupted", created=6, recipe=replace(RECIPE, seed=1))
    describe_run(new_run(RECIPE), status="interrupted", digest="of before the first release")
    assert run_to_resume(RECIPE, DATA, name=None) == newest
    assert unfinished_runs(RECIPE, DATA) == [newest, middle, oldest]


def test_without_any_unfinished_run_the_error_says_what_to_do(home):
    made("finished")
    new_run(RECIPE)  # a run that died before it described itself
    with pytest.raises(ValueError, match=f"no unfinished run of this recipe, these options and data in {home}"):
        run_to_resume(RECIPE, DATA, name=None)


def test_a_named_run_is_resumed_if_it_is_unfinished_and_of_the_same_data():
    interrupted, finished = made("interrupted"), made("finished")
    other = made("interrupted", data="sha256:other")
    assert run_to_resume(RECIPE, DATA, name=interrupted.name) == interrupted
    with pytest.raises(ValueError, match=f"run '{finished.name}' is finished; there is nothing to resume"):
        run_to_resume(RECIPE, DATA, name=finished.name)
    with pytest.raises(
        ValueError, match=f"data that run '{other.name}' was made with have changed since in /somewhere"
    ):
        run_to_resume(RECIPE, DATA, name=other.name)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (replace(RECIPE, seed=1), "seed 1 for the run's 0"),
        (replace(RECIPE, optim=replace(RECIPE.optim, lr=1e-4)), "optim.lr 0.0001 for the run's 0.01"),
        (
            replace(RECIPE, backbone=replace(RECIPE.backbone, scan_orders=("raster",), width=16)),
            r"backbone.width 16 for the run's 8; backbone.scan_orders \('raster',\) for the run's \('raster'",
        ),
        (replace(RECIPE, data=replace(RECIPE.data, subjects=("1",))), "data.subjects"),
    ],
)
def test_a_named_run_of_other_settings_is_refused_and_each_of_them_named(changed, named):
    run = made("interrupted")
    with pytest.raises(
        ValueError, match=f"run '{run.name}' has other settings than those given: .*{named}.*leave them"
    ):
        run_to_resume(changed, DATA, name=run.name)


def test_a_recipe_is_read_from_json_as_it_was_and_newer_settings_have_their_default():
    plain = json.loads(json.dumps(RECIPE.to_json()))
    assert Recipe.from_json(plain) == RECIPE
    del plain["optim"]["patience"], plain["keep_checkpoints"]
    assert Recipe.from_json(plain) == RECIPE


def test_an_unknown_name_is_an_error_that_lists_the_runs_there_are(home):
    with pytest.raises(ValueError, match=r"run 'nothing' is not in .*; there are: none"):
        run_to_resume(RECIPE, DATA, name="nothing")
    run = made("interrupted")
    with pytest.raises(ValueError, match=f"there are: {run.name}"):
        run_to_resume(RECIPE, DATA, name="nothing")


def hold(directory: Path, is_held, done) -> None:
    with held(directory):
        is_held.set()
        done.wait(60)


def test_a_run_that_another_process_trains_is_left_to_it_until_that_one_is_gone():
    run, context = made("running"), multiprocessing.get_context("spawn")
    is_held, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(run, is_held, done))
    process.start()
    assert is_held.wait(60)
    with pytest.raises(ValueError, match=f"run {run.name} is being trained by another process"), held(run):
        pass
    process.kill()
    process.join()
    with held(run):
        pass


def test_a_fresh_model_depends_on_the_seed_alone_and_takes_its_statistics_from_the_given_images(tiny_store):
    store = PooledStore.open(tiny_store)
    image = samples(store.subject("subj01"), split_of(store), "train").image
    models, spec = [], parse_parcels("auto:4")
    parcels = {name: make_parcels(spec, store.subject(name).voxels) for name in N_VOXELS}
    for seed in (0, 0, 1):
        torch.rand(3)
        models.append(
            build_model(tiny_recipe(tiny_store, seed=seed), store.tokens(ENCODER), np.tile(image, 2), parcels)
        )
    first, again, other = (dict(model.state_dict()) for model in models)
    torch.testing.assert_close(first, again, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(first["vae.queries"], other["vae.queries"])
    cls, patch = store.tokens(ENCODER).read(np.unique(image))
    streams = models[0].streams
    np.testing.assert_allclose(streams.cls_mean, cls.astype(np.float64).mean(0), atol=1e-5)
    np.testing.assert_allclose(streams.patch_sd, patch.astype(np.float64).std((0, 2)), atol=1e-4)
    assert models[0].subjects == list(N_VOXELS)
    assert [models[0].adapter(name).n_voxel for name in N_VOXELS] == list(N_VOXELS.values())


def plan_of(store: Path, directory: Path) -> Plan:
    """A run of the one subject whose voxels have positions, its parcels by responses."""
    recipe = tiny_recipe(store)
    recipe = replace(recipe, data=replace(recipe.data, subjects=("subj02",), parcels="functional:4"))
    return Plan(recipe=recipe, store=str(store), directory=directory, tracking_uri="", tracking_run="")


def test_adding_a_subject_leaves_the_lineage_of_the_others_as_it_was(tmp_path, monkeypatch):
    courses: list[Course] = []
    monkeypatch.setattr(course_module, "train", lambda engine, course, *_, **__: courses.append(course) or "trained")
    path = tmp_path / "tiny.zarr"
    store = make_tiny_store(path)
    before = split_of(store).digest
    train_run(plan_of(path, tmp_path), LocalEngine, lambda *_: None)
    rows = store.add_images(ImageBlock(ids=[f"new{k}" for k in range(30)], roles=["train", "test", "validation"] * 10))
    responses = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    store.add_subject(SubjectData(name="subj09", responses=responses, image=rows.astype(np.int32)))
    assert split_of(store).digest != before
    train_run(plan_of(path, tmp_path), LocalEngine, lambda *_: None)
    first, again = (course.made_from for course in courses)
    for key in ("split_digest", "parcels", "store_digest"):
        assert first[key] == again[key], key


def test_a_test_picture_under_another_identity_among_those_of_training_stops_a_run(tiny_store, tmp_path, monkeypatch):
    parts = split_of(PooledStore.open(tiny_store)).parts
    train, test = (int(np.flatnonzero(parts == part)[0]) for part in ("train", "test"))
    same = {train: "sha256:same", test: "sha256:same"}
    monkeypatch.setattr(PooledStore, "picture_digests", lambda self: same)
    with pytest.raises(ValueError, match=r"leakage audit: 1 found: images .*\(train\) and .*\(test\) are one picture"):
        train_run(plan_of(tiny_store, tmp_path), LocalEngine, lambda *_: None)
    assert not list(tmp_path.iterdir())


def test_the_code_is_named_by_version_and_commit():
    assert code_version().count("+") == 1

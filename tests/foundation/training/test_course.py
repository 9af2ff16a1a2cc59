"""A run's start and end: solved once, from training images, whole or not there; the best model outlives its finish."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.store import PooledStore
from foundation.checkpoint import file_digest, load_model
from foundation.config import Recipe
from foundation.training import course as module
from foundation.training.course import FINAL, START, Material, finish_run, start_run, train_run
from foundation.training.engine import LocalEngine
from foundation.training.optim import stage_of
from foundation.training.run import Plan
from foundation.training.validation import validation_scores
from tests.tiny_store import ENCODER, N_VOXELS, make_tiny_store, tiny_recipe


def plan(recipe: Recipe, directory: Path) -> Plan:
    directory.mkdir(parents=True, exist_ok=True)
    assert recipe.data.store is not None
    return Plan(recipe=recipe, store=recipe.data.store, directory=directory, tracking_uri="", tracking_run="")


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def digests(directory: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in directory.iterdir()}


def never(*_, **__):
    raise AssertionError("solved all the same")


def run(plan: Plan, *, stop: bool = False) -> str:
    """Train, as one worker; with `stop`, until after the second step."""

    def log(metrics, step: int) -> None:
        if stop and step == 2:
            (plan.directory / "stop").touch()

    (plan.directory / "stop").unlink(missing_ok=True)
    return train_run(plan, LocalEngine, log)


@pytest.fixture(scope="module")
def started(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A run that was started; read-only by agreement."""
    made = plan(tiny_recipe(tiny_store), tmp_path_factory.mktemp("started"))
    start_run(made)
    return made


@pytest.fixture(scope="module")
def finished(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A run that was trained and finished."""
    made = plan(tiny_recipe(tiny_store, epochs=2), tmp_path_factory.mktemp("finished"))
    run(made)
    before = digests(made.directory / "best")
    finish_run(made)
    assert digests(made.directory / "best") == before
    return made


# -- the start -------------------------------------------------------------------------------------------------------


def test_the_start_is_a_model_of_every_subject_with_its_path_solved(started):
    model, made_from = load_model(started.directory / START)
    assert model.subjects == list(N_VOXELS)
    assert made_from["run"] == started.directory.name
    for name in N_VOXELS:
        adapter = model.adapter(name)
        assert adapter.linear.solved
        torch.testing.assert_close(adapter.voxel_field.place, adapter.linear.place)
        assert adapter.alone


def test_a_start_that_is_there_is_not_made_again(started, monkeypatch):
    before = digests(started.directory / START)
    monkeypatch.setattr(module, "linear_start", never)
    start_run(started)
    assert digests(started.directory / START) == before


@pytest.mark.parametrize("killed", ["linear_start", "save_model"])
def test_a_start_that_is_killed_goes_on_with_the_subjects_that_are_left(started, tiny_store, tmp_path, killed):
    made = plan(started.recipe, tmp_path)
    real, calls = getattr(module, killed), []

    def dies(*args, **options):
        real(*args, **options)
        calls.append(killed)
        if len(calls) == 2:  # of three subjects; the second is solved, but its directory has no name yet
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, killed, dies)
        with pytest.raises(KeyboardInterrupt):
            start_run(made)
    assert [path.name for path in tmp_path.rglob("*") if path.name in N_VOXELS] == [next(iter(N_VOXELS))]
    said: list[str] = []
    start_run(made, tell=said.append)
    assert len(said) == 2
    assert [path.name for path in tmp_path.iterdir()] == [START]
    expected = weights(started.directory / START)
    torch.testing.assert_close(weights(tmp_path / START), expected, rtol=0, atol=0, equal_nan=True)


def test_a_resumed_run_goes_on_without_solving_again(tiny_store, tmp_path, monkeypatch):
    made = plan(tiny_recipe(tiny_store, epochs=1), tmp_path)
    assert run(made, stop=True) == "interrupted"
    before = digests(tmp_path / START)
    monkeypatch.setattr(module, "linear_start", never)
    assert run(made) == "trained"
    assert digests(tmp_path / START) == before


def test_the_start_looks_at_no_validation_or_test_response(started, tmp_path):
    make_tiny_store(tmp_path / "spoilt.zarr", spoilt=("validation", "test"))
    spoilt = plan(tiny_recipe(tmp_path / "spoilt.zarr"), tmp_path / "run")
    start_run(spoilt)
    found, expected = (weights(of.directory / START) for of in (spoilt, started))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def of_sessions(store: Path, n_sessions: int | None, directory: Path, **of_recipe) -> Plan:
    """A run of the first sessions of the subject whose positions are known, its parcels made of responses."""
    recipe = tiny_recipe(store, **of_recipe)
    data = replace(recipe.data, sessions=n_sessions, subjects=("subj02",), parcels="functional:4")
    return plan(replace(recipe, data=data), directory)


def test_a_run_of_the_first_sessions_learns_nothing_from_later_ones(tiny_store, tmp_path):
    """From its parcels and token statistics to the noise of single trials: bit for bit, whatever was measured later."""
    make_tiny_store(tmp_path / "spoilt.zarr", spoilt=(3,))
    found = []
    for name, store in (("spoilt", tmp_path / "spoilt.zarr"), ("clean", tiny_store)):
        made = of_sessions(store, 2, tmp_path / name, epochs=1)
        run(made)
        finish_run(made)
        found.append(weights(tmp_path / name / FINAL))
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


def test_images_token_statistics_and_parcels_are_those_of_the_first_sessions(tiny_store, tmp_path):
    made = of_sessions(tiny_store, 1, tmp_path)
    material, of_all = Material(made), Material(of_sessions(tiny_store, None, tmp_path))
    store = material.store
    subject = store.subject("subj02")
    assert subject.session is not None
    shown = set(subject.image[subject.session == 1].tolist())
    rows = sorted(row for row in shown if row < 44)
    assert 0 < len(rows) < 44
    assert material.train["subj02"].image.tolist() == rows
    assert material.validation["subj02"].image.tolist() == sorted(row for row in shown if 44 <= row < 52)
    assert material.parcels["subj02"].key != of_all.parcels["subj02"].key
    assert set(material.parcels["subj02"].used_images.tolist()) <= set(rows)
    start_run(made)
    model, made_from = load_model(tmp_path / START)
    assert made_from["recipe"]["data"]["sessions"] == 1
    cls, patch = (tokens.astype(np.float64) for tokens in store.tokens(ENCODER).read(np.array(rows)))
    np.testing.assert_allclose(model.streams.cls_mean, cls.mean(0), atol=1e-4)
    np.testing.assert_allclose(model.streams.patch_mean, patch.mean((0, 2)), atol=1e-4)


def test_gradient_steps_leave_the_closed_form_path_as_it_was(finished):
    first, last = (weights(finished.directory / name) for name in (START, "best"))
    path = [key for key in first if ".linear." in key]
    assert len(path) == 7 * len(N_VOXELS)
    for key in path:
        assert torch.equal(first[key], last[key]), key


def test_stage_1_learns_the_target_that_the_recipe_names(started, tiny_store, tmp_path):
    recipe = replace(started.recipe, loss=replace(started.recipe.loss, roi_target="reliability-weighted"))
    made = plan(replace(recipe, start="random"), tmp_path)
    start_run(made)
    found, plain = (weights(of.directory / START) for of in (made, started))
    for name in N_VOXELS:
        key = f"adapters.{name}.target_weight"
        assert not torch.allclose(found[key], plain[key])
        sums = torch.zeros(int(found[f"adapters.{name}.parcel"].max()) + 1)
        sums.index_add_(0, found[f"adapters.{name}.parcel"], found[key])
        torch.testing.assert_close(sums, torch.ones_like(sums))


# -- stages ----------------------------------------------------------------------------------------------------------


def test_each_stage_moves_its_own_parameters_and_no_others(tiny_store, tmp_path):
    recipe = tiny_recipe(tiny_store, epochs=2, checkpoint_every=5)
    recipe = replace(recipe, optim=replace(recipe.optim, stage1_share=0.5))
    assert run(plan(recipe, tmp_path)) == "trained"
    kept = [tmp_path / START, *sorted((tmp_path / "checkpoints").iterdir())]
    assert [path.name for path in kept] == [START, "step-0000005", "step-0000010"]
    model, _ = load_model(tmp_path / START)
    for stage, before, after in zip(("stage1", "stage2"), kept[:-1], kept[1:], strict=True):
        old, new = weights(before), weights(after)
        moved = {name for name, _ in model.named_parameters() if not torch.equal(old[name], new[name])}
        assert moved == {name for name, _ in model.named_parameters() if stage_of(name) == stage}


# -- the end ---------------------------------------------------------------------------------------------------------


def test_what_is_finished_is_the_best_model_with_shares_and_noise_settled(finished):
    (best, told), (final, made_from) = (load_model(finished.directory / name) for name in ("best", FINAL))
    assert {**made_from, "validation_voxel_r": None} == {**told, "validation_voxel_r": None}
    material = Material(finished)
    score = validation_scores(final, material.tokens, material.validation)["validation/voxel_r"]
    assert made_from["validation_voxel_r"] == score != told["validation_voxel_r"]  # of the mixture, not of the network
    changed = {key for key, value in final.state_dict().items() if not torch.equal(value, best.state_dict()[key])}
    assert changed == {f"adapters.{name}.{what}" for name in N_VOXELS for what in ("network_share", "noise_sd")}
    for name in N_VOXELS:
        adapter = final.adapter(name)
        assert ((adapter.network_share >= 0) & (adapter.network_share < 1)).all()
        assert ((adapter.noise_sd > 0) & (adapter.noise_sd < 3)).all()


def test_finishing_again_gives_the_same_model(finished):
    before = digests(finished.directory / FINAL)
    finish_run(finished)
    assert digests(finished.directory / FINAL) == before


def test_a_finished_model_can_be_sampled_and_an_unfinished_one_says_what_is_missing(finished, tiny_store):
    cls, patch = (torch.from_numpy(t).float() for t in PooledStore.open(tiny_store).tokens(ENCODER).read(np.arange(2)))
    final, best = (load_model(finished.directory / name)[0] for name in (FINAL, "best"))
    assert final.sample(cls, patch, "subj01", 3).isfinite().all()
    with pytest.raises(ValueError, match="the noise of 'subj01' hasn't been fitted"):
        best.sample(cls, patch, "subj01", 3)


def test_a_random_start_has_no_path_and_its_network_predicts_alone(tiny_store, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "linear_start", never)
    made = plan(tiny_recipe(tiny_store, epochs=1, start="random"), tmp_path)
    run(made)
    finish_run(made)
    model, _ = load_model(tmp_path / FINAL)
    cls, patch = (torch.from_numpy(t).float() for t in PooledStore.open(tiny_store).tokens(ENCODER).read(np.arange(4)))
    for name in N_VOXELS:
        adapter = model.adapter(name)
        assert not adapter.linear.solved
        assert (adapter.network_share == 1).all()
        network = model(cls, patch, {name: slice(0, 4)}).subjects[name].voxel
        torch.testing.assert_close(model.predict(cls, patch, name), network, rtol=0, atol=0)

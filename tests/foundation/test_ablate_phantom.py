"""On a phantom whose truth is known, ablation finds the specialisation that was planted, and none where none was."""

from dataclasses import replace
from pathlib import Path

import pytest

from data.features import compute_features, load_encoder
from data.phantom import PhantomConfig, write_phantom
from data.splits import split_of
from data.store import PooledStore
from foundation.checkpoint import load_model
from foundation.config import DataConfig
from foundation.evaluation.ablation import ablate
from foundation.evaluation.area_losses import merged
from foundation.evaluation.specialisation import Finding, findings, sentences
from foundation.model.encoding_model import EncodingModel
from foundation.recipes import recipe_named
from tests.tiny_runs import run_once

PHANTOM = PhantomConfig(subjects=3, sessions=4, voxels=600)
SUBJECTS = ("subj01", "subj02", "subj03")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PooledStore]:
    """The planted phantom and its twin of the same responses, whose labels are dealt out to voxels at random."""
    found = {}
    for name, specialised in (("planted", True), ("absent", False)):
        path = tmp_path_factory.mktemp(name) / "phantom.zarr"
        write_phantom(path, replace(PHANTOM, specialised=specialised))
        compute_features(PooledStore.open(path, writable=True), load_encoder("gabor"))
        found[name] = PooledStore.open(path)
    return found


@pytest.fixture(scope="module")
def model(stores: dict[str, PooledStore], tmp_path_factory: pytest.TempPathFactory) -> EncodingModel:
    """A dual-stream model of the planted phantom; it sees no labels, so training on the twin would give the same.

    Parcels are small: of the usual ten an area, no 1000 resamples could bear a claim among six tests.
    """
    recipe = recipe_named("phantom-tiny")
    data = DataConfig(store=str(stores["planted"].path), subjects=SUBJECTS, parcels="auto:10")
    directory: Path = tmp_path_factory.mktemp("run") / "run"
    run_once(replace(recipe, data=data, optim=replace(recipe.optim, epochs=5)), directory)
    return load_model(directory / "best")[0]


def found_on(model: EncodingModel, store: PooledStore) -> list[Finding]:
    tokens, split = store.tokens("gabor"), split_of(store)
    return findings(merged(ablate(model, store.subject(s), tokens, split) for s in SUBJECTS).differentials)


def test_the_planted_specialisation_of_the_patch_stream_is_found(model, stores):
    """In every subject its interval is clear of 0; so small a phantom bears the whole rule in some of them only."""
    found = found_on(model, stores["planted"])
    patch = [f for f in found if f.branch == "patch"]
    assert all(f.mean.versus_low > 0 for f in patch)
    assert "early" in [f.favours for f in patch]
    assert "higher" not in [f.favours for f in patch]
    assert "early" not in [f.favours for f in found if f.branch == "cls"]
    assert "Intervention-based evidence that the patch stream matters more for early" in sentences(found)[1]


def test_where_no_area_differs_from_another_nothing_is_claimed(model, stores):
    found = found_on(model, stores["absent"])
    assert [f.favours for f in found] == [None] * 6
    cls, patch, both, _ = sentences(found)
    assert all(said.startswith("No intervention-based evidence") for said in (cls, patch))
    assert both.startswith("No evidence")

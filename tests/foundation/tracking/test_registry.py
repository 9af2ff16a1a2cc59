"""Versions, who is champion, and how a backbone is found."""

import itertools
from pathlib import Path

import pytest
from mlflow import MlflowClient

from foundation.tracking.registry import Registered, aliases, find_backbone, register
from foundation.tracking.runs import TrackedRun, tracking_uri

TAGS = {"split_digest": "sha256:split", "store_digest": "sha256:store", "validation_voxel_r": "0.300000"}
NAMES = (f"recipe{i}" for i in itertools.count())


@pytest.fixture
def name() -> str:
    """A name that no other test registers."""
    return next(NAMES)


@pytest.fixture
def run(tmp_path: Path) -> TrackedRun:
    """A run that keeps a model."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text('{"kept": true}')
    started = TrackedRun.start("run", kind="pretrain", config={}, tags={})
    started.artifact(tmp_path / "model", "backbone")
    return started


def registered(name: str, run: TrackedRun, *, kind: str = "backbone", **tags: str) -> Registered:
    return register(name, run, "backbone", kind=kind, tags=TAGS | tags)


def test_versions_count_up_and_carry_their_lineage_and_files(name, run):
    first, second = registered(name, run, seed="0"), registered(name, run, seed="1")
    assert (first.label, second.label) == (f"{name}/1", f"{name}/2")
    found = find_backbone(f"{name}/1")
    assert found == first
    assert found.run_id == run.id
    assert found.tags == TAGS | {"seed": "0", "kind": "backbone"}
    assert (found.directory() / "model.json").read_text() == '{"kept": true}'


@pytest.mark.parametrize(
    ("second", "champion"),
    [
        ({"validation_voxel_r": "0.31"}, 2),
        ({"validation_voxel_r": "0.30"}, 2),
        ({"validation_voxel_r": "0.29"}, 1),
        ({"validation_voxel_r": "nan"}, 2),
        ({"validation_voxel_r": "0.29", "split_digest": "sha256:other"}, 2),
        ({"validation_voxel_r": "0.29", "store_digest": "sha256:other"}, 2),
        ({"validation_voxel_r": "0.29", "sessions": "1"}, 2),
    ],
    ids=["better", "as good", "worse", "unknown", "other split", "other data", "other sessions"],
)
def test_a_version_leads_unless_it_is_known_to_be_worse(name, run, second, champion):
    first = registered(name, run)
    assert aliases(first) == ["champion"]
    newer = registered(name, run, **second)
    assert aliases(newer) == (["champion"] if champion == 2 else ["candidate"])
    assert find_backbone(name).version == find_backbone(f"{name}@champion").version == champion
    assert aliases(first) == (["champion"] if champion == 1 else [])


def test_the_candidate_is_the_newest_that_does_not_lead(name, run):
    for score in ("0.3", "0.2", "0.1"):
        registered(name, run, validation_voxel_r=score)
    assert find_backbone(f"{name}@candidate").version == 3
    assert find_backbone(name).version == 1


def test_a_name_may_have_dots(run):
    made = registered("recipe.subj05", run, kind="adapter")
    assert find_backbone(f"recipe.subj05/{made.version}") == made


def test_without_a_name_the_champion_that_was_registered_last_is_found(name, run):
    other = next(NAMES)
    registered(other, run)
    best = registered(name, run)
    registered(name, run, validation_voxel_r="0.1")  # a candidate, though newer
    registered(f"{name}.subj05", run, kind="adapter")  # no backbone, though newest
    assert find_backbone(None) == best
    newest = registered(other, run)
    assert find_backbone(None) == newest


@pytest.mark.parametrize("wanted", ["nothing", "nothing@champion", "nothing/1", "{name}/7", "{name}@best", "{name}/x"])
def test_what_is_not_registered_is_an_error_that_lists_what_is(name, run, wanted):
    registered(name, run)
    wanted = wanted.format(name=name)
    with pytest.raises(ValueError, match=rf"backbone '{wanted}' is not in the registry .*registered are: .*{name}"):
        find_backbone(wanted)


def test_an_empty_registry_says_how_to_fill_it(monkeypatch, tmp_path):
    monkeypatch.setattr(MlflowClient, "search_registered_models", lambda self, **options: [])
    with pytest.raises(
        ValueError, match=r"no backbone is registered in .*mlflow\.db; run `python -m foundation.pretrain`"
    ):
        find_backbone(None)
    assert tracking_uri().endswith("mlflow.db")

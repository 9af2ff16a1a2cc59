"""A published version: whole, described, tagged, and predicting what was published."""

import itertools

import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from foundation.evaluation.compare import headline
from foundation.tracking.cards import card_text, read_card
from foundation.tracking.packaging import card_in, load_packaged, load_parts
from foundation.tracking.publish import publish
from foundation.tracking.registry import find_version, versions
from foundation.tracking.runs import TrackedRun, TrackingError, client
from tests.planted_scores import planted_versions
from tests.tiny_version import ADAPTED, save_parts

NAMES = (f"published{i}" for i in itertools.count())
LINEAGE = {"backbone": "tiny/1", "subject": ADAPTED, "sessions": 3, "composition": {"network": 0.5}}


@pytest.fixture
def name() -> str:
    """A name that no other test registers."""
    return next(NAMES)


@pytest.fixture
def run() -> TrackedRun:
    return TrackedRun.start("run", kind="adapt", config={}, tags={})


def test_an_adapter_is_published_with_its_backbone_card_tags_and_description(name, run, tmp_path):
    backbone, adapter, _ = save_parts(tmp_path)
    scores = planted_versions({ADAPTED: 0.3})
    made = publish(run, name=name, kind="adapter", backbone=backbone, adapter=adapter, lineage=LINEAGE, scores=scores)
    assert made == find_version(name, kind="adapter")
    found, lineage = load_packaged(made.directory())
    expected, expected_lineage = load_parts(backbone, adapter)
    torch.testing.assert_close(dict(found.state_dict()), dict(expected.state_dict()), rtol=0, atol=0, equal_nan=True)
    assert lineage == expected_lineage
    card = read_card(card_in(made.directory()))
    assert (card["name"], card["subjects"], card["composition"]) == (name, [ADAPTED], {"network": 0.5})
    assert made.tags["sessions"] == "3"
    assert made.tags["protocol"] == "strict"
    assert float(made.tags["test_voxel_r"]) == pytest.approx(headline(scores)["test/voxel_r"], abs=1e-6)
    version = client().get_model_version(name, "1")
    assert version.description == card_text(card)
    assert version.run_id == run.id
    kept = {file.path for file in client().list_artifacts(run.id, "model/artifacts/card")}
    assert {path.rpartition("/")[2] for path in kept} == {"card.json", "card.md", "figure.png"}


def test_a_backbone_of_many_subjects_is_described_in_what_a_description_may_hold(name, run, tmp_path):
    backbone, _, _ = save_parts(tmp_path)
    scores = planted_versions({f"subj{i:02d}": 0.3 for i in range(1, 13)})
    publish(run, name=name, kind="backbone", backbone=backbone, adapter=None, lineage={}, scores=scores)
    description = client().get_model_version(name, "1").description or ""
    assert 3000 < len(description) <= 5000
    assert description.endswith("(The whole card is `card.md` in the artifacts.)\n")
    assert find_version(name).tags["subjects"] == "subj01 subj02"


@pytest.mark.parametrize("step", ["log_artifacts", "create_model_version"])
def test_a_server_that_refuses_leaves_nothing_registered(name, run, tmp_path, monkeypatch, step):
    backbone, _, _ = save_parts(tmp_path)

    def fails(*words, **options):
        raise MlflowException("no room")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, step, fails)
        with pytest.raises(TrackingError, match="no room"):
            publish(
                run,
                name=name,
                kind="backbone",
                backbone=backbone,
                adapter=None,
                lineage={},
                scores=planted_versions({"subj01": 0.3}),
            )
    assert versions(name) == []
    assert name not in {model.name for model in client().search_registered_models()}

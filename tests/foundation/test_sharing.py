"""From one registry to another: the same numbers, the same words, and nothing at all of what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from foundation.bundle import METADATA, write_bundle
from foundation.checkpoint import file_digest
from foundation.safetensors_header import read_header
from foundation.sharing import export_version, import_bundle
from foundation.tracking.cards import read_card
from foundation.tracking.packaging import adapter_in, backbone_in, card_in, load_packaged
from foundation.tracking.publish import publish
from foundation.tracking.registry import Registered, aliases, find_adapter, find_backbone, versions
from foundation.tracking.runs import TrackedRun, TrackingError, client, find_runs
from tests.planted_scores import planted_versions
from tests.tiny_version import ADAPTED, save_parts

NAME = f"tiny.{ADAPTED}"
LINEAGE = {"backbone": "tiny/1", "backbone_name": "tiny", "subject": ADAPTED, "sessions": 3, "split_digest": "sha256:a"}


def published(directory: Path, kind: str, *, validation: float = 0.3) -> Registered:
    backbone, adapter, _ = save_parts(directory)
    run = TrackedRun.start("run", kind="adapt", config={}, tags={})
    lineage = LINEAGE if kind == "adapter" else {"split_digest": "sha256:a"}
    return publish(
        run,
        name=NAME if kind == "adapter" else "tiny",
        kind=kind,
        backbone=backbone,
        adapter=adapter if kind == "adapter" else None,
        lineage=lineage | {"validation_voxel_r": validation},
        scores=planted_versions({ADAPTED: 0.3} if kind == "adapter" else {"subj01": 0.3, "subj02": 0.4}),
    )


@pytest.fixture(scope="module")
def exported(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Registered]]:
    """A bundle of each kind, exported from a registry, and what it was exported from."""
    home, out = registry(tmp_path_factory.mktemp("sender"), empty_database), tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANYBRAINS_HOME", str(home))
        found = {}
        for kind in ("backbone", "adapter"):
            version = published(tmp_path_factory.mktemp(kind), kind)
            export_version(version, out / f"{kind}.safetensors")
            found[kind] = (out / f"{kind}.safetensors", version)
    return found


def registry(home: Path, empty_database: Path) -> Path:
    (home / "mlflow.db").write_bytes(empty_database.read_bytes())
    return home


@pytest.fixture(autouse=True)
def receiver(home: Path, empty_database: Path) -> Path:
    """An empty registry."""
    return registry(home, empty_database)


@pytest.mark.parametrize("kind", ["backbone", "adapter"])
def test_what_is_imported_predicts_bit_for_bit_what_was_exported_with_card_and_lineage(exported, kind):
    path, original = exported[kind]
    found = import_bundle(path)
    assert aliases(found) == ["champion"]
    (model, lineage), (expected, expected_lineage) = (load_packaged(v.directory()) for v in (found, original))
    assert lineage == expected_lineage
    tokens = torch.randn(3, 4, 48), torch.randn(3, 4, 64, 48)
    for subject in expected.subjects:
        assert torch.equal(model.predict(*tokens, subject), expected.predict(*tokens, subject))
        drawn = [m.sample(*tokens, subject, 2, generator=torch.Generator().manual_seed(0)) for m in (model, expected)]
        assert torch.equal(*drawn)
    parts = [(backbone_in(v.directory()), adapter_in(v.directory())) for v in (found, original)]
    for mine, theirs in zip(*parts, strict=True):
        if theirs is not None:
            assert {f.name: file_digest(f) for f in (mine or Path()).iterdir()}.items() >= {
                f.name: file_digest(f) for f in theirs.iterdir() if f.suffix == ".safetensors"
            }.items()
    assert read_card(card_in(found.directory())) == read_card(card_in(original.directory()))
    imported = {"imported_from": file_digest(path), "imported_name": original.name}
    assert found.tags == original.tags | imported
    (run,) = find_runs("tags.`manybrains.kind` = 'import'")
    assert (run.info.run_id, run.info.status) == (found.run_id, "FINISHED")


def test_an_import_is_found_by_subject_where_there_is_nothing_else(exported):
    found = import_bundle(exported["adapter"][0])
    assert find_adapter("5") == found
    backbone = import_bundle(exported["backbone"][0])
    assert find_backbone(None) == backbone


def test_the_card_lies_beside_the_bundle_for_people_to_read(exported):
    path, original = exported["adapter"]
    assert json.loads(path.with_suffix(".card.json").read_text()) == read_card(card_in(original.directory()))
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "adapter.card.json",
        "adapter.safetensors",
        "backbone.card.json",
        "backbone.safetensors",
    ]


def test_an_import_may_have_another_name(exported):
    found = import_bundle(exported["adapter"][0], name="theirs.subj05")
    assert found.label == "theirs.subj05/1"
    assert found.tags["imported_name"] == NAME
    for name in ("../up", "a/b", "", "a@b"):
        with pytest.raises(ValueError, match="a model's name"):
            import_bundle(exported["adapter"][0], name=name)


@pytest.mark.parametrize(("validation", "champion"), [(0.2, True), (0.3, True), (0.4, False), (float("nan"), False)])
def test_an_import_leads_only_if_it_is_known_to_be_no_worse(exported, tmp_path, validation, champion):
    own = published(tmp_path, "adapter", validation=validation)
    found = import_bundle(exported["adapter"][0])
    assert aliases(found) == (["champion"] if champion else ["candidate"])
    assert aliases(own) == ([] if champion else ["champion"])


def test_a_bundle_without_a_card_is_refused(tmp_path):
    backbone, adapter, _ = save_parts(tmp_path)
    write_bundle(backbone, tmp_path / "x.safetensors", adapter=adapter)
    with pytest.raises(ValueError, match=r"has no model card; it must be written by `foundation\.registry export`"):
        import_bundle(tmp_path / "x.safetensors")


def recarded(path: Path, out: Path, **changes) -> Path:
    """Write a bundle with a changed card."""
    metadata = read_header(path).metadata
    card = json.loads(metadata[f"{METADATA}.card"]) | changes
    save_file(load_file(path), out, metadata=metadata | {f"{METADATA}.card": json.dumps(card)})
    return out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "../../up"}, "a model's name"),
        ({"kind": "backbone"}, "its card is of another model"),
        ({"subjects": ["subj01"]}, "its card is of another model"),
        ({"lineage": {"subject": "subj01"}}, "lineage names another subject"),
        ({"lineage": {"store": "\x1b]0;evil\x07"}}, "can't be printed"),
        ({"lineage": {"a/b": 1}}, "must start with a letter"),
        ({"scores": [1]}, "lacks an entry"),
    ],
)
def test_a_card_that_is_not_the_models_own_is_refused(exported, tmp_path, changes, said):
    path = recarded(exported["adapter"][0], tmp_path / "x.safetensors", **changes)
    with pytest.raises(ValueError, match=said):
        import_bundle(path)
    assert_nothing()


def assert_nothing() -> None:
    assert versions() == []
    assert list(client().search_registered_models()) == []


def test_of_a_damaged_file_nothing_is_registered_and_no_run_started(exported, tmp_path):
    path = tmp_path / "x.safetensors"
    content = bytearray(exported["adapter"][0].read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="its tensors aren't those described"):
        import_bundle(path)
    assert_nothing()
    assert find_runs() == []


def test_of_an_import_that_the_server_breaks_off_nothing_stays(exported, monkeypatch):
    def fails(*words, **options):
        raise OSError("no room")

    monkeypatch.setattr("mlflow.MlflowClient.create_model_version", fails)
    with pytest.raises(TrackingError, match="no room"):
        import_bundle(exported["adapter"][0])
    assert_nothing()
    assert [run.info.status for run in find_runs()] == ["FAILED"]


def test_an_export_never_overwrites_and_needs_a_whole_version(tmp_path):
    version = published(tmp_path, "backbone")
    (tmp_path / "there.safetensors").write_text("mine")
    (tmp_path / "card.card.json").write_text("mine")
    for name, said in (("there.safetensors", "exists"), ("card.safetensors", "exists"), ("x.pt", "must end in")):
        with pytest.raises(ValueError, match=said):
            export_version(version, tmp_path / name)
    weights = backbone_in(version.directory()) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged or missing"):
        export_version(version, tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("*out*"))

"""Versions, who is champion, and how a backbone is found."""

import itertools
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.entities import PagedList

from foundation.tracking.registry import (
    IMPORTED,
    Registered,
    aliases,
    find_adapter,
    find_backbone,
    find_version,
    register,
    versions,
)
from foundation.tracking.runs import TrackedRun, TrackingError, client, tracking_uri

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
        ({"validation_voxel_r": "0.31", "sessions": "1"}, 1),
    ],
    ids=["better", "as good", "worse", "unknown", "other split", "other data", "fewer sessions"],
)
def test_a_version_leads_unless_it_is_known_to_be_worse(name, run, second, champion):
    first = registered(name, run)
    assert aliases(first) == ["champion"]
    newer = registered(name, run, **second)
    assert aliases(newer) == (["champion"] if champion == 2 else ["candidate"])
    assert find_backbone(name).version == find_backbone(f"{name}@champion").version == champion
    assert aliases(first) == (["champion"] if champion == 1 else [])


def test_more_sessions_lead_whatever_their_score_on_other_images(name, run):
    few = registered(name, run, sessions="2", validation_voxel_r="0.4")
    more = registered(name, run, sessions="10", validation_voxel_r="0.3")
    assert (aliases(few), aliases(more)) == ([], ["champion"])


def test_the_candidate_is_the_newest_that_does_not_lead(name, run):
    for score in ("0.3", "0.2", "0.1"):
        registered(name, run, validation_voxel_r=score)
    assert find_backbone(f"{name}@candidate").version == 3
    assert find_backbone(name).version == 1


def test_a_name_may_have_dots(run):
    made = registered("recipe.subj05", run, kind="adapter")
    assert find_version(f"recipe.subj05/{made.version}") == find_version("recipe.subj05@champion") == made


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
    monkeypatch.setattr(MlflowClient, "search_registered_models", lambda self, *words, **options: PagedList([], None))
    with pytest.raises(
        ValueError, match=r"no backbone is registered in .*mlflow\.db; run `python -m foundation.pretrain`"
    ):
        find_backbone(None)
    assert tracking_uri().endswith("mlflow.db")


def test_an_error_about_a_backbone_lists_backbones_alone(name, run):
    registered(name, run)
    registered(f"{name}.subj05", run, kind="adapter", subject="subj05")
    with pytest.raises(ValueError, match=r"backbone 'nothing' is not in") as refused:
        find_backbone("nothing")
    assert f"{name}.subj05" not in str(refused.value)
    with pytest.raises(ValueError, match=rf"{name}.subj05/1 is no backbone but a registered adapter"):
        find_backbone(f"{name}.subj05")


def test_an_imported_backbone_is_the_default_of_nobody_who_has_one(name, run, monkeypatch):
    own = registered(name, run)
    imported = registered(next(NAMES), run, **{IMPORTED: "sha256:x"})
    assert find_backbone(None) == own
    models = MlflowClient.search_registered_models
    only = lambda *w, **o: PagedList([m for m in models(*w, **o) if m.name == imported.name], None)  # noqa: E731
    monkeypatch.setattr(MlflowClient, "search_registered_models", only)
    assert find_backbone(None) == imported


def test_a_name_is_of_one_kind(name, run):
    registered(name, run)
    with pytest.raises(ValueError, match=f"'{name}' is the name of a registered backbone; give this adapter another"):
        registered(name, run, kind="adapter")
    assert [version.label for version in versions(name)] == [f"{name}/1"]


def test_all_versions_are_listed_newest_first_and_other_peoples_models_left_out(name, run, tmp_path):
    for score in ("0.3", "0.2", "0.4"):
        registered(name, run, validation_voxel_r=score)
    theirs = f"theirs-{name}"
    client().create_registered_model(theirs)
    client().create_model_version(theirs, str(tmp_path / "model"))
    assert [version.version for version in versions(name)] == [3, 2, 1]
    assert versions()[0].label == f"{name}/3"
    assert theirs not in {version.name for version in versions()}
    with pytest.raises(ValueError, match=f"{theirs}/1 in .* is no model of manybrains"):
        find_version(f"{theirs}/1")


def test_files_of_a_local_registry_are_used_in_place_and_gone_is_an_error(name, run):
    found = registered(name, run)
    directory = found.directory()
    assert found.source == directory.as_uri()
    directory.rename(directory.with_name("elsewhere"))
    with pytest.raises(ValueError, match=f"the files of {name}/1 are gone from .*; register it again"):
        found.directory()


@pytest.fixture
def remote(home: Path, monkeypatch: pytest.MonkeyPatch) -> Registered:
    """A version whose files a server has."""
    monkeypatch.setenv("MANYBRAINS_HOME", str(home))
    source = "mlflow-artifacts:/1/run/artifacts/model"
    return Registered(name="far", version=3, tags={"kind": "backbone"}, run_id="run", source=source, created_ms=0)


def fetching(monkeypatch: pytest.MonkeyPatch, *, meanwhile=lambda: None) -> list[str]:
    """Put a download of a file in place of MLflow's; return the list that grows with each."""
    fetched: list[str] = []

    def download(*, artifact_uri: str, dst_path: str, tracking_uri: str) -> str:
        fetched.append(artifact_uri)
        (Path(dst_path) / "model").mkdir()
        (Path(dst_path) / "model" / "MLmodel").write_text("whole")
        meanwhile()
        return str(Path(dst_path) / "model")

    monkeypatch.setattr("foundation.tracking.registry.download_artifacts", download)
    return fetched


def test_what_a_server_has_is_downloaded_once(remote, home, monkeypatch):
    fetched = fetching(monkeypatch)
    directory = remote.directory()
    assert remote.directory() == directory
    assert fetched == [remote.source]
    assert (directory / "MLmodel").read_text() == "whole"
    assert [path.name for path in (home / "downloads").iterdir()] == [directory.name]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://another:5000")
    assert remote.directory() != directory


def test_a_download_that_breaks_off_leaves_nothing(remote, home, monkeypatch):
    def breaks() -> None:
        raise OSError("connection lost")

    fetching(monkeypatch, meanwhile=breaks)
    with pytest.raises(TrackingError, match="connection lost"):
        remote.directory()
    assert list((home / "downloads").iterdir()) == []


def test_of_two_processes_that_download_the_same_both_have_it(remote, home, monkeypatch):
    def other_process() -> None:
        monkeypatch.undo()
        monkeypatch.setenv("MANYBRAINS_HOME", str(home))
        fetching(monkeypatch)
        remote.directory()

    fetching(monkeypatch, meanwhile=other_process)
    directory = remote.directory()
    assert (directory / "MLmodel").read_text() == "whole"
    assert [path.name for path in (home / "downloads").iterdir()] == [directory.name]


@pytest.mark.parametrize("step", ["create_model_version", "set_registered_model_alias"])
@pytest.mark.parametrize("there", [True, False], ids=["known name", "new name"])
def test_a_registration_that_fails_leaves_nothing(name, run, monkeypatch, step, there):
    have = [registered(name, run).label] if there else []

    def fails(*words, **options):
        raise MlflowException("no room")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, step, fails)
        with pytest.raises(TrackingError, match="no room"):
            registered(name, run)
    assert [version.label for version in versions(name)] == have
    assert (name in {model.name for model in client().search_registered_models()}) == there


@pytest.mark.parametrize(
    ("second", "champion"),
    [
        ({"validation_voxel_r": "0.30"}, 2),
        ({"validation_voxel_r": "0.29"}, 1),
        ({"validation_voxel_r": "nan"}, 1),
        ({"validation_voxel_r": "0.9", "split_digest": "sha256:other"}, 1),
    ],
    ids=["as good", "worse", "unknown", "other split"],
)
def test_a_version_that_must_prove_itself_leads_only_where_it_can_be_compared(name, run, second, champion):
    def challenged(**tags: str) -> Registered:
        return register(name, run, "backbone", kind="backbone", tags=TAGS | tags, unproven_leads=False)

    assert aliases(challenged()) == ["champion"]
    challenged(**second)
    assert find_backbone(name).version == champion


# -- adapters ----------------------------------------------------------------------------------------------------------


def adapter(backbone: Registered, subject: str, run: TrackedRun, **tags: str) -> Registered:
    lineage = {"subject": subject, "backbone": backbone.label, "backbone_name": backbone.name}
    return registered(f"{backbone.name}.{subject}", run, kind="adapter", **lineage, **tags)


@pytest.mark.parametrize("subject", ["5", "subj05"])
def test_a_subjects_adapter_is_the_champion_of_the_champion_backbone(name, run, subject):
    older = registered(next(NAMES), run)
    adapter(older, "subj05", run)
    backbone = registered(name, run)
    best = adapter(backbone, "subj05", run)
    adapter(backbone, "subj05", run, validation_voxel_r="0.1")
    adapter(backbone, "subj07", run)
    assert find_adapter(subject) == find_adapter(subject, backbone=name) == best
    assert find_adapter(subject, backbone=older.name).name == f"{older.name}.subj05"
    assert find_adapter(subject, name=f"{name}.subj05/2").version == 2


def test_the_adapter_of_a_backbones_version_was_fitted_on_that_version(name, run):
    first, second = registered(name, run), registered(name, run)
    for backbone, score in ((first, "0.3"), (first, "0.2"), (second, "0.4")):
        adapter(backbone, "subj05", run, validation_voxel_r=score)
    assert find_adapter("5").version == find_adapter("5", backbone=second.label).version == 3
    assert find_adapter("5", backbone=first.label).version == 2
    third = registered(name, run)
    with pytest.raises(ValueError, match=rf"no version of adapter {name}.subj05 was fitted on backbone {third.label}"):
        find_adapter("5", backbone=third.label)


def test_a_subject_without_an_adapter_is_an_error_that_lists_adapters_alone(name, run):
    backbone = registered(name, run)
    adapter(backbone, "subj05", run)
    for options in ({}, {"backbone": name}):
        with pytest.raises(ValueError, match=rf"subject '7' has none on backbone {name}; adapters in .*{name}.subj05"):
            find_adapter("7", **options)
    with pytest.raises(ValueError, match=rf"subject '7' is not in adapter {name}.subj05/1; it has subj05"):
        find_adapter("7", name=f"{name}.subj05")
    with pytest.raises(ValueError, match=rf"{name}/1 is no adapter but a registered backbone"):
        find_adapter("5", name=name)


def test_an_imported_adapter_is_found_without_any_backbone(name, run, monkeypatch):
    missing = Registered(name=name, version=1, tags={}, run_id="", source="", created_ms=0)
    found = adapter(missing, "subj05", run)
    models = MlflowClient.search_registered_models
    only = lambda *w, **o: PagedList([m for m in models(*w, **o) if m.name == found.name], None)  # noqa: E731
    monkeypatch.setattr(MlflowClient, "search_registered_models", only)
    assert find_adapter("5") == found

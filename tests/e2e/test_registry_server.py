"""The registry on an MLflow server with an artifact proxy: what is published, found, promoted, shared, and kept."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from foundation.sharing import export_version, import_bundle
from foundation.tracking.packaging import load_packaged, load_parts
from foundation.tracking.promotion import promote
from foundation.tracking.publish import publish
from foundation.tracking.registry import Registered, aliases, find_adapter, find_backbone, find_version, versions
from foundation.tracking.runs import TrackedRun, TrackingError, client
from tests.e2e.test_tracking_server import Server
from tests.planted_scores import planted_versions
from tests.tiny_version import ADAPTED, save_parts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A running server, which is the one that everything here goes to."""
    made = Server(tmp_path / "server")
    made.directory.mkdir()
    made.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.uri)
    yield made
    made.kill()


def published(parts: Path, *, noise: float, validation: float) -> Registered:
    backbone, adapter, _ = save_parts(parts)
    run = TrackedRun.start("run", kind="adapt", config={}, tags={})
    lineage = {"subject": ADAPTED, "backbone": "tiny/1", "split_digest": "sha256:a", "validation_voxel_r": validation}
    return publish(
        run,
        name=f"tiny.{ADAPTED}",
        kind="adapter",
        backbone=backbone,
        adapter=adapter,
        lineage=lineage,
        scores=planted_versions({ADAPTED: noise}),
    )


def test_a_registry_behind_a_server_does_what_a_local_one_does(server, home, tmp_path):
    first = published(tmp_path / "first", noise=0.3, validation=0.4)
    second = published(tmp_path / "second", noise=0.9, validation=0.3)
    assert (aliases(first), aliases(second)) == (["champion"], ["candidate"])
    assert find_adapter("5") == first
    assert versions() == [second, first]
    with pytest.raises(ValueError, match="promote it all the same with --force"):
        promote(second.label)
    promote(second.label, force=True)
    assert find_version(first.name) == second
    with pytest.raises(ValueError, match="registered are: none"):
        find_backbone("tiny")
    assert (client().get_model_version(first.name, "1").description or "").startswith(f"# `{first.name}`")

    copy = first.directory()
    assert copy.is_relative_to(home / "downloads")
    found, _ = load_packaged(copy)
    expected, _ = load_parts(tmp_path / "first" / "final", tmp_path / "first" / "fitted")
    torch.testing.assert_close(dict(found.state_dict()), dict(expected.state_dict()), rtol=0, atol=0, equal_nan=True)

    out = tmp_path / "shared.safetensors"
    export_version(first, out)
    imported = import_bundle(out, name="theirs.subj05")
    assert aliases(imported) == ["champion"]
    assert imported.tags["test_voxel_r"] == first.tags["test_voxel_r"]

    server.kill()
    assert first.directory() == copy
    with pytest.raises(TrackingError, match=f"the tracking server {server.uri} doesn't do what it is asked"):
        second.directory()
    with pytest.raises(TrackingError):
        find_version(first.name)
    assert list(copy.parent.iterdir()) == [copy]

"""A Ray cluster, a home and a store for a module of tests: each takes a while to make."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cluster.config import ClusterConfig
from cluster.launch import NEW, connect
from tests.tiny_store import make_tiny_store


@pytest.fixture(scope="module")
def ray_cluster(session_home: Path) -> Iterator[None]:
    """A cluster of this process's own."""
    connect(ClusterConfig(address=NEW))
    yield
    ray.shutdown()


@pytest.fixture
def module_home(session_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One home for the module: its MLflow database is made once."""
    monkeypatch.setenv("MANYBRAINS_HOME", str(session_home))
    return session_home


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "tiny.zarr"
    make_tiny_store(path)
    return path

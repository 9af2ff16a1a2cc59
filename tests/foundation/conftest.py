"""What is slow to make, made once: the tiny store, and an MLflow database without runs."""

from pathlib import Path

import pytest

from tests.tiny_store import make_tiny_store


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three subjects, 60 images and three sessions; read-only by agreement."""
    path = tmp_path_factory.mktemp("store") / "tiny.zarr"
    make_tiny_store(path)
    return path


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables made, to be copied into a home: MLflow takes seconds to make them."""
    from foundation.tracking.runs import client

    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    client(f"sqlite:///{path}").search_experiments()
    return path

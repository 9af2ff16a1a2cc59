"""Fixtures for every test: a home of its own, one torch thread, no network, and the shared real data where it is."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Read when these libraries are imported, so set before any test module is: no test fetches a model or reports usage.
os.environ.update(
    HF_HUB_OFFLINE="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    RAY_USAGE_STATS_ENABLED="0",
)

REPOSITORY = Path(__file__).resolve().parents[1]

# A developer's own settings would lead a test to their runs or to their cluster.
FOREIGN = (
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_REGISTRY_URI",
    "MLFLOW_RUN_ID",
    "MLFLOW_TRACKING_URI",
    "RAY_ADDRESS",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", type=Path, metavar="DIR", help="keep the browser tests' screenshots here")


@pytest.fixture(scope="session", autouse=True)
def session_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The home that session and module fixtures see; a test itself has `home`."""
    home = tmp_path_factory.mktemp("session-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANYBRAINS_HOME", str(home))
        for name in FOREIGN:
            patch.delenv(name, raising=False)
        yield home


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home for this test alone, in MANYBRAINS_HOME: no test reads or writes the user's."""
    path = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("MANYBRAINS_HOME", str(path))
    return path


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """One thread: the same sums on every machine, and no contention between a test and the workers it starts."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """`../shared/data`: real recordings and a real encoder, which the project never contains."""
    path = REPOSITORY.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"needs the real recordings and encoder of {path}, which is absent")
    return path

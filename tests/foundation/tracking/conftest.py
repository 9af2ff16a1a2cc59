"""The tests of a module share a home and its database."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def shared_home(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a database."""
    home = tmp_path_factory.mktemp("tracking-home")
    shutil.copy(empty_database, home)
    return home


@pytest.fixture(autouse=True)
def tracking_home(home: Path, shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of these tests, in place of an empty one for each."""
    monkeypatch.setenv("MANYBRAINS_HOME", str(shared_home))
    return shared_home

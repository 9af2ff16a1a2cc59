"""An uninterrupted run, made once."""

from pathlib import Path

import pytest

from tests.tiny_runs import Told, run_once
from tests.tiny_store import tiny_recipe


@pytest.fixture(scope="session")
def whole(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Told]:
    """An uninterrupted run; read-only by agreement."""
    directory = tmp_path_factory.mktemp("whole")
    status, told = run_once(tiny_recipe(tiny_store), directory)
    assert status == "trained"
    return directory, told

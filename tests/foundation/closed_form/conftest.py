"""The planted store, made once."""

import pytest

from tests.foundation.closed_form.planted import Planted, plant


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Read-only by agreement."""
    return plant(tmp_path_factory.mktemp("planted") / "planted.zarr")

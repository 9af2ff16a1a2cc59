"""The one directory where everything that manybrains makes lives: stores, runs, the MLflow database and artifacts.

A Ray job runs in a scratch directory and a later ``adapt`` in a shell, so nothing may depend on the working directory.
"""

import os
from pathlib import Path

import platformdirs

VARIABLE = "MANYBRAINS_HOME"


def home() -> Path:
    """Return the absolute home directory: ``$MANYBRAINS_HOME``, else the per-user data directory of the platform."""
    named = os.environ.get(VARIABLE)
    return Path(named).expanduser().resolve() if named else Path(platformdirs.user_data_dir("manybrains"))


def set_home(path: str | Path | None) -> Path:
    """Make `path` the home of this process and of those it starts; ``None`` leaves it as it is."""
    if path is not None:
        os.environ[VARIABLE] = str(Path(path).expanduser().resolve())
    return home()


def stores_dir() -> Path:
    """Return the directory of the pooled stores that we make ourselves."""
    return home() / "stores"

"""Runs in MLflow: parameters, step metrics, final scores, the resolved config, figures.

The tracking server is ``$MLFLOW_TRACKING_URI``, else a SQLite file in our home, so that a cluster job and a shell see
the same runs. All kinds of runs live in one experiment, where they can be ticked and compared; docs/mlflow.md has the
names of metrics and tags.
"""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException

from data.home import home

EXPERIMENT = "manybrains"
_MAX_PARAM = 500
_MAX_BATCH = 1000


def tracking_uri() -> str:
    """Return where runs are tracked."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


def client(uri: str | None = None) -> MlflowClient:
    """Return a client of the tracking server and registry."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    uri = uri or tracking_uri()
    if not uri.startswith("sqlite:///"):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    # A first client makes or migrates the tables; two processes at once would fail halfway.
    with open(database.with_name(f".{database.name}.lock"), "w") as lock, contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def experiment_id(uri: str | None = None) -> str:
    """Return the id of our experiment on the tracking server, made if it is missing."""
    uri = uri or tracking_uri()
    mlflow = client(uri)
    found = mlflow.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return found.experiment_id
    location = (home() / "artifacts").as_uri() if uri.startswith("sqlite:") else None
    tags = {"mlflow.experimentKind": "custom_model_development"}
    try:
        return mlflow.create_experiment(EXPERIMENT, artifact_location=location, tags=tags)
    except MlflowException:  # another process was quicker
        found = mlflow.get_experiment_by_name(EXPERIMENT)
        assert found is not None
        return found.experiment_id


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = str(value)[:_MAX_PARAM]
    return flat


class TrackingError(ConnectionError):
    """The tracking server doesn't answer, or doesn't take what it is given."""


@contextlib.contextmanager
def answering(uri: str) -> Iterator[None]:
    """Turn what goes wrong with the server at `uri` into one clear error."""
    try:
        yield
    except (MlflowException, OSError) as error:
        if isinstance(error, TrackingError):
            raise
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TrackingError(
            f"the tracking server {uri} doesn't do what it is asked: {first_line[:300]}; start it (a new "
            "run may name another by MLFLOW_TRACKING_URI)"
        ) from error


class TrackedRun:
    """A run in MLflow that is being written.

    All methods raise a `TrackingError` where the server doesn't do what it is asked.
    """

    def __init__(self, run_id: str, uri: str | None = None) -> None:
        self.id, self.uri = run_id, uri or tracking_uri()
        self._client = client(self.uri)

    @classmethod
    def start(
        cls,
        name: str,
        *,
        kind: str,
        config: Mapping[str, Any],
        tags: Mapping[str, str],
        parent: str | None = None,
        uri: str | None = None,
    ) -> "TrackedRun":
        """Start a run, perhaps as the child of another; `kind` becomes the tag ``manybrains.kind``."""
        uri = uri or tracking_uri()
        with answering(uri):
            mlflow = client(uri)
            named = {f"manybrains.{key}": value for key, value in tags.items()} | {"manybrains.kind": kind}
            named |= {"mlflow.parentRunId": parent} if parent else {}
            run = mlflow.create_run(experiment_id(uri), run_name=name, tags=named)
            started = cls(run.info.run_id, uri)
            params = [Param(key, value) for key, value in _flat(config).items()]
            for at in range(0, len(params), 100):
                mlflow.log_batch(started.id, params=params[at : at + 100])
            mlflow.log_dict(started.id, dict(config), "config.json")
        return started

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics of a step; those that are undefined (NaN) are left out."""
        self.log_steps([(step, metrics)])

    def log_steps(
        self, steps: Sequence[tuple[int, Mapping[str, float]]], *, times_ms: Sequence[int] | None = None
    ) -> None:
        """Log metrics of several steps.

        Parameters
        ----------
        times_ms : when each step was, in milliseconds since 1970; MLflow takes the same point twice for one, so what a
            server took without saying so may be sent again. Default: now.
        """
        times_ms = times_ms or [int(time.time() * 1000)] * len(steps)
        entries = [
            Metric(key, float(value), at_ms, step)
            for (step, metrics), at_ms in zip(steps, times_ms, strict=True)
            for key, value in metrics.items()
            if value == value
        ]
        with answering(self.uri):
            for at in range(0, len(entries), _MAX_BATCH):
                self._client.log_batch(self.id, metrics=entries[at : at + _MAX_BATCH])

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        with answering(self.uri):
            self._client.log_batch(self.id, tags=[RunTag(f"manybrains.{key}", value) for key, value in tags.items()])

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a file, or what a directory holds, with the run."""
        with answering(self.uri):
            if path.is_dir():
                self._client.log_artifacts(self.id, str(path), folder or path.name)
            else:
                self._client.log_artifact(self.id, str(path), folder)

    @contextlib.contextmanager
    def ending(self) -> Iterator["TrackedRun"]:
        """Finish the run when the block ends: FINISHED, KILLED by an interrupt, or FAILED."""
        try:
            yield self
        except BaseException as error:
            self.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        self.finish()

    def reopen(self) -> None:
        """Mark an interrupted run as running again."""
        with answering(self.uri):
            self._client.update_run(self.id, status="RUNNING")

    def finish(self, status: str = "FINISHED") -> None:
        """End the run: FINISHED, FAILED or KILLED."""
        with answering(self.uri):
            self._client.set_terminated(self.id, status=status)


def quoted(value: str) -> str:
    """Return a value as MLflow's filter takes it; it knows no escape, so it's the value that picks the quotes."""
    return f'"{value}"' if "'" in value else f"'{value}'"


def find_runs(filter_string: str = "", *, uri: str | None = None) -> list[Any]:
    """Return our runs, newest first.

    Raises
    ------
    TrackingError
        If the server doesn't answer.
    """
    uri = uri or tracking_uri()
    with answering(uri):
        mlflow = client(uri)
        found = mlflow.get_experiment_by_name(EXPERIMENT)
        if found is None:
            return []
        newest_first = ["start_time DESC"]
        return list(
            mlflow.search_runs([found.experiment_id], filter_string, ViewType.ACTIVE_ONLY, order_by=newest_first)
        )

"""The model registry: backbones and adapters, versioned, with their lineage as tags.

A backbone's registered name is its recipe's, or that of the store it was told to use; an adapter's is
``<backbone>.<subject>``. The newest version that isn't known to be worse than the one before it has the alias
``champion``; one that is, ``candidate``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from foundation.tracking.runs import TrackedRun, client, tracking_uri

CHAMPION, CANDIDATE = "champion", "candidate"


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A version of a registered model."""

    name: str
    version: int
    tags: dict[str, str]
    run_id: str
    source: str

    @property
    def label(self) -> str:
        """``name/version``."""
        return f"{self.name}/{self.version}"

    def directory(self) -> Path:
        """Return a local directory with the model's files, downloaded if the server is remote."""
        return Path(download_artifacts(artifact_uri=self.source, tracking_uri=tracking_uri()))


def _registered(version: ModelVersion) -> Registered:
    assert version.run_id is not None and version.source is not None
    tags = {key.removeprefix("manybrains."): value for key, value in version.tags.items()}
    return Registered(
        name=version.name, version=int(version.version), tags=tags, run_id=version.run_id, source=version.source
    )


def register(name: str, run: TrackedRun, folder: str, *, kind: str, tags: Mapping[str, str]) -> Registered:
    """Register what `run` keeps in `folder` as a new version of `name`, and let it compete for the alias."""
    mlflow = client(run.uri)
    named = {f"manybrains.{key}": value for key, value in tags.items()} | {"manybrains.kind": kind}
    try:
        mlflow.create_registered_model(name, tags={"manybrains.kind": kind})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    root = mlflow.get_run(run.id).info.artifact_uri
    created = _registered(mlflow.create_model_version(name, f"{root}/{folder}", run_id=run.id, tags=named))
    alias = CHAMPION if _may_lead(mlflow, created) else CANDIDATE
    mlflow.set_registered_model_alias(name, alias, str(created.version))
    return created


def _may_lead(mlflow: MlflowClient, new: Registered) -> bool:
    """Return whether `new` isn't known to be worse: no champion, another split or data, or no lower score."""
    try:
        champion = _registered(mlflow.get_model_version_by_alias(new.name, CHAMPION))
    except MlflowException:
        return True
    same = all(champion.tags.get(key) == new.tags.get(key) for key in ("split_digest", "store_digest", "sessions"))
    scores = [float(tags.get("validation_voxel_r", "nan")) for tags in (champion.tags, new.tags)]
    return not (same and scores[1] < scores[0])


def aliases(model: Registered, *, uri: str | None = None) -> list[str]:
    """Return the aliases that point to a version, on the server at `uri` (default: ours)."""
    found = client(uri).get_registered_model(model.name)
    return sorted(alias for alias, version in found.aliases.items() if int(version) == model.version)


def find_backbone(name: str | None) -> Registered:
    """Return ``NAME@ALIAS``, ``NAME/VERSION`` or ``NAME`` (its champion); None: the champion registered last.

    Raises
    ------
    ValueError
        If there is no such backbone.
    """
    mlflow = client()
    if name is None:
        found = [
            m for m in mlflow.search_registered_models(max_results=1000) if m.tags.get("manybrains.kind") == "backbone"
        ]
        champions = [mlflow.get_model_version_by_alias(m.name, CHAMPION) for m in found if CHAMPION in m.aliases]
        if not champions:
            raise ValueError(
                f"no backbone is registered in {tracking_uri()}; run `python -m foundation.pretrain` first"
            )
        return _registered(max(champions, key=lambda v: v.creation_timestamp))
    try:
        if "/" in name:
            model, _, version = name.rpartition("/")
            return _registered(mlflow.get_model_version(model, version))
        model, _, alias = name.partition("@")
        return _registered(mlflow.get_model_version_by_alias(model, alias or CHAMPION))
    except MlflowException as error:
        have = ", ".join(sorted(m.name for m in mlflow.search_registered_models(max_results=1000))) or "none"
        raise ValueError(
            f"backbone {name!r} is not in the registry ({tracking_uri()}); registered are: {have}"
        ) from error

"""The model registry: backbones and adapters, versioned, with their lineage and scores as tags.

A backbone's registered name is its recipe's, or that of the store it was told to use; an adapter's is
``<backbone>.<subject>``. The newest version that isn't known to be worse than the one before it has the alias
``champion``; one that is, ``candidate``. By hand, `foundation.tracking.promotion` moves them.
"""

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse
from urllib.request import url2pathname

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from data.home import home
from data.schema import resolve_subject
from foundation.tracking.runs import TrackedRun, answering, client, tracking_uri

BACKBONE, ADAPTER = "backbone", "adapter"
CHAMPION, CANDIDATE = "champion", "candidate"
IMPORTED = "imported_from"
"""The tag of what came as a bundle."""
_TAG = "manybrains."
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
_OURS = f"tags.`{_TAG}kind` LIKE '%'"


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A version of a registered model."""

    name: str
    version: int
    tags: dict[str, str]
    run_id: str
    source: str
    created_ms: int
    """When it was registered, in milliseconds since 1970."""

    @property
    def label(self) -> str:
        """``name/version``."""
        return f"{self.name}/{self.version}"

    @property
    def kind(self) -> str:
        """``backbone`` or ``adapter``."""
        return self.tags["kind"]

    def directory(self) -> Path:
        """Return a local directory with the version's files; what a server has is downloaded to the home, once.

        Raises
        ------
        ValueError
            If the files are gone.
        TrackingError
            If the server doesn't give them.
        """
        url = urlparse(self.source)
        if url.scheme in ("", "file"):
            path = Path(url2pathname(unquote(url.path)) if url.scheme else self.source)
            if not path.is_dir():
                raise ValueError(f"the files of {self.label} are gone from {path}; register it again")
            return path
        uri = tracking_uri()
        key = hashlib.sha256(f"{uri} {self.source}".encode()).hexdigest()[:16]
        kept = home() / "downloads" / f"{self.name.replace('/', '_')}-{self.version}-{key}"
        return kept if kept.is_dir() else _downloaded(self.source, kept, uri)


def _downloaded(source: str, kept: Path, uri: str) -> Path:
    """Download what `source` holds to `kept`, whole or not at all; another process may do the same meanwhile."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{kept.name}.", dir=kept.parent))
    try:
        with answering(uri):
            found = Path(download_artifacts(artifact_uri=source, dst_path=str(scratch), tracking_uri=uri))
        try:
            found.rename(kept)
        except OSError:
            if not kept.is_dir():  # else the other process was quicker
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return kept


def _registered(version: ModelVersion) -> Registered:
    if f"{_TAG}kind" not in version.tags or version.source is None:
        raise ValueError(f"{version.name}/{version.version} in {tracking_uri()} is no model of manybrains")
    return Registered(
        name=version.name,
        version=int(version.version),
        tags={key.removeprefix(_TAG): value for key, value in version.tags.items()},
        run_id=version.run_id or "",
        source=version.source,
        created_ms=version.creation_timestamp,
    )


# -- registering -------------------------------------------------------------------------------------------------------


def register(
    name: str,
    run: TrackedRun,
    folder: str,
    *,
    kind: str,
    tags: Mapping[str, str],
    description: str | None = None,
    unproven_leads: bool = True,
) -> Registered:
    """Register what `run` keeps in `folder` as a new version of `name`, and let it compete for the alias.

    Parameters
    ----------
    description : Markdown, shown beside the version in MLflow's UI.
    unproven_leads : whether a version that can't be compared with the champion takes its place.

    Raises
    ------
    ValueError
        If `name` is a model of another kind.
    TrackingError
        If the server doesn't take it; nothing is then registered.
    """
    mlflow = client(run.uri)
    named = {f"{_TAG}{key}": value for key, value in tags.items()} | {f"{_TAG}kind": kind}
    with answering(run.uri), contextlib.ExitStack() as undo:
        if _make_model(mlflow, name, kind):
            undo.callback(_unmake_model, mlflow, name)
        root = mlflow.get_run(run.id).info.artifact_uri
        made = mlflow.create_model_version(name, f"{root}/{folder}", run_id=run.id, tags=named, description=description)
        undo.callback(mlflow.delete_model_version, name, made.version)
        created = _registered(made)
        alias = CHAMPION if _may_lead(mlflow, created, unproven_leads=unproven_leads) else CANDIDATE
        mlflow.set_registered_model_alias(name, alias, str(created.version))
        undo.pop_all()
    return created


def _make_model(mlflow: MlflowClient, name: str, kind: str) -> bool:
    """Make the registered model `name`, unless it is there; return whether it was made."""
    try:
        mlflow.create_registered_model(name, tags={f"{_TAG}kind": kind})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        have = mlflow.get_registered_model(name).tags.get(f"{_TAG}kind", "model that isn't of manybrains")
        if have != kind:
            raise ValueError(f"{name!r} is the name of a registered {have}; give this {kind} another") from error
        return False
    return True


def _unmake_model(mlflow: MlflowClient, name: str) -> None:
    """Delete a registered model that has no version; another process may have given it one."""
    if not mlflow.search_model_versions(f"name = '{name}'", max_results=1):
        mlflow.delete_registered_model(name)


def _may_lead(mlflow: MlflowClient, new: Registered, *, unproven_leads: bool) -> bool:
    """Return whether `new` leads: there is no champion, or its validation score is no lower on the same images."""
    try:
        champion = _registered(mlflow.get_model_version_by_alias(new.name, CHAMPION))
    except MlflowException as error:
        if error.error_code not in _MISSING:
            raise
        return True
    if _sessions(new) < _sessions(champion):
        return False  # it learned from less: a point of a curve, or a trial
    comparable = ("split_digest", "store_digest", "sessions", "preprocessing_digest")
    same = all(champion.tags.get(key) == new.tags.get(key) for key in comparable)
    old_score, score = (float(tags.get("validation_voxel_r", "nan")) for tags in (champion.tags, new.tags))
    if not same or score != score or old_score != old_score:
        return unproven_leads
    return score >= old_score


def _sessions(version: Registered) -> float:
    """Return how many sessions a version learned from; infinity: all there were."""
    told = version.tags.get("sessions", "")
    return float(told) if told.isdecimal() else float("inf")


# -- finding -----------------------------------------------------------------------------------------------------------


def models(uri: str | None = None) -> dict[str, RegisteredModel]:
    """Return our registered models by name; each has its aliases."""
    uri = uri or tracking_uri()
    with answering(uri):
        return {model.name: model for model in _pages(client(uri).search_registered_models, _OURS, 1000)}


def versions(name: str | None = None, *, uri: str | None = None) -> list[Registered]:
    """Return all versions, or those of one model, the newest first."""
    uri = uri or tracking_uri()
    with answering(uri):
        found = [_registered(version) for version in _pages(client(uri).search_model_versions, _OURS, 10_000)]
    kept = [version for version in found if name is None or version.name == name]
    return sorted(kept, key=lambda version: (version.created_ms, version.version), reverse=True)


def _pages(search: Callable[..., Any], filter_string: str, size: int) -> Iterator[Any]:
    """Give what all pages of a search hold."""
    token = None
    while True:
        page = search(filter_string, max_results=size, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def aliases(model: Registered, *, uri: str | None = None) -> list[str]:
    """Return the aliases that point to a version, on the server at `uri` (default: ours)."""
    found = client(uri).get_registered_model(model.name)
    return sorted(alias for alias, version in found.aliases.items() if int(version) == model.version)


def find_version(name: str, *, kind: str | None = None) -> Registered:
    """Return ``NAME@ALIAS``, ``NAME/VERSION`` or ``NAME`` (its champion), of a `kind` if one is named.

    Raises
    ------
    ValueError
        If there is no such version; the error lists what there is of that kind.
    """
    uri = tracking_uri()
    mlflow = client(uri)
    model, separator, wanted = name.rpartition("/") if "/" in name else name.partition("@")
    with answering(uri):
        try:
            if separator == "/":
                found = _registered(mlflow.get_model_version(model, wanted))
            else:
                found = _registered(mlflow.get_model_version_by_alias(model, wanted or CHAMPION))
        except MlflowException as error:
            if error.error_code not in _MISSING:
                raise
            raise ValueError(
                f"{kind or 'model'} {name!r} is not in the registry ({uri}); registered are: {_told(kind)}"
            ) from error
    if kind is not None and found.kind != kind:
        raise ValueError(f"{found.label} is no {kind} but a registered {found.kind}; there are: {_told(kind)}")
    return found


def _told(kind: str | None) -> str:
    """Return the names of the registered models of a kind, for an error."""
    names = [name for name, model in models().items() if kind in (None, model.tags[f"{_TAG}kind"])]
    return ", ".join(sorted(names)) or "none"


def find_backbone(name: str | None) -> Registered:
    """Return ``NAME@ALIAS``, ``NAME/VERSION`` or ``NAME`` (its champion); None: the champion registered last.

    An imported backbone is that only where there is none of our own, so that an import changes nobody's default.

    Raises
    ------
    ValueError
        If there is no such backbone.
    """
    if name is not None:
        return find_version(name, kind=BACKBONE)
    uri = tracking_uri()
    found = [m for m in models().values() if m.tags[f"{_TAG}kind"] == BACKBONE and CHAMPION in m.aliases]
    if not found:
        raise ValueError(f"no backbone is registered in {uri}; run `python -m foundation.pretrain` first")
    with answering(uri):
        champions = [_registered(client(uri).get_model_version_by_alias(m.name, CHAMPION)) for m in found]
    return max(champions, key=lambda version: (IMPORTED not in version.tags, version.created_ms))


class NoAdapterError(ValueError):
    """A subject has no adapter at all, so whatever else predicts it may do so."""


def find_adapter(subject: str, *, backbone: str | None = None, name: str | None = None) -> Registered:
    """Return a subject's adapter: the champion of ``<backbone's name>.<subject>``, or the one of that `name`.

    Parameters
    ----------
    subject : name or number: 5 is subj05.
    backbone : NAME (default: that of the champion that was registered last), or NAME@ALIAS or NAME/VERSION: then the
        champion if it was fitted on that version, else the newest that was.
    name : NAME, NAME@ALIAS or NAME/VERSION of an adapter.

    Raises
    ------
    ValueError
        If there is none; the error lists the adapters that there are.
    """
    if name is not None:
        found = find_version(name, kind=ADAPTER)
        resolve_subject(subject, [found.tags["subject"]], f"adapter {found.label}")
        return found
    kinds = {name: model.tags[f"{_TAG}kind"] for name, model in models().items()}
    have = sorted(name for name, kind in kinds.items() if kind == ADAPTER)
    if backbone is None and BACKBONE not in kinds.values():  # adapters that were imported; each has its backbone
        base, names = None, sorted({name.rpartition(".")[0] for name in have})
    else:
        base = find_backbone(backbone)
        names = [base.name]
    fitting = [f"{of}.{found}" for of in names if (found := _subject_among(subject, of, have)) is not None]
    if len(fitting) != 1:
        told = "could be " + " or ".join(fitting) if fitting else f"has none on backbone {' or '.join(names) or 'any'}"
        raise (ValueError if fitting else NoAdapterError)(
            f"adapter: subject {subject!r} {told}; adapters in {tracking_uri()}: {', '.join(have) or 'none'} (`adapt` "
            "fits one)"
        )
    (model,) = fitting
    champion = find_version(model, kind=ADAPTER)
    if base is None or backbone in (None, base.name) or champion.tags.get("backbone") == base.label:
        return champion
    for version in versions(model):
        if version.tags.get("backbone") == base.label:
            return version
    raise ValueError(
        f"no version of adapter {model} was fitted on backbone {base.label}; its champion {champion.label} was on "
        f"{champion.tags.get('backbone')}"
    )


def _subject_among(subject: str, base: str, adapters: list[str]) -> str | None:
    """Return which subject of a backbone's adapters is meant by a name or a number; None if none is, or several."""
    subjects = [name.removeprefix(f"{base}.") for name in adapters if name.startswith(f"{base}.")]
    with contextlib.suppress(ValueError):
        return resolve_subject(subject, subjects, base)
    return None

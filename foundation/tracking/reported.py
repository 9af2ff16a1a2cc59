"""What a name on a report's command line stands for: systems to score, and what runs in MLflow keep to be shown.

A name is a baseline's, a run's (its id or its name in MLflow, the newest of that name), or else a model's
(`foundation.named_model`).
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from foundation.evaluation.area_losses import Ablation, AblationRow, Differential
from foundation.evaluation.baselines import BASELINES
from foundation.evaluation.curve import CurveRow
from foundation.evaluation.partition import PartitionRow
from foundation.evaluation.protocols import ProtocolStep
from foundation.evaluation.report.runs import AblationRun, CurveRun, ScoresRun, StepsRun
from foundation.evaluation.score import Row, Scores
from foundation.tracking.runs import answering, client, find_runs, quoted, tracking_uri

_MODEL_TAGS = {"pretrain": "backbone", "adapt": "adapter", "baseline": "baseline", "ablation": "model"}
"""Tag that names what a run of a kind made, or is about."""
_MAKERS = ("pretrain", "adapt", "baseline")
PREFERENCE = "ablation-preference-"
"""How the files with a subject's stream preference begin."""
_RUN_ID = re.compile(r"[0-9a-f]{32}")
Kept = CurveRun | AblationRun | StepsRun | ScoresRun


@dataclass(frozen=True, kw_only=True)
class Reported:
    """What one name stands for."""

    systems: tuple[str, ...] = ()
    """Names of models and baselines that it is."""
    about: tuple[str, ...] = ()
    """Names of those that its findings are about; they are scored where no name is a system."""
    kept: tuple[Kept, ...] = ()
    store: str | None = None
    """Of the run, as the following; what baselines are scored on where no model is named."""
    subjects: tuple[str, ...] = ()
    sessions: int | None = None


def reported(name: str) -> Reported:
    """Return what `name` stands for; what is no baseline and no run in MLflow is taken for a model's name.

    Raises
    ------
    ValueError
        If a run registered no model, keeps nothing that a report shows, or what it keeps is damaged.
    TrackingError
        If the server doesn't answer.
    """
    run = None if name in BASELINES or Path(name).exists() else _find(name)
    return Reported(systems=(name,)) if run is None else _of_run(run)


def found_beside(models: Sequence[str]) -> list[Kept]:
    """Return, of each model, the newest ablation and the newest evaluation under both protocols that were tracked."""
    kept: list[Kept] = []
    for kind in ("ablation", "evaluation"):
        runs = find_runs(f"attributes.status = 'FINISHED' and tags.`manybrains.kind` = '{kind}'")
        for model in models:
            for run in runs:
                tags = _tags(run)
                if model == (tags.get("model") if kind == "ablation" else tags.get("models", "").split(" ")[0]):
                    found = _kept(run)
                    kept += found
                    if found:
                        break
    return kept


def _find(name: str) -> Run | None:
    uri = tracking_uri()
    if _RUN_ID.fullmatch(name):
        with answering(uri):
            try:
                return client(uri).get_run(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return None
    return next(iter(find_runs(f"attributes.run_name = {quoted(name)}", uri=uri)), None)


def _of_run(run: Run) -> Reported:
    tags = _tags(run)
    kind, name = tags.get("kind", ""), run.info.run_name
    if kind in _MAKERS:
        made = tags.get(_MODEL_TAGS[kind])
        if made is None and kind == "pretrain":
            made = name  # it may have checkpoints here, though it registered nothing
        if made is None:
            raise ValueError(f"run {name} ({run.info.status}) registered no adapter; name one that is finished")
        return _on_data(Reported(systems=(made,)), tags)
    kept = _kept(run)
    if not kept and kind != "evaluation":
        raise ValueError(
            f"run {name} is of kind {kind or 'unknown'!r} and keeps no curve.json, ablation.json or "
            f"protocol-steps.json; name a training run, an adaptation, a curve, an ablation or an evaluation"
        )
    return _on_data(Reported(about=_about(run, kind, tags, kept), kept=tuple(kept)), tags)


def _on_data(found: Reported, tags: Mapping[str, str]) -> Reported:
    """Return `found` with what the run's tags say of its data."""
    subjects = tags.get("subjects", tags.get("subject", "")).replace(",", " ").split()
    sessions = int(tags["sessions"]) if "sessions" in tags else None
    return replace(found, store=tags.get("store"), subjects=tuple(subjects), sessions=sessions)


def _about(run: Run, kind: str, tags: Mapping[str, str], kept: Sequence[Kept]) -> tuple[str, ...]:
    """Return the names of what a run's findings are about."""
    if kind == "comparison":  # its networks aren't registered, so only the baselines can be scored again
        scored = {row.system for of in kept if isinstance(of, ScoresRun) for row in of.scores.rows}
        return tuple(name for name in BASELINES if name in scored)
    if kind == "evaluation":
        return tuple(tags.get("models", "").split())
    if kind == "curve":  # the adapter that learned from the most sessions
        children = find_runs(f"tags.`mlflow.parentRunId` = '{run.info.run_id}' and tags.`manybrains.kind` = 'adapt'")
        made = [_tags(child) for child in children if "adapter" in _tags(child)]
        made.sort(key=lambda tags: int(tags.get("sessions", 0)))
        return (made[-1]["adapter"],) if made else ()
    return (tags["model"],) if kind == "ablation" and "model" in tags else ()


def _tags(run: Run) -> dict[str, str]:
    return {k.removeprefix("manybrains."): v for k, v in run.data.tags.items() if k.startswith("manybrains.")}


# -- artifacts ---------------------------------------------------------------------------------------------------------


def _kept(run: Run) -> list[Kept]:
    readers: dict[str, Callable[[str, Any], Kept]] = {
        "curve.json": _curve,
        "ablation.json": _ablation,
        "protocol-steps.json": _steps,
    }
    if _tags(run).get("kind") == "comparison":
        readers["scores.json"] = _scores
    uri = tracking_uri()
    with answering(uri):
        there = {file.path for file in client(uri).list_artifacts(run.info.run_id)}
    kept = [_read(run, name, reader) for name, reader in readers.items() if name in there]
    maps = [name for name in there if name.startswith(PREFERENCE) and name.endswith(".npy")]
    return [replace(of, preference=_preferences(run, maps)) if isinstance(of, AblationRun) else of for of in kept]


def _read(run: Run, name: str, reader: Callable[[str, Any], Kept]) -> Kept:
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # a bar for a file of some kilobytes
    uri = tracking_uri()
    with tempfile.TemporaryDirectory() as scratch:
        with answering(uri):
            text = Path(client(uri).download_artifacts(run.info.run_id, name, scratch)).read_text()
        try:
            return reader(run.info.run_name or run.info.run_id, json.loads(text))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{name} of run {run.info.run_name} is damaged or from another version ({error}); make it again"
            ) from error


def _curve(run: str, found: Any) -> CurveRun:
    return CurveRun(run=run, rows=tuple(CurveRow(**row) for row in found))


def _ablation(run: str, found: Any) -> AblationRun:
    ablation = Ablation(
        rows=tuple(AblationRow(**row) for row in found["rows"]),
        differentials=tuple(Differential(**row) for row in found["differentials"]),
        notes=tuple(found["notes"]),
    )
    return AblationRun(
        run=run,
        model=str(found["model"]),
        ablation=ablation,
        sentences=tuple(found["sentences"]),
        partition=tuple(PartitionRow(**row) for row in found.get("partition", ())),
    )


def _preferences(run: Run, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Return the arrays that `foundation.ablate --partition` keeps beside its numbers, by subject."""
    found, uri = {}, tracking_uri()
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            with answering(uri):
                path = client(uri).download_artifacts(run.info.run_id, name, scratch)
            found[name.removeprefix(PREFERENCE).removesuffix(".npy")] = np.load(path, allow_pickle=False)
    return found


def _scores(run: str, found: Any) -> ScoresRun:
    return ScoresRun(run=run, scores=Scores(rows=tuple(Row(**row) for row in found), comparisons=()))


def _steps(run: str, found: Any) -> StepsRun:
    return StepsRun(run=run, steps=tuple(ProtocolStep(**step) for step in found))

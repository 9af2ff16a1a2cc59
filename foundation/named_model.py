"""A trained model by the name that a user gives it, wherever it is kept: in the registry, with a run, in a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.preprocess import Preprocessing
from data.schema import resolve_subject
from data.splits import Split
from data.store import PooledStore, TokenReader
from foundation.bundle import assembled, read_bundle
from foundation.checkpoint import load_model, read_description, standing
from foundation.model.encoding_model import EncodingModel
from foundation.tracking.packaging import backbone_in, load_packaged
from foundation.tracking.registry import find_version
from foundation.training.checkpoints import newest_checkpoint
from foundation.training.course import FINAL
from foundation.training.run import describe_run, runs_dir

_FIRST_N = Preprocessing(later_sessions="first-n")


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A model, loaded, and what its lineage says of how it is to be scored."""

    label: str
    """How tables call it."""
    model: EncodingModel
    lineage: dict[str, Any]
    backbone: dict[str, Any]
    """The lineage of the backbone; the same, unless the model is an adapter."""
    run: Path | None = None
    """The directory of the training run, where that is here."""
    run_id: str | None = None
    """The run in MLflow that registered it."""

    @property
    def subjects(self) -> tuple[str, ...]:
        """The subjects that it was fitted to: an adapter's own, or all of a backbone's."""
        return (self.lineage["subject"],) if "subject" in self.lineage else tuple(self.model.subjects)

    @property
    def store(self) -> str:
        """Path or URL of the store that it learned from."""
        return self.lineage["store"]

    @property
    def encoder(self) -> str:
        """Name of the encoder in the store."""
        return self.backbone["recipe"]["data"]["encoder"]

    @property
    def n_sessions(self) -> int | None:
        """The first N sessions that it learned from; None: all."""
        found = self.lineage.get("sessions", self.backbone["recipe"]["data"].get("sessions"))
        return None if found is None else int(found)

    @property
    def preprocessing(self) -> Preprocessing:
        """How the trials that it learned from were standardised."""
        return _FIRST_N if self.lineage.get("preprocessing_digest") == _FIRST_N.digest else Preprocessing()

    def check(self, store: PooledStore, tokens: TokenReader, split: Split) -> None:
        """Check that the store has what the model was made from: encoder, subjects, and the split of their images.

        Raises
        ------
        ValueError
            If something differs; a test image might then be one that the model learned from.
        """
        trouble = f"{self.label} can't be scored on {store.path}: "
        known = self.lineage.get("preprocessing_digest")
        if known not in (None, _FIRST_N.digest, Preprocessing().digest):
            raise ValueError(f"{trouble}another version of manybrains standardised its trials; train it again")
        if tokens.digest != self.backbone["encoder_digest"]:
            raise ValueError(f"{trouble}its {tokens.name!r} tokens come from another encoder than the model learned")
        for name in self.subjects:
            known = self.backbone["subject_digests"].get(name) if self.lineage is self.backbone else None
            if known is not None and known != store.subject(name).digest:
                raise ValueError(f"{trouble}{name} isn't the one that the model learned from, or has changed since")
        known = self.lineage.get("store_digest")
        if self.lineage is not self.backbone and known != store.digest(list(self.subjects), self.encoder):
            raise ValueError(
                f"{trouble}{self.subjects[0]} isn't the one that the model learned from, or has changed since"
            )
        images = np.concatenate([store.subject(name).image for name in self.subjects])
        if split.digest_of(images) != self.lineage["split_digest"]:
            raise ValueError(f"{trouble}the model was trained with another split of its images; train it again")

    def chosen_subjects(self, wanted: tuple[str, ...]) -> list[str]:
        """Return the subjects that are asked for by name or number; all of its own if none is.

        Raises
        ------
        ValueError
            If it wasn't fitted to one of them.
        """
        return [resolve_subject(name, list(self.subjects), self.label) for name in wanted] or list(self.subjects)


def named_model(name: str) -> NamedModel:
    """Load a model: ``NAME@ALIAS`` or ``NAME/VERSION`` of the registry, a run (its name or directory), a model
    directory or a bundle's file.

    A path is a file of `foundation.convert` or `foundation.registry export`, or a directory with a ``model.json``. A
    run's model is the one that was scored and registered, else its newest whole checkpoint.

    Raises
    ------
    ValueError
        If there is no such model; the error lists what was looked for.
    """
    path = Path(name)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise ValueError(f"there is no file {name}; name a bundle, a run or a registered model")
        bundle = read_bundle(path)
        model, lineage = assembled(bundle)
        return _described(path.stem, model, lineage, bundle.model.description["made_from"])
    if (path / "model.json").is_file():
        return _of_directory(path)
    if (path / "run.json").is_file():
        return _of_run(path.resolve())
    if (runs_dir() / name / "run.json").is_file():
        return _of_run(runs_dir() / name)
    try:
        version = find_version(name)
    except ValueError as error:
        raise ValueError(
            f"{error}; and {name!r} is no run in {runs_dir()}, no directory with a model.json, no .safetensors file"
        ) from error
    directory = version.directory()
    model, lineage = load_packaged(directory)
    backbone = read_description(backbone_in(directory))["made_from"]
    return _described(version.label, model, lineage, backbone, run_id=version.run_id or None)


def _of_directory(path: Path) -> NamedModel:
    if read_description(path)["kind"] != "model":
        raise ValueError(f"{path} holds an adapter without its backbone; name it as the registry does, NAME/VERSION")
    model, lineage = load_model(path)
    return _described(f"{path.resolve().parent.name}/{path.name}", model, lineage, lineage)


def _of_run(run: Path) -> NamedModel:
    final = standing(run / FINAL)
    directory = final if final.exists() else newest_checkpoint(run)
    if directory is None:
        raise ValueError(f"run {run.name} has no whole checkpoint yet; let it train on")
    model, lineage = load_model(directory)
    label = run.name if directory == final else f"{run.name}/{directory.name}"
    run_id = describe_run(run).get("tracking_run")
    return _described(label, model, lineage, lineage, run_id=run_id)


def _described(
    label: str, model: EncodingModel, lineage: dict[str, Any], backbone: dict[str, Any], *, run_id: str | None = None
) -> NamedModel:
    """Put together what is known of a model; a lineage with a subject is an adapter's."""
    of_adapter = "subject" in lineage
    lineage = lineage if of_adapter else backbone
    needed = {"store", "store_digest", "split_digest"}
    lacking = (needed - lineage.keys()) | ({"recipe", "subject_digests", "encoder_digest"} - backbone.keys())
    if lacking:
        raise ValueError(
            f"the lineage of {label} lacks {', '.join(sorted(lacking))}, so it can't be scored; train it again"
        )
    run = runs_dir() / str(backbone.get("run"))
    here = not of_adapter and (run / "run.json").is_file()
    return NamedModel(
        label=label, model=model.eval(), lineage=lineage, backbone=backbone, run=run if here else None, run_id=run_id
    )

"""Which systems are compared, on which subjects of which store: from the names that a user gives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from jaxtyping import Float32, Int

from data.embedded import embedded_phantom
from data.legacy import LegacyTrials
from data.splits import Split, split_of
from data.store import PooledStore, TokenReader
from foundation.checkpoint import load_model
from foundation.evaluation.baselines import BASELINES
from foundation.evaluation.evaluated import Course, Evaluated, System, evaluate_subject
from foundation.evaluation.measured import measured_legacy, measured_part
from foundation.evaluation.metrics import patternwise_r
from foundation.evaluation.model_outputs import model_prediction
from foundation.model.encoding_model import EncodingModel
from foundation.named_model import NamedModel, named_model
from foundation.seen_images import check_images
from foundation.training.checkpoints import checkpoints

Value = TypeVar("Value")
PICKED = " (picked on test)"


@dataclass(frozen=True, kw_only=True, eq=False)
class Legacy:
    """One subject's test images in the unit of ``chasm-legacy``."""

    subject: str
    rows: Int[np.ndarray, " image"]
    mean: Float32[np.ndarray, "image voxel"]
    unit: LegacyTrials
    """Without its trials."""


@dataclass(frozen=True, kw_only=True)
class LineUp:
    """Models and baselines that can be compared: of one store, split and subjects."""

    models: dict[str, NamedModel]
    baselines: tuple[str, ...]
    store: PooledStore
    split: Split
    tokens: TokenReader
    """Of the baselines: those of the first model."""
    subjects: tuple[str, ...]
    course: Course
    notes: tuple[str, ...] = ()
    """What a reader of the scores has to know about the comparison."""

    @property
    def systems(self) -> dict[str, System]:
        """The models with their tokens."""
        return {
            label: System(model=named.model, tokens=self.store.tokens(named.encoder))
            for label, named in self.models.items()
        }

    def evaluate(self, subject: str, *, picked: dict[str, System] | None = None) -> Evaluated:
        """Return the systems' predictions and scores on one subject."""
        return evaluate_subject(
            self.systems,
            self.store.subject(subject),
            self.split,
            self.course,
            baseline_tokens=self.tokens,
            pictures=self.store.picture_digests(),
            picked=picked,
        )

    def predict(self, subject: str, rows: Int[np.ndarray, " image"]) -> dict[str, Float32[np.ndarray, "image voxel"]]:
        """Return what each model predicts of a subject for the images in the store's `rows`."""
        return {label: model_prediction(of.model, of.tokens, subject, rows) for label, of in self.systems.items()}

    def picked_on_test(self, label: str) -> tuple[dict[str, System], str]:
        """Return, under `label` and `PICKED`, the checkpoint of a model's run that is best on the test images.

        As ``chasm-legacy`` has it: by pattern r against repeat means, averaged over subjects, the model itself among
        them. Empty where the run isn't here or kept no checkpoint. Beside it, what a reader has to know of the choice.
        """
        named = self.models[label]
        kept = [] if named.run is None else checkpoints(named.run)
        if not kept:
            why = "its run isn't in this home" if named.run is None else "its run kept none (--keep-checkpoints N)"
            return {}, f"{label}: no checkpoint is picked on the test images, for {why}"
        tokens = self.store.tokens(named.encoder)
        prepared = [self._legacy(name) for name in self.subjects]
        best, best_r, which = named.model, _legacy_r(named.model, tokens, prepared), "the model itself"
        for directory in kept:  # one in memory beside the best, however many there are
            model = load_model(directory)[0]
            r = _legacy_r(model, tokens, prepared)
            if r > best_r:
                best, best_r, which = model, r, directory.name
        told = f"{label}: of {len(kept)} checkpoints and the model itself, {which} is picked on the test images"
        return {f"{label}{PICKED}": System(model=best, tokens=tokens)}, told

    def _legacy(self, name: str) -> Legacy:
        """Return one subject's test images as ``chasm-legacy`` prepares them."""
        subject, course = self.store.subject(name), self.course
        measured, rows = measured_part(
            subject, self.split, n_sessions=course.n_sessions, preprocessing=course.preprocessing
        )
        of_legacy, unit = measured_legacy(subject, self.split, measured)
        return Legacy(subject=name, rows=rows, mean=of_legacy.mean, unit=replace(unit, responses=unit.responses[:0]))


def _legacy_r(model: EncodingModel, tokens: TokenReader, prepared: Sequence[Legacy]) -> float:
    """Return the mean pattern r over images, averaged over subjects."""
    found = []
    for of in prepared:
        predicted = of.unit.converted(model_prediction(model, tokens, of.subject, of.rows))
        found.append(np.nanmean(patternwise_r(predicted, of.mean)))
    return float(np.mean(found))


def line_up(
    names: Sequence[str],
    *,
    store: str | None = None,
    subjects: tuple[str, ...] = (),
    encoder: str | None = None,
    sessions: int | None = None,
    course: Course,
    tell: Callable[[str], None],
) -> LineUp:
    """Find the models and baselines that `names` name, and what they can be compared on.

    Parameters
    ----------
    names
        Of models (`foundation.named_model`) and of baselines, which learn from the first model's encoder and sessions.
    store
        Path or URL; None: that of the first model, or the embedded phantom.
    subjects
        By number or name; empty: all that every model was fitted to.
    encoder, sessions
        Of the baselines, in place of the first model's.

    Raises
    ------
    ValueError
        If a name is unknown, the models have no subject in common, or the store isn't what a model was made from.
    """
    baselines = tuple(dict.fromkeys((*(name for name in names if name in BASELINES), *course.baselines)))
    models = _models([name for name in names if name not in BASELINES])
    if models and sessions is not None:
        raise ValueError("--sessions is for baselines alone: beside models they learn from as many sessions as these")
    first = next(iter(models.values()), None)
    where = store or (embedded_phantom("tiny", tell=tell) if first is None else first.store)
    opened = PooledStore.open(where)
    split = split_of(opened)
    tokens = opened.tokens(encoder or (_only_encoder(opened) if first is None else first.encoder))
    chosen = _common_subjects(models, opened, subjects)
    notes: list[str] = []
    for label, named in models.items():
        named.check(opened, opened.tokens(named.encoder), split)
        for name in chosen:
            images = check_images(opened, name, named.backbone, label=label)
            if images.startswith("not checked"):
                notes.append(f"whether {label} was trained on test images of {name} is {images}")
    amounts = {label: named.n_sessions for label, named in models.items()}
    n_sessions = sessions if sessions is not None else _agreed(list(amounts.values()), None)
    if len(set(amounts.values())) > 1:
        told = ", ".join(f"{label} {'all' if n is None else n}" for label, n in amounts.items())
        notes.append(f"models learned from different numbers of sessions: {told}")
    if baselines:
        learned = "all sessions" if n_sessions is None else f"the first {n_sessions} sessions"
        notes.append(f"baselines learned from {tokens.name} tokens, {learned}")
    others = {label: named.encoder for label, named in models.items() if named.encoder != tokens.name}
    notes += [f"{label} learned from {name} tokens" for label, name in others.items() if baselines]
    ways = {named.preprocessing.name for named in models.values()}
    if len(ways) > 1:
        notes.append(f"models were trained with different standardisation ({'; '.join(sorted(ways))})")
    preprocessing = _agreed([named.preprocessing for named in models.values()], course.preprocessing)
    return LineUp(
        models=models,
        baselines=baselines,
        store=opened,
        split=split,
        tokens=tokens,
        subjects=tuple(chosen),
        course=replace(course, baselines=baselines, n_sessions=n_sessions, preprocessing=preprocessing),
        notes=tuple(notes),
    )


def _models(names: Sequence[str]) -> dict[str, NamedModel]:
    """Return the models by label; one whose label is taken is called by the name that it was given."""
    found: dict[str, NamedModel] = {}
    for name in names:
        named = named_model(name)
        label = named.label if named.label not in found else name
        if label in found:
            raise ValueError(f"{name!r} is named twice; name each model once")
        found[label] = replace(named, label=label)
    return found


def _agreed(values: list[Value], otherwise: Value) -> Value:
    """Return what all values are, or something else where they differ or there are none."""
    return values[0] if values and all(value == values[0] for value in values) else otherwise


def _common_subjects(models: dict[str, NamedModel], store: PooledStore, wanted: tuple[str, ...]) -> list[str]:
    if wanted:
        chosen = [store.resolve_subject(name) for name in wanted]
        for named in models.values():
            named.chosen_subjects(tuple(chosen))
        return list(dict.fromkeys(chosen))
    if not models:
        if not store.subjects:
            raise ValueError(f"{store.path} has no subjects; import some with `python -m data import`")
        return store.subjects
    first, *others = models.values()
    chosen = [name for name in first.subjects if all(name in other.subjects for other in others)]
    if not chosen:
        told = "; ".join(f"{label}: {', '.join(named.subjects)}" for label, named in models.items())
        raise ValueError(f"the models have no subject in common ({told}); compare models of the same subjects")
    return chosen


def _only_encoder(store: PooledStore) -> str:
    if len(store.encoders) != 1:
        have = ", ".join(store.encoders) or "none (`python -m data features` makes them)"
        raise ValueError(f"say which tokens of {store.path} to use, by --encoder; there are: {have}")
    return store.encoders[0]

"""One subject's measured responses, what each system predicts of them, and the scores under each protocol.

Reports and commands draw everything from here, so that a figure shows the very numbers of the table.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int

from data.audit import audit_fit
from data.preprocess import Preprocessing, samples
from data.splits import Part, Split
from data.store import SubjectStore, TokenReader
from foundation.evaluation.baselines import BASELINES, kept_prediction
from foundation.evaluation.measured import measured_legacy, measured_part
from foundation.evaluation.model_outputs import model_prediction, model_samples
from foundation.evaluation.permutation import PermutationTest, draw_orders, permutation_test
from foundation.evaluation.score import Measured, Scores, score
from foundation.model.encoding_model import EncodingModel

Protocol = Literal["strict", "chasm-legacy"]
PROTOCOLS: tuple[Protocol, ...] = ("strict", "chasm-legacy")


@dataclass(frozen=True, kw_only=True)
class System:
    """A model, and the tokens that it takes."""

    model: EncodingModel
    tokens: TokenReader


@dataclass(frozen=True, kw_only=True)
class Course:
    """How systems are compared: on which images, after how many sessions, against what."""

    part: Part = "test"
    protocols: tuple[Protocol, ...] = ("strict",)
    baselines: tuple[str, ...] = ("ridge",)
    n_sessions: int | None = None
    """Sessions that the baselines learn from, and that standardise what is measured; None: all."""
    preprocessing: Preprocessing = Preprocessing()
    seed: int = 0
    n_bootstraps: int = 1000
    n_samples: int = 0
    """Single trials that each model draws for an image, to be scored as a distribution; 0: none."""
    n_permutations: int = 0
    """Permutations of the images that the null is made of; 0: none."""

    @property
    def strict(self) -> str:
        """What rows of the strict protocol call it: other images than test ones are named."""
        return "strict" if self.part == "test" else f"strict-{self.part}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluated:
    """One subject, evaluated."""

    measured: Measured
    """As the strict protocol wants it."""
    rows: Int[np.ndarray, " image"]
    """The store's row of each image."""
    predictions: dict[str, Float32[np.ndarray, "image voxel"]]
    """By system, in SD of the session."""
    samples: dict[str, Float32[np.ndarray, "sample image voxel"]]
    """Single trials that a system draws, of those that draw any."""
    training_mean: Float32[np.ndarray, " voxel"]
    scores: dict[Protocol, Scores] = field(default_factory=dict)
    null: dict[str, PermutationTest] = field(default_factory=dict)
    """By system: its voxel r against repeat means, against those of predictions of other images."""

    @property
    def subject(self) -> str:
        """The subject's name."""
        return self.measured.subject


def evaluate_subject(
    systems: Mapping[str, System],
    subject: SubjectStore,
    split: Split,
    course: Course,
    *,
    baseline_tokens: TokenReader,
    pictures: dict[int, str],
    picked: Mapping[str, System] | None = None,
) -> Evaluated:
    """Score models and baselines on one subject, under each protocol of `course`.

    Parameters
    ----------
    systems
        The models by name.
    baseline_tokens
        What the baselines are fitted on.
    pictures
        The store's (`PooledStore.picture_digests`), for the leakage audit, which comes before a baseline is fitted.
    picked
        By model: its checkpoint that is best on the test images, which ``chasm-legacy`` scores in its place.

    Raises
    ------
    ValueError
        If the audit finds a leak, a baseline is unknown, or a model has a baseline's name.
    """
    check_names(systems, course.baselines)
    if course.part != "test" and "chasm-legacy" in course.protocols:
        raise ValueError(f"chasm-legacy is a protocol for test images; score {course.part} images under strict")
    name, seed = subject.name, course.seed
    measured, rows = measured_part(
        subject, split, n_sessions=course.n_sessions, preprocessing=course.preprocessing, part=course.part
    )
    train = samples(subject, split, "train", n_sessions=course.n_sessions, preprocessing=course.preprocessing)
    audit_fit(split.ids, split, {name: train}, {}, parcels={}, pictures=pictures)
    predictions = {label: model_prediction(of.model, of.tokens, name, rows) for label, of in systems.items()}
    predictions |= {
        label: kept_prediction(
            label, subject, baseline_tokens, train, rows, images=split.ids, pictures=pictures, seed=seed
        )
        for label in course.baselines
    }
    unfitted = [label for label, of in systems.items() if of.model.adapter(name).noise_sd.isnan().any()]
    drawn = {}
    if course.n_samples and "strict" in course.protocols:
        drawn = {
            label: model_samples(of.model, of.tokens, name, rows, n=course.n_samples, seed=seed)
            for label, of in systems.items()
            if label not in unfitted
        }
    scores: dict[Protocol, Scores] = {}
    training_mean = train.responses.mean(0)
    if "strict" in course.protocols:
        found = score(
            predictions,
            measured,
            training_mean=training_mean,
            n_bootstraps=course.n_bootstraps,
            rng=np.random.default_rng(seed),
            samples=drawn or None,
            protocol=course.strict,
        )
        why = "n/a, the noise of its voxels hasn't been fitted; it is when training ends"
        missing = [f"{name}: samples of {label}: {why}" for label in unfitted if course.n_samples]
        scores["strict"] = replace(found, notes=(*found.notes, *missing))
    if "chasm-legacy" in course.protocols:
        of_legacy, unit = measured_legacy(subject, split, measured, part=course.part)
        shown = predictions | {
            label: model_prediction(of.model, of.tokens, name, rows) for label, of in (picked or {}).items()
        }
        scores["chasm-legacy"] = score(
            {label: unit.converted(predicted) for label, predicted in shown.items()},
            of_legacy,
            training_mean=unit.training_mean,
            n_bootstraps=course.n_bootstraps,
            rng=np.random.default_rng(seed),
            protocol="chasm-legacy",
        )
    null: dict[str, PermutationTest] = {}
    if course.n_permutations:
        orders = draw_orders(measured.n_images, course.n_permutations, rng=np.random.default_rng(seed))
        rois = {"all": np.ones(measured.n_voxels, bool), **measured.families}
        null = {
            label: permutation_test(predicted, measured.mean, orders, rois=rois)
            for label, predicted in predictions.items()
        }
    return Evaluated(
        measured=measured,
        rows=rows,
        predictions=predictions,
        samples=drawn,
        training_mean=training_mean,
        scores=scores,
        null=null,
    )


def check_names(systems: Collection[str], baselines: Sequence[str]) -> None:
    """Raise ValueError where a baseline is unknown, or a model has a baseline's name."""
    unknown = [name for name in baselines if name not in BASELINES]
    if unknown:
        raise ValueError(f"there is no baseline {', '.join(map(repr, unknown))}; there are {', '.join(BASELINES)}")
    taken = [name for name in systems if name in baselines]
    if taken:
        raise ValueError(f"a model can't be named {taken[0]!r} beside the baseline of that name; rename the model")

"""Scores of systems on one subject's test images, with floors, ceiling, intervals and paired differences.

Choices, beyond the protocol's text:

- Images are resampled; an image takes its trials along. Ceilings and ROI masks are held fixed, so an interval of
  ``r2_ceiling`` leaves out the uncertainty of the ceiling itself. Distributions of voxelwise statistics are centred on
  their estimate before the percentiles are taken (:func:`foundation.evaluation.statistics.centre`); the level is raised
  for few images (:func:`foundation.evaluation.statistics.percentile_interval`).
- ``r`` is the mean over voxels of the voxelwise correlation on the axis ``voxel``, and the mean over images (target
  ``mean``) or trials (target ``trial``) of the patternwise correlation on the axis ``pattern``.
- Averaging squared errors over images and over voxels commutes: ``mse`` is one number, printed on both axes, so that
  either axis read alone has its floors.
- The ceiling of ``mse`` is the noise that is left in the target, ``(1 - ceiling) * variance``.
- Differences of patternwise ``r`` and of ``mse`` have a value per image and are tested with Wilcoxon's signed ranks
  over images. The voxelwise ``r`` has none; voxels share their images' noise, and a test across them would claim too
  much. Its p comes from the paired bootstrap.
- Samples are of single trials, so ``crps``, ``coverage90`` and ``energy`` are of the target ``trial``, and those of
  ``mean`` are null. Where the data came averaged, averages are all there is: then they are the target, and a note
  says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import product

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from data.noise_ceiling import pattern_ceiling, single_trial_ceiling
from foundation.evaluation.estimates import (
    COVERED,
    UNDEFINED,
    Estimate,
    Key,
    Target,
    estimate_ceiling,
    estimate_differences,
    estimate_point_mass,
    estimate_sampling,
    estimate_systems,
    mean_over_images,
)
from foundation.evaluation.metrics import LOWEST_CEILING
from foundation.evaluation.sampling import MIN_CRPS_SAMPLES, samples_needed
from foundation.evaluation.statistics import percentile_interval, resample_counts

FLOORS = ("zero", "mean")
CEILING = "ceiling"
FAMILIES = ("early", "mid", "higher")
METRICS = (
    ("voxel", "r"),
    ("voxel", "r_median"),
    ("voxel", "mse"),
    ("voxel", "r2_ceiling"),
    ("voxel", "r2_ceiling_unclipped"),
    ("pattern", "r"),
    ("pattern", "mse"),
)
"""Axis and metric of the rows."""
SAMPLING_METRICS = (("voxel", "crps"), ("voxel", "coverage90"), ("pattern", "energy"))
"""Axis and metric of the further rows of systems with samples, and of the floors beside them."""


@dataclass(frozen=True, eq=False)
class Measured:
    """One subject's measured responses to the images of a split, ready to be compared with predictions."""

    subject: str
    trials: Float[np.ndarray, "trial voxel"]
    """Standardised responses, finite; a missing repeat is an absent row."""
    image: Int[np.ndarray, " trial"]
    """The image of each trial, 0 to n_images - 1: the row of the predictions."""
    ceiling: Float[np.ndarray, " voxel"] | None
    """Share of the variance of the repeats' mean that is signal; NaN for a voxel where it is undefined."""
    ceiling_reason: str | None = None
    """Why there is no ceiling."""
    families: dict[str, Bool[np.ndarray, " voxel"]] = field(default_factory=dict)
    """ROI families or labels, by name, from real labels."""
    notes: tuple[str, ...] = ()
    """What a reader of the table has to know, such as ``upstream_preprocessing``."""
    trial_reason: str | None = None
    """Why there are no single trials: the one row per image is an average that was made upstream."""
    normalisation: str | None = None
    """How the trials were standardised, such as ``session-standardised``."""

    def __post_init__(self) -> None:
        n_trials, n_voxels = self.trials.shape
        if len(self.image) != n_trials:
            raise ValueError(f"{self.subject} has {n_trials} trials but {len(self.image)} image numbers")
        shown = np.unique(self.image)
        if shown.size == 0 or not np.array_equal(shown, np.arange(len(shown))):
            raise ValueError(f"images of {self.subject} must be numbered 0 to n_images - 1, each with a trial")
        if not np.isfinite(self.trials).all():
            raise ValueError(f"trials of {self.subject} hold NaN or infinite values; a missing repeat is an absent row")
        if self.ceiling is not None and self.ceiling.shape != (n_voxels,):
            raise ValueError(f"ceiling of {self.subject} has shape {self.ceiling.shape}, expected ({n_voxels},)")
        if self.ceiling is None and self.ceiling_reason is None:
            raise ValueError(f"{self.subject} has no ceiling; say why in ceiling_reason")
        if self.trial_reason is not None and n_trials != self.n_images:
            raise ValueError(
                f"{self.subject} has {n_trials} rows for {self.n_images} images, yet claims to be averaged"
            )
        for name, mask in self.families.items():
            if name == "all" or mask.shape != (n_voxels,):
                raise ValueError(
                    f"family {name!r} of {self.subject} needs another name than 'all' and {n_voxels} voxels"
                )

    @property
    def n_images(self) -> int:
        return int(self.image.max()) + 1

    @property
    def n_voxels(self) -> int:
        return self.trials.shape[1]

    @cached_property
    def n_repeats(self) -> Int[np.ndarray, " image"]:
        return np.bincount(self.image)

    @cached_property
    def mean(self) -> Float[np.ndarray, "image voxel"]:
        """Mean of each image's repeats."""
        n_trials = len(self.image)
        share = (1 / self.n_repeats[self.image]).astype(self.trials.dtype)
        return (
            sparse.csr_array((share, (self.image, np.arange(n_trials))), shape=(self.n_images, n_trials)) @ self.trials
        )


@dataclass(frozen=True)
class Row:
    """One number of the table; None is undefined, for a reason that the notes give."""

    system: str
    subject: str
    roi: str
    protocol: str
    axis: str
    target: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    n_images: int
    n_voxels: int

    def to_json(self) -> dict[str, str | int | float | None]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """``system`` minus ``versus`` on the same resamples; for ``mse``, negative is better."""

    system: str
    versus: str
    subject: str
    roi: str
    axis: str
    target: str
    metric: str
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    test: str
    """Where the p value comes from: ``wilcoxon over images`` or ``bootstrap over images``."""

    def to_json(self) -> dict[str, str | float | None]:
        return asdict(self)


@dataclass(frozen=True)
class Scores:
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...] = ()
    """Normalisation, reasons for what is undefined, and the voxels left out; each starts with its subject."""


def merge_scores(scores: Iterable[Scores]) -> Scores:
    """Several subjects' scores as one; nothing is averaged."""
    several = list(scores)
    return Scores(
        rows=tuple(row for s in several for row in s.rows),
        comparisons=tuple(c for s in several for c in s.comparisons),
        notes=tuple(dict.fromkeys(note for s in several for note in s.notes)),
    )


def score(
    predictions: Mapping[str, Float[np.ndarray, "image voxel"]],
    measured: Measured,
    *,
    training_mean: Float[np.ndarray, " voxel"],
    n_bootstraps: int = 1000,
    rng: np.random.Generator,
    protocol: str = "strict",
    samples: Mapping[str, Float[np.ndarray, "_sample image voxel"]] | None = None,
) -> Scores:
    """Score systems against single trials and repeat means, voxelwise and patternwise, per ROI.

    Parameters
    ----------
    predictions
        By system: one finite row per image. ``zero``, ``mean`` and ``ceiling`` are taken by the floors and the ceiling.
    training_mean
        Mean response of the training images, what the floor ``mean`` predicts.
    n_bootstraps
        Resamples of the images; 0 leaves the intervals undefined.
    protocol
        ``strict`` or ``chasm-legacy``: names how ``measured`` was prepared.
    samples
        Draws of single trials' responses from the predictive distribution, of those among the systems that have one;
        each has its own number of samples.

    Returns
    -------
    scores
        Rows for every system, floor and ceiling, each ROI (``all``, the given families, and null rows for those of
        early, mid and higher that have no labels), axis, target and metric. Comparisons for every ordered pair of
        systems, and of each system with the floors where both are defined. With samples, further rows of
        `SAMPLING_METRICS` for these systems and the floors; a floor is a point mass, its CRPS the absolute
        error and its energy score the error's norm.

    Raises
    ------
    ValueError
        If a prediction's shape isn't (n_images, n_voxels), a value isn't finite, a name is taken, or samples have no
        prediction of their name.
    """
    _check(predictions, measured, training_mean)
    _check_samples(samples or {}, predictions, measured)
    shape = (measured.n_images, measured.n_voxels)
    systems = {
        "zero": np.broadcast_to(np.zeros(1, dtype=np.float32), shape),
        "mean": np.broadcast_to(training_mean, shape),
        **predictions,
    }
    rois = {"all": np.ones(measured.n_voxels, dtype=bool), **measured.families}
    counts = resample_counts(measured.n_images, n_bootstraps, rng=rng)
    rows: list[Row] = []
    comparisons: list[Comparison] = []
    notes = [f"normalisation: {measured.normalisation or 'not stated'}", *measured.notes]
    notes += [f"roi {name}: n/a, no labels" for name in FAMILIES if name not in rois]
    notes.append("r of zero, voxel and pattern axis, and of mean, voxel axis: n/a, a constant has no correlation")
    if measured.trial_reason is not None:
        notes.append(f"target trial: n/a, {measured.trial_reason}")
    if measured.ceiling is None:
        notes.append(f"voxel ceiling and r2_ceiling: n/a, {measured.ceiling_reason}")
    if (measured.n_repeats < 2).all():
        notes.append("pattern ceiling: n/a, no image was repeated")

    for target in ("trial", "mean"):
        estimates: dict[tuple[str, Key], Estimate] = {}
        differences: dict[tuple[str, str, Key], Estimate] = {}
        if target == "mean" or measured.trial_reason is None:
            against = _target(measured, target, rois, counts)
            found = estimate_systems(systems, against)
            estimates = {(name, key): e for name, system in found.items() for key, e in system.estimates.items()}
            estimates |= {(CEILING, key): e for key, e in _ceiling(measured, target, against).items()}
            for a, b in ((a, b) for a in predictions for b in systems if a != b):
                differences |= {(a, b, key): e for key, e in estimate_differences(found[a], found[b], against).items()}
            notes += _low_ceiling_notes(target, against)
        for roi, system, (axis, metric) in product(dict.fromkeys((*rois, *FAMILIES)), (*systems, CEILING), METRICS):
            estimate = estimates.get((system, Key(roi, axis, metric)), UNDEFINED)
            rows.append(_row(estimate, measured, system, roi, protocol, axis, target, metric))
        for (a, b, key), estimate in differences.items():
            test = "bootstrap over images" if key[1:] == ("voxel", "r") else "wilcoxon over images"
            low, high = percentile_interval(estimate.samples, n_images=estimate.n_images or measured.n_images)
            numbers = (_null(estimate.value), _null(low), _null(high), _null(estimate.p_value))
            comparisons.append(
                Comparison(a, b, measured.subject, key.roi, key.axis, target, key.metric, *numbers, test)
            )
    if samples:
        target = "trial" if measured.trial_reason is None else "mean"
        against = _target(measured, target, rois, counts)
        sampled = {floor: estimate_point_mass(systems[floor], against) for floor in FLOORS}
        sampled |= {name: estimate_sampling(drawn, against) for name, drawn in samples.items()}
        places = product(("trial", "mean"), dict.fromkeys((*rois, *FAMILIES)), sampled, SAMPLING_METRICS)
        for of, roi, system, (axis, metric) in places:
            estimate = sampled[system].get(Key(roi, axis, metric), UNDEFINED) if of == target else UNDEFINED
            rows.append(_row(estimate, measured, system, roi, protocol, axis, of, metric))
        notes += _sampling_notes(samples, measured)
    return Scores(tuple(rows), tuple(comparisons), tuple(f"{measured.subject}: {note}" for note in notes))


def _row(
    estimate: Estimate, measured: Measured, system: str, roi: str, protocol: str, axis: str, target: str, metric: str
) -> Row:
    n_images = measured.n_images if estimate.n_images is None else estimate.n_images
    low, high = percentile_interval(estimate.samples, n_images=n_images)
    numbers = (_null(estimate.value), _null(low), _null(high), n_images, estimate.n_voxels)
    return Row(system, measured.subject, roi, protocol, axis, target, metric, *numbers)


def _target(measured: Measured, target: str, rois: dict[str, np.ndarray], counts: np.ndarray) -> Target:
    if target == "mean":
        return Target(measured.mean, np.arange(measured.n_images), rois, measured.ceiling, counts)
    ceiling = None if measured.ceiling is None else single_trial_ceiling(measured.ceiling, measured.n_repeats)
    return Target(measured.trials, measured.image, rois, ceiling, counts)


def _ceiling(measured: Measured, target: str, against: Target) -> dict[Key, Estimate]:
    """Voxelwise from the given ceiling; patternwise from the agreement of the repeats themselves."""
    found = estimate_ceiling(against)
    for roi, mask in against.rois.items():
        if mask.any():
            of_mean, of_trial = pattern_ceiling(measured.trials[:, mask], measured.image)
            r = of_mean if target == "mean" else of_trial
            found[Key(roi, "pattern", "r")] = mean_over_images(r, against, n_voxels=int(mask.sum()))
    return found


def _low_ceiling_notes(target: str, against: Target) -> list[str]:
    if against.ceiling is None:
        return []
    low = ~(against.ceiling >= LOWEST_CEILING)
    return [
        f"r2_ceiling, target {target}, roi {roi}: {int((mask & low).sum())} of {int(mask.sum())} voxels left out, "
        f"ceiling below {LOWEST_CEILING} or undefined"
        for roi, mask in against.rois.items()
        if (mask & low).any()
    ]


def _sampling_notes(samples: Mapping[str, np.ndarray], measured: Measured) -> list[str]:
    """How many samples there are, what they were compared with, and what so few don't allow."""
    if measured.trial_reason is None:
        notes = ["crps, coverage90, energy, target mean: n/a, samples are of single trials"]
    else:
        told = "crps, coverage90, energy against averages, which vary less than the trials sampled"
        notes = [f"{told}: {measured.trial_reason}"]
    notes.append("coverage90 of zero and mean: n/a, a point mass has no interval")
    for name, drawn in samples.items():
        notes.append(f"samples of {name}: T = {len(drawn)}")
        needs = (("crps", MIN_CRPS_SAMPLES), ("coverage90", samples_needed(COVERED)), ("energy", MIN_CRPS_SAMPLES))
        notes += [f"{m} of {name}: n/a, needs {n} samples, got {len(drawn)}" for m, n in needs if len(drawn) < n]
    return notes


def _null(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _check(predictions: Mapping[str, np.ndarray], measured: Measured, training_mean: np.ndarray) -> None:
    expected = (measured.n_images, measured.n_voxels)
    taken = {*FLOORS, CEILING} & set(predictions)
    if taken:
        raise ValueError(f"system name {sorted(taken)[0]!r} is taken by the floors and the ceiling; rename the system")
    for name, values in predictions.items():
        if values.shape != expected:
            raise ValueError(
                f"prediction of {name!r} for {measured.subject} is {values.shape}, expected (image, voxel) {expected}"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"prediction of {name!r} for {measured.subject} holds NaN or infinite values")
    if training_mean.shape != expected[1:] or not np.isfinite(training_mean).all():
        raise ValueError(f"training_mean has shape {training_mean.shape}, expected finite values of {expected[1:]}")


def _check_samples(
    samples: Mapping[str, np.ndarray], predictions: Mapping[str, np.ndarray], measured: Measured
) -> None:
    expected = (measured.n_images, measured.n_voxels)
    for name, drawn in samples.items():
        if name not in predictions:
            raise ValueError(f"samples of {name!r} stand without a prediction; add one, such as the samples' mean")
        if drawn.shape[1:] != expected:
            raise ValueError(
                f"samples of {name!r} for {measured.subject} are {drawn.shape}, expected (sample, image, voxel) with "
                f"(image, voxel) {expected}"
            )
        if not all(np.isfinite(one).all() for one in drawn):
            raise ValueError(f"samples of {name!r} for {measured.subject} hold NaN or infinite values")

"""Losses of voxelwise correlation per ROI family, early against higher areas, and how sure that is.

Symbols: ``r_f`` the network's voxelwise correlation with the mean of an image's repeats, averaged over family ``f``.
For an intervention,

    loss_f = r_f(intact) - r_f(intervened)        difference = loss_early - loss_higher
    share  = loss_f / r_f(intact)                 versus control = difference - difference(random subspace)

Choices:

- A voxel whose prediction is constant under an intervention has no correlation; nothing is predicted of it, so its r
  counts as 0.
- The interval of a loss is over test images, its voxels being what they are. A difference between areas is said of
  areas, of which the voxels are a sample: two sets of voxels drawn from one area differ, and images alone would find
  that difference real. So differences are resampled over images and, at once, over parcels of neighbouring voxels
  (Owen 2007); a parcel takes its early and its higher voxels along. Resamples of a few parcels spread too little, so
  intervals and p are expanded for the smallest sample: the images, or the parcels of the smaller area.
- A share is a ratio, and its resamples explode where the intact r comes near 0; their mean is then no place to centre
  them at. So they take plain percentiles, and shares are n/a where the interval of an area's intact r touches 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from foundation.evaluation.interventions import CONTROL, Removed
from foundation.evaluation.score import FAMILIES, Measured
from foundation.evaluation.statistics import (
    bootstrap_p,
    bootstrap_voxelwise,
    centre,
    percentile_interval,
    resample_counts,
    voxel_moments,
)

MIN_PARCELS = 5
"""Fewest parcels that an area has to lie in; fewer say too little of how voxels vary."""
_COMPARED = ("early", "higher")
_TESTED = ("low", "high", "p_value")


@dataclass(frozen=True, kw_only=True)
class AblationRow:
    """What one intervention costs the voxels of one family; None is undefined."""

    subject: str
    branch: str
    """``cls``, ``patch``, or ``both`` where the streams' inputs are swapped."""
    intervention: str
    roi: str
    intact: float
    loss: float
    low: float | None
    high: float | None
    share_of_intact: float | None
    n_images: int
    n_voxels: int


@dataclass(frozen=True, kw_only=True)
class Differential:
    """The loss of early less that of higher areas; intervals and p are over images and parcels."""

    subject: str
    branch: str
    intervention: str
    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    share_difference: float | None
    """The same of losses as shares of the intact r."""
    share_low: float | None
    share_high: float | None
    share_p_value: float | None
    versus_control: float | None
    """The difference less that of random directions that hold as much variance, on the same resamples."""
    versus_low: float | None
    versus_high: float | None
    versus_p_value: float | None
    n_units: int | None = None
    """What is resampled and scarcest: images, or parcels of the smaller area."""
    n_resamples: int | None = None
    n_removed: int | None = None
    """Directions that the control takes, of `n_directions`."""
    n_directions: int | None = None


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """All that was found of one subject, or of several."""

    rows: tuple[AblationRow, ...] = ()
    differentials: tuple[Differential, ...] = ()
    notes: tuple[str, ...] = ()
    """What is n/a and why, and what was left out; each starts with its subject."""


def merged(found: Iterable[Ablation]) -> Ablation:
    """Return several subjects' ablations as one; nothing is averaged."""
    several = list(found)
    return Ablation(
        rows=tuple(row for a in several for row in a.rows),
        differentials=tuple(d for a in several for d in a.differentials),
        notes=tuple(note for a in several for note in a.notes),
    )


@dataclass(frozen=True, eq=False)
class ResampledR:
    """Mean r of each region, the images as they are first, then resampled."""

    over_images: Float[np.ndarray, "resample region"]
    over_both: Float[np.ndarray, "resample region"]
    """Over images and parcels."""


class Losses:
    """One subject's regions and the resamples that all of its interventions share.

    Parameters
    ----------
    parcel
        The parcel of each voxel: neighbours that aren't independent of each other.
    """

    def __init__(
        self,
        measured: Measured,
        parcel: Int[np.ndarray, " voxel"],
        *,
        n_bootstraps: int,
        rng: np.random.Generator,
    ) -> None:
        self.measured = measured
        families = {name: measured.families[name] for name in FAMILIES if name in measured.families}
        self.regions = {"all": np.ones(measured.n_voxels, dtype=bool), **families}
        n_parcels = int(parcel.max()) + 1
        self._counts = np.vstack(
            [
                np.ones((1, measured.n_images), np.float32),
                resample_counts(measured.n_images, n_bootstraps, rng=rng),
            ]
        )
        self._parcels = np.vstack([np.ones((1, n_parcels)), resample_counts(n_parcels, n_bootstraps, rng=rng)])
        member = np.stack(list(self.regions.values()), axis=1)
        voxel, region = np.nonzero(member)
        column, n_columns = parcel[voxel] * len(self.regions) + region, n_parcels * len(self.regions)
        self._member = sparse.csr_array(
            (np.ones(len(voxel), np.float32), (column, voxel)), shape=(n_columns, measured.n_voxels)
        )
        self._n_voxels = np.bincount(column, minlength=n_columns).reshape(n_parcels, -1).astype(np.float64)

    def mean_r(self, predictions: Iterable[Float[np.ndarray, "image voxel"]]) -> ResampledR:
        """Return each region's mean r on every resample, averaged over `predictions`, which are draws of one thing."""
        sums = [self._summed(prediction) for prediction in predictions]
        by_parcel = np.mean(sums, axis=0)
        with np.errstate(invalid="ignore"):
            both = np.einsum("bp,bpf->bf", self._parcels, by_parcel) / (self._parcels @ self._n_voxels)
        return ResampledR(by_parcel.sum(1) / self._n_voxels.sum(0), both)

    def _summed(self, prediction: np.ndarray) -> Float[np.ndarray, "resample parcel region"]:
        moments = voxel_moments(prediction, self.measured.mean)
        summed = bootstrap_voxelwise(lambda r: (self._member @ np.nan_to_num(r).T).T, moments, self._counts)
        return summed.reshape(len(self._counts), *self._n_voxels.shape)

    def told(
        self,
        intact: ResampledR,
        found: Mapping[tuple[str, str], ResampledR],
        *,
        removed: Mapping[str, Removed] | None = None,
    ) -> Ablation:
        """Return rows and differentials of interventions.

        Parameters
        ----------
        found
            By branch and name.
        removed
            What the control takes, by branch; it is noted.
        """
        removed = removed or {}
        notes = tuple(
            f"{self.measured.subject}: the {CONTROL} that is matched to {branch} takes {taken.n} of {taken.n_all} "
            "directions"
            for branch, taken in removed.items()
        )
        rows = [
            self._row(branch, name, k, intact, under)
            for (branch, name), under in found.items()
            for k in range(len(self.regions))
        ]
        reason = self._no_difference()
        if reason is not None:
            note = f"{self.measured.subject}: early against higher n/a, {reason}"
            return Ablation(rows=tuple(rows), notes=(*notes, note))
        unclear = self._unclear(intact)
        if unclear:
            names = " and ".join(unclear)
            notes += (f"{self.measured.subject}: shares n/a, the intact r of {names} areas isn't clear of 0",)
        differentials = tuple(
            self._differential(
                branch,
                name,
                intact,
                under,
                control=found.get((branch, CONTROL)) if name != CONTROL else None,
                removed=removed.get(branch),
                with_shares=not unclear,
            )
            for (branch, name), under in found.items()
        )
        return Ablation(rows=tuple(rows), differentials=differentials, notes=notes)

    def _differential(
        self,
        branch: str,
        name: str,
        intact: ResampledR,
        under: ResampledR,
        *,
        control: ResampledR | None,
        removed: Removed | None,
        with_shares: bool,
    ) -> Differential:
        whole = intact.over_both[:, self._areas]

        def loss(of: ResampledR) -> Float[np.ndarray, "resample area"]:
            return whole - of.over_both[:, self._areas]

        plain = _difference(loss(under))
        share: dict[str, float | None] = dict.fromkeys(("difference", *_TESTED))
        if with_shares:
            share = _tested(_difference(loss(under) / whole), "difference", n_units=self.n_units)
        versus: dict[str, float | None] = dict.fromkeys(("control", *_TESTED))
        if control is not None:
            versus = _tested(_centred(plain - _difference(loss(control))), "control", n_units=self.n_units)
        return Differential(
            subject=self.measured.subject,
            branch=branch,
            intervention=name,
            **_tested(_centred(plain), "difference", n_units=self.n_units),  # pyright: ignore[reportArgumentType]
            **{f"share_{key}": value for key, value in share.items()},
            **{f"versus_{key}": value for key, value in versus.items()},
            n_units=self.n_units,
            n_resamples=len(plain) - 1,
            n_removed=None if removed is None else removed.n,
            n_directions=None if removed is None else removed.n_all,
        )

    def _row(self, branch: str, name: str, k: int, intact: ResampledR, under: ResampledR) -> AblationRow:
        loss = (intact.over_images - under.over_images)[:, k]
        value, whole = float(loss[0]), float(intact.over_images[0, k])
        low, high = percentile_interval(centre(loss[1:], value), n_images=self.measured.n_images)
        return AblationRow(
            subject=self.measured.subject,
            branch=branch,
            intervention=name,
            roi=list(self.regions)[k],
            intact=whole,
            loss=value,
            low=_null(low),
            high=_null(high),
            share_of_intact=value / whole if whole > 0 else None,
            n_images=self.measured.n_images,
            n_voxels=int(self._n_voxels[:, k].sum()),
        )

    def _no_difference(self) -> str | None:
        for name in _COMPARED:
            if name not in self.regions:
                return f"no labels of {name} areas"
            n_parcels = self._n_parcels(name)
            if n_parcels < MIN_PARCELS:
                return (
                    f"{name} voxels lie in {n_parcels} of the model's parcels, at least {MIN_PARCELS} are needed; "
                    f"train with smaller ones (--parcels)"
                )
        return None

    @property
    def n_units(self) -> int:
        """What is resampled and scarcest: images, or parcels of the smaller of the areas compared."""
        return min(self.measured.n_images, *map(self._n_parcels, _COMPARED))

    @property
    def _areas(self) -> list[int]:
        return [list(self.regions).index(name) for name in _COMPARED]

    def _unclear(self, intact: ResampledR) -> list[str]:
        """Return the areas of which shares say nothing: the interval of the intact r touches 0."""
        of_areas = zip(_COMPARED, intact.over_both[:, self._areas].T, strict=True)
        return [name for name, r in of_areas if not percentile_interval(_centred(r)[1:], n_images=self.n_units)[0] > 0]

    def _n_parcels(self, name: str) -> int:
        return int((self._n_voxels[:, list(self.regions).index(name)] > 0).sum())


def _tested(samples: Float[np.ndarray, " resample"], name: str, *, n_units: int) -> dict[str, float | None]:
    """Return the first value under `name`, and interval and p of the others, resamples of `n_units`."""
    low, high = percentile_interval(samples[1:], n_images=n_units)
    numbers = (float(samples[0]), low, high, bootstrap_p(samples[1:], n_images=n_units))
    return {key: _null(number) for key, number in zip((name, *_TESTED), numbers, strict=True)}


def _centred(samples: Float[np.ndarray, " resample"]) -> Float[np.ndarray, " resample"]:
    return np.append(samples[:1], centre(samples[1:], float(samples[0])))


def _difference(of_areas: Float[np.ndarray, "resample area"]) -> Float[np.ndarray, " resample"]:
    return of_areas[:, 0] - of_areas[:, 1]


def _null(value: float) -> float | None:
    return value if np.isfinite(value) else None

"""What a report keeps of one subject's evaluation: a few numbers per voxel and three images, never all predictions."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from data.store import PooledStore
from data.voxels import VoxelTable
from foundation.evaluation.evaluated import Evaluated
from foundation.evaluation.figures.maps import best_median_worst
from foundation.evaluation.metrics import patternwise_r, voxelwise_r
from foundation.evaluation.sampling import calibration
from foundation.evaluation.score import Scores
from foundation.evaluation.statistics import benjamini_hochberg, voxelwise_p

LEVELS = tuple(round(0.1 * k, 1) for k in range(1, 10))
"""Nominal levels of the calibration plot."""
FDR = 0.05
_LARGEST_PIXELS = 160
_JPEG_QUALITY = 80


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One image, what was measured of it and what the leading system predicts."""

    which: str
    """``best``, ``median`` or ``worst``."""
    name: str
    r: float
    """Pattern r of the leading system."""
    measured: Float[np.ndarray, " voxel"]
    predicted: Float[np.ndarray, " voxel"]
    jpeg: bytes | None
    """The picture itself; None where the store doesn't have it or it isn't wanted."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shown:
    """What the figures of one subject show."""

    subject: str
    scores: Scores
    """Strict."""
    r: dict[str, Float[np.ndarray, " voxel"]]
    """Voxelwise, against the mean of an image's repeats, by system."""
    highest_r: Float[np.ndarray, " voxel"] | None
    """The r that a perfect prediction is expected to reach: the root of the ceiling."""
    ceiling_reason: str | None
    above_chance: dict[str, int]
    """Voxels with r above 0 at a false discovery rate of `FDR`, by system."""
    n_images: int
    families: Mapping[str, Bool[np.ndarray, " voxel"]]
    voxels: VoxelTable
    covered: dict[str, Float[np.ndarray, " level"]] = field(default_factory=dict)
    """Share of targets inside the central interval of each of `LEVELS`, by system with samples."""
    n_samples: int = 0
    trial_reason: str | None = None
    """Why samples of single trials are compared with averages."""
    examples: tuple[Example, ...] = ()

    @property
    def n_voxels(self) -> int:
        """Number of voxels."""
        return self.voxels.n_voxels


def shown(evaluated: Evaluated, store: PooledStore, *, leading: str, with_pictures: bool = True) -> Shown:
    """Return what is kept of an evaluation under the strict protocol.

    Parameters
    ----------
    leading
        The system whose best, median and worst image are shown.
    with_pictures
        Whether the pictures themselves are kept; not every data set may be shown to others.
    """
    measured, predictions = evaluated.measured, evaluated.predictions
    mean = measured.mean
    r = {name: voxelwise_r(predicted, mean) for name, predicted in predictions.items()}
    of_image = patternwise_r(predictions[leading], mean)
    ids = store.image_ids()
    examples = [
        Example(
            which=which,
            name=ids[evaluated.rows[k]],
            r=float(of_image[k]),
            measured=mean[k].astype(np.float32),
            predicted=predictions[leading][k].copy(),
            jpeg=picture(store, int(evaluated.rows[k])) if with_pictures else None,
        )
        for which, k in best_median_worst(of_image).items()
    ]
    return Shown(
        subject=evaluated.subject,
        scores=evaluated.scores["strict"],
        r=r,
        highest_r=None if measured.ceiling is None else np.sqrt(np.clip(measured.ceiling, 0, None)),
        ceiling_reason=measured.ceiling_reason,
        above_chance={name: n_above_chance(values, n_images=measured.n_images) for name, values in r.items()},
        n_images=measured.n_images,
        families=measured.families,
        voxels=store.subject(evaluated.subject).voxels,
        covered={
            name: calibration(drawn, measured.trials, LEVELS, image=measured.image)
            for name, drawn in evaluated.samples.items()
        },
        n_samples=max((len(drawn) for drawn in evaluated.samples.values()), default=0),
        trial_reason=measured.trial_reason,
        examples=tuple(examples),
    )


def n_above_chance(r: Float[np.ndarray, " voxel"], *, n_images: int) -> int:
    """Return how many voxels are predicted better than by chance, at a false discovery rate of `FDR` over voxels."""
    adjusted = benjamini_hochberg(voxelwise_p(r, n_images=n_images))
    return int(((adjusted < FDR) & (r > 0)).sum())


def picture(store: PooledStore, row: int) -> bytes | None:
    """Return the picture of an image as a small JPEG; None where the store has no pixels of it."""
    first = 0
    for block, n_images, shape in store.image_blocks():
        if row < first + n_images:
            if shape is None:
                return None
            _, _, pixels = next(store.pixels(1, block=block, start=row - first))
            shrunk = Image.fromarray(pixels[0])
            shrunk.thumbnail((_LARGEST_PIXELS, _LARGEST_PIXELS))
            file = io.BytesIO()
            shrunk.save(file, "jpeg", quality=_JPEG_QUALITY)
            return file.getvalue()
        first += n_images
    raise ValueError(f"there is no image {row} in {store.path}; it has {first}")

"""The phantom's visual cortex: where its voxels lie, what part of the image they see, and which ROI they belong to.

Each hemisphere is a sheet with two axes. `area`, from -1 (ventral) to 1 (dorsal), crosses V1 in the middle, then V2,
V3 and so on to either side; polar angle runs along it and reverses at each border, as on real cortex. `eccentricity`,
0 to 1, runs from fovea to periphery, magnified at the fovea. The sheet is bent smoothly into space. The hierarchy `h`
of a voxel is `|area|`: 0 in the middle of V1, 1 at the end of the streams.

Receptive fields are Gaussian, in fractions of the image's side (x to the right, y downwards), and grow with
eccentricity and `h`. The left hemisphere sees the right half.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Float32

from data.voxels import Rois

EARLY_LIMIT = 0.40
_V1, _V2, _V3, _V4, _MID = 0.14, 0.28, EARLY_LIMIT, 0.52, 0.62
_AREA_TURNS = (-1.0, -0.82, -0.66, -_V4, -_V3, -_V2, -_V1, _V1, _V2, _V3, _V4, 0.66, 0.82, 1.0)
_POLAR_ANGLE_DEG = (40.0, -60.0, 60.0, -90.0, 90.0, 0.0, 90.0, -90.0, 0.0, -90.0, 90.0, -60.0, 60.0, -40.0)
_VISUAL_NAMES = {1: "V1v", 2: "V1d", 3: "V2v", 4: "V2d", 5: "V3v", 6: "V3d", 7: "hV4"}
_STREAMS = ("early", "midventral", "midlateral", "midparietal", "ventral", "lateral", "parietal")
_VOXEL_SIZE_MM = 1.8
_SMALLEST_FIELD, _LARGEST_FIELD = 1 / 64, 0.45
_N_WAVES = 96


@dataclass(frozen=True, kw_only=True)
class Cortex:
    """The voxels of one subject, in the order of a volume (x slowest).

    Attributes
    ----------
    sheet : left (-1) or right (1) hemisphere, `area`, `eccentricity`.
    coordinates : position in mm; x to the right, y to the front, z up.
    hierarchy : 0 (V1) to 1 (end of the streams).
    receptive_field : x, y and standard deviation, in fractions of the image's side.
    """

    sheet: Float[np.ndarray, "voxel 3"]
    coordinates: Float32[np.ndarray, "voxel 3"]
    hierarchy: Float[np.ndarray, " voxel"]
    receptive_field: Float[np.ndarray, "voxel 3"]

    @property
    def retinotopic(self) -> Rois:
        """NSD's `prf-visualrois`."""
        area = self.sheet[:, 1]
        ventral = area < 0
        labels = np.zeros(len(area), np.int16)
        for index, (inner, outer) in enumerate(((0.0, _V1), (_V1, _V2), (_V2, _V3))):
            inside = (self.hierarchy >= inner) & (self.hierarchy < outer)
            labels[inside & ventral] = 2 * index + 1
            labels[inside & ~ventral] = 2 * index + 2
        labels[(self.hierarchy >= _V3) & (self.hierarchy < _V4) & ventral] = 7
        return Rois(labels=labels, names=dict(_VISUAL_NAMES))

    @property
    def streams(self) -> Rois:
        """NSD's `streams`; hV4 lies in midventral."""
        _, area, eccentricity = self.sheet.T
        course = np.where(area < 0, 2, np.where(eccentricity < 0.5, 3, 4))
        labels = np.where(self.hierarchy < _V3, 1, np.where(self.hierarchy < _MID, course, course + 3))
        return Rois(labels=labels.astype(np.int16), names=dict(enumerate(_STREAMS, start=1)))


def draw_cortex(n_voxels: int, *, rng: np.random.Generator, early_only: bool = False) -> Cortex:
    """Draw a subject's voxels, spread evenly over the areas, on a sheet bent a little differently in each subject.

    With `early_only` all of them lie in V1 to V3.
    """
    reach = EARLY_LIMIT if early_only else 1.0
    side = np.where(np.arange(n_voxels) % 2 == 0, -1.0, 1.0)
    area = reach * (2 * (np.arange(n_voxels) + rng.random(n_voxels)) / n_voxels - 1)
    eccentricity = rng.random(n_voxels)
    sheet = np.stack([side, area, eccentricity], axis=1)
    coordinates = _bend(sheet, rng)
    order = np.lexsort(np.round(coordinates / _VOXEL_SIZE_MM)[:, ::-1].T)
    sheet, coordinates = sheet[order], coordinates[order]
    hierarchy = np.abs(sheet[:, 1])
    return Cortex(
        sheet=sheet,
        coordinates=coordinates.astype(np.float32),
        hierarchy=hierarchy,
        receptive_field=_receptive_fields(sheet, rng),
    )


def smooth_fields(
    sheet: Float[np.ndarray, "voxel 3"], n_fields: int, *, length: float, rng: np.random.Generator
) -> Float[np.ndarray, "voxel field"]:
    """Gaussian random fields of unit variance over the sheets, independent between hemispheres.

    They are correlated over `length` (a sheet is 2 by 1). A sum of random plane waves (Rahimi & Recht 2007).
    """
    fields = np.empty((len(sheet), n_fields))
    for side in (-1.0, 1.0):
        here = sheet[:, 0] == side
        waves = rng.standard_normal((2, _N_WAVES)) / length
        phase = rng.uniform(0, 2 * np.pi, _N_WAVES)
        weights = rng.standard_normal((_N_WAVES, n_fields))
        fields[here] = np.cos(sheet[here, 1:] @ waves + phase) @ weights * np.sqrt(2 / _N_WAVES)
    return fields


def selective_rois(
    cortex: Cortex, selective: Bool[np.ndarray, " voxel"], *, lateral_name: str, ventral_name: str
) -> Rois:
    """Label the selective voxels of the lateral stream 1 and those of the ventral stream 2, as in NSD's `floc-*`."""
    streams = cortex.streams
    labels = np.zeros(len(selective), np.int16)
    labels[selective & streams.mask("midlateral", "lateral")] = 1
    labels[selective & streams.mask("midventral", "ventral")] = 2
    return Rois(labels=labels, names={1: lateral_name, 2: ventral_name})


def dealt_out(rois: dict[str, Rois], *, rng: np.random.Generator) -> dict[str, Rois]:
    """Give each voxel the labels of a voxel drawn at random, the same one in all families.

    As many voxels have each label as before, but areas are samples of one population: they differ by chance alone.
    """
    n_voxels = len(next(iter(rois.values())).labels)
    order = rng.permutation(n_voxels)
    return {name: replace(family, labels=family.labels[order]) for name, family in rois.items()}


def _receptive_fields(sheet: Float[np.ndarray, "voxel 3"], rng: np.random.Generator) -> Float[np.ndarray, "voxel 3"]:
    side, area, along = sheet.T
    polar = np.deg2rad(np.interp(area, _AREA_TURNS, _POLAR_ANGLE_DEG))
    eccentricity = 0.03 * np.expm1(2.95 * along)
    size = np.clip((0.011 + 0.06 * eccentricity) * np.exp(2.5 * np.abs(area)), _SMALLEST_FIELD, _LARGEST_FIELD)
    scatter = 0.15 * np.minimum(size, 0.1) * rng.standard_normal((2, len(sheet)))
    x = 0.5 - side * eccentricity * np.cos(polar) + scatter[0]
    y = 0.5 - eccentricity * np.sin(polar) + scatter[1]
    return np.stack([np.clip(x, 0, 1), np.clip(y, 0, 1), size], axis=1)


def _bend(sheet: Float[np.ndarray, "voxel 3"], rng: np.random.Generator) -> Float[np.ndarray, "voxel 3"]:
    """Roll the sheet around the occipital pole, V1 on the medial wall, with shallow folds."""
    side, area, along = sheet.T
    turn = np.deg2rad(140.0) * area
    fold_phase, scale = rng.uniform(0, 2 * np.pi, 2), rng.normal(1.0, 0.04, 3)
    folds = 1.5 * np.sin(5 * turn + fold_phase[0]) + 1.5 * np.sin(7 * along + fold_phase[1])
    radius = 16 + 14 * along + folds
    x = side * (7 + 1.1 * (16 + 14 + 3) - radius * np.cos(turn))
    y = -95 + 50 * along + 6 * np.abs(area) ** 2
    z = radius * np.sin(turn)
    return np.stack([x, y, z], axis=1) * scale

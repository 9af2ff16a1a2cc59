"""Which voxels or vertices of an NSD subject are imported, and what NSD publishes of them.

In ``func1pt8mm`` a mask is a volume beside the ROIs, its voxels in the C order of (x, y, z). `nsdgeneral` holds -1, 0
and 1, so a mask is where a volume is above 0; "all" is the brain mask, outside which NSD's betas are zero. On
``fsaverage`` the voxels are the vertices of the left hemisphere, then of the right; "all" is every vertex. There the
betas are floats, and a vertex that a session's field of view missed is NaN: it is left out for all sessions of the
directory, imported or not. A session that is fetched later and misses yet other vertices can't be appended, since a
subject has one list of vertices: "with other voxels". Fetch all sessions before the first import, or import anew.

Labels of a ROI family are numbers in a volume (or ``{lh,rh}.<family>.mgz``), named by ``<family>.mgz.ctab``; 0 and
below mean none.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int16

from data.importers.findings import Findings
from data.nifti import read_volume, volume_of_mask
from data.voxels import Rois, Surface, VoxelTable

FAMILIES = (
    "streams",
    "prf-visualrois",
    "floc-faces",
    "floc-bodies",
    "floc-places",
    "floc-words",
    "Kastner2015",
    "HCP_MMP1",
)
PRF_NAMES = {1: "V1v", 2: "V1d", 3: "V2v", 4: "V2d", 5: "V3v", 6: "V3d", 7: "hV4"}
VOLUMES = {
    "subj01": (81, 104, 83),
    "subj02": (82, 106, 84),
    "subj03": (81, 106, 82),
    "subj04": (85, 99, 80),
    "subj05": (79, 97, 78),
    "subj06": (85, 113, 83),
    "subj07": (78, 95, 81),
    "subj08": (80, 103, 78),
}
FSAVERAGE_VERTICES = 163_842
HEMISPHERES = ("lh", "rh")


@dataclass(frozen=True, kw_only=True)
class Voxels:
    """A subject's voxels, and the files that tell of them."""

    table: VoxelTable
    files: tuple[Path, ...]


def _vertices(path: Path) -> np.ndarray:
    return read_volume(path)[0].reshape(-1)


def volume_voxels(source: Path, subject: str, betas: str, mask: str, findings: Findings) -> Voxels | None:
    """Return a subject's voxels in ``func1pt8mm``; None, with problems noted, where the mask can't be had."""
    space = source / "nsddata" / "ppdata" / subject / "func1pt8mm"
    path = space / "brainmask.nii.gz" if mask == "all" else space / "roi" / f"{mask}.nii.gz"
    with findings.noting():
        values, affine = read_volume(path)
        inside = values > 0
        if not inside.any():
            raise ValueError(f"{path} has no voxel above 0; fetch it again or choose another --mask")
        if inside.shape != VOLUMES[subject]:
            findings.warnings.append(f"{path} is {inside.shape}, not the {VOLUMES[subject]} of {subject} in NSD")
        place = volume_of_mask(inside, affine)
        maps = {family: (space / "roi" / f"{family}.nii.gz",) for family in FAMILIES}
        ncsnr = (source / "nsddata_betas" / "ppdata" / subject / "func1pt8mm" / betas / "ncsnr.nii.gz",)
        names_from = source / "nsddata" / "freesurfer" / subject / "label"
        maps_of = _Maps(subject=subject, shapes=(inside.shape,), inside=inside, findings=findings)
        table = VoxelTable(
            n_voxels=len(place.index),
            coordinates=place.coordinates(),
            place=place,
            rois=maps_of.rois(maps, names_from),
            reliability=maps_of.reliability(ncsnr),
        )
        return Voxels(table=table, files=_there(path, *(p for paths in maps.values() for p in paths), *ncsnr))
    return None


def surface_voxels(
    source: Path,
    subject: str,
    betas: str,
    mask: str,
    finite: tuple[Bool[np.ndarray, " left"], Bool[np.ndarray, " right"]],
    findings: Findings,
) -> Voxels | None:
    """Return a subject's vertices on ``fsaverage``; None, with problems noted, where the mask can't be had.

    `finite` is where each hemisphere's betas are finite in all sessions.
    """
    labels = source / "nsddata" / "freesurfer" / "fsaverage" / "label"
    n_vertices = (len(finite[0]), len(finite[1]))
    paths = () if mask == "all" else _pair(labels, f"{mask}.mgz")
    halves = [np.ones(n, bool) for n in n_vertices]
    with findings.noting():
        if n_vertices != (FSAVERAGE_VERTICES, FSAVERAGE_VERTICES):
            findings.warnings.append(
                f"{subject} has {n_vertices} vertices, not fsaverage's {FSAVERAGE_VERTICES} a side"
            )
        if missing := [path for path in paths if not path.exists()]:
            raise ValueError(f"{missing[0]} does not exist; fetch it, or take every vertex by --mask all")
        for side, path in enumerate(paths):
            values = _vertices(path)
            if len(values) != n_vertices[side]:
                raise ValueError(f"{path} has {len(values)} vertices, {subject} {n_vertices[side]}; fetch it again")
            halves[side] = values > 0
        masked = np.concatenate(halves)
        inside = masked & np.concatenate(finite)
        if not inside.any():
            raise ValueError(f"{subject} has no vertex within the mask {mask!r} that is finite; choose another --mask")
        if left_out := int(masked.sum() - inside.sum()):
            findings.warnings.append(
                f"{subject}: {left_out} of {masked.sum()} vertices are not finite in some session's first trial, so "
                f"they are left out of all; sessions that are fetched later and miss others can't be appended"
            )
        vertex = np.flatnonzero(inside)
        side = (vertex >= n_vertices[0]).astype(np.int8)
        place = Surface(
            space="fsaverage",
            n_vertices=n_vertices,
            hemisphere=side,
            vertex=(vertex - side * n_vertices[0]).astype(np.int32),
        )
        maps = {family: _pair(labels, f"{family}.mgz") for family in FAMILIES}
        ncsnr = _pair(source / "nsddata_betas" / "ppdata" / subject / "fsaverage" / betas, "ncsnr.mgh")
        shapes = tuple((n, 1, 1) for n in n_vertices)
        maps_of = _Maps(subject=subject, shapes=shapes, inside=inside, findings=findings)
        table = VoxelTable(
            n_voxels=len(vertex),
            place=place,
            rois=maps_of.rois(maps, labels),
            reliability=maps_of.reliability(ncsnr),
        )
        return Voxels(table=table, files=_there(*paths, *(p for pair in maps.values() for p in pair), *ncsnr))
    return None


def _pair(directory: Path, name: str) -> tuple[Path, Path]:
    return directory / f"lh.{name}", directory / f"rh.{name}"


def _there(*paths: Path) -> tuple[Path, ...]:
    return tuple(path for path in paths if path.exists())


@dataclass(frozen=True, kw_only=True)
class _Maps:
    """Reader of maps in one subject's space: one file each, or one a hemisphere, of `shapes`; `inside` is the mask."""

    subject: str
    shapes: tuple[tuple[int, ...], ...]
    inside: Bool[np.ndarray, "..."]
    findings: Findings

    def read(self, paths: tuple[Path, ...]) -> np.ndarray:
        """Return a map's values in the voxels inside the mask."""
        parts = []
        for path, shape in zip(paths, self.shapes, strict=True):
            values, _ = read_volume(path)
            if values.shape != shape:
                raise ValueError(f"{path} is {values.shape}, but the mask of {self.subject} is {shape}; fetch it again")
            parts.append(values.reshape(-1) if len(self.shapes) > 1 else values)
        return np.concatenate(parts)[self.inside]

    def reliability(self, paths: tuple[Path, ...]) -> dict[str, Float32[np.ndarray, " voxel"]]:
        """Return NSD's map of the noise ceiling's signal-to-noise ratio, where it is there."""
        if absent := [path for path in paths if not path.exists()]:
            self.findings.warnings.append(f"{absent[0]} does not exist; fetch it for the published reliability")
            return {}
        with self.findings.noting():
            return {"ncsnr": self.read(paths).astype(np.float32)}
        return {}

    def rois(self, maps: dict[str, tuple[Path, ...]], names_from: Path) -> dict[str, Rois]:
        """Return the families whose files are there."""
        absent = [family for family, paths in maps.items() if not all(path.exists() for path in paths)]
        if absent:
            where = next(iter(maps.values()))[0].parent
            self.findings.warnings.append(
                f"{self.subject} has no {', '.join(absent)} in {where}; fetch them for these ROIs"
            )
        found = {}
        for family, paths in maps.items():
            if family not in absent:
                with self.findings.noting():
                    labels = _labels(paths, self.read(paths))
                    used = sorted(set(labels.tolist()) - {0})
                    ctab = names_from / f"{family}.mgz.ctab"
                    found[family] = Rois(labels=labels, names=_names(ctab, family, used, self.findings))
        return found


def _labels(paths: tuple[Path, ...], values: np.ndarray) -> Int16[np.ndarray, " voxel"]:
    odd = values[~((values == np.round(values)) & (np.abs(values) <= np.iinfo(np.int16).max))]
    if len(odd):
        raise ValueError(f"{paths[0]} holds {odd[0]}, but labels are whole numbers up to 32767; fetch it again")
    return np.maximum(values, 0).astype(np.int16)


def _names(path: Path, family: str, used: list[int], findings: Findings) -> dict[int, str]:
    """Return the names of labels: those of the .ctab; without one, those known, or ``label-<k>``, with a warning."""
    if not path.exists():
        known = PRF_NAMES if family == "prf-visualrois" else {}
        findings.warnings.append(
            f"{path} does not exist, so labels of {family} are named "
            f"{'as in NSD' if known else 'by number'}; fetch it for its own names"
        )
        return known | {label: f"label-{label}" for label in used if label not in known}
    names = read_ctab(path)
    if nameless := [label for label in used if label not in names]:
        findings.warnings.append(
            f"{path} has no name for label {nameless[0]}, so it is named by number; fetch it again"
        )
    return names | {label: f"label-{label}" for label in nameless}


def read_ctab(path: Path) -> dict[int, str]:
    """Return the names of the labels above 0 that a ``.ctab`` lists, lines of ``index name``.

    Raises
    ------
    ValueError
        If a line is anything else, or a label has two names.
    """
    names: dict[int, str] = {}
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text; fetch it again") from error
    for line in filter(str.strip, lines):
        index, *rest = line.split()
        if not index.removeprefix("-").isdecimal() or not rest:
            raise ValueError(f"{path}: {line.strip()!r} is not a label's index and name; fetch it again")
        if names.setdefault(int(index), rest[0]) != rest[0]:
            raise ValueError(
                f"{path}: label {index} has two names, {names[int(index)]!r} and {rest[0]!r}; fetch it again"
            )
    return {index: name for index, name in names.items() if index > 0}

"""Which voxels of GLMsingle's betas are imported, where they lie, and the ROIs that they belong to.

A mask's voxels are taken in its C order. A voxel that isn't finite in some trial of any session, imported or not, is
left out, so that a session that comes later finds the same voxels; without a mask, so is one that never varies.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from data.importers.findings import Findings
from data.importers.glmsingle_betas import Betas, extremes
from data.nifti import label_path, load_image, read_labels, read_volume, same_grid, stem_of
from data.schema import check_name
from data.voxels import Rois, Volume, VoxelTable


@dataclass(frozen=True, kw_only=True)
class Voxels:
    """The voxels to import: their table, and their rows in the C order of the betas' grid."""

    table: VoxelTable
    rows: Int64[np.ndarray, " voxel"]
    mask: str | None
    n_left_out: int


@dataclass(frozen=True, kw_only=True)
class _Candidates:
    """Voxels before betas are looked at; `shape`, `affine` and `index` say where they are, if that is known."""

    rows: Int64[np.ndarray, " voxel"]
    mask: Path | None
    shape: tuple[int, int, int]
    affine: Float64[np.ndarray, "4 4"] | None
    index: Int32[np.ndarray, "voxel 3"]


def find_voxels(
    name: str, directory: Path, rois: Path, files: list[Betas], mask: Path | None, findings: Findings
) -> Voxels | None:
    """Return the voxels of a subject, None with problems noted where betas are damaged; reads all betas.

    Parameters
    ----------
    directory, rois : where the subject's mask and ROIs lie, and where else ROIs may.
    mask : the mask, if it lies elsewhere.

    Raises
    ------
    ValueError
        If the mask or the betas can't be read, or don't lie in one volume, or no voxel is left.
    """
    for betas in files[1:]:
        if betas.grid != files[0].grid or not _agree(betas.affine, files[0].affine):
            raise ValueError(
                f"{betas.path} and {files[0].path} have different volumes; betas of all sessions must lie in one"
            )
    found = _candidates(directory, files[0], mask, findings)
    before = len(findings.problems)
    keep = _usable(files, found, findings)
    if len(findings.problems) > before:
        return None
    if not keep.any():
        raise ValueError(f"{name}: no voxel is finite in all trials; check {found.mask or files[0].path}")
    left_out = int((~keep).sum())
    if left_out:
        why = "constant or not finite in some trial" if found.mask is None else "not finite in some trial"
        findings.warnings.append(f"{name}: {left_out} of {len(keep)} voxels are {why}, so they are left out")
    rows, index = found.rows[keep], found.index[keep]
    if found.affine is None:
        findings.warnings.append(
            f"{name}: {files[0].path} doesn't say where its voxels are, so no map can be exported to NIfTI; give a "
            f"mask by --mask"
        )
        return Voxels(table=VoxelTable(n_voxels=len(rows)), rows=rows, mask=None, n_left_out=left_out)
    place = Volume(shape=found.shape, affine=found.affine, index=index)
    labels = _rois(name, (directory, rois / name), place, findings)
    table = VoxelTable(n_voxels=len(rows), place=place, coordinates=place.coordinates(), rois=labels)
    return Voxels(table=table, rows=rows, mask=None if found.mask is None else str(found.mask), n_left_out=left_out)


def _usable(files: list[Betas], found: "_Candidates", findings: Findings) -> Bool[np.ndarray, " voxel"]:
    """Return which voxels are finite in every trial and, where no mask speaks for them, not constant."""
    low, high = np.full(len(found.rows), np.inf, np.float32), np.full(len(found.rows), -np.inf, np.float32)
    for betas in files:
        with findings.noting():
            lowest, highest = extremes(betas, found.rows)
            np.minimum(low, lowest, out=low)  # NaN stays NaN
            np.maximum(high, highest, out=high)
    finite = np.isfinite(low) & np.isfinite(high)
    return finite if found.mask is not None else finite & (low < high)


def _agree(affine: np.ndarray | None, other: np.ndarray | None) -> bool:
    return affine is None or other is None or np.allclose(affine, other, atol=1e-2)


def _candidates(directory: Path, betas: Betas, mask: Path | None, findings: Findings) -> _Candidates:
    path = mask or _find_mask(directory)
    if path is None:
        findings.warnings.append(
            f"{directory} has no mask.nii.gz, so every voxel whose betas vary is taken; put one there or give --mask"
        )
        rows = np.arange(int(np.prod(betas.grid)))
        index = np.column_stack(np.unravel_index(rows, betas.grid)).astype(np.int32)
        return _Candidates(rows=rows, mask=None, shape=betas.grid, affine=betas.affine, index=index)
    array, affine = read_volume(path)
    inside = array > 0
    if not inside.any():
        raise ValueError(f"{path} has no voxel above 0; give another mask")
    shape = (inside.shape[0], inside.shape[1], inside.shape[2])
    index = np.argwhere(inside).astype(np.int32)
    if shape == betas.grid:
        if betas.affine is not None and not same_grid(shape, affine, betas.grid, betas.affine):
            raise ValueError(
                f"{path} and {betas.path} have different affines; the mask must lie in the space of the betas"
            )
        rows = np.flatnonzero(inside)
    elif betas.grid == (len(index), 1, 1):  # GLMsingle was given the mask's voxels alone
        rows = np.arange(len(index))
    else:
        raise ValueError(
            f"{path} is {shape} with {len(index)} voxels above 0, which fits neither the volume {betas.grid} of "
            f"{betas.path} nor a list of its voxels; give the mask of these betas"
        )
    return _Candidates(rows=rows, mask=path, shape=shape, affine=affine, index=index)


def _find_mask(directory: Path) -> Path | None:
    found = sorted(
        path
        for path in directory.rglob("*mask.nii*")
        if path.name.startswith("mask.") or ("_mask." in path.name and "_label-" not in path.name)
    )
    if len(found) > 1:
        raise ValueError(
            f"{directory} has several masks, such as {found[0].name} and {found[1].name}; choose by --mask"
        )
    return (found or sorted(directory.rglob("*_desc-R2mean_statmap.nii.gz")) or [None])[0]


def _rois(name: str, directories: tuple[Path, ...], place: Volume, findings: Findings) -> dict[str, Rois]:
    """Return the label volumes beside the betas by family, and the masks of single ROIs, those on the betas' grid."""
    families: dict[str, Rois] = {}
    volumes = [path for directory in directories for path in sorted(directory.rglob("*_dseg.nii.gz"))]
    masks = [path for directory in directories for path in sorted(directory.rglob("*_label-*_mask.nii.gz"))]
    nameless = [path for path in volumes if not label_path(path).exists()]
    elsewhere = []
    for path in [*volumes, *masks]:
        if path in nameless:
            continue
        with findings.noting():
            image = load_image(path)
            on_grid = image.affine is not None and same_grid(image.shape, image.affine, place.shape, place.affine)
            if not on_grid and path in masks:
                elsewhere.append(path)
                continue
            family = _family(path)
            if family in families:
                raise ValueError(f"{path} is the second file of the ROI family {family!r} of {name}; leave one")
            if not on_grid:
                findings.warnings.append(
                    f"{path} has another grid than the betas, so its labels are resampled (nearest)"
                )
            rois = read_labels(path, place)
            families[family] = replace(rois, names={1: family}) if path in masks else rois
    if nameless:
        findings.warnings.append(
            f"{nameless[0]} has no .tsv of names ({len(nameless)} such of {name}), so it gives no ROIs"
        )
    if elsewhere:
        findings.warnings.append(
            f"{elsewhere[0]} has another grid ({len(elsewhere)} such of {name}), so it gives no ROI"
        )
    return families


def _family(path: Path) -> str:
    """Return what a label volume is called: its BIDS ``label``, ``atlas``, ``seg`` or ``desc``, else its stem."""
    stem = stem_of(path)
    entities = dict(part.split("-", 1) for part in stem.split("_") if "-" in part)
    told = (entities[entity] for entity in ("label", "atlas", "seg", "desc") if entity in entities)
    return check_name(next(told, stem.removesuffix("_dseg")), "ROI family")

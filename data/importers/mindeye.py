"""The MindEye2 release: NSD's b2 betas of ``nsdgeneral``, z-scored per session.

Read as published::

    betas_all_subj0X_fp32_renorm.hdf5       `betas` float32 (trial, voxel); row i is NSD's trial i
    COCO_73k_subj_indices.hdf5              `subj0X`: NSD's image (from 0) of each trial
    wds/subj0X/{train,test,new_test}/N.tar  `*.behav.npy` (1, 17): column 0 NSD's image, 5 the row of the betas, -1 none
    coco_images_224_float16.hdf5            `images` float16 (73000, 3, 224, 224) in 0..1
    shared1000.npy                          (73000,) bool: images that all subjects saw

What a row shows is in up to three places: the indices, the tars and NSD's design file. One is enough, and all that are
there must agree. The release says nothing of where its voxels lie.
"""

import io
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jaxtyping import Float32, Int, UInt8

from data.importers.findings import Findings
from data.importers.hdf5_files import open_dataset, open_hdf5
from data.importers.nsd_design import N_IMAGES, N_REPEATS, Design, optional_design
from data.importers.plan import ImportPlan, SessionChoice, choose_subjects
from data.sources import ImageSource, SessionSource, SubjectSource
from data.voxels import VoxelTable

TRIALS_PER_SESSION = 750
MEASURE = "betas_fithrf"
UPSTREAM = "z-scored per session (MindEye2: b2, fithrf)"
PICTURES = "coco_images_224_float16.hdf5"
SHARED = "shared1000.npy"
INDICES = "COCO_73k_subj_indices.hdf5"

_BETAS = re.compile(r"betas_all_(subj0[1-8])_fp32_renorm\.hdf5")
_BLOCK_BYTES = 64 << 20
_MEMBER_BYTES = 1 << 20
"""A `behav.npy` has some hundred bytes; a member of more is something else."""
_AGAIN = "download it again from the release"


def plan_mindeye(
    source: Path,
    *,
    subjects: tuple[str, ...] | None,
    sessions: SessionChoice,
    design: Path | None = None,
    pixels: bool = True,
) -> ImportPlan:
    """Plan the import of the MindEye2 release; only headers and tables are read.

    Parameters
    ----------
    source : the directory that the release was downloaded to.
    subjects : numbers or names; all that are there if None.
    sessions : sessions of NSD, of 750 trials each.
    design : NSD's ``nsd_expdesign.mat``, for the roles of images; it says what the trials show, too.
    pixels : whether the pictures come too.
    """
    findings = Findings()
    shape = None
    nsd = optional_design(design, findings, f"{source}: without NSD's design file a hash splits the images")
    if nsd is not None and (source / SHARED).exists():
        with findings.noting():
            _check_shared(source / SHARED, nsd)
    if pixels:
        with findings.noting():
            shape = _picture_shape(source / PICTURES)
    have = sorted(match[1] for path in source.glob("*.hdf5") if (match := _BETAS.fullmatch(path.name)))
    if not have:
        findings.problems.append(
            f"{source} has no betas_all_subj0X_fp32_renorm.hdf5; give the directory of the MindEye2 release"
        )
    found: list[SubjectSource] = []
    for name in choose_subjects(subjects, have, source, findings):
        with findings.noting():
            found.append(_plan_subject(findings, source, name, sessions, nsd, shape))
    return ImportPlan(subjects=found, problems=findings.problems, warnings=findings.warnings)


def _plan_subject(
    findings: Findings,
    source: Path,
    name: str,
    choice: SessionChoice,
    design: Design | None,
    shape: tuple[int, int] | None,
) -> SubjectSource:
    """Return a subject."""
    betas = source / f"betas_all_{name}_fp32_renorm.hdf5"
    n_trials, n_voxels = _betas_shape(betas)
    nsd_id = _images_of_trials(findings, source, name, n_trials, design)
    known = np.flatnonzero(nsd_id >= 0)
    if not len(known):
        raise ValueError(
            f"{betas}: nothing says which images its rows show; download {INDICES} or wds/{name}, or pass --design"
        )
    images, times = np.unique(nsd_id[known], return_counts=True)
    if times.max() > N_REPEATS:
        raise ValueError(
            f"{betas}: image {images[times.argmax()]} is in {times.max()} trials, but NSD shows each in {N_REPEATS} at "
            f"most; download {INDICES} and wds/{name} again"
        )
    if len(known) < n_trials:
        findings.warnings.append(
            f"{betas}: {n_trials - len(known)} of {n_trials} rows are left out, since no file says which image they "
            f"show; download {INDICES}, or pass --design"
        )
    if n_trials % TRIALS_PER_SESSION:
        findings.warnings.append(
            f"{betas}: {n_trials} rows are not whole sessions of {TRIALS_PER_SESSION}, so the last is incomplete; "
            f"download it again if rows are missing"
        )
    session = known // TRIALS_PER_SESSION + 1
    chosen = choice.of(np.unique(session).tolist(), name)
    repeat = _earlier_presentations(nsd_id[known])
    shown = np.unique(nsd_id[known[np.isin(session, chosen)]])  # rising, so that pictures are read front to back
    return SubjectSource(
        name=name,
        dtype=np.dtype(np.float32),
        voxels=VoxelTable(n_voxels=n_voxels),
        images=ImageSource(
            ids=[f"nsd-{image:05d}" for image in shown],
            roles=[""] * len(shown) if design is None else design.roles(shown),
            shape=shape,
            files=() if shape is None else (source / PICTURES,),
            read=None if shape is None else partial(_read_pictures, source / PICTURES, shown),
        ),
        sessions=tuple(
            SessionSource(
                session=number,
                columns={
                    "image": np.searchsorted(shown, nsd_id[known[session == number]]).astype(np.int32),
                    "repeat": repeat[session == number],
                },
                read=partial(_read_betas, betas, known[session == number]),
                files=(betas,),
            )
            for number in chosen
        ),
        unit="z",
        measure=MEASURE,
        upstream_preprocessing=UPSTREAM,
        provenance={
            "importer": "mindeye 1",
            "source": str(source),
            "design": None if design is None else design.files,
            "pixels": None if shape is None else f"{PICTURES}: float16 in 0..1, times 255 and rounded to uint8",
            "left_out": f"{n_trials - len(known)} rows whose image no file says",
        },
    )


def _earlier_presentations(image: Int[np.ndarray, " trial"]) -> np.ndarray:
    """Return how often each trial's image was shown before, as (trial,) int8."""
    order = np.argsort(image, kind="stable")
    first = np.searchsorted(image[order], image[order])
    earlier = np.empty(len(image), np.int8)
    earlier[order] = np.arange(len(image)) - first
    return earlier


# -- files -------------------------------------------------------------------------------------------------------------


def _dataset(file: h5py.File, key: str, ndim: int, dtype: Any) -> h5py.Dataset:
    found = open_dataset(file, key, _AGAIN)
    if found.ndim != ndim or not np.issubdtype(found.dtype, dtype) or 0 in found.shape:
        what = np.dtype(dtype).name if isinstance(dtype, type) and dtype is not np.integer else "integers"
        raise ValueError(
            f"{file.filename}: {key!r} must be {what} of {ndim} axes, got {found.dtype} {found.shape}; {_AGAIN}"
        )
    return found


def _betas_shape(path: Path) -> tuple[int, int]:
    with open_hdf5(path, _AGAIN) as file:
        n_trials, n_voxels = _dataset(file, "betas", 2, np.float32).shape
        return n_trials, n_voxels


def _read_betas(path: Path, rows: Int[np.ndarray, " trial"]) -> Iterator[Float32[np.ndarray, "trial voxel"]]:
    """Yield the rows (rising) by whole chunks of the file."""
    with open_hdf5(path, _AGAIN) as file:
        betas = _dataset(file, "betas", 2, np.float32)
        chunk = betas.chunks[0] if betas.chunks else 1
        step = chunk * max(1, _BLOCK_BYTES // (chunk * betas.shape[1] * 4))
        for start in range(int(rows[0]) // step * step, int(rows[-1]) + 1, step):
            inside = rows[(rows >= start) & (rows < start + step)]
            if len(inside):
                first = int(inside[0])
                yield betas[first : int(inside[-1]) + 1][inside - first].astype(np.float32, copy=False)


def _picture_shape(path: Path) -> tuple[int, int]:
    with open_hdf5(path, _AGAIN) as file:
        shape = _dataset(file, "images", 4, np.float16).shape
    if shape[:2] != (N_IMAGES, 3):
        raise ValueError(f"{path}: 'images' must be ({N_IMAGES}, 3, height, width), got {shape}; {_AGAIN}")
    return shape[2], shape[3]


def _read_pictures(
    path: Path, nsd_id: Int[np.ndarray, " known"], which: Int[np.ndarray, " image"]
) -> UInt8[np.ndarray, "image height width 3"]:
    """Return pictures as uint8; each chunk of the file is read once."""
    wanted = nsd_id[which]
    with open_hdf5(path, _AGAIN) as file:
        images = _dataset(file, "images", 4, np.float16)
        chunk = images.chunks[0] if images.chunks else 1
        found = np.empty((len(wanted), *images.shape[2:], 3), np.uint8)
        for start in np.unique(wanted // chunk) * chunk:
            here = np.flatnonzero(wanted // chunk == start // chunk)
            first, last = int(wanted[here].min()), int(wanted[here].max())
            block = images[first : last + 1][wanted[here] - first]
            scaled = np.rint(block.astype(np.float32) * 255)
            unfit = ~((scaled >= 0) & (scaled <= 255)).all(axis=(1, 2, 3))
            if unfit.any():
                bad = wanted[here][unfit.argmax()]
                raise ValueError(f"{path}: picture {bad} has values outside 0..1; {_AGAIN}")
            found[here] = scaled.astype(np.uint8).transpose(0, 2, 3, 1)
    return found


def _check_shared(path: Path, design: Design) -> None:
    """Raise ValueError if the release and the design file don't share the same images."""
    try:
        shared = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a readable .npy ({error}); {_AGAIN}") from error
    if not isinstance(shared, np.ndarray) or shared.shape != (N_IMAGES,) or shared.dtype != bool:
        raise ValueError(f"{path} must be {N_IMAGES} booleans; {_AGAIN}")
    if set(np.flatnonzero(shared).tolist()) != set(design.shared.tolist()):
        odd = min(set(np.flatnonzero(shared).tolist()) ^ set(design.shared.tolist()))
        raise ValueError(
            f"{path} and {next(iter(design.files))} disagree on whether image {odd} is shared; replace the one that is "
            f"not NSD's"
        )


# -- what a row shows --------------------------------------------------------------------------------------------------


def _images_of_trials(
    findings: Findings, source: Path, name: str, n_trials: int, design: Design | None
) -> Int[np.ndarray, " trial"]:
    """Return NSD's image (from 0) of each row of the betas, -1 where no file says; where two differ is noted."""
    told: dict[str, Int[np.ndarray, " trial"]] = {}
    if (source / INDICES).exists():
        with findings.noting():
            told[str(source / INDICES)] = _read_indices(source / INDICES, name)
    if design is not None:
        told[next(iter(design.files))] = design.done(int(name[-2:]))
    for tar in sorted((source / "wds" / name).glob("*/*.tar")):
        with findings.noting():
            told[str(tar)] = _read_tar(tar, n_trials)
    nsd_id = np.full(n_trials, -1, np.int64)
    whose = np.full(n_trials, -1)
    for k, (path, images) in enumerate(told.items()):
        given = np.full(n_trials, -1, np.int64)
        given[: min(n_trials, len(images))] = images[:n_trials]
        if (odd := (given >= 0) & (nsd_id >= 0) & (given != nsd_id)).any():
            row = int(odd.argmax())
            findings.problems.append(
                f"{path} says that trial {row} of {name} showed image {given[row]}, {list(told)[whose[row]]} says "
                f"{nsd_id[row]} ({odd.sum()} trials differ); remove the file that is wrong"
            )
        new = (given >= 0) & (nsd_id < 0)
        nsd_id[new], whose[new] = given[new], k
    return nsd_id


def _check_ids(path: Path, nsd_id: np.ndarray) -> None:
    if len(nsd_id) and (nsd_id.min() < 0 or nsd_id.max() >= N_IMAGES):
        bad = nsd_id.min() if nsd_id.min() < 0 else nsd_id.max()
        raise ValueError(f"{path} names image {bad}; NSD has 0 to {N_IMAGES - 1}; {_AGAIN}")


def _read_indices(path: Path, name: str) -> Int[np.ndarray, " trial"]:
    with open_hdf5(path, _AGAIN) as file:
        indices = _dataset(file, name, 1, np.integer)[...].astype(np.int64)
    _check_ids(path, indices)
    return indices


def _read_tar(path: Path, n_trials: int) -> Int[np.ndarray, " trial"]:
    """Return the image of each row that one tar names, -1 elsewhere."""
    nsd_id = np.full(n_trials, -1, np.int64)
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))
        if file.read() != bytes(1024):  # tarfile takes a header that is cut off for the end
            raise ValueError(f"{path} is cut off or no tar: it doesn't end with two empty blocks; {_AGAIN}")
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.name.endswith(".behav.npy"):
                    continue
                image, row = _read_behav(path, archive, member)
                if row == -1 or image == -1:
                    continue
                if not 0 <= row < n_trials:
                    raise ValueError(f"{path}:{member.name} names trial {row}; the betas have {n_trials}; {_AGAIN}")
                if nsd_id[row] not in (-1, image):
                    raise ValueError(f"{path}:{member.name} gives trial {row} a second image, {image}; {_AGAIN}")
                nsd_id[row] = image
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a readable tar ({error}); {_AGAIN}") from error
    _check_ids(path, nsd_id[nsd_id >= 0])
    return nsd_id


def _read_behav(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[int, int]:
    """Return a sample's image and row, -1 where missing."""
    file = archive.extractfile(member) if member.isreg() else None
    if file is None or member.size > _MEMBER_BYTES:
        raise ValueError(f"{path}:{member.name} of {member.size} bytes is no table of a trial; {_AGAIN}")
    try:
        behav = np.load(io.BytesIO(file.read()), allow_pickle=False)
    except (ValueError, EOFError, MemoryError) as error:
        raise ValueError(f"{path}:{member.name} is not a readable .npy ({error}); {_AGAIN}") from error
    if not isinstance(behav, np.ndarray) or behav.shape != (1, 17) or behav.dtype.kind not in "iuf":
        raise ValueError(f"{path}:{member.name} must be numbers (1, 17); {_AGAIN}")
    image, row = behav[0, 0], behav[0, 5]
    if image != np.floor(image) or row != np.floor(row):
        raise ValueError(f"{path}:{member.name} has image {image} and trial {row}, not whole numbers; {_AGAIN}")
    return int(image), int(row)

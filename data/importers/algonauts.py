"""The training split of the Algonauts 2023 challenge: NSD's betas on fsaverage, averaged over an image's repeats.

Read as published, per subject ``subj0X/``::

    training_split/training_fmri/{lh,rh}_training_fmri.npy         float32 (image, vertex), z-scored per session
    training_split/training_images/train-%04d_nsd-%05d.png         row of the responses (from 1), NSD's image (from 0)
    roi_masks/{lh,rh}.all-vertices_fsaverage_space.npy             where the challenge's vertices lie on fsaverage
    roi_masks/{lh,rh}.<family>_challenge_space.npy                 a label per vertex; mapping_<family>.npy names them

The left hemisphere's vertices come first. There is no session index, and the responses to the test images were never
published.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int

from data.importers.files import Pictures, load_array, open_pictures
from data.importers.findings import Findings
from data.importers.nsd_design import N_IMAGES, Design, optional_design
from data.importers.plan import ImportPlan, SessionChoice, choose_subjects
from data.importers.restricted_pickle import load_pickled_dict
from data.sources import ImageSource, SessionSource, SubjectSource
from data.voxels import Rois, Surface, VoxelTable

HEMISPHERES = ("lh", "rh")
FAMILIES = ("prf-visualrois", "floc-bodies", "floc-faces", "floc-places", "floc-words", "streams")
FSAVERAGE = 163_842
"""Vertices of a hemisphere of fsaverage."""
NOMINAL_REPEATS = 3.0
UPSTREAM = "z-scored per session and averaged over repeats (Algonauts 2023)"

_PICTURE = re.compile(r"train-(\d{4,})_nsd-(\d{5})\.png")
_BLOCK_BYTES = 32 << 20
_AGAIN = "download it again from the challenge"


def plan_algonauts(
    source: Path,
    *,
    subjects: tuple[str, ...] | None,
    sessions: SessionChoice,
    design: Path | None = None,
    pixels: bool = True,
) -> ImportPlan:
    """Plan the import of the Algonauts 2023 training split; only headers and tables are read.

    Parameters
    ----------
    source : the directory that holds ``subj01`` to ``subj08``, or some of them.
    subjects : numbers or names; all that are there if None.
    sessions : must choose none, since the challenge has no session index.
    design : NSD's ``nsd_expdesign.mat``, for the roles of images and for how many repeats each row is the mean of.
    pixels : whether the pictures come too.
    """
    findings = Findings()
    if sessions:
        findings.problems.append(
            f"{source}: Algonauts 2023 has no session index, so no sessions can be chosen; leave the choice out, or "
            f"import NSD itself (python -m data import nsd)"
        )
    nsd = optional_design(
        design,
        findings,
        f"{source}: without NSD's design file a hash splits the images, and each row is taken for the mean of "
        f"{NOMINAL_REPEATS:g} repeats, though some have fewer",
    )
    have = sorted(path.name for path in source.glob("subj0[1-8]") if path.is_dir())
    if not have:
        findings.problems.append(
            f"{source} has none of subj01 to subj08; give the directory that the challenge unpacks to"
        )
    chosen = choose_subjects(subjects, have, source, findings)
    found = [_plan_subject(findings, source / name, nsd, pixels=pixels) for name in chosen]
    there = [subject for subject in found if subject is not None]
    return ImportPlan(subjects=there, problems=findings.problems, warnings=findings.warnings)


def _plan_subject(findings: Findings, directory: Path, design: Design | None, *, pixels: bool) -> SubjectSource | None:
    """Return a subject, or None with all that is wrong with its files noted."""
    before = len(findings.problems)
    pictures, nsd_id, voxels, repeats = None, None, None, None
    with findings.noting():
        pictures, nsd_id = _find_pictures(directory)
    shapes: list[tuple[int, ...]] = []
    for side in HEMISPHERES:
        with findings.noting():
            shapes.append(_open_responses(directory, side).shape)
    if len(shapes) == 2:
        with findings.noting():
            _check_rows(directory, [n_rows for n_rows, _ in shapes], pictures)
        voxels = _read_voxels(findings, directory, (shapes[0][1], shapes[1][1]))
    if design is not None and nsd_id is not None:
        with findings.noting():
            repeats = _count_repeats(findings, directory, nsd_id, design)
    if len(findings.problems) > before or pictures is None or nsd_id is None or voxels is None:
        return None
    n_rows = len(pictures)
    return SubjectSource(
        name=directory.name,
        dtype=np.dtype(np.float32),
        voxels=voxels,
        images=ImageSource(
            ids=[f"nsd-{image:05d}" for image in nsd_id],
            roles=[""] * n_rows if design is None else design.roles(nsd_id),
            shape=pictures.shape,
            read=pictures.read if pixels else None,
        ),
        sessions=(
            SessionSource(
                session=None,
                columns={
                    "image": np.arange(n_rows, dtype=np.int32),
                    "n_averaged": np.full(n_rows, NOMINAL_REPEATS, np.float32) if repeats is None else repeats,
                },
                read=partial(_read_responses, directory),
                files=tuple(_responses_path(directory, side) for side in HEMISPHERES),
            ),
        ),
        unit="z",
        upstream_preprocessing=UPSTREAM,
        provenance={
            "importer": "algonauts 1",
            "source": str(directory),
            "design": None if design is None else design.files,
            "n_averaged": "nominal"
            if repeats is None
            else "presentations in the design, up to the split's last session",
            "left_out": "the challenge's test images, whose responses were not published",
        },
    )


# -- responses ---------------------------------------------------------------------------------------------------------


def _responses_path(directory: Path, side: str) -> Path:
    return directory / "training_split" / "training_fmri" / f"{side}_training_fmri.npy"


def _open_responses(directory: Path, side: str) -> Float32[np.ndarray, "image vertex"]:
    """Return one hemisphere's responses, still on disk."""
    path = _responses_path(directory, side)
    array = _load(path, in_memory=False)
    if array.dtype != np.float32 or array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{path} must be float32 (image, vertex), got {array.dtype} {array.shape}; {_AGAIN}")
    return array


def _load(path: Path, *, in_memory: bool = True) -> np.ndarray:
    try:
        return load_array(path, in_memory=in_memory)
    except ValueError as error:
        raise ValueError(f"{error}; {_AGAIN}") from error


def _check_rows(directory: Path, n_rows: list[int], pictures: Pictures | None) -> None:
    left, right = (_responses_path(directory, side) for side in HEMISPHERES)
    if n_rows[0] != n_rows[1]:
        raise ValueError(f"{left} has {n_rows[0]} rows but {right.name} {n_rows[1]}; {_AGAIN}")
    if pictures is not None and len(pictures) != n_rows[0]:
        raise ValueError(f"{directory} has {len(pictures)} training pictures but {left} {n_rows[0]} rows; {_AGAIN}")


def _read_responses(directory: Path) -> Iterator[Float32[np.ndarray, "image vertex"]]:
    """Yield both hemispheres' responses side by side, some rows at a time."""
    (n_rows, n_left), (_, n_right) = (_open_responses(directory, side).shape for side in HEMISPHERES)
    step = max(1, _BLOCK_BYTES // (4 * (n_left + n_right)))
    for start in range(0, n_rows, step):
        # Mapped anew for each block: pages of a map that is kept would count as memory until all of it is.
        halves = [_open_responses(directory, side)[start : start + step] for side in HEMISPHERES]
        yield np.concatenate(halves, axis=1, dtype=np.float32)


# -- pictures ----------------------------------------------------------------------------------------------------------


def _find_pictures(directory: Path) -> tuple[Pictures, Int[np.ndarray, " image"]]:
    """Return the pictures of the training split in the order of rows, and NSD's id (from 0) of each."""
    folder = directory / "training_split" / "training_images"
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing, and its pictures' names say which image each row is; {_AGAIN}")
    pictures = open_pictures(folder)
    nsd_id = np.empty(len(pictures), np.int64)
    for k, path in enumerate(map(Path, pictures.names)):
        match = _PICTURE.fullmatch(path.name)
        if match is None:
            raise ValueError(f"{path} must be named train-%04d_nsd-%05d.png; give it its name back or remove it")
        if int(match[1]) != k + 1:
            raise ValueError(
                f"{path} is where the picture of row {k + 1} should be, so one is missing or there twice; {_AGAIN}"
            )
        nsd_id[k] = int(match[2])
    images, times = np.unique(nsd_id, return_counts=True)
    if (times > 1).any():
        raise ValueError(f"{folder} has {times.max()} pictures of nsd-{images[times.argmax()]:05d}; {_AGAIN}")
    if images[-1] >= N_IMAGES:
        raise ValueError(f"{folder} has a picture of nsd-{images[-1]:05d}, but NSD has {N_IMAGES} images; {_AGAIN}")
    return pictures, nsd_id


# -- vertices ----------------------------------------------------------------------------------------------------------


def _read_voxels(findings: Findings, directory: Path, counts: tuple[int, int]) -> VoxelTable:
    """Return places and labels of the vertices; what is wrong with them is noted, what is absent a warning."""
    masks = directory / "roi_masks"
    place, rois = None, {}
    if missing := _first_missing([masks / f"{side}.all-vertices_fsaverage_space.npy" for side in HEMISPHERES]):
        findings.warnings.append(f"{missing} is missing, so the vertices have no place on fsaverage; {_AGAIN}")
    else:
        with findings.noting():
            place = _read_place(masks, counts)
    for family in FAMILIES:
        paths = [masks / f"{side}.{family}_challenge_space.npy" for side in HEMISPHERES]
        if missing := _first_missing([*paths, masks / f"mapping_{family}.npy"]):
            findings.warnings.append(f"{missing} is missing, so the ROI family {family!r} is left out; {_AGAIN}")
        else:
            with findings.noting():
                rois[family] = _read_rois(masks, family, counts)
    return VoxelTable(n_voxels=sum(counts), place=place, rois=rois)


def _first_missing(paths: list[Path]) -> Path | None:
    return next((path for path in paths if not path.exists()), None)


def _read_place(masks: Path, counts: tuple[int, int]) -> Surface:
    """Return where the vertices lie: the responses' columns are the masks' nonzero vertices in their order."""
    vertices = []
    for side, count in zip(HEMISPHERES, counts, strict=True):
        path = masks / f"{side}.all-vertices_fsaverage_space.npy"
        mask = _load(path)
        if mask.shape != (FSAVERAGE,) or not np.isin(mask, (0, 1)).all():
            raise ValueError(f"{path} must hold {FSAVERAGE} zeros and ones, got shape {mask.shape}; {_AGAIN}")
        vertices.append(np.flatnonzero(mask).astype(np.int32))
        if len(vertices[-1]) != count:
            raise ValueError(f"{path} marks {len(vertices[-1])} vertices, but the responses have {count}; {_AGAIN}")
    return Surface(
        space="fsaverage",
        n_vertices=(FSAVERAGE, FSAVERAGE),
        hemisphere=np.repeat(np.array([0, 1], np.int8), counts),
        vertex=np.concatenate(vertices),
    )


def _read_rois(masks: Path, family: str, counts: tuple[int, int]) -> Rois:
    mapping = masks / f"mapping_{family}.npy"
    names: dict[int, str] = {}
    for label, name in load_pickled_dict(mapping).items():
        if not isinstance(label, int) or not isinstance(name, str) or not 0 <= label <= np.iinfo(np.int16).max:
            raise ValueError(f"{mapping} must map small whole numbers to names, got {label!r}: {name!r}; {_AGAIN}")
        names[label] = name
    labels = []
    for side, count in zip(HEMISPHERES, counts, strict=True):
        path = masks / f"{side}.{family}_challenge_space.npy"
        of_side = _load(path)
        if of_side.shape != (count,):
            raise ValueError(f"{path} has shape {of_side.shape}, but the responses have {count} vertices; {_AGAIN}")
        if unnamed := sorted(set(np.unique(of_side).tolist()) - set(names) - {0}):
            raise ValueError(f"{path} has label {unnamed[0]}, which {mapping.name} does not name; {_AGAIN}")
        labels.append(of_side.astype(np.int16))
    return Rois(labels=np.concatenate(labels), names={label: name for label, name in names.items() if label != 0})


# -- NSD's design ------------------------------------------------------------------------------------------------------


def _count_repeats(
    findings: Findings, directory: Path, nsd_id: Int[np.ndarray, " image"], design: Design
) -> Float32[np.ndarray, " image"] | None:
    """Return how many presentations each row is the mean of; None, with a warning, where that can't be told.

    The challenge kept the last sessions back as its test. Which, follows from the pictures: the split has all images
    of the sessions up to its last one, and the session after that brings new ones.
    """
    name, file = directory.name, next(iter(design.files))
    shown = design.done(int(name[-2:]))
    images, first = np.unique(shown, return_index=True)
    if strangers := sorted(set(nsd_id.tolist()) - set(images.tolist())):
        raise ValueError(
            f"{directory} has a picture of nsd-{strangers[0]:05d}, which {name} never saw by {file}; "
            f"check the directory's name and the design file"
        )
    new_in = first // design.trials_per_session + 1
    last = int(new_in[np.isin(images, nsd_id)].max())
    next_new = new_in[new_in > last].min(initial=len(shown) // design.trials_per_session + 1)
    if (new_in <= last).sum() != len(nsd_id) or next_new > last + 1:
        findings.warnings.append(
            f"{directory}: its pictures are not the images of {name}'s first sessions by {file}, so the repeats behind "
            f"a row can't be counted and each is taken for the mean of {NOMINAL_REPEATS:g}; {_AGAIN} for exact counts"
        )
        return None
    images, times = np.unique(shown[: design.trials(last).stop], return_counts=True)
    return times[np.searchsorted(images, nsd_id)].astype(np.float32)

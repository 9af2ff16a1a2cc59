"""The Natural Scenes Dataset as it is published (Allen et al. 2022): native volumes or fsaverage surfaces.

A tree has, below its root (K from 1 to 8, NN a session)::

    nsddata/experiments/nsd/{nsd_expdesign.mat, nsd_stim_info_merged.csv}              data.importers.nsd_design
    nsddata/ppdata/subj0K/behav/responses.tsv                                          data.importers.nsd_design
    nsddata/ppdata/subj0K/func1pt8mm/roi/*.nii.gz, nsddata/freesurfer/*/label/         data.importers.nsd_voxels
    nsddata_betas/ppdata/subj0K/func1pt8mm/<betas>/betas_sessionNN.{nii.gz,hdf5}       data.importers.betas
    nsddata_betas/ppdata/subj0K/fsaverage/<betas>/{lh,rh}.betas_sessionNN.mgh          data.importers.betas
    nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5                                       data.importers.nsd_files

Betas in a volume are int16, 300 times the percent signal change, and stay so; on a surface they are float32 percent
signal change. A plan reads headers, tables and small maps; betas and pictures are read when they are written.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data.importers.betas import BetaHeader, finite_vertices, hdf5_trials, mgh_trials, nifti_trials, read_header
from data.importers.findings import Findings
from data.importers.nsd_design import Behaviour, Design, file_digest, read_behaviour, read_design, runs_by_rule
from data.importers.nsd_files import (
    SUBJECTS,
    Betas,
    FileType,
    Pictures,
    Space,
    Tree,
    choose_sessions,
    subjects_of,
)
from data.importers.nsd_voxels import HEMISPHERES, Voxels, surface_voxels, volume_voxels
from data.importers.plan import ImportPlan, SessionChoice
from data.sources import ImageSource, SessionSource, SubjectSource
from data.voxels import Surface, Volume

SCALE = 1 / 300


def plan_nsd(
    source: Path,
    *,
    subjects: tuple[str, ...] | None,
    sessions: SessionChoice,
    betas: Betas = "betas_fithrf_GLMdenoise_RR",
    space: Space = "func1pt8mm",
    file_type: FileType = "auto",
    mask: str = "nsdgeneral",
    pixels: bool = True,
) -> ImportPlan:
    """Return what an import of an NSD tree would do, and everything in it that is missing or odd.

    Parameters
    ----------
    subjects
        Numbers ("5") or names ("subj05"); None for all that have `betas` in `space`.
    file_type
        Of betas in a volume; "auto" takes a session's hdf5 where there is one (it is read faster), else its nii.gz.
    mask
        Name of a ROI file whose voxels above 0 are imported; "all" for the brain mask, or every vertex.
    pixels
        Whether the pictures come along, or their identities alone.

    Raises
    ------
    ValueError
        If the options contradict each other. What is wrong with the tree is in the plan's problems.
    """
    if space == "fsaverage" and file_type != "auto":
        raise ValueError(f"--file-type {file_type} is for func1pt8mm; betas on fsaverage are .mgh, so leave it out")
    plan, findings = ImportPlan(), Findings()
    if not source.is_dir():
        return ImportPlan(problems=[f"{source} is no directory; give the root of NSD, which holds nsddata_betas"])
    tree = Tree(source=source, betas=betas, space=space, file_type=file_type)
    design = read_design(source, findings)
    pictures = None
    if pixels:
        with findings.noting():
            pictures = Pictures.of(source)
    for name in subjects_of(tree, subjects, findings):
        subject = _plan_subject(tree, name, sessions, mask, design, pictures, findings)
        if subject is not None:
            plan.subjects.append(subject)
    plan.problems.extend(findings.problems)
    plan.warnings.extend(findings.warnings)
    return plan


def _plan_subject(
    tree: Tree,
    name: str,
    choice: SessionChoice,
    mask: str,
    design: Design | None,
    pictures: Pictures | None,
    findings: Findings,
) -> SubjectSource | None:
    """Return a subject as it would be imported; None where a problem stands against it."""
    n_before = len(findings.problems)
    files = tree.sessions(name)
    chosen = choose_sessions(tree, name, files, choice, findings)
    headers = _headers([path for n in chosen for path in files[n]], findings)
    if tree.space == "fsaverage":
        later = Findings()
        others = _headers([path for n in files if n not in chosen for path in files[n]], later)
        findings.warnings.extend(later.problems)
        voxels = _surface(tree, name, mask, headers | others, findings)
    else:
        voxels = volume_voxels(tree.source, name, tree.betas, mask, findings)
    _check_headers(name, headers, voxels, design, findings)
    if design is None:
        return None
    behaviour = _behaviour(tree, name, design, chosen, findings)
    if voxels is None or not chosen or len(findings.problems) > n_before:
        return None
    with findings.noting():
        sources = {n: files[n] for n in chosen}
        subject = _subject(tree, name, sources, mask, voxels, design, behaviour, pictures)
        subject.check()
        return subject
    return None


def _headers(paths: list[Path], findings: Findings) -> dict[Path, BetaHeader]:
    headers = {}
    for path in paths:
        with findings.noting():
            headers[path] = read_header(path)
    return headers


def _surface(tree: Tree, name: str, mask: str, headers: dict[Path, BetaHeader], findings: Findings) -> Voxels | None:
    """Return the vertices that are finite in every session that is there, chosen or not: so more can be added later."""
    halves = []
    for side in HEMISPHERES:
        paths = [path for path in headers if path.name.startswith(side)]
        counts = sorted({headers[path].shape[0] for path in paths})
        if len(counts) > 1:
            findings.problems.append(
                f"{tree.directory(name)}: vertices of {side} differ by file ({counts}); fetch them again"
            )
        if len(counts) != 1:
            return None
        halves.append(np.logical_and.reduce([finite_vertices(path) for path in paths]))
    return surface_voxels(tree.source, name, tree.betas, mask, (halves[0], halves[1]), findings)


def _check_headers(
    name: str, headers: dict[Path, BetaHeader], voxels: Voxels | None, design: Design | None, findings: Findings
) -> None:
    """Compare what files of betas say with the mask and the design."""
    place = None if voxels is None else voxels.table.place
    for path, header in headers.items():
        expected = np.dtype(np.float32 if path.suffix == ".mgh" else np.int16)
        *space, n_trials = header.shape
        if header.dtype.newbyteorder("=") != expected:
            findings.problems.append(f"{path} holds {header.dtype.name}, NSD's own has {expected}; fetch it again")
        if design is not None and n_trials != design.trials_per_session:
            findings.problems.append(f"{path} has {n_trials} trials, not {design.trials_per_session}; fetch it again")
        if isinstance(place, Volume) and tuple(space) != place.shape:
            findings.problems.append(
                f"{path} is {tuple(space)} (x, y, z), but the mask of {name} is {place.shape}; fetch both again"
            )
        slope, inter = header.scaling
        if inter != 0 or not np.isclose([1, SCALE], slope).any():
            findings.warnings.append(
                f"{path}: slope {slope:g} and offset {inter:g} of its header are not NSD's; ignored"
            )
    if isinstance(place, Volume):
        affines = {path: header.affine for path, header in headers.items() if header.affine is not None}
        off = [path for path, affine in affines.items() if not np.allclose(affine, place.affine, atol=1e-3)]
        if off:
            findings.warnings.append(f"{off[0]} has another affine than the mask of {name}, whose affine is taken")


def _behaviour(tree: Tree, name: str, design: Design, chosen: list[int], findings: Findings) -> Behaviour | None:
    path = tree.source / "nsddata" / "ppdata" / name / "behav" / "responses.tsv"
    if not path.exists():
        findings.warnings.append(f"{path} does not exist, so trials have no times, and runs by NSD's rule; fetch it")
        return None
    with findings.noting():
        return read_behaviour(path, design, SUBJECTS.index(name) + 1, chosen, findings)
    return None


def _subject(
    tree: Tree,
    name: str,
    files: dict[int, tuple[Path, ...]],
    mask: str,
    voxels: Voxels,
    design: Design,
    behaviour: Behaviour | None,
    pictures: Pictures | None,
) -> SubjectSource:
    """Return the record of a subject's chosen sessions, whose `files` are given."""
    number = SUBJECTS.index(name) + 1
    shown, repeat = design.image[number - 1], design.repeat(number)
    images = np.unique(np.concatenate([shown[design.trials(n)] for n in files]))
    if pictures is not None and images[-1] >= pictures.n_images:
        raise ValueError(
            f"{pictures.path} has {pictures.n_images} pictures, but {name} saw picture {images[-1]}; fetch it again"
        )

    def columns(session: int) -> dict[str, np.ndarray]:
        trials = design.trials(session)
        found = {"image": np.searchsorted(images, shown[trials]).astype(np.int32), "repeat": repeat[trials]}
        if behaviour is None:
            return found | {"run": runs_by_rule(design.trials_per_session)}
        here = behaviour.of(session)
        times = {} if behaviour.time_s is None else {"time_s": behaviour.time_s[here]}
        return found | {"run": behaviour.run[here]} | times

    in_volume = tree.space == "func1pt8mm"
    return SubjectSource(
        name=name,
        dtype=np.dtype(np.int16 if in_volume else np.float32),
        voxels=voxels.table,
        images=ImageSource(
            ids=[f"nsd-{image:05d}" for image in images],
            roles=design.roles(images),
            shape=None if pictures is None else pictures.shape,
            files=() if pictures is None else (pictures.path,),
            read=None if pictures is None else partial(pictures.read, images),
        ),
        sessions=tuple(
            SessionSource(session=n, columns=columns(n), read=_reader(paths, voxels), files=paths)
            for n, paths in files.items()
        ),
        scale=SCALE if in_volume else 1.0,
        unit="percent signal change",
        measure=tree.betas,
        provenance={
            "importer": "nsd 1",
            "betas": tree.betas,
            "options": {
                "space": tree.space,
                "file_type": tree.file_type,
                "mask": mask,
                "pixels": pictures is not None,
            },
            "design": design.files,
            "voxels": {str(path.relative_to(tree.source)): file_digest(path) for path in voxels.files},
        },
    )


def _reader(paths: tuple[Path, ...], voxels: Voxels) -> Callable[[], Iterator[np.ndarray]]:
    place = voxels.table.place
    if isinstance(place, Surface):
        left, right = (place.vertex[place.hemisphere == side] for side in (0, 1))
        return partial(mgh_trials, (paths[0], paths[1]), (left, right))
    assert isinstance(place, Volume)
    return partial(hdf5_trials if paths[0].suffix == ".hdf5" else nifti_trials, paths[0], place.index)

"""Single-trial betas of GLMsingle, from a lab's own scans or from LAION-fMRI, with the lab's own table of trials.

SOURCE holds a directory per subject, ``sub-01/`` or any other name, or is one itself. Anywhere below it lie::

    TYPED_FITHRF_GLMDENOISE_RR.{hdf5,npy}           GLMsingle (Python): all sessions in one file, or one per ses-01/
    *_desc-SingletrialBetas_statmap.nii.gz          LAION-fMRI: one per session
    *_trials.tsv, trials.tsv or *_events.tsv, events.tsv    tables of trials (`data.importers.trial_tables`); --trials
    mask.nii.gz or *_mask.nii.gz                    which voxels to take, and where they are; --mask
    *_dseg.nii.gz with *_dseg.tsv                   label volumes, a ROI family each
    *_label-NAME_mask.nii.gz                        one ROI, a family of that one label (LAION-fMRI has ../rois/sub-01)

Pictures lie in SOURCE/stimuli or SOURCE/images; --images. An image's identity is the table's ``image_id``, else the
digest of its pixels. Without a mask the voxels where LAION-fMRI's mean R2 is positive are taken, else all that vary. A
voxel that isn't finite in some trial of any session is left out, for which all betas are read before the import.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int8, Int64

from data.importers.findings import Findings
from data.importers.glmsingle_betas import Betas, open_betas
from data.importers.glmsingle_voxels import find_voxels
from data.importers.named_pictures import NamedPictures
from data.importers.plan import ImportPlan, SessionChoice, choose_subjects
from data.importers.shown_images import ShownImages, shown_images
from data.importers.trial_tables import TrialTable, find_tables, read_trials, session_of
from data.schema import check_name
from data.sources import SessionSource, SubjectSource

KINDS = (
    "*_desc-SingletrialBetas_statmap.nii.gz",
    "TYPED_FITHRF_GLMDENOISE_RR.hdf5",
    "TYPED_FITHRF_GLMDENOISE_RR.npy",
)
_GIGABYTE = 1 << 30


@dataclass(frozen=True, kw_only=True)
class _Options:
    sessions: SessionChoice
    trials: Path | None
    mask: Path | None
    pictures: NamedPictures | None
    pixels: bool
    rois: Path


def plan_glmsingle(
    source: Path,
    *,
    subjects: tuple[str, ...] | None,
    sessions: SessionChoice,
    images: Path | None = None,
    trials: Path | None = None,
    mask: Path | None = None,
    pixels: bool = True,
) -> ImportPlan:
    """Plan the import of GLMsingle's betas; all betas are read once, to find the voxels that are finite throughout.

    Parameters
    ----------
    source : a directory per subject, or one subject's.
    subjects : names, or numbers (5 for sub-05); all that have betas if None.
    sessions : which to import; needs a session index.
    images : directory of the pictures, or LAION-fMRI's archive of them.
    trials : table of trials, or a directory of tables, of one subject or with a directory per subject.
    mask : NIfTI volume, above 0 where voxels are taken, for every subject.
    pixels : whether the pictures come too; without them the tables need a column ``image_id``.
    """
    findings = Findings()
    have: dict[str, Path] = {}
    with findings.noting():
        have = _directories(source, findings)
    chosen = choose_subjects(subjects, list(have), source, findings)
    pictures = None
    if pixels:
        with findings.noting():
            pictures = NamedPictures(images or _default_images(source))
    options = _Options(
        sessions=sessions, trials=trials, mask=mask, pictures=pictures, pixels=pixels, rois=source.parent / "rois"
    )
    found = [_plan_subject(name, have[name], options, findings) for name in chosen]
    planned = [subject for subject in found if subject is not None]
    sizes = sorted({subject.images.shape for subject in planned if subject.images.shape is not None})
    if len(sizes) > 1:
        findings.problems.append(f"{source}: subjects' pictures have different sizes {sizes}; crop them to one size")
    return ImportPlan(subjects=planned, problems=findings.problems, warnings=findings.warnings)


def _default_images(source: Path) -> Path:
    return next((path for path in (source / "stimuli", source / "images") if path.is_dir()), source / "stimuli")


# -- what is there -----------------------------------------------------------------------------------------------------


def _directories(source: Path, findings: Findings) -> dict[str, Path]:
    """Return the directories of the subjects that have betas, by name."""
    if not source.is_dir():
        raise ValueError(f"{source} is not a directory; give the one that holds the subjects' directories")
    if source.resolve().name.startswith("sub-"):
        return _named(source, {source.resolve().name: source} if _files_of(source) else {})
    children = [path for path in sorted(source.iterdir()) if path.is_dir() and not path.name.startswith((".", "ses-"))]
    have = {path.name: path for path in children if _files_of(path)}
    if not have and _files_of(source):
        have = {source.resolve().name: source}
    if without := [path.name for path in children if path.name.startswith("sub-") and path.name not in have]:
        findings.warnings.append(f"{source}: {', '.join(without)} hold no betas, so they are passed over")
    return _named(source, have)


def _named(source: Path, have: dict[str, Path]) -> dict[str, Path]:
    if not have:
        raise ValueError(
            f"{source} has no betas: neither {KINDS[1]} or .npy nor {KINDS[0]} in a directory per subject; check SOURCE"
        )
    for name in have:
        check_name(name, "subject directory")
    return have


def _files_of(directory: Path) -> list[Path]:
    """Return a subject's files of betas: those of the first kind that is there."""
    return next((files for kind in KINDS if (files := sorted(directory.rglob(kind)))), [])


def _plan_subject(name: str, directory: Path, options: _Options, findings: Findings) -> SubjectSource | None:
    """Return a subject, or None with all that is wrong with its files noted."""
    before = len(findings.problems)
    table, voxels, images = None, None, None
    files: list[Betas] = []
    for path in _files_of(directory):
        with findings.noting():
            files.append(open_betas(path))
    with findings.noting():
        table = _read_tables(name, directory, options.trials)
    runs: list[_Run] = []
    if table is not None and len(findings.problems) == before:
        with findings.noting():
            runs = _match(name, files, table, options.sessions, findings)
    if runs and table is not None and (options.pictures is not None or not options.pixels):
        shown = np.concatenate([np.arange(run.first, run.first + run.stop - run.start) for run in runs])
        images = shown_images(table, shown, options.pictures, findings)
    if files:  # last, since it reads everything
        with findings.noting():
            voxels = find_voxels(name, directory, options.rois, files, options.mask, findings)
    if table is None or voxels is None or images is None or len(findings.problems) > before:
        return None
    if table.n_passed_over:
        findings.warnings.append(
            f"{table.paths[0]}: {table.n_passed_over} rows of {name}'s tables show no picture and are passed over"
        )
    if loaded := max(betas.bytes_loaded for betas in files):
        findings.warnings.append(
            f"{files[0].path} can only be loaded whole, which takes {loaded / _GIGABYTE:.1f} GB of memory; GLMsingle "
            f"writes files that can be streamed with wanthdf5=1"
        )
    repeats = None
    with findings.noting():
        repeats = _repeats(table, options.pictures)
    if repeats is None:
        return None
    return SubjectSource(
        name=name,
        dtype=np.dtype(np.float32),
        voxels=voxels.table,
        images=images.source,
        sessions=tuple(_session(run, table, images, repeats, voxels.rows) for run in runs),
        unit="percent signal change",
        measure=files[0].measure,
        provenance={
            "importer": "glmsingle 1",
            "source": str(directory),
            "betas": [str(betas.path) for betas in files],
            "trials": [str(path) for path in table.paths],
            "rows_without_picture": table.n_passed_over,
            "mask": voxels.mask,
            "voxels_left_out": voxels.n_left_out,
        },
    )


# -- trials ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Trials of one session: `start` to `stop` of a file of betas, rows from `first` on of the trial table."""

    session: int | None
    betas: Betas
    start: int
    stop: int
    first: int


def _read_tables(name: str, directory: Path, trials: Path | None) -> TrialTable:
    if trials is None:
        return read_trials(find_tables(directory))
    if trials.is_dir():
        return read_trials(find_tables(trials / name if (trials / name).is_dir() else trials))
    return read_trials([trials])


def _match(name: str, files: list[Betas], table: TrialTable, choice: SessionChoice, findings: Findings) -> list[_Run]:
    """Return the chosen sessions, each with its betas and its rows of the table."""
    if table.session is None:
        if choice:
            raise ValueError(
                f"{table.paths[0]} has no column session, so sessions can't be chosen for {name}; add it or leave the "
                f"choice out"
            )
        if len(files) > 1:
            raise ValueError(f"{name} has {len(files)} files of betas but its trials no session; add a column session")
        _check_count(files[0], len(table), table)
        return [_Run(session=None, betas=files[0], start=0, stop=len(table), first=0)]
    runs: dict[int | None, _Run]
    numbers, first, count = np.unique(table.session, return_index=True, return_counts=True)
    if len(files) == 1 and session_of(files[0].path) is None:
        _check_count(files[0], len(table), table)
        runs = {
            int(number): _Run(session=int(number), betas=files[0], start=int(f), stop=int(f + n), first=int(f))
            for number, f, n in zip(numbers, first, count, strict=True)
        }
    else:
        runs = {}
        for betas in files:
            with findings.noting():
                run = _session_file(betas, table)
                if run.session in runs:
                    raise ValueError(f"{betas.path} is a second file of session {run.session} of {name}; leave one")
                runs[run.session] = run
        if without := [str(number) for number in numbers if int(number) not in runs]:
            findings.warnings.append(f"{name}: no betas of session {', '.join(without)}, whose trials are passed over")
    return [runs[session] for session in choice.of([session for session in runs if session is not None], name)]


def _session_file(betas: Betas, table: TrialTable) -> _Run:
    """Return the session that one of several files of betas is."""
    session = session_of(betas.path)
    assert table.session is not None
    if session is None:
        raise ValueError(f"{betas.path} is one of several files of betas, so its path must say its session (ses-01)")
    here = np.flatnonzero(table.session == session)
    if not len(here):
        raise ValueError(
            f"{betas.path} is of session {session}, of which {table.paths[0].parent} has no trials; add them"
        )
    _check_count(betas, len(here), table, session)
    return _Run(session=session, betas=betas, start=0, stop=len(here), first=int(here[0]))


def _check_count(betas: Betas, n: int, table: TrialTable, session: int | None = None) -> None:
    if betas.n_trials != n:
        path = next((p for p in table.paths if session_of(p) == session), table.paths[0])
        raise ValueError(
            f"{betas.path} has {betas.n_trials} betas but {path}{'' if len(table.paths) == 1 else ' and the like'} {n} "
            f"rows with a picture; they must be the trials that GLMsingle was given"
        )


def _session(
    run: _Run,
    table: TrialTable,
    images: ShownImages,
    repeats: Int8[np.ndarray, " trial"],
    voxels: Int64[np.ndarray, " voxel"],
) -> SessionSource:
    rows = slice(run.first, run.first + run.stop - run.start)
    columns: dict[str, np.ndarray] = {"image": np.array([images.row[name] for name in table.names[rows]], np.int32)}
    columns["repeat"] = repeats[rows]
    if table.run is not None:
        columns["run"] = table.run[rows]
    if table.time_s is not None:
        columns["time_s"] = table.time_s[rows]
    return SessionSource(
        session=run.session,
        columns=columns,
        read=partial(run.betas.read, voxels, run.start, run.stop),
        files=(run.betas.path,),
    )


def _repeats(table: TrialTable, pictures: NamedPictures | None) -> Int8[np.ndarray, " trial"]:
    """Return how often each trial's image was shown before, over all sessions, imported or not.

    A picture that isn't there, of a session that isn't imported, counts by its name.
    """
    key = {name: name for name in table.names}
    if table.image_id is None and pictures is not None:
        key = {name: pictures.identity(name) if pictures.has(name) else name for name in key}
    seen: Counter[str] = Counter()
    out = []
    for name in table.names:
        out.append(seen[key[name]])
        seen[key[name]] += 1
    return np.minimum(out, np.iinfo(np.int8).max).astype(np.int8)

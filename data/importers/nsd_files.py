"""Where a tree of NSD has what: its subjects, the files of their sessions, the pictures."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, UInt8

from data.importers.findings import Findings
from data.importers.hdf5_files import hdf5_shape, open_dataset, open_hdf5
from data.importers.nsd_design import SESSIONS
from data.importers.plan import SessionChoice, choose_subjects

Betas = Literal["betas_fithrf_GLMdenoise_RR", "betas_fithrf", "betas_assumehrf"]
Space = Literal["func1pt8mm", "fsaverage"]
FileType = Literal["auto", "nii.gz", "hdf5"]
SUBJECTS = tuple(f"subj{k:02d}" for k in range(1, len(SESSIONS) + 1))


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A tree of NSD, and which of its betas are wanted."""

    source: Path
    betas: Betas
    space: Space
    file_type: FileType

    def directory(self, subject: str) -> Path:
        """Return where a subject's betas are."""
        return self.source / "nsddata_betas" / "ppdata" / subject / self.space / self.betas

    def sessions(self, subject: str) -> dict[int, tuple[Path, ...]]:
        """Return the files of betas by session: one, or one a hemisphere (of which one may be missing)."""
        directory = self.directory(subject)
        names = sorted(path.name for path in directory.iterdir())
        found: dict[int, tuple[Path, ...]] = {}
        if self.space == "fsaverage":
            for match in filter(None, (re.fullmatch(r"[lr]h\.betas_session(\d\d)\.mgh", name) for name in names)):
                number = int(match[1])
                found[number] = tuple(directory / f"{side}.betas_session{number:02d}.mgh" for side in ("lh", "rh"))
        else:
            suffixes = ("nii.gz", "hdf5") if self.file_type == "auto" else (self.file_type,)  # the last one prevails
            for suffix in suffixes:
                pattern = rf"betas_session(\d\d)\.{re.escape(suffix)}"
                for match in filter(None, (re.fullmatch(pattern, name) for name in names)):
                    found[int(match[1])] = (directory / match[0],)
        return dict(sorted(found.items()))

    def session_name(self, session: int) -> str:
        """Return what a session's file is called."""
        if self.space == "fsaverage":
            return f"{{lh,rh}}.betas_session{session:02d}.mgh"
        return f"betas_session{session:02d}.{'{nii.gz,hdf5}' if self.file_type == 'auto' else self.file_type}"


def subjects_of(tree: Tree, subjects: tuple[str, ...] | None, findings: Findings) -> list[str]:
    """Return the names of the wanted subjects that are there; all that are there where none is named."""
    there = [name for name in SUBJECTS if tree.directory(name).is_dir()]
    example = tree.directory(SUBJECTS[0]).relative_to(tree.source)
    if not there:
        findings.problems.append(
            f"{tree.source} has no {example}, nor that of another subject; fetch it, or give the root of NSD"
        )
    return choose_subjects(subjects, there, f"{tree.source} with {tree.betas} in {tree.space}", findings)


def choose_sessions(
    tree: Tree, subject: str, files: dict[int, tuple[Path, ...]], choice: SessionChoice, findings: Findings
) -> list[int]:
    """Return the sessions to import; unless they are chosen by number, none may be missing before the last."""
    directory, n_sessions = tree.directory(subject), SESSIONS[SUBJECTS.index(subject)]
    if not files:
        findings.problems.append(f"{directory} has no {tree.session_name(1)} nor a later session; fetch them")
        return []
    for number in [n for n in files if not 1 <= n <= n_sessions]:
        findings.problems.append(
            f"{files[number][0]}: {subject} did sessions 1 to {n_sessions} in NSD; remove or rename it"
        )
    chosen: list[int] = []
    with findings.noting():
        chosen = choice.of(list(files), f"{directory}")
    if choice.numbered is None:
        for missing in sorted(set(range(1, max(chosen, default=0))) - set(files)):
            findings.problems.append(
                f"{directory / tree.session_name(missing)} does not exist, though later sessions do; fetch it, or "
                f"choose sessions by --session-numbers"
            )
    if not choice and len(files) < n_sessions:
        findings.warnings.append(f"{directory} has {len(files)} of the {n_sessions} sessions that {subject} did")
    return [n for n in chosen if 1 <= n <= n_sessions]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The 73,000 pictures: ``imgBrick`` (image, height, width, 3), uint8 RGB, in the order of their ids."""

    path: Path
    n_images: int
    shape: tuple[int, int]

    @classmethod
    def of(cls, source: Path) -> "Pictures":
        """Return the pictures of a tree.

        Raises
        ------
        ValueError
            If they are missing or something else.
        """
        path = source / "nsddata_stimuli" / "stimuli" / "nsd" / "nsd_stimuli.hdf5"
        if not path.exists():
            raise ValueError(f"{path} does not exist; fetch it, or import without pictures by --no-pixels")
        shape, dtype = hdf5_shape(path, "imgBrick")
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
            raise ValueError(
                f"{path}: imgBrick is {dtype} {shape}, not uint8 (image, height, width, 3); fetch it again"
            )
        return cls(path=path, n_images=shape[0], shape=(shape[1], shape[2]))

    def read(self, images: Int[np.ndarray, " image"], rows: Any) -> UInt8[np.ndarray, "row height width 3"]:
        """Return the pictures of some `rows` of a list of images, read one by one.

        Raises
        ------
        ValueError
            If the file is damaged.
        """
        wanted = images[rows]
        pixels = np.empty((len(wanted), *self.shape, 3), np.uint8)
        with open_hdf5(self.path) as file:
            brick = open_dataset(file, "imgBrick")
            for k, image in enumerate(wanted):
                pixels[k] = brick[image]
        return pixels

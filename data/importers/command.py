"""``python -m data import FORMAT SOURCE STORE``: the options of each format, and what they have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from tyro.conf import OmitSubcommandPrefixes, Positional, arg, subcommand

from data.command_line import CommonOptions, Session, begin, progress_bar
from data.importers.carry_out import carry_out, conflicts, described, estimate, n_bytes
from data.importers.plan import ImportPlan, SessionChoice

Store = Annotated[str, arg(metavar="STORE")]


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What every import needs to know."""

    source: Positional[Path]
    """Directory to read."""
    store: Positional[Store]
    """Store to add to, a path or URL; made if it is missing."""
    subjects: tuple[str, ...] | None = None
    """Only these subjects, by number or name."""
    sessions: int | None = None
    """Only the first N sessions."""
    session_numbers: tuple[int, ...] | None = None
    """Only these sessions."""
    pixels: bool = True
    """Take the pictures too; without them features can't be computed."""
    check: bool = False
    """Read everything that must be known, report what is missing or odd, write nothing."""
    session: CommonOptions = Session()

    @property
    def choice(self) -> SessionChoice:
        """The sessions to import."""
        return SessionChoice(n=self.sessions, numbered=self.session_numbers)


@dataclass(frozen=True, kw_only=True)
class Nsd(ImportOptions):
    """The Natural Scenes Dataset as published: SOURCE holds nsddata, nsddata_betas and nsddata_stimuli."""

    betas: Literal["betas_fithrf_GLMdenoise_RR", "betas_fithrf", "betas_assumehrf"] = "betas_fithrf_GLMdenoise_RR"
    """Version of the single-trial betas: b3, b2 or b1."""
    space: Literal["func1pt8mm", "fsaverage"] = "func1pt8mm"
    """The subject's own 1.8 mm volume, or the fsaverage surface."""
    file_type: Literal["auto", "nii.gz", "hdf5"] = "auto"
    """Which files of the volume to read."""
    mask: str = "nsdgeneral"
    """ROI file whose voxels above 0 are imported; all: the brain mask, or every vertex."""

    def plan(self) -> ImportPlan:
        """Find out what is there."""
        from data.importers.nsd import plan_nsd

        return plan_nsd(
            self.source,
            subjects=self.subjects,
            sessions=self.choice,
            betas=self.betas,
            space=self.space,
            file_type=self.file_type,
            mask=self.mask,
            pixels=self.pixels,
        )


@dataclass(frozen=True, kw_only=True)
class Algonauts(ImportOptions):
    """The Algonauts 2023 challenge: SOURCE holds subj01, subj02, ..."""

    design: Path | None = None
    """NSD's nsd_expdesign.mat, which says what trains, validates and tests."""

    def plan(self) -> ImportPlan:
        """Find out what is there."""
        from data.importers.algonauts import plan_algonauts

        return plan_algonauts(
            self.source, subjects=self.subjects, sessions=self.choice, design=self.design, pixels=self.pixels
        )


@dataclass(frozen=True, kw_only=True)
class MindEye(ImportOptions):
    """The MindEye2 release: SOURCE holds betas_all_subj0X_fp32_renorm.hdf5 and wds."""

    design: Path | None = None
    """NSD's nsd_expdesign.mat, which says what trains, validates and tests."""

    def plan(self) -> ImportPlan:
        """Find out what is there."""
        from data.importers.mindeye import plan_mindeye

        return plan_mindeye(
            self.source, subjects=self.subjects, sessions=self.choice, design=self.design, pixels=self.pixels
        )


@dataclass(frozen=True, kw_only=True)
class GlmSingle(ImportOptions):
    """GLMsingle's output of your own scans, or LAION-fMRI: SOURCE holds a directory per subject (docs/importing.md)."""

    images: Path | None = None
    """Directory of the pictures that the trial tables name (default: SOURCE/stimuli or SOURCE/images)."""
    trials: Path | None = None
    """Table of trials, where it is not beside the betas."""
    mask: Path | None = None
    """NIfTI mask of the voxels to import (default: the one beside the betas)."""

    def plan(self) -> ImportPlan:
        """Find out what is there."""
        from data.importers.glmsingle import plan_glmsingle

        return plan_glmsingle(
            self.source,
            subjects=self.subjects,
            sessions=self.choice,
            images=self.images,
            trials=self.trials,
            mask=self.mask,
            pixels=self.pixels,
        )


@dataclass(frozen=True, kw_only=True)
class Arrays(ImportOptions):
    """Plain arrays: SOURCE is a directory with a recordings.json (docs/importing.md)."""

    recordings: Path | None = None
    """The table, where it is not SOURCE/recordings.json."""

    def plan(self) -> ImportPlan:
        """Find out what is there."""
        from data.importers.arrays import plan_arrays

        return plan_arrays(
            self.source, table=self.recordings, subjects=self.subjects, sessions=self.choice, pixels=self.pixels
        )


Format = OmitSubcommandPrefixes[
    Annotated[Nsd, subcommand("nsd")]
    | Annotated[Algonauts, subcommand("algonauts")]
    | Annotated[MindEye, subcommand("mindeye")]
    | Annotated[GlmSingle, subcommand("glmsingle")]
    | Annotated[Arrays, subcommand("arrays")]
]


def import_(*, format: Annotated[Format, arg(name="")]) -> None:
    """Import recordings into a store, made if it is missing; what is there already is passed over.

    Args:
        format: layout of the source.
    """
    begin(format.session)
    console = Console(soft_wrap=True)
    name = type(format).__name__.lower()
    with console.status(f"looking at {format.source}"):
        plan = format.plan()
    for line in plan.warnings:
        console.print(f"warn {line}", markup=False)
    if format.check:
        _report(plan, format.store, console.print)
        return
    if plan.subjects and not plan.problems:
        console.print(estimate(plan, format.store), markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with progress_bar(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task(f"importing {name}", total=sum(map(n_bytes, plan.subjects)))
        carry_out(
            plan,
            format.store,
            importer=f"{name} 1",
            tell=lambda line: console.print(line, markup=False),
            progress=lambda n: bar.advance(task, n),
        )


def _report(plan: ImportPlan, store: str, tell: Callable[..., None]) -> None:
    """Print what would come in and everything that stands against it.

    Raises
    ------
    ValueError
        If something does.
    """
    for source in plan.subjects:
        tell(f"ok   {described(source)}", markup=False)
    bad = plan.problems + conflicts(plan, store)
    for line in bad:
        tell(f"bad  {line}", markup=False)
    if bad:
        raise ValueError(
            f"{len(bad)} {'problem' if len(bad) == 1 else 'problems'} found, named above; nothing was written"
        )
    tell(estimate(plan, store), markup=False)

"""``python -m foundation.report RUN... --out report.html``: runs as one page that a browser shows by itself."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from data.command_line import CommonOptions, Session, begin, progress_bar, run
from foundation.evaluation.baselines import BASELINES
from foundation.evaluation.evaluated import Course
from foundation.evaluation.report import Drawer, Section, Shown, page, shown
from foundation.evaluation.report.images import image_section
from foundation.evaluation.report.runs import (
    AblationRun,
    CurveRun,
    ScoresRun,
    StepsRun,
    ablation_section,
    curve_section,
    protocol_section,
    stored_section,
)
from foundation.evaluation.report.samples import sample_section
from foundation.evaluation.report.scores import bars_section, comparison_section, score_section
from foundation.evaluation.report.streams import preference_section
from foundation.evaluation.report.summary import summary
from foundation.evaluation.report.voxels import map_section, voxel_section
from foundation.evaluation.table import write_whole
from foundation.line_up import LineUp, line_up
from foundation.named_model import NamedModel
from foundation.tracking.reported import Kept, Reported, found_beside, reported
from foundation.tracking.runs import TrackingError
from foundation.training.run import code_version

PROGRAM = "python -m foundation.report"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write a page about runs, models and baselines."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN...")]
    """Runs in MLflow by name or id, of any kind; models (NAME@ALIAS, NAME/VERSION, a run or model directory, a
    .safetensors file); baselines. The first model leads; several are compared in pairs."""
    out: Path
    """The HTML file to write; one that is there is replaced."""
    png: Path | None = None
    """Directory for the figures as PNG files."""
    title: str | None = None
    """Title of the page (default: what is compared)."""
    store: str | None = None
    """Store's path or URL (default: that of the first model, or of the first run)."""
    subjects: tuple[str, ...] = ()
    """Subjects, by number or name (default: all that the models were fitted to, or those of the first run)."""
    encoder: str | None = None
    """Encoder whose tokens the baselines learn from (default: the first model's)."""
    sessions: int | None = None
    """First N sessions that the baselines learn from (default: as many as the models did)."""
    baselines: tuple[str, ...] = ("ridge",)
    """Baselines to put beside the models."""
    samples: int = 20
    """Single trials that each model draws for an image, to be looked at as a distribution; 0: none."""
    bootstraps: int = 1000
    """Resamples of the images that intervals are made of."""
    pictures: bool = True
    """Show the images themselves; not every data set's may be shown to others."""
    seed: int = 0
    """Seed of resamples and samples."""
    session: CommonOptions = Session()


def report(command: Report) -> None:
    """Run the command."""
    begin(command.session)
    console = Console(soft_wrap=True)
    _check(command)
    named = [reported(name) for name in command.runs]
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        console.print(text)

    entrants = _line_up(command, named, tell)
    kept = [one for of in named for one in of.kept]
    kept += _beside(entrants, kept, console)
    subjects = _evaluated(entrants, with_pictures=command.pictures)
    if command.png is not None:
        command.png.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        drawer = Drawer(scratch=Path(scratch), png=command.png)
        first = _summary(entrants, subjects, notes=(*entrants.notes, *told))
        sections = [first, *_sections(_names(entrants), subjects, kept, drawer, with_pictures=command.pictures)]
    title = command.title or f"Report: {', '.join(_names(entrants))}"
    made = f"Made by manybrains {code_version()} on {datetime.now():%Y-%m-%d %H:%M}."
    text = page(title, sections, made=made)
    write_whole(text, command.out)
    console.print(f"{command.out}: {len(subjects)} subjects, {len(_names(entrants))} systems, {len(text) / 1e6:.1f} MB")


def _line_up(command: Report, named: Sequence[Reported], tell: Callable[[str], None]) -> LineUp:
    """Return what is compared; baselines alone are scored on the data of the first run that tells its own."""
    systems = _systems(named)
    if not systems and not command.baselines:
        told = ", ".join(command.runs)
        raise ValueError(f"{told} and --baselines name no model and no baseline; name one to report on")
    data = Reported()
    if all(name in BASELINES for name in systems):
        data = next((of for of in named if of.store is not None), data)
    return line_up(
        systems,
        store=command.store or data.store,
        subjects=command.subjects or data.subjects,
        encoder=command.encoder,
        sessions=data.sessions if command.sessions is None else command.sessions,
        course=Course(
            baselines=command.baselines,
            seed=command.seed,
            n_bootstraps=command.bootstraps,
            n_samples=command.samples,
        ),
        tell=tell,
    )


def _names(entrants: LineUp) -> tuple[str, ...]:
    """Return all systems; the first leads."""
    return (*entrants.models, *entrants.baselines)


def _sections(
    systems: Sequence[str], subjects: Sequence[Shown], kept: Sequence[Kept], drawer: Drawer, *, with_pictures: bool
) -> list[Section]:
    """Return the sections after the summary, those that there is nothing for left out."""
    sections = [
        score_section(subjects),
        comparison_section(subjects, systems),
        stored_section([of for of in kept if isinstance(of, ScoresRun)], drawer),
        protocol_section([of for of in kept if isinstance(of, StepsRun)]),
        bars_section(subjects, drawer),
        voxel_section(subjects, drawer),
        ablation_section([of for of in kept if isinstance(of, AblationRun)], drawer),
        preference_section([of for of in kept if isinstance(of, AblationRun)], subjects, drawer),
        curve_section([of for of in kept if isinstance(of, CurveRun)], drawer),
        sample_section(subjects, systems, drawer),
        image_section(subjects, systems[0], drawer, with_pictures=with_pictures),
        map_section(subjects, systems, drawer),
    ]
    return [section for section in sections if section is not None]


def _check(command: Report) -> None:
    """Refuse what is wrong by itself, before anything is loaded."""
    if not command.runs:
        raise ValueError("name what to report on: a run, a model such as phantom-tiny@champion, or a baseline")
    for name, value in (("--bootstraps", command.bootstraps), ("--samples", command.samples)):
        if value < 0:
            raise ValueError(f"{name} {value} must be at least 0")
    if command.out.is_dir():
        raise ValueError(f"--out {command.out} is a directory; name a file, such as {command.out / 'report.html'}")
    for path in (command.out, command.png):
        if path is not None and not path.resolve().parent.is_dir():
            raise ValueError(f"there is no directory {path.resolve().parent} for {path}; make it first")
    if command.png is not None and command.png.exists() and not command.png.is_dir():
        raise ValueError(f"--png {command.png} is a file; name a directory")


def _systems(named: Sequence[Reported]) -> list[str]:
    """Return what is scored: the systems that are named; what runs are about where there is no model among them."""
    systems = [name for of in named for name in of.systems]
    if all(name in BASELINES for name in systems):
        systems = [name for of in named for name in of.about] + systems
    return list(dict.fromkeys(systems))


def _beside(entrants: LineUp, kept: Sequence[Kept], console: Console) -> list[Kept]:
    """Return what MLflow has on the models beside what was asked for by name."""
    try:
        found = found_beside(list(entrants.models))
    except TrackingError as error:
        console.print(f"no ablation or evaluation of the models was looked for: {error}")
        return []
    asked = {type(of) for of in kept}
    return [of for of in found if type(of) not in asked]


def _evaluated(entrants: LineUp, *, with_pictures: bool) -> list[Shown]:
    """Score one subject after the other; of each, only what is shown stays in memory."""
    with progress_bar() as bar:
        task = bar.add_task("scoring", total=len(entrants.subjects))
        found = []
        for subject in entrants.subjects:
            evaluated = entrants.evaluate(subject)
            found.append(shown(evaluated, entrants.store, leading=_names(entrants)[0], with_pictures=with_pictures))
            bar.advance(task)
    return found


def _summary(entrants: LineUp, subjects: Sequence[Shown], *, notes: Sequence[str]) -> Section:
    course, n_sessions = entrants.course, entrants.course.n_sessions
    setting = {
        "protocol": f"strict; {course.preprocessing.name}",
        "store": entrants.store.path,
        "subjects": ", ".join(f"{of.subject} ({of.n_voxels} voxels, {of.n_images} test images)" for of in subjects),
        "split": f"by image, globally, rule: {entrants.split.rule}",
        "baselines": ", ".join(entrants.baselines) or "none",
        "baselines learned from": f"{entrants.tokens.name} tokens, "
        + ("all sessions" if n_sessions is None else f"the first {n_sessions} sessions"),
        "bootstraps": f"{course.n_bootstraps} resamples of the images, seed {course.seed}",
        "code": f"manybrains {code_version()}",
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
    }
    models = {label: _lineage(named) for label, named in entrants.models.items()}
    return summary(subjects, models=models, baselines=entrants.baselines, setting=setting, notes=notes)


def _lineage(named: NamedModel) -> dict[str, str]:
    """Return what a model was made from, for readers."""
    lineage, backbone = named.lineage, named.backbone
    adapter = lineage is not backbone
    return {
        "what it is": f"adapter of {lineage['subject']} on {lineage.get('backbone', 'a backbone')}"
        if adapter
        else f"backbone, recipe {backbone['recipe'].get('name', 'unnamed')}",
        "learned from": ", ".join(named.subjects)
        + (f"; backbone: {', '.join(backbone['subject_digests'])}" if adapter else ""),
        "sessions": "all" if named.n_sessions is None else f"the first {named.n_sessions}",
        "encoder": f"{named.encoder} ({backbone['encoder_digest'][:19]})",
        "store": f"{named.store} ({lineage['store_digest'][:19]})",
        "split": lineage["split_digest"][:19],
        "seed": str(lineage.get("seed", backbone["recipe"].get("seed", "n/a"))),
        "code": str(lineage.get("code_version", "n/a")),
        "run": str(lineage.get("run") or named.run_id or "n/a"),
    }


def main() -> None:
    """Run the command line."""

    def command(options: Annotated[Report, arg(name="")]) -> None:
        """Write a page with scores, intervals, figures and maps of runs, models and baselines."""
        report(options)

    run(command, program=PROGRAM, description=__doc__)


if __name__ == "__main__":
    main()

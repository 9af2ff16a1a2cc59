"""``python -m foundation.evaluate MODEL...``: scores of models and baselines, under either protocol, or both."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from rich.console import Console
from tyro.conf import Positional, arg

from data.command_line import CommonOptions, Session, begin, progress_bar, run
from data.splits import Part
from foundation.evaluation.evaluated import PROTOCOLS, Course, Evaluated, Protocol, System
from foundation.evaluation.fold_table import fold_rows, fold_table
from foundation.evaluation.folds import CrossValidated, cross_validate
from foundation.evaluation.protocols import ProtocolStep, protocol_steps, steps_table
from foundation.evaluation.published_rdms import PublishedRdms, read_rdms
from foundation.evaluation.rsa import RsaScore, compare_rdms, rdm, rsa
from foundation.evaluation.rsa_table import rsa_rows, rsa_table
from foundation.evaluation.score import Row, Scores, merge_scores
from foundation.evaluation.side_by_side import side_by_side
from foundation.evaluation.significance import significance_rows, significance_table
from foundation.evaluation.table import WIDTH, print_scores, sampling_table
from foundation.line_up import PICKED, LineUp, line_up
from foundation.score_files import ScoreFiles
from foundation.tracking.runs import TrackedRun, tracking_uri
from foundation.tracking.scores import log_evaluation
from foundation.training.run import code_version

PROGRAM = "python -m foundation.evaluate"


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score models and baselines."""

    models: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL...")]
    """NAME@ALIAS or NAME/VERSION in the registry, a run, a model directory, a .safetensors file, or a baseline (ridge,
    banded-ridge, cls-probe, spatial, stacked, roi-transformer). Several are compared in pairs."""
    store: str | None = None
    """Store's path or URL (default: that of the first model's training; of baselines, the embedded phantom)."""
    subjects: tuple[str, ...] = ()
    """Subjects, by number or name (default: all that the models were fitted to)."""
    split: Part = "test"
    """Images to score: test, or validation or train, which have been learned from or chosen by."""
    protocol: Literal["strict", "chasm-legacy", "both"] = "strict"
    """How a score is made: docs/metrics.md. both adds a table of what each step from one to the other changes."""
    baselines: tuple[str, ...] = ("ridge",)
    """Baselines to put beside the models."""
    encoder: str | None = None
    """Encoder whose tokens the baselines learn from (default: the first model's)."""
    sessions: int | None = None
    """First N sessions that baselines learn from where no model is named; beside models, as many as these did."""
    samples: int = 20
    """Single trials that each model draws for an image, to be scored as a distribution; 0: none."""
    bootstraps: int = 1000
    """Resamples of the images that intervals are made of."""
    permutations: int = 1000
    """Permutations of the images against which it is tested that a voxel is predicted at all; 0: none."""
    folds: int | None = None
    """Cross-validate the baselines besides, with so many folds of all images, each fitted anew."""
    rsa: bool = False
    """Compare predicted with measured dissimilarities of images, too (representational similarity)."""
    rdms: Path | None = None
    """Published RDMs to compare predictions with: an .npz with `rdms` (rdm, image, image) and `images` (identities)."""
    json: Path | None = None
    """File for the rows as JSON; `NAME.comparisons.json` beside it has the paired differences."""
    csv: Path | None = None
    """File for the rows as CSV."""
    seed: int = 0
    """Seed of resamples, folds and samples."""
    session: CommonOptions = Session()


def evaluate(command: Evaluate) -> None:
    """Run the command."""
    begin(command.session)
    console = Console(soft_wrap=True)
    _check(command)
    protocols: tuple[Protocol, ...] = PROTOCOLS if command.protocol == "both" else (command.protocol,)
    entrants = line_up(
        command.models,
        store=command.store,
        subjects=command.subjects,
        encoder=command.encoder,
        sessions=command.sessions,
        course=Course(
            part=command.split,
            protocols=protocols,
            baselines=command.baselines,
            seed=command.seed,
            n_bootstraps=command.bootstraps,
            n_samples=command.samples,
            n_permutations=command.permutations,
        ),
        tell=console.print,
    )
    published = None if command.rdms is None else _published(command.rdms, entrants)
    leading = next(iter(entrants.models), command.models[0])
    name = f"evaluate-{leading.replace('/', '-')}"
    with TrackedRun.start(
        name, kind="evaluation", config=_config(command, entrants), tags=_tags(command, entrants)
    ).ending() as tracked:
        picked, choices = _picked(entrants)
        evaluated = _evaluated(entrants, picked)
        scores = {p: _merged(entrants, [of.scores[p] for of in evaluated]) for p in protocols}
        if "chasm-legacy" in scores:
            scores["chasm-legacy"] = _noted(scores["chasm-legacy"], entrants, choices)
        wide = Console(width=max(console.width, WIDTH))
        steps: list[ProtocolStep] = []
        if len(protocols) == 1:
            print_scores(scores[protocols[0]])
        else:
            wide.print(side_by_side(scores))
            sampled = sampling_table(scores["strict"])
            if sampled is not None:
                wide.print(sampled)
            for system in (*entrants.models, *entrants.baselines):
                with_picked = f"{system}{PICKED}" if f"{system}{PICKED}" in picked else None
                steps += protocol_steps(evaluated, system, picked=with_picked)
            wide.print(steps_table([step for step in steps if step.system == leading]))
        further = [row for of in evaluated for row in _of_null(of, entrants.course.strict)]
        if further:
            wide.print(significance_table(further, n_permutations=command.permutations))
        if command.folds is not None:
            folded = [_cross_validated(entrants, subject, command.folds, console) for subject in entrants.subjects]
            wide.print(fold_table(folded))
            further += fold_rows(folded)
        similar = _similarity(command, entrants, evaluated, published, console)
        if similar:
            wide.print(rsa_table(similar))
            further += [row for of_subject in similar for row in rsa_rows(of_subject, protocol=entrants.course.strict)]
        ScoreFiles(json=command.json, csv=command.csv).write(
            [row for of_protocol in scores.values() for row in of_protocol.rows] + further,
            [c for of_protocol in scores.values() for c in of_protocol.comparisons],
            [note for of_protocol in scores.values() for note in of_protocol.notes],
            tell=console.print,
        )
        headlines = {"strict": leading, "chasm-legacy": next(iter(picked), leading)}
        log_evaluation(tracked, scores, systems=headlines, part=command.split, steps=steps, further=further)
    console.print(f"the run is {name} in {tracking_uri()}")


def _check(command: Evaluate) -> None:
    """Refuse what is wrong by itself, before anything is loaded."""
    if not command.models:
        raise ValueError("name a model or a baseline to evaluate, such as phantom-tiny@champion or ridge")
    if command.split != "test" and command.protocol != "strict":
        raise ValueError(f"--protocol {command.protocol} is for test images; --split {command.split} goes with strict")
    least = {"bootstraps": 0, "samples": 0, "permutations": 0, "folds": 2}
    for name, lowest in least.items():
        value = getattr(command, name)
        if value is not None and value < lowest:
            raise ValueError(f"--{name} {value} must be at least {lowest}")
    ScoreFiles(json=command.json, csv=command.csv).check()


def _published(path: Path, entrants: LineUp) -> tuple[PublishedRdms, np.ndarray]:
    """Return published RDMs and the store's rows of their images, before anything is computed."""
    if not entrants.models:
        raise ValueError("--rdms compares what models predict, and only baselines are named; name a model")
    published = read_rdms(path)
    return published, published.rows(entrants.split)


def _picked(entrants: LineUp) -> tuple[dict[str, System], list[str]]:
    """Return the checkpoints that chasm-legacy picks on the test images, and how it came to them."""
    picked, notes = {}, []
    if "chasm-legacy" in entrants.course.protocols:
        for label in entrants.models:
            found, told = entrants.picked_on_test(label)
            picked |= found
            notes.append(told)
    return picked, notes


def _evaluated(entrants: LineUp, picked: dict[str, System]) -> list[Evaluated]:
    """Return each subject's evaluation, without the samples, which are scored and large."""
    with progress_bar() as bar:
        task = bar.add_task("scoring", total=len(entrants.subjects))
        found = []
        for subject in entrants.subjects:
            found.append(replace(entrants.evaluate(subject, picked=picked), samples={}))
            bar.advance(task)
    return found


def _merged(entrants: LineUp, scores: list[Scores]) -> Scores:
    """Return several subjects' scores as one, with what has to be known of the comparison."""
    part = entrants.course.part
    notes = list(entrants.notes)
    if part != "test":
        of = {"train": "what the models were fitted to", "validation": "what chose their settings"}[part]
        notes.append(f"scored on {part} images, {of}: no estimate of how they predict new ones")
    return _noted(merge_scores(scores), entrants, notes)


def _noted(scores: Scores, entrants: LineUp, notes: list[str]) -> Scores:
    who = ", ".join(entrants.subjects)
    return replace(scores, notes=(*scores.notes, *(f"{who}: {note}" for note in notes)))


def _config(command: Evaluate, entrants: LineUp) -> dict[str, object]:
    return {
        "models": " ".join((*entrants.models, *entrants.baselines)),
        "store": entrants.store.path,
        "subjects": " ".join(entrants.subjects),
        "split": command.split,
        "protocol": command.protocol,
        "encoder": entrants.tokens.name,
        "bootstraps": command.bootstraps,
        "samples": command.samples,
        "seed": command.seed,
    }


def _tags(command: Evaluate, entrants: LineUp) -> dict[str, str]:
    tags = {
        "models": " ".join((*entrants.models, *entrants.baselines)),
        "subjects": " ".join(entrants.subjects),
        "store": entrants.store.path,
        "store_digest": entrants.store.digest(list(entrants.subjects), entrants.tokens.name),
        "split": command.split,
        "protocol": command.protocol,
        "preprocessing": entrants.course.preprocessing.name,
        "seed": str(command.seed),
        "code_version": code_version(),
    }
    n_sessions = entrants.course.n_sessions
    return tags | ({} if n_sessions is None else {"sessions": str(n_sessions)})


def _of_null(evaluated: Evaluated, protocol: str) -> list[Row]:
    """Return what one subject's permutations found, which are of the strict protocol."""
    if "strict" not in evaluated.scores:
        return []
    measured = evaluated.measured
    return significance_rows(
        evaluated.null,
        subject=measured.subject,
        families=measured.families,
        n_images=measured.n_images,
        protocol=protocol,
    )


def _similarity(
    command: Evaluate,
    entrants: LineUp,
    evaluated: list[Evaluated],
    published: tuple[PublishedRdms, np.ndarray] | None,
    console: Console,
) -> list[dict[str, list[RsaScore]]]:
    """Return each subject's representational similarity by system: to its own repeats, and to published RDMs."""
    options: dict[str, Any] = {"n_bootstraps": command.bootstraps}
    found: list[dict[str, list[RsaScore]]] = []
    for of in evaluated if command.rsa else ():
        rng = np.random.default_rng(command.seed)
        try:
            found.append({label: list(rsa(p, of.measured, rng=rng, **options)) for label, p in of.predictions.items()})
        except ValueError as error:  # of these patterns there are no dissimilarities; the scores stand all the same
            console.print(f"{of.subject}: no representational similarity: {error}")
    if command.rdms is not None and published is not None:
        rdms, rows = published
        for subject in entrants.subjects:
            rng = np.random.default_rng(command.seed)
            about = {"subject": subject, "roi": command.rdms.stem, "rng": rng} | options
            predicted = entrants.predict(subject, rows)
            found.append({name: [compare_rdms(rdm(p), rdms.rdms, **about)] for name, p in predicted.items()})
    return found


def _cross_validated(entrants: LineUp, subject: str, n_folds: int, console: Console) -> CrossValidated:
    """Return the baselines' scores over folds."""
    return cross_validate(
        entrants.store.subject(subject),
        entrants.tokens,
        entrants.split,
        pictures=entrants.store.picture_digests(),
        baselines=entrants.baselines,
        n_folds=n_folds,
        n_sessions=entrants.course.n_sessions,
        preprocessing=entrants.course.preprocessing,
        seed=entrants.course.seed,
        tell=console.print,
    )


def main() -> None:
    """Run the command line."""

    def command(options: Annotated[Evaluate, arg(name="")]) -> None:
        """Score models and baselines on held-out images, under either protocol, or both."""
        evaluate(options)

    run(command, program=PROGRAM, description=__doc__)


if __name__ == "__main__":
    main()

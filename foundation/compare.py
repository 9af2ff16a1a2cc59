"""``python -m foundation.compare``: the paper's comparison table on any store: recipes, and baselines beside them.

A recipe that has no finished run of these settings and data is pretrained first, by ``python -m foundation.pretrain``
in a process of its own; called again after an interruption, the command goes on where it was.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import arg

from data.command_line import CommonOptions, Session, begin, progress_bar, run
from data.splits import split_of
from foundation.checkpoint import load_model, read_description
from foundation.config import Recipe
from foundation.evaluation.baselines import BASELINES
from foundation.evaluation.compare import score_subject
from foundation.evaluation.evaluated import check_names
from foundation.evaluation.score import Scores, merge_scores
from foundation.evaluation.table import print_scores
from foundation.model.encoding_model import EncodingModel
from foundation.recipe_options import Opened, opened
from foundation.recipes import recipe_named
from foundation.score_files import ScoreFiles
from foundation.tracking.runs import TrackedRun, tracking_uri
from foundation.tracking.scores import log_scores
from foundation.training.course import FINAL
from foundation.training.run import code_version, finished_runs, unfinished_runs

PROGRAM = "python -m foundation.compare"
PRETRAIN = "foundation.pretrain"
FROM_SCRATCH = " from scratch"
"""What follows a recipe's name where each subject has a run of its own."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare recipes and baselines."""

    store: str | None = None
    """Store's path or URL (default: the first recipe's, else the embedded phantom)."""
    subjects: tuple[str, ...] = ()
    """Subjects to pool and to score, by number or name (default: the first recipe's)."""
    encoder: str | None = None
    """Encoder whose tokens everything learns from (default: the first recipe's)."""
    sessions: int | None = None
    """Learn from the first N sessions of each subject (default: all)."""
    recipes: tuple[str, ...] = ("base", "single-mamba", "single-transformer", "single-gru", "single-mlp")
    """Recipes to pretrain on the subjects together; the first is the one that the run in MLflow is known by."""
    scratch: tuple[str, ...] = ()
    """Recipes to train on each subject alone."""
    baselines: tuple[str, ...] = BASELINES
    """Baselines to fit on the same tokens and images."""
    bootstraps: int = 1000
    """Resamples of the images that intervals are made of."""
    json: Path | None = None
    """File for the rows as JSON; `NAME.comparisons.json` beside it has the paired differences."""
    csv: Path | None = None
    """File for the rows as CSV."""
    seed: int = 0
    """Seed of resamples and of the baselines; a recipe has its own."""
    session: CommonOptions = Session()


def compare(command: Compare) -> None:
    """Run the command."""
    begin(command.session)
    console = Console(soft_wrap=True)
    _check(command)
    first = recipe_named((*command.recipes, *command.scratch)[0])
    data = opened(_on(first, command, store=command.store, subjects=command.subjects), tell=console.print)
    systems: dict[str, dict[str, Path]] = {name: {} for name in data.subjects}
    for name, label, groups in (
        *((name, name, [data.subjects]) for name in command.recipes),
        *((name, name + FROM_SCRATCH, [[s] for s in data.subjects]) for name in command.scratch),
    ):
        for subjects in groups:
            recipe = _on(recipe_named(name), command, store=data.where, subjects=tuple(subjects))
            directory = trained(recipe, data, tell=console.print) / FINAL
            for subject in subjects:
                systems[subject][label] = directory
    leading = next(iter(systems[data.subjects[0]]))
    encoder = command.encoder or first.data.encoder
    with TrackedRun.start(
        f"compare-{data.store.name}", kind="comparison", config=_config(command), tags=_tags(command, data, encoder)
    ).ending() as tracked:
        scores = _scored(command, data, encoder, systems)
        print_scores(scores)
        # Before anything is logged: a server that has gone away must not cost the files.
        files = ScoreFiles(json=command.json, csv=command.csv)
        files.write(scores.rows, scores.comparisons, scores.notes, tell=console.print)
        log_scores(tracked, scores, system=leading)
    console.print(f"the run compare-{data.store.name} is in {tracking_uri()}")


def _check(command: Compare) -> None:
    """Refuse what is wrong by itself, before anything is trained."""
    names = (*command.recipes, *command.scratch)
    if not names:
        raise ValueError("--recipes and --scratch name nothing to train; name one recipe at least, such as base")
    encoders = {name: command.encoder or recipe_named(name).data.encoder for name in names}
    if len(set(encoders.values())) > 1:
        told = ", ".join(f"{name} from {encoder}" for name, encoder in encoders.items())
        raise ValueError(
            f"the recipes learn from different tokens: {told}; compare those of one encoder, or give one for all, such "
            f"as --encoder {encoders[names[0]]}"
        )
    check_names((), command.baselines)
    if command.bootstraps < 0:
        raise ValueError(f"--bootstraps {command.bootstraps} must be at least 0")
    ScoreFiles(json=command.json, csv=command.csv).check()


def _on(recipe: Recipe, command: Compare, *, store: str | None, subjects: tuple[str, ...]) -> Recipe:
    """Return the recipe on the data that are compared, by the names that `foundation.pretrain` gives them."""
    if store is not None and "://" not in store:
        store = str(Path(store).resolve())
    given = {"store": store, "subjects": subjects, "encoder": command.encoder, "sessions": command.sessions}
    return replace(recipe, data=replace(recipe.data, **{name: value for name, value in given.items() if value}))


def trained(recipe: Recipe, data: Opened, *, tell: Callable[[str], None]) -> Path:
    """Return the directory of a finished run of `recipe`; one is trained, or gone on with, where there is none.

    Raises
    ------
    ValueError
        If the training fails.
    KeyboardInterrupt
        If it is interrupted.
    """
    who, digest = list(recipe.data.subjects), data.store.digest(list(recipe.data.subjects), recipe.data.encoder)
    if found := finished_runs(recipe, digest):
        told = f"{recipe.name} on {', '.join(who)}: run {found[0].name}, finished before"
        tell("; ".join([told, *other_code(found[0] / FINAL)]))
        return found[0]
    words = [recipe.name, "--store", str(recipe.data.store), "--subjects", *who, "--encoder", recipe.data.encoder]
    words += [] if recipe.data.sessions is None else ["--sessions", str(recipe.data.sessions)]
    words += ["--cluster.engine", "local"] + (["--resume"] if unfinished_runs(recipe, digest) else [])
    tell(f"{recipe.name} on {', '.join(who)}: python -m {PRETRAIN} {' '.join(words)}")
    code = _run_child([sys.executable, "-m", PRETRAIN, *words])
    if code == 130:
        raise KeyboardInterrupt
    found = finished_runs(recipe, digest)
    if code or not found:
        raise ValueError(f"pretraining {recipe.name} on {', '.join(who)} ended with code {code}; its output tells why")
    return found[0]


def other_code(directory: Path) -> list[str]:
    """Return a remark where another version of our code than this one trained the model in `directory`, else none."""
    by, this = read_description(directory)["made_from"].get("code_version", "an unknown version"), code_version()
    return [] if by == this else [f"trained by {by}, this is {this}"]


def _run_child(words: list[str]) -> int:
    """Run a command with our own output, and return its exit code; Ctrl-C reaches it too, and it may take its time."""
    child = subprocess.Popen(words)
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.wait()
        raise


def _scored(command: Compare, data: Opened, encoder: str, systems: dict[str, dict[str, Path]]) -> Scores:
    tokens, split, pictures = data.store.tokens(encoder), split_of(data.store), data.store.picture_digests()
    pooled: dict[Path, EncodingModel] = {}
    found = []
    with progress_bar() as bar:
        task = bar.add_task("scoring", total=len(systems))
        for subject, of_subject in systems.items():
            for directory in of_subject.values():
                if directory not in pooled:
                    pooled[directory] = load_model(directory)[0]
            scores = score_subject(
                {label: pooled[directory] for label, directory in of_subject.items()},
                data.store.subject(subject),
                tokens,
                split,
                pictures=pictures,
                baselines=command.baselines,
                n_sessions=command.sessions,
                seed=command.seed,
                n_bootstraps=command.bootstraps,
            )
            old = [f"{subject}: {label}: {of}" for label, path in of_subject.items() for of in other_code(path)]
            found.append(replace(scores, notes=(*scores.notes, *old)))
            bar.advance(task)
    return merge_scores(found)


def _config(command: Compare) -> dict[str, object]:
    return {
        "recipes": " ".join(command.recipes),
        "scratch": " ".join(command.scratch),
        "baselines": " ".join(command.baselines),
        "bootstraps": command.bootstraps,
        "seed": command.seed,
    }


def _tags(command: Compare, data: Opened, encoder: str) -> dict[str, str]:
    tags = {
        "subjects": " ".join(data.subjects),
        "store": data.where,
        "store_digest": data.store.digest(data.subjects, encoder),
        "seed": str(command.seed),
        "code_version": code_version(),
    }
    return tags | ({} if command.sessions is None else {"sessions": str(command.sessions)})


def main() -> None:
    """Run the command line."""

    def command(options: Annotated[Compare, arg(name="")]) -> None:
        """Train what isn't trained yet, and score recipes and baselines on the same test images, in one table."""
        compare(options)

    run(command, program=PROGRAM, description=__doc__)


if __name__ == "__main__":
    main()

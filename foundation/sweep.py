"""``python -m foundation.sweep``: train a recipe with other settings, several trials at once, and compare them.

Trials see training and validation images only; no test score is made. The best of many validation scores is optimistic.
"""

import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from tyro.conf import Positional, arg

from cluster.config import ClusterConfig
from data.command_line import CommonOptions, Session, begin, run
from data.embedded import embedded_phantom
from data.home import set_home
from data.store import PooledStore
from foundation.config import BackboneConfig, LossConfig, OptimConfig, Recipe
from foundation.recipes import RECIPES, recipe_named
from foundation.tracking.runs import TrackedRun, TrackingError
from foundation.training.run import describe_run, held
from foundation.training.search_space import DEFAULT_SPACE, draws, parse_space, told_settings
from foundation.training.signals import interrupt_on_signal, stop_file_on_signal
from foundation.training.sweep_table import OPTIMISTIC, best_of, recipe_options, tell_outcomes
from foundation.training.sweeps import new_sweep, sweep_named, sweep_to_resume, trials_of
from foundation.training.trials import BEST, Trial

PROGRAM = "python -m foundation.sweep"
NEWEST = "newest"
N_TRIALS = 8


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Train a recipe with other settings."""

    recipe: Positional[str] = "phantom-tiny"
    """The recipe's name, as for foundation.pretrain."""
    trials: int | None = None
    """Trials, the first of which is the recipe as it stands (default: 8, or as many as the sweep has that is resumed;
    more enlarge it)."""
    space: tuple[str, ...] = DEFAULT_SPACE
    """What trials may change: SETTING=log:LOW:HIGH, SETTING=uniform:LOW:HIGH or SETTING=A,B,C, any settings of
    backbone, loss and optim."""
    at_once: int = 2
    """Trials that train at the same time, each in a process with its share of the cores."""
    gpus_per_trial: float = 0.0
    """GPUs that Ray sets aside for a trial; 0.5: two trials share one."""
    early_stop: bool = True
    """Stop a trial that is in the lower half of those that got as far, first after a quarter of the epochs (ASHA)."""
    resume: Annotated[str | None, arg(metavar="[SWEEP]")] = None
    """Go on with a sweep, with its own settings; without a name, the newest of the recipe, space and data given that
    has something left to do."""
    address: str | None = None
    """Ray cluster to join; auto: the one on this machine (default: $RAY_ADDRESS, which a job has, else a new one)."""
    store: str | None = None
    """Store's path or URL (default: the embedded phantom, made if it is missing)."""
    subjects: tuple[str, ...] = ()
    """Subjects to pool, by number or name."""
    encoder: str = "gabor"
    """Encoder whose tokens are read."""
    parcels: str = "auto:30"
    """ROIs of Stage 1, as for foundation.pretrain."""
    start: Literal["ridge", "random"] = "ridge"
    """Start of the adapters, as for foundation.pretrain."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of what is drawn and of everything random in each trial."""
    backbone: BackboneConfig = BackboneConfig()
    """Shared backbone, where a trial doesn't change it."""
    loss: LossConfig = LossConfig()
    """Objective, where a trial doesn't change it."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and length, where a trial doesn't change them."""
    session: CommonOptions = Session()

    @classmethod
    def of(cls, recipe: Recipe, **options: Any) -> "Sweep":
        """Return the command that a recipe is without options."""
        data = {name: getattr(recipe.data, name) for name in ("store", "subjects", "encoder", "parcels")}
        own = ("start", "checkpoint_every", "seed", "backbone", "loss", "optim")
        return cls(recipe=recipe.name, **data, **{name: getattr(recipe, name) for name in own}, **options)

    def resolved(self) -> Recipe:
        """Return the recipe with this command's options in place of its own."""
        recipe = recipe_named(self.recipe)
        store = self.store and (self.store if "://" in self.store else str(Path(self.store).resolve()))
        data = replace(recipe.data, store=store, subjects=self.subjects, encoder=self.encoder, parcels=self.parcels)
        return replace(
            recipe,
            data=data,
            backbone=self.backbone,
            loss=self.loss,
            optim=self.optim,
            start=self.start,
            checkpoint_every=self.checkpoint_every,
            seed=self.seed,
        )


def sweep(command: Sweep) -> None:
    """Run the command."""
    begin(command.session)
    console = Console(soft_wrap=True)
    recipe = command.resolved()
    for option, number in (("trials", command.trials), ("at-once", command.at_once)):
        if number is not None and number < 1:
            raise ValueError(f"--{option} {number} must be at least 1")
    space = parse_space(command.space, recipe)
    draws(space, recipe, seed=recipe.seed, n_trials=command.trials or N_TRIALS)  # refused before anything is made
    where = recipe.data.store or embedded_phantom(recipe.data.phantom, tell=console.print)
    store = PooledStore.open(where)
    names = [store.resolve_subject(s) for s in recipe.data.subjects]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"--subjects {' '.join(recipe.data.subjects) or '(none)'} must name at least one, each once")
    directory, tracked = _open_sweep(command, recipe, store.digest(names, recipe.data.encoder), where)
    with held(directory):
        settings = draws(space, recipe, seed=recipe.seed, n_trials=describe_run(directory)["trials"])
        console.print(
            f"sweep {directory.name}: {len(settings)} trials of {recipe.name} on {', '.join(names)} of {where}, "
            f"{command.at_once} at once; scores are of validation images, and test images aren't looked at"
        )
        _carry_out(command, recipe, directory, trials_of(directory, recipe, settings), tracked, console)


def _open_sweep(command: Sweep, recipe: Recipe, data_digest: str, where: str) -> tuple[Path, TrackedRun]:
    """Return the sweep's directory and its run in MLflow: a new one, or the one to resume."""
    if command.resume is not None:
        directory = sweep_to_resume(
            recipe,
            command.space,
            data_digest,
            early_stop=command.early_stop,
            name=None if command.resume == NEWEST else command.resume,
            n_trials=command.trials,
        )
        known = describe_run(directory)
        tracked = TrackedRun(known["tracking_run"], known["tracking_uri"])
        tracked.reopen()
        describe_run(directory, status="running", trials=command.trials or known["trials"])
        return directory, tracked
    directory = new_sweep(recipe)
    config = recipe.to_json() | {"space": dict(word.split("=", 1) for word in command.space)}
    tags = {"recipe": recipe.name, "store": where, "subjects": " ".join(recipe.data.subjects)}
    tracked = TrackedRun.start(directory.name, kind="sweep", config=config, tags=tags)
    describe_run(
        directory,
        status="running",
        created=time.time(),
        data_digest=data_digest,
        recipe=recipe.to_json(),
        space=list(command.space),
        early_stop=command.early_stop,
        trials=command.trials or N_TRIALS,
        store=where,
        tracking_run=tracked.id,
        tracking_uri=tracked.uri,
    )
    return directory, tracked


def _carry_out(
    command: Sweep, recipe: Recipe, directory: Path, trials: list[Trial], tracked: TrackedRun, console: Console
) -> None:
    """Run the trials and compare them; however it ends, the sweep and its run in MLflow say so."""
    home = f" --home {command.session.home}" if command.session.home else ""
    again = f"{PROGRAM} --resume {directory.name}{home}"
    try:
        with interrupt_on_signal():
            from cluster.launch import connect
            from cluster.tune import run_trials

            connect(ClusterConfig(workers=command.at_once, address=command.address))  # first: it sets a SIGTERM handler
            with stop_file_on_signal(directory):
                outcomes = run_trials(
                    trials,
                    at_once=command.at_once,
                    early_stop=command.early_stop,
                    gpus_per_trial=command.gpus_per_trial,
                    stop=directory / "stop",
                    tell=partial(print, flush=True),
                )
        tell_outcomes(outcomes)
        left = [trial for trial in trials if not trial.is_settled]
        failed = [outcome for outcome in outcomes if outcome.status.startswith("failed")]
        if len(left) > len(failed):
            raise KeyboardInterrupt
        best = best_of(outcomes)
        words = ["python", "-m", "foundation.pretrain", recipe.name, *recipe_options(trials[best.trial].recipe)]
        console.print(f"best: trial {best.trial}, validation r {best.best:.4f}: {told_settings(best.settings)}")
        console.print(OPTIMISTIC)
        console.print(f"next: {shlex.join(words)}{home}")
        if failed:
            console.print(f"{len(failed)} failed; try them again with: {again}")
        tracked.tag({"best_trial": str(best.trial), "best_settings": told_settings(best.settings)})
        tracked.log({BEST: best.best or 0.0})
    except (KeyboardInterrupt, SystemExit):
        _end(directory, tracked, "interrupted", "KILLED")
        console.print(f"interrupted; go on with: {again}")
        sys.exit(130)
    except BaseException:
        _end(directory, tracked, "failed", "FAILED")
        console.print(f"failed; once the cause is gone, go on with: {again}")
        raise
    _end(directory, tracked, "finished", "FINISHED")


def _end(directory: Path, tracked: TrackedRun, status: str, in_mlflow: str) -> None:
    describe_run(directory, status=status)
    with suppress(TrackingError):  # how the sweep ended is told anyway, and matters more
        tracked.finish(in_mlflow)


def arguments(args: Sequence[str]) -> tuple[Sweep, list[str]]:
    """Return what the options that aren't given are, and the arguments with a bare ``--resume`` completed.

    They are those of the sweep that is resumed by name, else of the recipe that is named.

    Raises
    ------
    ValueError
        If the recipe is unknown.
    """
    completed: list[str] = []
    for i, word in enumerate(args):
        completed.append(word)
        following = args[i + 1] if i + 1 < len(args) else "-"
        if word == "--resume" and (following.startswith("-") or following in RECIPES):
            completed.append(NEWEST)
    given = dict(pairwise(completed))
    if "--home" in given:
        set_home(given["--home"])
    if given.get("--resume", NEWEST) != NEWEST:
        described = describe_run(sweep_named(given["--resume"]))
        options = {"space": tuple(described["space"]), "early_stop": described["early_stop"]}
        return Sweep.of(Recipe.from_json(described["recipe"]), **options), completed
    first = completed[0] if completed and not completed[0].startswith("-") else None
    named = first or next((word for word in completed if word in RECIPES), "phantom-tiny")
    return Sweep.of(recipe_named(named)), completed


def main() -> None:
    """Run the command line."""
    try:
        defaults, args = arguments(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)

    def command(options: Annotated[Sweep, arg(name="")] = defaults) -> None:
        """Train a recipe with other settings, several trials at once, and compare them on validation images."""
        sweep(options)

    run(command, program=PROGRAM, description=__doc__, args=args)


if __name__ == "__main__":
    main()

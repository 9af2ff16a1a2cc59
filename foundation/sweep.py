"""``python -m foundation.sweep``: train a recipe with other settings, several trials at once, and compare them.

Trials see training and validation images only; no test score is made. The best of many validation scores is optimistic.
"""

import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import arg

from cluster.config import ClusterConfig
from data.command_line import CommonOptions, Session, begin, or_exit, run
from foundation.config import Recipe
from foundation.recipe_options import NEWEST, Opened, RecipeOptions, Words, opened
from foundation.tracking.runs import TrackedRun, TrackingError
from foundation.training.run import describe_run, held
from foundation.training.search_space import DEFAULT_SPACE, draws, parse_space, told_settings
from foundation.training.signals import interrupt_on_signal, stop_file_on_signal
from foundation.training.sweep_table import OPTIMISTIC, best_of, recipe_options, tell_outcomes
from foundation.training.sweeps import new_sweep, sweep_named, sweep_to_resume, trials_of
from foundation.training.trials import BEST, Trial

PROGRAM = "python -m foundation.sweep"
N_TRIALS = 8


@dataclass(frozen=True, kw_only=True)
class Sweep(RecipeOptions):
    """Train a recipe with other settings."""

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
    session: CommonOptions = Session()


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
    data = opened(recipe, tell=console.print)
    directory, tracked = _open_sweep(command, recipe, data)
    with held(directory):
        settings = draws(space, recipe, seed=recipe.seed, n_trials=describe_run(directory)["trials"])
        console.print(
            f"sweep {directory.name}: {len(settings)} trials of {recipe.name} on {', '.join(data.subjects)} of "
            f"{data.where}, {command.at_once} at once; validation images give the scores, test images aren't looked at"
        )
        _carry_out(command, recipe, directory, trials_of(directory, recipe, settings), tracked, console)


def _open_sweep(command: Sweep, recipe: Recipe, data: Opened) -> tuple[Path, TrackedRun]:
    """Return the sweep's directory and its run in MLflow: a new one, or the one to resume."""
    if command.resume is not None:
        directory = sweep_to_resume(
            recipe,
            command.space,
            data.digest,
            early_stop=command.early_stop,
            name=None if command.resume == NEWEST else command.resume,
            n_trials=command.trials,
        )
        with held(directory):
            known = describe_run(directory)
            tracked = TrackedRun(known["tracking_run"], known["tracking_uri"])
            tracked.reopen()
            describe_run(directory, status="running", trials=command.trials or known["trials"])
        return directory, tracked
    directory = new_sweep(recipe)
    config = recipe.to_json() | {"space": dict(word.split("=", 1) for word in command.space)}
    tags = {"recipe": recipe.name, "store": data.where, "subjects": " ".join(recipe.data.subjects)}
    try:
        tracked = TrackedRun.start(directory.name, kind="sweep", config=config, tags=tags)
    except TrackingError:
        directory.rmdir()
        raise
    describe_run(
        directory,
        status="running",
        created=time.time(),
        data_digest=data.digest,
        recipe=recipe.to_json(),
        space=list(command.space),
        early_stop=command.early_stop,
        trials=command.trials or N_TRIALS,
        store=data.where,
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
        If the recipe, or the sweep that is to be resumed, is unknown.
    """
    words = Words.of(args)
    if words.resumed is None:
        return Sweep.of(words.recipe()), words.args
    described = describe_run(sweep_named(words.resumed))
    options = {"space": tuple(described["space"]), "early_stop": described["early_stop"]}
    return Sweep.of(Recipe.from_json(described["recipe"]), **options), words.args


def main() -> None:
    """Run the command line."""
    defaults, args = or_exit(lambda: arguments(sys.argv[1:]))

    def command(options: Annotated[Sweep, arg(name="")] = defaults) -> None:
        """Train a recipe with other settings, several trials at once, and compare them on validation images."""
        sweep(options)

    run(command, program=PROGRAM, description=__doc__, args=args)


if __name__ == "__main__":
    main()

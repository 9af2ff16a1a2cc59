"""``python -m foundation.pretrain``: pretrain a backbone on pooled subjects, score it, track it, register it."""

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import arg

from cluster.config import PRESETS, ClusterConfig, check_batch
from data.command_line import CommonOptions, Session, begin, or_exit, run
from data.preprocess import n_sessions_of
from data.schema import check_name
from data.splits import split_of
from foundation.checkpoint import load_model
from foundation.config import Recipe
from foundation.evaluation.compare import score_subject
from foundation.evaluation.score import merge_scores
from foundation.evaluation.table import print_scores
from foundation.recipe_options import NEWEST, Opened, RecipeOptions, Words, opened
from foundation.tracking.publish import publish
from foundation.tracking.registry import aliases, versions
from foundation.tracking.runs import TrackedRun, TrackingError
from foundation.tracking.scores import log_baselines, log_scores
from foundation.training.course import FINAL, finish_run, start_run, train_run
from foundation.training.engine import LocalEngine
from foundation.training.reporter import Reporter, follow
from foundation.training.run import (
    Plan,
    check_settings,
    describe_run,
    held,
    is_held,
    new_run,
    run_named,
    run_to_resume,
    set_threads,
    unfinished_runs,
)
from foundation.training.signals import interrupt_on_signal, stop_file_on_signal

PROGRAM = "python -m foundation.pretrain"
_ENDED = {"running": "its process is gone"}
N_SAMPLES = 20
"""Single trials that are drawn for each test image, to score the model as a distribution."""


@dataclass(frozen=True, kw_only=True)
class Pretrain(RecipeOptions):
    """Pretrain a backbone on pooled subjects."""

    resume: Annotated[str | None, arg(metavar="[RUN]")] = None
    """Continue a run, with its own recipe, options, store and cluster settings (the last may be changed); without a
    name, the newest unfinished one of the recipe, options and data that are given, on the cluster settings given."""
    cluster: ClusterConfig = ClusterConfig()
    """Where and how it computes."""
    profile: bool = False
    """Write a trace of ten steps by torch's profiler into the run's directory."""
    session: CommonOptions = Session()


def train_here(plan: Plan, tracked: TrackedRun, cluster: ClusterConfig) -> None:
    """Train in this process."""
    set_threads(1)
    describe_run(plan.directory, cluster=cluster.kept())
    with follow(plan.directory) as told, closing(Reporter(tracked, plan.directory)) as reporter:

        def log(metrics: Mapping[str, float], step: int) -> None:
            reporter(metrics, step)
            told()

        status = train_run(plan, partial(LocalEngine, compute=cluster), log, tell=reporter.tell)
    describe_run(plan.directory, status=status)


def pretrain(command: Pretrain) -> None:
    """Run the command."""
    begin(command.session)
    console = Console(soft_wrap=True)
    recipe = command.resolved()
    check_batch(recipe.optim.batch_size, command.cluster)
    if command.resume not in (None, NEWEST):
        check_settings(run_named(command.resume), recipe)
    if command.cluster.engine == "ray":
        _join(command.cluster)
    data = opened(recipe, tell=console.print)
    check_name(_registered_name(recipe, data), "a backbone's name in the registry, which is its store's,")
    directory, tracked = _open_run(command, recipe, data, console)
    subjects, engine = ", ".join(data.subjects), command.cluster.engine
    console.print(f"run {directory.name}: {recipe.name} on {subjects} of {data.where}, engine {engine}")
    plan = Plan(
        recipe=recipe,
        store=data.where,
        directory=directory,
        tracking_uri=tracked.uri,
        tracking_run=tracked.id,
        profile=command.profile,
    )
    with held(directory):
        _carry_out(plan, command, tracked, data, console)


def _join(cluster: ClusterConfig) -> None:
    """Join or start the Ray cluster, before anything is made that it may have no room for."""
    from cluster.launch import check_room, connect

    with interrupt_on_signal():
        connect(cluster)
        check_room(cluster)


def _carry_out(plan: Plan, command: Pretrain, tracked: TrackedRun, data: Opened, console: Console) -> None:
    """Start, train, finish, score and register; however it ends, the run and its run in MLflow say so."""
    directory = plan.directory
    try:
        with interrupt_on_signal():
            start_run(plan, tell=console.print)
            if command.cluster.engine == "local":
                with stop_file_on_signal(directory):
                    train_here(plan, tracked, command.cluster)
            else:
                from cluster.launch import train_on_ray

                with stop_file_on_signal(directory):
                    train_on_ray(plan, command.cluster)
            if describe_run(directory)["status"] != "trained":
                raise KeyboardInterrupt
            finish_run(plan, tell=console.print)
            _score_and_register(plan, data, tracked, console)
    except (KeyboardInterrupt, SystemExit):
        _note(directory, "interrupted")
        console.print(f"interrupted; go on with: {_resume_command(command, directory)}")
        _end(tracked, "KILLED", console)
        sys.exit(130)
    except BaseException:
        _note(directory, "failed")
        again = _resume_command(command, directory)
        console.print(f"failed; once the cause is gone, go on with: {again} (options of --cluster may be added)")
        _end(tracked, "FAILED", console)
        raise
    describe_run(directory, status="finished")
    _end(tracked, "FINISHED", console)


def _note(directory: Path, status: str) -> None:
    """Write how a run ended; where that can't be written, what ended it matters more."""
    with suppress(OSError):
        describe_run(directory, status=status)


def _resume_command(command: Pretrain, directory: Path) -> str:
    """Return what goes on with a run; its options are the run's own."""
    home = f" --home {command.session.home}" if command.session.home else ""
    return f"{PROGRAM} --resume {directory.name}{home}"


def _end(tracked: TrackedRun, status: str, console: Console) -> None:
    """End the run in MLflow; where the server is down, say so, for how the run ended matters more."""
    try:
        tracked.finish(status)
    except TrackingError as error:
        console.print(f"the run's status in MLflow stays as it was: {error}")


def _open_run(command: Pretrain, recipe: Recipe, data: Opened, console: Console) -> tuple[Path, TrackedRun]:
    """Return the run's directory and its run in MLflow: a new one, or the one to resume."""
    if command.resume is not None:
        name = None if command.resume == NEWEST else command.resume
        directory = run_to_resume(recipe, data.digest, name=name)
        with held(directory):
            known = describe_run(directory)
            tracked = TrackedRun(known["tracking_run"], known["tracking_uri"])
            tracked.reopen()
            describe_run(directory, status="running")
        return directory, tracked
    for other in unfinished_runs(recipe, data.digest)[:1]:
        status = str(describe_run(other)["status"])
        state = "trained by another process" if is_held(other) else "not finished: " + _ENDED.get(status, status)
        console.print(
            f"a new run; {other.name} of the same settings is {state} (`--resume {other.name}` goes on with it)"
        )
    tags = {
        "recipe": recipe.name,
        "store": data.where,
        "engine": command.cluster.engine,
        "subjects": " ".join(command.subjects),
    }
    directory = new_run(recipe)
    try:
        tracked = TrackedRun.start(directory.name, kind="pretrain", config=recipe.to_json(), tags=tags)
    except TrackingError:
        directory.rmdir()
        raise
    describe_run(
        directory,
        status="running",
        created=time.time(),
        data_digest=data.digest,
        recipe=recipe.to_json(),
        cluster=command.cluster.kept(),
        store=data.where,
        tracking_run=tracked.id,
        tracking_uri=tracked.uri,
    )
    return directory, tracked


def _score_and_register(plan: Plan, data: Opened, tracked: TrackedRun, console: Console) -> None:
    """Score the finished model beside ridge, print and log the table, register the backbone."""
    console.print("trained; now the scores: samples for each test image, and ridge beside the model")
    recipe, final, store, names = plan.recipe, plan.directory / FINAL, data.store, data.subjects
    model, made_from = load_model(final)
    tokens, split = store.tokens(recipe.data.encoder), split_of(store)
    pictures = store.picture_digests()
    scores = merge_scores(
        score_subject(
            {"manybrains": model},
            store.subject(name),
            tokens,
            split,
            pictures=pictures,
            n_sessions=recipe.data.sessions,
            seed=recipe.seed,
            n_samples=N_SAMPLES,
        )
        for name in names
    )
    print_scores(scores)
    log_scores(tracked, scores)
    tags = {key: str(made_from[key]) for key in ("store", "store_digest", "split_digest", "preprocessing_digest")}
    tags |= {"code_version": made_from["code_version"], "subjects": " ".join(names), "seed": str(recipe.seed)}
    tags |= {"sessions": str(recipe.data.sessions)} if recipe.data.sessions is not None else {}
    tracked.tag(tags)
    log_baselines(scores, tags=tags, parent=tracked.id, uri=tracked.uri)
    name = _registered_name(recipe, data)
    lineage = made_from | {"recipe_name": recipe.name, "seed": recipe.seed}
    lineage |= {"sessions": recipe.data.sessions} if recipe.data.sessions is not None else {}
    known = [version for version in versions(name, uri=tracked.uri) if version.run_id == tracked.id]
    registered = (  # a run that was interrupted right here has its version already
        known[0]
        if known
        else publish(tracked, name=name, kind="backbone", backbone=final, adapter=None, lineage=lineage, scores=scores)
    )
    tracked.tag({"backbone": registered.label})
    alias = ", ".join(aliases(registered, uri=tracked.uri)) or "no alias"
    console.print(f"registered backbone {registered.label} as {alias}; runs are in {tracked.uri}")
    unseen = [name for name in store.subjects if name not in names and store.subject(name).session is not None]
    if unseen:
        subject = "subj05" if "subj05" in unseen else unseen[0]
        n_sessions = min(3, n_sessions_of(store.subject(subject)) or 0)
        console.print(f"next: adapt --subject {subject} --sessions {n_sessions}   (a subject that it hasn't seen)")
    console.print("then: make ui   (compare the runs in MLflow)")


def _registered_name(recipe: Recipe, data: Opened) -> str:
    """Return the backbone's name in the registry: its recipe's, or that of the store it was told to use."""
    return recipe.name if recipe.data.store is None else data.store.name


def arguments(args: Sequence[str]) -> tuple[Pretrain, list[str]]:
    """Return what the options that aren't given are, and the arguments with a bare ``--resume`` completed.

    They are those of the run that is resumed by name, else of the recipe that is named; and of the cluster's preset.

    Raises
    ------
    ValueError
        If the recipe, or the run that is to be resumed, is unknown.
    """
    words = Words.of(args)
    preset = PRESETS.get(words.value_of("--cluster.preset") or "")
    if words.resumed is None:
        return Pretrain.of(words.recipe(), cluster=preset or ClusterConfig()), words.args
    described = describe_run(run_named(words.resumed))
    try:
        cluster = preset or ClusterConfig(**described["cluster"])
        return Pretrain.of(Recipe.from_json(described["recipe"]), cluster=cluster), words.args
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"run {words.resumed!r} can't be read by this version ({error}); start a new run") from error


def main() -> None:
    """Run the command line."""
    defaults, args = or_exit(lambda: arguments(sys.argv[1:]))

    def command(options: Annotated[Pretrain, arg(name="")] = defaults) -> None:
        """Pretrain a backbone on pooled subjects, score it beside ridge, track it in MLflow, register it."""
        pretrain(options)

    run(command, program=PROGRAM, description=__doc__, args=args)


if __name__ == "__main__":
    main()

"""``python -m foundation.pretrain``: pretrain a backbone on pooled subjects, score it, track it, register it."""

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from tyro.conf import Positional, arg

from cluster.config import PRESETS, ClusterConfig
from data.command_line import CommonOptions, Session, begin, run
from data.embedded import embedded_phantom
from data.home import set_home
from data.preprocess import n_sessions_of
from data.splits import split_of
from data.store import PooledStore
from foundation.checkpoint import load_model
from foundation.config import BackboneConfig, ComputeConfig, LossConfig, OptimConfig, Recipe
from foundation.evaluation.compare import score_subject
from foundation.evaluation.score import merge_scores
from foundation.evaluation.table import print_scores
from foundation.recipes import RECIPES, recipe_named
from foundation.tracking.registry import aliases, register
from foundation.tracking.runs import TrackedRun, TrackingError, tracking_uri
from foundation.tracking.scores import log_scores
from foundation.training.course import FINAL, finish_run, start_run, train_run
from foundation.training.engine import LocalEngine
from foundation.training.reporter import Reporter, follow
from foundation.training.run import (
    Plan,
    describe_run,
    held,
    new_run,
    run_to_resume,
    runs_dir,
    set_threads,
    unfinished_runs,
)
from foundation.training.signals import interrupt_on_signal, stop_file_on_signal

PROGRAM = "python -m foundation.pretrain"
NEWEST = "newest"
DEFAULT_RECIPE = "phantom-tiny"
N_SAMPLES = 20
"""Single trials that are drawn for each test image, to score the model as a distribution."""


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pretrain a backbone on pooled subjects."""

    recipe: Positional[str] = DEFAULT_RECIPE
    """The run's name among the recipes: phantom-tiny, phantom-standard, base, chasm, v4."""
    store: str | None = None
    """Store's path or URL (default: the embedded phantom, made if it is missing)."""
    subjects: tuple[str, ...] = ()
    """Subjects to pool, by number or name."""
    resume: Annotated[str | None, arg(metavar="[RUN]")] = None
    """Continue a run, with its own recipe, options, store and cluster settings (the last may be changed); without a
    name, the newest unfinished one of the recipe, options and data that are given."""
    encoder: str = "gabor"
    """Encoder whose tokens are read."""
    parcels: str = "auto:30"
    """ROIs of Stage 1: sequential:30, compact:30, auto:30 (compact where positions are known), functional:30,
    roi:FAMILY or atlas:PATH."""
    shuffle_buffer: int | None = None
    """Samples of each subject within which the order is shuffled (default: the whole epoch)."""
    start: Literal["ridge", "random"] = "ridge"
    """Start of the adapters: a closed-form path beside the network, its fields handed to the network; or neither."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept; the best model by validation is kept besides."""
    seed: int = 0
    """Seed of everything random."""
    backbone: BackboneConfig = BackboneConfig()
    """Shared backbone."""
    loss: LossConfig = LossConfig()
    """Objective."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and length."""
    cluster: ClusterConfig = ClusterConfig()
    """Where and how it computes."""
    profile: bool = False
    """Write a trace of ten steps by torch's profiler into the run's directory."""
    session: CommonOptions = Session()

    @classmethod
    def of(cls, recipe: Recipe, cluster: ClusterConfig | None = None) -> "Pretrain":
        """Return the command that a recipe is without options."""
        return cls(
            recipe=recipe.name,
            store=recipe.data.store,
            subjects=recipe.data.subjects,
            encoder=recipe.data.encoder,
            parcels=recipe.data.parcels,
            shuffle_buffer=recipe.data.shuffle_buffer,
            start=recipe.start,
            checkpoint_every=recipe.checkpoint_every,
            keep_checkpoints=recipe.keep_checkpoints,
            seed=recipe.seed,
            backbone=recipe.backbone,
            loss=recipe.loss,
            optim=recipe.optim,
            cluster=cluster or ClusterConfig(),
        )

    def resolved(self) -> Recipe:
        """Return the recipe with this command's options in place of its own."""
        recipe = recipe_named(self.recipe)
        store = self.store and (self.store if "://" in self.store else str(Path(self.store).resolve()))
        data = replace(
            recipe.data,
            store=store,
            subjects=self.subjects,
            encoder=self.encoder,
            parcels=self.parcels,
            shuffle_buffer=self.shuffle_buffer,
        )
        return replace(
            recipe,
            data=data,
            backbone=self.backbone,
            loss=self.loss,
            optim=self.optim,
            start=self.start,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
            seed=self.seed,
        )


def train_here(plan: Plan, tracked: TrackedRun, compute: ComputeConfig) -> None:
    """Train in this process."""
    set_threads(1)
    with follow(plan.directory) as told, closing(Reporter(tracked, plan.directory)) as reporter:

        def log(metrics: Mapping[str, float], step: int) -> None:
            reporter(metrics, step)
            told()

        status = train_run(plan, partial(LocalEngine, compute=compute), log, tell=reporter.tell)
    describe_run(plan.directory, status=status)


def pretrain(command: Pretrain) -> None:
    """Run the command."""
    begin(command.session)
    console = Console(soft_wrap=True)
    recipe = command.resolved()
    where = recipe.data.store or embedded_phantom(recipe.data.phantom, tell=console.print)
    store = PooledStore.open(where)
    names = [store.resolve_subject(s) for s in recipe.data.subjects]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"--subjects {' '.join(recipe.data.subjects) or '(none)'} must name at least one, each once")
    data_digest = store.digest(names, recipe.data.encoder)
    directory, tracked = _open_run(command, recipe, data_digest, where, console)
    console.print(
        f"run {directory.name}: {recipe.name} on {', '.join(names)} of {where}, engine {command.cluster.engine}"
    )
    plan = Plan(
        recipe=recipe,
        store=where,
        directory=directory,
        tracking_uri=tracked.uri,
        tracking_run=tracked.id,
        profile=command.profile,
    )
    with held(directory):
        _carry_out(plan, command, tracked, store, names, console)


def _carry_out(
    plan: Plan, command: Pretrain, tracked: TrackedRun, store: PooledStore, names: list[str], console: Console
) -> None:
    """Start, train, finish, score and register; however it ends, the run and its run in MLflow say so."""
    directory = plan.directory
    try:
        with interrupt_on_signal():
            start_run(plan, tell=console.print)
            if command.cluster.engine == "local":
                with stop_file_on_signal(directory):
                    train_here(plan, tracked, command.cluster)
            else:
                from cluster.launch import connect, train_on_ray

                connect(command.cluster)  # first: Ray then sets a SIGTERM handler of its own, which raises SystemExit
                with stop_file_on_signal(directory):
                    train_on_ray(plan, command.cluster)
            if describe_run(directory)["status"] == "interrupted":
                raise KeyboardInterrupt
            finish_run(plan, tell=console.print)
            _score_and_register(plan, store, names, tracked, console)
    except (KeyboardInterrupt, SystemExit):
        describe_run(directory, status="interrupted")
        console.print(f"interrupted; go on with: {_resume_command(command, directory)}")
        _end(tracked, "KILLED", console)
        sys.exit(130)
    except BaseException:
        describe_run(directory, status="failed")
        console.print(f"failed; once the cause is gone, go on with: {_resume_command(command, directory)}")
        _end(tracked, "FAILED", console)
        raise
    describe_run(directory, status="finished")
    _end(tracked, "FINISHED", console)


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


def _open_run(
    command: Pretrain, recipe: Recipe, data_digest: str, where: str, console: Console
) -> tuple[Path, TrackedRun]:
    """Return the run's directory and its run in MLflow: a new one, or the one to resume."""
    cluster = asdict(command.cluster)
    if command.resume is not None:
        name = None if command.resume == NEWEST else command.resume
        directory = run_to_resume(recipe, data_digest, name=name)
        with held(directory):
            known = describe_run(directory)
            tracked = TrackedRun(known["tracking_run"], known["tracking_uri"])
            tracked.reopen()
            describe_run(directory, status="running", cluster=cluster)
        return directory, tracked
    for other in unfinished_runs(recipe, data_digest)[:1]:
        status = describe_run(other)["status"]
        console.print(
            f"run {other.name} of the same settings isn't finished ({status}); `--resume {other.name}` goes on with it"
        )
    tags = {
        "recipe": recipe.name,
        "store": where,
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
        data_digest=data_digest,
        recipe=recipe.to_json(),
        cluster=cluster,
        store=where,
        tracking_run=tracked.id,
        tracking_uri=tracked.uri,
    )
    return directory, tracked


def _score_and_register(
    plan: Plan, store: PooledStore, names: list[str], tracked: TrackedRun, console: Console
) -> None:
    """Score the finished model beside ridge, print and log the table, register the backbone."""
    recipe, final = plan.recipe, plan.directory / FINAL
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
            seed=recipe.seed,
            n_samples=N_SAMPLES,
        )
        for name in names
    )
    print_scores(scores)
    log_scores(tracked, scores)
    tracked.artifact(final, "backbone")
    keys = ("store", "store_digest", "encoder_digest", "split_digest", "preprocessing_digest", "code_version", "step")
    lineage = {key: str(made_from[key]) for key in keys} | {"subjects": " ".join(names), "seed": str(recipe.seed)}
    lineage |= {"recipe": recipe.name, "validation_voxel_r": f"{made_from['validation_voxel_r']:.6f}"}
    name = recipe.name if recipe.data.store is None else store.name
    registered = register(name, tracked, "backbone", kind="backbone", tags=lineage)
    tracked.tag({"backbone": registered.label})
    alias = aliases(registered)[0]
    console.print(f"registered backbone {registered.label} as {alias}; runs are in {tracking_uri()}")
    unseen = [name for name in store.subjects if name not in names and store.subject(name).session is not None]
    if unseen:
        subject = "subj05" if "subj05" in unseen else unseen[0]
        n_sessions = min(3, n_sessions_of(store.subject(subject)) or 0)
        console.print(f"next: adapt --subject {subject} --sessions {n_sessions}   (a subject that it hasn't seen)")
    console.print("then: make ui   (compare the runs in MLflow)")


def _value_of(args: Sequence[str], option: str) -> str | None:
    """Return what `args` give to an option, be it ``--option value`` or ``--option=value``."""
    for i, word in enumerate(args):
        if word == option and i + 1 < len(args):
            return args[i + 1]
        if word.startswith(f"{option}="):
            return word.removeprefix(f"{option}=")
    return None


def arguments(args: Sequence[str]) -> tuple[Pretrain, list[str]]:
    """Return what the options that aren't given are, and the arguments with a bare ``--resume`` completed.

    They are those of the run that is resumed by name, else of the recipe that is named; and of the cluster's preset.

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
    home = _value_of(completed, "--home")
    set_home(None if home is None else Path(home))
    preset = PRESETS.get(_value_of(completed, "--cluster.preset") or "")
    resumed = runs_dir() / (_value_of(completed, "--resume") or NEWEST)
    if (resumed / "run.json").exists():
        described = describe_run(resumed)
        cluster = preset or ClusterConfig(**described["cluster"])
        return Pretrain.of(Recipe.from_json(described["recipe"]), cluster), completed
    first = completed[0] if completed and not completed[0].startswith("-") else None
    named = first or next((word for word in completed if word in RECIPES), DEFAULT_RECIPE)
    return Pretrain.of(recipe_named(named), preset), completed


def main() -> None:
    """Run the command line."""
    try:
        defaults, args = arguments(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)

    def command(options: Annotated[Pretrain, arg(name="")] = defaults) -> None:
        """Pretrain a backbone on pooled subjects, score it beside ridge, track it in MLflow, register it."""
        pretrain(options)

    run(command, program=PROGRAM, description=__doc__, args=args)


if __name__ == "__main__":
    main()

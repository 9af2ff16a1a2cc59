"""``python -m foundation.pretrain``: pretrain a backbone on pooled subjects, score it, track it, register it."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from tyro.conf import Positional, arg

from cluster.config import ClusterConfig
from data.command_line import CommonOptions, Session, begin, run
from data.embedded import embedded_phantom
from data.preprocess import n_sessions_of
from data.splits import split_of
from data.store import PooledStore
from foundation.checkpoint import load_model
from foundation.config import BackboneConfig, LossConfig, OptimConfig, Recipe
from foundation.evaluation.compare import score_subject
from foundation.evaluation.score import merge_scores
from foundation.evaluation.table import print_scores
from foundation.recipes import RECIPES, recipe_named
from foundation.tracking.registry import aliases, register
from foundation.tracking.runs import TrackedRun, tracking_uri
from foundation.tracking.scores import log_scores
from foundation.training.course import FINAL, finish_run, start_run, train_run
from foundation.training.engine import LocalEngine
from foundation.training.reporter import Reporter, follow
from foundation.training.run import Plan, describe_run, new_run, run_digest, run_to_resume, set_threads
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
    """Continue a run; without a name, the newest unfinished one of the same recipe and store."""
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
    seed: int = 0
    """Seed of everything random."""
    backbone: BackboneConfig = BackboneConfig()
    """Shared backbone."""
    loss: LossConfig = LossConfig()
    """Objective."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and length."""
    cluster: ClusterConfig = ClusterConfig()
    """Where it computes."""
    session: CommonOptions = Session()

    @classmethod
    def of(cls, recipe: Recipe) -> "Pretrain":
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
            seed=recipe.seed,
            backbone=recipe.backbone,
            loss=recipe.loss,
            optim=recipe.optim,
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
            seed=self.seed,
        )


def train_here(plan: Plan, tracked: TrackedRun) -> None:
    """Train in this process."""
    set_threads(1)
    reporter = Reporter(tracked, plan.directory)
    with follow(plan.directory) as told:

        def log(metrics: Mapping[str, float], step: int) -> None:
            reporter(metrics, step)
            told()

        status = train_run(plan, LocalEngine, log)
    reporter.flush()
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
    digest = run_digest(recipe, store.digest(names, recipe.data.encoder))
    directory, tracked = _open_run(command, recipe, digest, where)
    console.print(
        f"run {directory.name}: {recipe.name} on {', '.join(names)} of {where}, engine {command.cluster.engine}"
    )
    plan = Plan(recipe=recipe, store=where, directory=directory, tracking_uri=tracked.uri, tracking_run=tracked.id)
    try:
        with interrupt_on_signal():
            start_run(plan, tell=console.print)
            if command.cluster.engine == "local":
                with stop_file_on_signal(directory):
                    train_here(plan, tracked)
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
        tracked.finish("KILLED")
        console.print(f"interrupted; go on with: {PROGRAM} {recipe.name} --resume {directory.name}")
        sys.exit(130)
    except BaseException:
        describe_run(directory, status="failed")
        tracked.finish("FAILED")
        raise
    tracked.finish()
    describe_run(directory, status="finished")


def _open_run(command: Pretrain, recipe: Recipe, digest: str, where: str) -> tuple[Path, TrackedRun]:
    """Return the run's directory and its run in MLflow: a new one, or the one to resume."""
    if command.resume is not None:
        directory = run_to_resume(digest, name=None if command.resume == NEWEST else command.resume)
        known = describe_run(directory, status="running")
        tracked = TrackedRun(known["tracking_run"], known["tracking_uri"])
        tracked.reopen()
        return directory, tracked
    directory = new_run(recipe)
    tags = {
        "recipe": recipe.name,
        "store": where,
        "engine": command.cluster.engine,
        "subjects": " ".join(command.subjects),
    }
    tracked = TrackedRun.start(directory.name, kind="pretrain", config=recipe.to_json(), tags=tags)
    describe_run(
        directory,
        status="running",
        created=time.time(),
        digest=digest,
        recipe=recipe.to_json(),
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


def arguments(args: Sequence[str]) -> tuple[Recipe, list[str]]:
    """Return the recipe that `args` name and the arguments with a bare ``--resume`` completed.

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
    first = completed[0] if completed and not completed[0].startswith("-") else None
    named = first or next((word for word in completed if word in RECIPES), DEFAULT_RECIPE)
    return recipe_named(named), completed


def main() -> None:
    """Run the command line."""
    try:
        recipe, args = arguments(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)

    def command(options: Annotated[Pretrain, arg(name="")] = Pretrain.of(recipe)) -> None:
        """Pretrain a backbone on pooled subjects, score it beside ridge, track it in MLflow, register it."""
        pretrain(options)

    run(command, program=PROGRAM, description=__doc__, args=args)


if __name__ == "__main__":
    main()

"""What pretraining is worth for a new subject: adapters beside baselines that learned from the same sessions.

::

    python -m tests.experiments.curves fit DIR --backbone RUN/final --subject 5 --curve 1,2,3,5,10 [--scratch]
    python -m tests.experiments.curves table DIR [--goal 1 3]

A point's predictions are kept in DIR when it is done, so an interrupted fit goes on with the next one. `fit` may be
called for several backbones, which makes the matrix of leave-one-subject-out. ``from scratch`` is the same model and
recipe trained on the subject's sessions alone, for as many epochs as give it `SCRATCH_STEPS` steps, its best epoch by
validation kept. ``parts`` of ours are scored beside it: closed form alone, network alone.
"""

import dataclasses
import json
import math
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.console import Console

from adapters.backbone_outputs import BackboneOutputs
from adapters.course import Settings, adapt_subject, check_subject, gather
from adapters.fit import Method
from data.command_line import CommonOptions, Session, begin
from data.preprocess import Preprocessing, samples
from data.splits import split_of
from data.store import PooledStore
from foundation.checkpoint import load_model, read_description
from foundation.config import Recipe
from foundation.evaluation.baselines import predict
from foundation.evaluation.curve import curve_rows, print_curve
from foundation.evaluation.figures import learning_curve
from foundation.evaluation.measured import measured_part
from foundation.evaluation.model_outputs import model_prediction
from foundation.evaluation.score import Scores, merge_scores, score
from foundation.training.course import FINAL, finish_run, start_run, train_run
from foundation.training.engine import LocalEngine
from foundation.training.run import Plan
from tests.experiments.parts import keep_predictions

OURS, SCRATCH = "manybrains", "from scratch"
SCRATCH_STEPS = 300
N_BOOTSTRAPS = 1000


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Fit the points that aren't there."""

    directory: tyro.conf.Positional[Path]
    """Where predictions are kept."""
    backbone: Path
    """Model directory of the backbone."""
    subject: str
    """Subject that the backbone hasn't seen."""
    curve: str
    """Numbers of sessions."""
    store: str | None = None
    """Store, if not the backbone's."""
    method: Method = "head"
    """How the network's readouts are fitted."""
    baselines: tuple[str, ...] = ("ridge", "banded-ridge", "stacked")
    """Baselines to fit beside."""
    scratch: bool = False
    """Train the model from scratch, too."""
    seed: int = 0
    """Seed of everything random."""
    threads: int = 1
    """Threads to compute with."""
    session: CommonOptions = Session()


@dataclass(frozen=True, kw_only=True)
class Tabulate:
    """Print the curves of what is finished, and draw them."""

    directory: tyro.conf.Positional[Path]
    """Where predictions are kept."""
    goal: tuple[int, int] | None = None
    """Compare ours after so many sessions with ridge after so many."""
    session: CommonOptions = Session()


def fit(command: Fit) -> None:
    """Fit each point that isn't there."""
    begin(command.session)
    torch.set_num_threads(command.threads)
    console = Console(soft_wrap=True)
    description = read_description(command.backbone)
    made_from = description["made_from"]
    store = PooledStore.open(command.store or made_from["store"])
    wanted = sorted(int(n) for n in command.curve.split(","))
    subject = check_subject(
        store, command.subject, made_from, most_sessions=wanted[-1], backbone=str(command.backbone), allow_seen=False
    )
    directory = command.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    settings = Settings(method=command.method, preprocessing=Preprocessing(), seed=command.seed)
    for n_sessions in wanted:
        path = directory / f"{subject}-{n_sessions}s.npz"
        if path.exists():
            continue
        since = time.perf_counter()
        material = gather(store, subject, made_from, n_sessions=n_sessions, settings=settings)
        model, _ = load_model(command.backbone)
        outputs = BackboneOutputs(
            load_model(command.backbone)[0],
            material.tokens,
            backbone=description["weights"],
            images=store.image_ids(),
        )
        adapted = adapt_subject(
            model, material, made_from, settings=settings, outputs=outputs, log=lambda metrics, step: None
        )
        _, rows = measured_part(store.subject(subject), material.split, n_sessions=n_sessions)
        found = {OURS: model_prediction(model, material.tokens, subject, rows)}
        took = time.perf_counter() - since
        adapter = model.adapter(subject)
        for part, share in (("network alone", 1), ("closed form alone", 0)):
            adapter.network_share.fill_(share)
            found[f"{OURS}, {part}"] = model_prediction(model, material.tokens, subject, rows)
        for name in command.baselines:
            found[name] = predict(name, material.tokens, material.train, rows, seed=command.seed)
        if command.scratch:
            found[SCRATCH] = scratch(made_from, store, subject, n_sessions, directory, len(material.train))
        keep_predictions(path, found)
        about = {"store": str(store.path), "subject": subject, "n_sessions": n_sessions, "n_train": len(material.train)}
        path.with_suffix(".json").write_text(json.dumps(about | {"composition": adapted.composition}))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        console.print(f"{path.stem}: adapted in {took:.0f} s, peak so far {peak:.1f} GiB; {adapted.told()}")


def scratch(
    made_from: dict[str, Any], store: PooledStore, subject: str, n_sessions: int, directory: Path, n_train: int
) -> np.ndarray:
    """Return what the backbone's recipe predicts for the test images, trained on the subject's sessions alone."""
    recipe = Recipe.from_json(made_from["recipe"])
    data = dataclasses.replace(recipe.data, store=str(store.path), subjects=(subject,), sessions=n_sessions)
    steps_per_epoch = max(1, n_train // recipe.optim.batch_size)
    epochs = max(recipe.optim.epochs, math.ceil(SCRATCH_STEPS / steps_per_epoch))
    plan = Plan(
        recipe=dataclasses.replace(recipe, data=data, optim=dataclasses.replace(recipe.optim, epochs=epochs)),
        store=str(store.path),
        directory=directory / f"scratch-{subject}-{n_sessions}s",
        tracking_uri="",
        tracking_run="",
    )
    plan.directory.mkdir(exist_ok=True)
    start_run(plan)
    train_run(plan, LocalEngine, lambda metrics, step: None)
    finish_run(plan)
    model, _ = load_model(plan.directory / FINAL)
    _, rows = measured_part(store.subject(subject), split_of(store), n_sessions=n_sessions)
    return model_prediction(model, store.tokens(recipe.data.encoder), subject, rows)


def read_point(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what is told of a point, and its predictions."""
    with np.load(path) as kept:
        return json.loads(path.with_suffix(".json").read_text()), {name: kept[name] for name in kept.files}


def scored(about: dict[str, Any], predictions: dict[str, np.ndarray]) -> Scores:
    """Return the scores of predictions for a point's test images."""
    store = PooledStore.open(about["store"])
    subject, split = store.subject(about["subject"]), split_of(store)
    measured, _ = measured_part(subject, split, n_sessions=about["n_sessions"])
    training = samples(subject, split, "train", n_sessions=about["n_sessions"]).responses
    rng = np.random.default_rng(0)
    return score(predictions, measured, training_mean=training.mean(0), n_bootstraps=N_BOOTSTRAPS, rng=rng)


def tabulate(command: Tabulate) -> None:
    """Print and draw the curve of all subjects; of a goal, the paired differences."""
    begin(command.session)
    directory, console = command.directory.resolve(), Console(soft_wrap=True)
    points: dict[int, list[Scores]] = {}
    n_train: dict[int, int] = {}
    of_point: dict[tuple[str, int], tuple[dict[str, Any], dict[str, np.ndarray]]] = {}
    for path in sorted(directory.glob("*.npz")):
        about, predictions = read_point(path)
        of_point[about["subject"], about["n_sessions"]] = about, predictions
        points.setdefault(about["n_sessions"], []).append(scored(about, predictions))
        n_train[about["n_sessions"]] = about["n_train"]
    curve = [(n, merge_scores(scores)) for n, scores in sorted(points.items())]
    print_curve(curve_rows(curve, n_train=n_train))
    learning_curve(curve, directory / "curve.png", n_train=n_train)
    for (_, n_sessions), (about, _) in sorted(of_point.items()):
        console.print(f"{about['subject']} {n_sessions}: {about['composition']}")
    if command.goal is None:
        return
    few, more = command.goal
    for subject in dict.fromkeys(subject for subject, _ in of_point):
        if (subject, few) not in of_point or (subject, more) not in of_point:
            continue
        about, later = of_point[subject, more]
        both = {OURS: of_point[subject, few][1][OURS], "ridge": later["ridge"]}
        for c in scored(about, both).comparisons:
            if (c.system, c.versus, c.roi, c.axis, c.target, c.metric) == (OURS, "ridge", "all", "voxel", "mean", "r"):
                console.print(
                    f"{subject}: {OURS} after {few} less ridge after {more}: "
                    f"{c.difference:+.3f} [{c.low:+.3f} {c.high:+.3f}]"
                )


if __name__ == "__main__":
    command = tyro.cli(
        Annotated[Fit, tyro.conf.subcommand("fit")] | Annotated[Tabulate, tyro.conf.subcommand("table")],
        description=__doc__,
    )
    (fit if isinstance(command, Fit) else tabulate)(command)  # pyright: ignore[reportArgumentType]

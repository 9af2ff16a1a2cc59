"""Which parts of the model earn their keep: a queue of trainings, a part removed or added in each, and their table.

::

    python -m tests.experiments.parts train DIR --store STORE --encoder NAME --subjects 1 2 7 [--recipe base]
    python -m tests.experiments.parts table DIR

The queue goes on where it was stopped, in the middle of a training too: a finished variant has ``predictions.npz``, and
an unfinished one its checkpoints. Every variant has the data and the closed-form path of ``full``, and its seed, but
for the one that tells how much a seed matters. The table gives each subject's voxelwise r on its test images and the
paired difference from ``full``, with a 95 % interval over images; baselines are beside them. ``validation`` is the best
checkpoint's mean over subjects, of the network alone.
"""

import dataclasses
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from data.command_line import CommonOptions, Session, begin
from data.preprocess import Samples, samples
from foundation.checkpoint import load_model, new_directory, read_description, save_model
from foundation.config import BackboneConfig, Recipe
from foundation.evaluation.baselines import BASELINES, predict
from foundation.evaluation.measured import measured_part
from foundation.evaluation.model_outputs import model_prediction
from foundation.evaluation.score import Scores, score
from foundation.model.encoding_model import EncodingModel
from foundation.recipes import recipe_named
from foundation.training.course import FINAL, START, Material, build_model, finish_run, start_run, train_run
from foundation.training.engine import LocalEngine
from foundation.training.run import Plan

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, another seed": {"seed": 1},
    "without CLS stream": {"streams": ("patch",)},
    "without patch stream": {"streams": ("cls",)},
    "CLS of the last depth only": {"cls_depths": "last"},
    "mean of patches as readout": {"readout": "mean"},
    "with a gate per ROI": {"gate": "roi"},
    "with InfoNCE": {"n_contrast": 64},
    "with the VAE's latent": {"latent": 32},
    "without residual decoder": {"decoders": ("holistic",)},
    "with amplitude": {"amplitude": True},
    "without ridge start": {"start": "random"},
    "without blocks in the streams": {"n_cls_layer": 0, "n_patch_layer": 0},
}
"""What is changed of the recipe: fields of its backbone, or its start."""
WITH_VALIDATION = "stacked, on validation too"
"""The strongest baseline, fitted on the images that choose checkpoints and shares for the model as well."""
LENT = (".linear.", ".target_weight", ".roi_field.", ".voxel_field.")


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train the variants that aren't finished."""

    directory: tyro.conf.Positional[Path]
    """Where the runs are kept."""
    store: str
    """Store's path."""
    encoder: str
    """Encoder whose tokens are read."""
    subjects: tuple[str, ...]
    """Subjects to pool."""
    recipe: str = "base"
    """Recipe that is varied."""
    parcels: str | None = None
    """Stage-1 ROIs, if not the recipe's."""
    epochs: int | None = None
    """Passes over the images, if not the recipe's."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Variants to train."""
    baselines: tuple[str, ...] = BASELINES
    """Baselines to fit beside them."""
    threads: int = 1
    """Threads to compute with."""
    session: CommonOptions = Session()


@dataclass(frozen=True, kw_only=True)
class Tabulate:
    """Print the table of what is finished."""

    directory: tyro.conf.Positional[Path]
    """Where the runs are kept."""
    roi: str = "all"
    """ROI family to score."""
    session: CommonOptions = Session()


def varied(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """Return the recipe with a variant's changes."""
    of_backbone = {f.name for f in dataclasses.fields(BackboneConfig)} & changes.keys()
    backbone = dataclasses.replace(recipe.backbone, **{name: changes[name] for name in of_backbone})
    rest = {name: value for name, value in changes.items() if name not in of_backbone}
    return dataclasses.replace(recipe, backbone=backbone, **rest)


def lend_start(full: Path, plan: Plan) -> None:
    """Write a variant's start with the closed-form path and the fields of ``full``, which don't depend on a network."""
    if (plan.directory / START).exists():
        return
    material, (lender, made_from) = Material(plan), load_model(full / START)
    images = np.concatenate([s.image for s in material.train.values()])
    model = build_model(plan.recipe, material.tokens, images, material.parcels)
    own, lent = model.state_dict(), lender.state_dict()
    for name, tensor in own.items():
        if any(part in name for part in LENT) and name in lent and lent[name].shape == tensor.shape:
            tensor.copy_(lent[name])
    with new_directory(plan.directory / START) as directory:
        save_model(model, directory, made_from=made_from | {"recipe": plan.recipe.to_json()})


def joined(first: Samples, second: Samples) -> Samples:
    """Return the images of both."""
    fields = ("image", "responses", "n_repeats")
    return dataclasses.replace(
        first, **{field: np.concatenate([getattr(first, field), getattr(second, field)]) for field in fields}
    )


def keep_predictions(path: Path, predictions: dict[str, np.ndarray]) -> None:
    """Write predictions under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.unfinished")
    with open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **predictions)
    temporary.rename(path)


def predict_test(model: EncodingModel, material: Material) -> dict[str, np.ndarray]:
    """Return the model's predictions for each subject's test images, and those of its two halves alone."""
    found = {}
    for name in material.names:
        _, rows = measured_part(material.store.subject(name), material.split)
        found[name] = model_prediction(model, material.tokens, name, rows)
        adapter = model.adapter(name)
        share = adapter.network_share.clone()
        adapter.network_share.fill_(1)
        found[f"{name}/network"] = model_prediction(model, material.tokens, name, rows)
        adapter.network_share.fill_(0)
        found[f"{name}/closed form"] = model_prediction(model, material.tokens, name, rows)
        adapter.network_share.copy_(share)
    return found


def train(command: Train) -> None:
    """Train what isn't finished, the baselines first."""
    begin(command.session)
    torch.set_num_threads(command.threads)
    console = Console(soft_wrap=True)
    recipe = recipe_named(command.recipe)
    data = dataclasses.replace(
        recipe.data, store=str(Path(command.store).resolve()), encoder=command.encoder, subjects=command.subjects
    )
    if command.parcels is not None:
        data = dataclasses.replace(data, parcels=command.parcels)
    optim = recipe.optim if command.epochs is None else dataclasses.replace(recipe.optim, epochs=command.epochs)
    recipe = dataclasses.replace(recipe, data=data, optim=optim)
    directory = command.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    told, path = json.dumps(recipe.to_json(), indent=1), directory / "recipe.json"
    if path.exists() and path.read_text() != told:
        raise ValueError(f"{directory} holds another recipe's runs; name another directory, or the same options")
    path.write_text(told)

    def plan_of(variant: str) -> Plan:
        place = directory / variant.replace(" ", "-")
        place.mkdir(exist_ok=True)
        assert data.store is not None
        changed = varied(recipe, VARIANTS[variant])
        return Plan(recipe=changed, store=data.store, directory=place, tracking_uri="", tracking_run="")

    full = plan_of("full")
    material = Material(full)
    material.audit()
    fits = {name: (name, material.train) for name in command.baselines}
    if "stacked" in command.baselines:
        fits[WITH_VALIDATION] = (
            "stacked",
            {name: joined(material.train[name], material.validation[name]) for name in material.names},
        )
    for title, (baseline, images) in fits.items():
        path = directory / f"{title}.npz"
        if not path.exists():
            since, found = time.perf_counter(), {}
            for name in material.names:
                _, rows = measured_part(material.store.subject(name), material.split)
                found[name] = predict(baseline, material.tokens, images[name], rows, seed=recipe.seed)
            keep_predictions(path, found)
            console.print(f"{title}: {time.perf_counter() - since:.0f} s")
    for variant in command.variants:
        plan = plan_of(variant)
        path = plan.directory / "predictions.npz"
        if path.exists():
            continue
        since = time.perf_counter()
        if variant != "full" and plan.recipe.start == "ridge":
            lend_start(full.directory, plan)
        else:
            start_run(plan, tell=console.print)
        started = time.perf_counter()
        status = train_run(plan, LocalEngine, partial(_tell, console, variant))
        if status == "interrupted":
            return
        finish_run(plan)
        model, _ = load_model(plan.directory / FINAL)
        keep_predictions(path, predict_test(model, Material(plan)))
        now = time.perf_counter()
        console.print(f"{variant}: start {started - since:.0f} s, training {now - started:.0f} s")


def _tell(console: Console, variant: str, metrics: Any, step: int) -> None:
    if "validation/voxel_r" in metrics:
        scores = " ".join(f"{v:.4f}" for k, v in metrics.items() if k.startswith("validation/voxel_r/"))
        console.print(f"{variant}, step {step}: loss {metrics['train/loss']:.4f}, validation r {scores}")


def scores_of(directory: Path) -> dict[str, Scores]:
    """Return each subject's scores of all that is finished, paired on the same resamples of images."""
    recipe = json.loads((directory / "recipe.json").read_text())
    plan_recipe = recipe_named(recipe["name"])
    fields = {f.name for f in dataclasses.fields(plan_recipe.data)}
    stored = {k: tuple(v) if isinstance(v, list) else v for k, v in recipe["data"].items() if k in fields}
    data = dataclasses.replace(plan_recipe.data, **stored)
    plan = Plan(
        recipe=dataclasses.replace(plan_recipe, data=data),
        store=recipe["data"]["store"],
        directory=directory,
        tracking_uri="",
        tracking_run="",
    )
    material = Material(plan)
    files = {path.stem: path for path in sorted(directory.glob("*.npz"))}
    files |= {path.parent.name: path for path in sorted(directory.glob("*/predictions.npz"))}
    found = {}
    for name in material.names:
        measured, _ = measured_part(material.store.subject(name), material.split)
        predictions = {}
        for system, path in files.items():
            with np.load(path) as kept:
                predictions[system] = kept[name]
                if system == "full":
                    predictions["full, network alone"] = kept[f"{name}/network"]
                    predictions["full, closed form alone"] = kept[f"{name}/closed form"]
        training = samples(material.store.subject(name), material.split, "train").responses
        found[name] = score(
            predictions, measured, training_mean=training.mean(0), n_bootstraps=1000, rng=np.random.default_rng(0)
        )
    return found


def validation_of(run: Path) -> str:
    """Return the score that chose a run's checkpoint, to be shown; nothing for what isn't a run."""
    if not (run / "best").exists():
        return ""
    return f"{read_description(run / 'best')['made_from']['validation_voxel_r']:.4f}"


def tabulate(command: Tabulate) -> None:
    """Print a row per system: r of each subject and its difference from ``full``."""
    begin(command.session)
    directory = command.directory.resolve()
    scores = scores_of(directory)
    table = Table("system", "validation", *scores, title=f"voxelwise r against repeat means, roi {command.roi}")
    wanted = {"roi": command.roi, "axis": "voxel", "target": "mean", "metric": "r"}
    systems = dict.fromkeys(row.system for found in scores.values() for row in found.rows)
    for system in systems:
        cells = []
        for found in scores.values():
            rows = [r for r in found.rows if r.system == system and _matches(r, wanted)]
            pairs = [c for c in found.comparisons if (c.system, c.versus) == (system, "full") and _matches(c, wanted)]
            value = f"{rows[0].value:.4f}" if rows and rows[0].value is not None else "n/a"
            if pairs and pairs[0].difference is not None:
                value += f" {pairs[0].difference:+.4f} [{pairs[0].low:+.4f} {pairs[0].high:+.4f}]"
            cells.append(value)
        table.add_row(system, validation_of(directory / system), *cells)
    Console(width=72 + 34 * len(scores)).print(table)


def _matches(row: Any, wanted: dict[str, str]) -> bool:
    return all(getattr(row, key) == value for key, value in wanted.items())


if __name__ == "__main__":
    command = tyro.cli(
        Annotated[Train, tyro.conf.subcommand("train")] | Annotated[Tabulate, tyro.conf.subcommand("table")],
        description=__doc__,
    )
    (train if isinstance(command, Train) else tabulate)(command)  # pyright: ignore[reportArgumentType]

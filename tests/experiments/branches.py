"""What the branches are for, and whether every part is alive: interventions on a model that `parts` trained.

::

    python -m tests.experiments.branches DIR/full

For each subject the table has the loss of voxelwise r of the network (the closed-form path is left out), early and
higher voxels, under each intervention of `foundation.evaluation.interventions`, and the difference early less higher
with a 95 % interval over test images. Then: how the gate is spread, and how much each stream, the latent and the
closed-form path change the prediction.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from adapters.fit import streams_of
from data.command_line import CommonOptions, Session, begin
from data.preprocess import Samples
from data.splits import split_of
from data.store import PooledStore, TokenReader
from foundation.checkpoint import load_model
from foundation.evaluation.interventions import (
    Intervention,
    averaged,
    mean_of,
    random_subspace,
    shuffled,
    swapped_inputs,
    zeroed,
)
from foundation.evaluation.measured import measured_test
from foundation.evaluation.statistics import percentile_interval, resample_counts
from foundation.model.dual_stream import Streams
from foundation.model.encoding_model import EncodingModel
from foundation.training.course import FINAL

N_RESAMPLES = 1000
N_SUBSPACES = 10
BRANCHES = ("cls", "patch")


@dataclass(frozen=True, kw_only=True)
class Branches:
    """Intervene on a finished run of `parts`."""

    run: tyro.conf.Positional[Path]
    """The run's directory."""
    seed: int = 0
    """Seed of everything random."""
    session: CommonOptions = Session()


def correlations(prediction: np.ndarray, measured: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return each voxel's r under each resample of images, the resample of all images first: (resample, voxel)."""
    weights = np.vstack([np.ones(len(measured)), counts]).astype(np.float64)
    total = weights.sum(1, keepdims=True)
    x, y = prediction.astype(np.float64), measured.astype(np.float64)
    mean_x, mean_y = weights @ x / total, weights @ y / total
    covariance = weights @ (x * y) / total - mean_x * mean_y
    variance_x, variance_y = weights @ x**2 / total - mean_x**2, weights @ y**2 / total - mean_y**2
    scale = np.sqrt(np.maximum(variance_x, 0) * np.maximum(variance_y, 0))
    return np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 1e-9)


def network(model: EncodingModel, subject: str, streams: Streams) -> np.ndarray:
    """Return what the network predicts from streams."""
    with torch.inference_mode():
        return model.decode(streams, {subject: slice(0, len(streams))}).subjects[subject].voxel.numpy()


def swapped_streams(model: EncodingModel, tokens: TokenReader, rows: np.ndarray) -> Streams:
    """Return the streams' outputs where each is fed with the other's tokens."""
    cls, patch = (torch.from_numpy(part).float() for part in tokens.read(rows))
    with torch.inference_mode():
        return model.streams(*swapped_inputs(cls, patch))


def interventions(streams: Streams, *, seed: int) -> dict[str, list[Intervention]]:
    """Return the interventions by name; those with chance in them several times."""
    generator, mean = torch.Generator().manual_seed(seed), mean_of(streams)
    found: dict[str, list[Intervention]] = {}
    for branch in BRANCHES:
        orders = [torch.randperm(len(streams), generator=generator) for _ in range(N_SUBSPACES)]
        found[f"{branch}: zero"] = [zeroed(branch)]
        found[f"{branch}: mean"] = [averaged(branch, mean)]
        found[f"{branch}: shuffled"] = [shuffled(branch, order) for order in orders]
        found[f"random subspace as {branch}"] = [
            random_subspace(branch, streams, mean, generator=generator)[0] for _ in range(N_SUBSPACES)
        ]
    return found


def branches(command: Branches) -> None:
    """Print both tables."""
    begin(command.session)
    torch.set_num_threads(1)
    console = Console(width=150)
    model, made_from = load_model(command.run / FINAL)
    store = PooledStore.open(made_from["store"])
    tokens, split = store.tokens(made_from["recipe"]["data"]["encoder"]), split_of(store)
    lost = Table("subject", "intervention", "early", "higher", "early - higher [95 %]", title="loss of voxelwise r")
    alive = Table(
        "subject", "gate 5 / 50 / 95 %", "no CLS", "no patches", "latent drawn", "latent at 0", "share of network"
    )
    for subject in model.subjects:
        measured, rows = measured_test(store.subject(subject), split)
        wanted = Samples(
            subject=subject,
            image=rows,
            responses=np.zeros((len(rows), measured.n_voxels), np.float32),
            n_repeats=np.ones(len(rows), np.float32),
        )
        streams = streams_of(model, tokens, wanted)
        counts = resample_counts(len(rows), N_RESAMPLES, rng=np.random.default_rng(command.seed))
        families = {name: measured.families[name] for name in ("early", "higher") if name in measured.families}
        intact = network(model, subject, streams)
        whole = correlations(intact, measured.mean, counts)
        if len(families) == 2:
            changed = {
                name: [change(streams) for change in several]
                for name, several in interventions(streams, seed=command.seed).items()
            }
            changed["inputs swapped"] = [swapped_streams(model, tokens, rows)]
            for name, several in changed.items():
                found = [correlations(network(model, subject, of), measured.mean, counts) for of in several]
                left = np.mean(found, axis=0)
                loss = {family: (whole - left)[:, mask].mean(1) for family, mask in families.items()}
                difference = loss["early"] - loss["higher"]
                low, high = percentile_interval(difference[1:])
                lost.add_row(
                    subject,
                    name,
                    f"{loss['early'][0]:+.4f}",
                    f"{loss['higher'][0]:+.4f}",
                    f"{difference[0]:+.4f} [{low:+.4f} {high:+.4f}]",
                )
        alive.add_row(subject, *signs_of_life(model, subject, streams, intact, seed=command.seed))
    if lost.row_count:
        console.print(lost)
    console.print(alive)
    console.print(
        "no CLS, no patches: sd of the change of the network's prediction, over its sd; latent drawn: likewise, a draw "
        "less the mean; latent at 0: likewise, its bias alone in place of its mean"
    )


def signs_of_life(model: EncodingModel, subject: str, streams: Streams, intact: np.ndarray, *, seed: int) -> list[str]:
    """Return how the gate is spread, and by how much each part changes the network's prediction."""
    adapter = model.adapter(subject)
    with torch.inference_mode():
        gate = adapter.roi_values(streams).share.numpy()
        everything = {subject: slice(0, len(streams))}
        generator = torch.Generator().manual_seed(seed)
        drawn = model.decode(streams, everything, sample=True, generator=generator).subjects[subject].voxel.numpy()

    def change(other: np.ndarray) -> str:
        return f"{(other - intact).std() / intact.std():.3f}"

    without = "n/a"
    if model.config.latent is not None:
        kept = {name: value.clone() for name, value in model.vae.from_latent.state_dict().items()}
        with torch.no_grad():
            model.vae.from_latent.weight.zero_()
        without = change(network(model, subject, streams))
        model.vae.from_latent.load_state_dict(kept)
    return [
        " / ".join(f"{q:.2f}" for q in np.quantile(gate, (0.05, 0.5, 0.95))),
        change(network(model, subject, zeroed("cls")(streams))),
        change(network(model, subject, zeroed("patch")(streams))),
        change(drawn),
        without,
        f"{adapter.network_share.mean():.2f} (sd {adapter.network_share.std():.2f})",
    ]


if __name__ == "__main__":
    branches(tyro.cli(Branches, description=__doc__))

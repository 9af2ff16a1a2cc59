"""What the branches are for, and whether every part is alive: interventions on a model that `parts` trained.

::

    python -m tests.experiments.branches DIR/full

What `python -m foundation.ablate` prints; then how the gate is spread, and how much each stream, the latent and the
closed-form path change the prediction.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from data.command_line import CommonOptions, Session, begin
from data.splits import split_of
from data.store import PooledStore
from foundation.checkpoint import load_model
from foundation.evaluation.ablation import ablate, stream_outputs
from foundation.evaluation.ablation_table import print_ablation
from foundation.evaluation.area_losses import merged
from foundation.evaluation.interventions import zeroed
from foundation.evaluation.measured import measured_part
from foundation.evaluation.specialisation import findings, sentences
from foundation.model.dual_stream import Streams
from foundation.model.encoding_model import EncodingModel
from foundation.training.course import FINAL


@dataclass(frozen=True, kw_only=True)
class Branches:
    """Intervene on a finished run of `parts`."""

    run: tyro.conf.Positional[Path]
    """The run's directory."""
    seed: int = 0
    """Seed of everything random."""
    session: CommonOptions = Session()


def network(model: EncodingModel, subject: str, streams: Streams) -> np.ndarray:
    """Return what the network predicts from streams."""
    with torch.inference_mode():
        return model.decode(streams, {subject: slice(0, len(streams))}).subjects[subject].voxel.numpy()


def branches(command: Branches) -> None:
    """Print the ablation, and the signs of life."""
    begin(command.session)
    torch.set_num_threads(1)
    console = Console(width=150)
    model, made_from = load_model(command.run / FINAL)
    store = PooledStore.open(made_from["store"])
    tokens, split = store.tokens(made_from["recipe"]["data"]["encoder"]), split_of(store)
    found = merged(ablate(model, store.subject(s), tokens, split, seed=command.seed) for s in model.subjects)
    print_ablation(found, sentences(findings(found.differentials)))
    alive = Table(
        "subject", "gate 5 / 50 / 95 %", "no CLS", "no patches", "latent drawn", "latent at 0", "share of network"
    )
    for subject in model.subjects:
        _, rows = measured_part(store.subject(subject), split)
        streams = stream_outputs(model, tokens, subject, rows)
        intact = network(model, subject, streams)
        alive.add_row(subject, *signs_of_life(model, subject, streams, intact, seed=command.seed))
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

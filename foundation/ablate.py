"""``python -m foundation.ablate MODEL``: what each stream of a model is for, by interventions, with their controls."""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from tyro.conf import Positional, arg

from data.audit import audit_fit
from data.command_line import CommonOptions, Session, begin, run
from data.nifti import written_whole
from data.preprocess import samples
from data.splits import Split, split_of
from data.store import PooledStore, TokenReader
from foundation.evaluation.ablation import ablate, write_ablation
from foundation.evaluation.ablation_table import print_ablation, print_partition
from foundation.evaluation.area_losses import Ablation, merged
from foundation.evaluation.figures.ablation import ablation_figure
from foundation.evaluation.interventions import BRANCHES, Branch
from foundation.evaluation.measured import measured_part
from foundation.evaluation.partition import Partition, partition_subject
from foundation.evaluation.specialisation import bootstraps_needed, findings, sentences
from foundation.model.encoding_model import EncodingModel
from foundation.named_model import NamedModel, named_model
from foundation.score_files import ScoreFiles
from foundation.tracking.runs import TrackedRun

PROGRAM = "python -m foundation.ablate"


@dataclass(frozen=True, kw_only=True)
class Ablate:
    """Disable each stream of a trained model, and say what that shows."""

    model: Positional[str]
    """NAME@ALIAS or NAME/VERSION in the registry, a run, a model's directory or a bundle's file."""
    store: str | None = None
    """Store's path or URL (default: the one that the model learned from)."""
    subjects: tuple[str, ...] = ()
    """Subjects, by number or name (default: all that the model was fitted to)."""
    without_cls: str | None = None
    """A model that was trained without the CLS stream, named likewise: adds what retraining without it costs."""
    without_patch: str | None = None
    """The same, without the patch stream."""
    partition: bool = False
    """Also partition the variance between CLS and patch features, by ridge."""
    json: Path | None = None
    """File for everything; each voxel's preference for patches goes beside it, as .npy."""
    bootstraps: int = 1000
    """Resamples of images and parcels."""
    draws: int = 10
    """Draws of what is random: orders and subspaces."""
    seed: int = 0
    """Seed of everything random."""
    track: bool = True
    """Log to MLflow, as a run of kind ablation."""
    session: CommonOptions = Session()


def ablate_model(command: Ablate) -> None:
    """Run the command."""
    begin(command.session)
    ScoreFiles(json=command.json, csv=None).check()
    torch.set_num_threads(1)
    named = named_model(command.model)
    store = PooledStore.open(command.store or named.store)
    tokens, split = store.tokens(named.encoder), split_of(store)
    named.check(store, tokens, split)
    chosen = named.chosen_subjects(command.subjects)
    n_tests = len(BRANCHES) * len(chosen)
    needed = bootstraps_needed(n_tests)
    if command.bootstraps < needed:
        raise ValueError(
            f"--bootstraps {command.bootstraps} can't tell {n_tests} tests from chance; at least {needed:.0f} "
            f"are needed for {len(chosen)} subjects"
        )
    without = _without(command, chosen, named, store, tokens, split)
    ablation = merged(
        ablate(
            named.model,
            store.subject(subject),
            tokens,
            split,
            n_sessions=named.n_sessions,
            preprocessing=named.preprocessing,
            without=without,
            n_bootstraps=command.bootstraps,
            n_draws=command.draws,
            seed=command.seed,
        )
        for subject in chosen
    )
    parts: dict[str, Partition] = {}
    if command.partition:
        parts = {s: _partition(command, named, store, tokens, split, s) for s in chosen}
    said = sentences(findings(ablation.differentials), looked_at=(len(chosen), len(named.subjects)))
    print_ablation(ablation, said)
    if parts:
        print_partition(parts.values())
    more = {"model": named.label, "partition": [asdict(row) for part in parts.values() for row in part.rows]}
    if command.json is not None:
        _write(command.json, ablation, said, more, parts)
    if command.track:
        _track(command, named, chosen, ablation, said, more, parts)


def _without(
    command: Ablate, subjects: list[str], named: NamedModel, store: PooledStore, tokens: TokenReader, split: Split
) -> dict[Branch, EncodingModel]:
    """Load the models that were trained without a stream; they must have learned from the same images and trials."""
    wanted: dict[Branch, str | None] = {"cls": command.without_cls, "patch": command.without_patch}
    found: dict[Branch, EncodingModel] = {}
    for branch, name in wanted.items():
        if name is None:
            continue
        other = named_model(name)
        option = f"--without-{branch}"
        with_tokens = {branch, "joint"} & set(other.model.config.streams)  # a joint stream reads the tokens of both
        if with_tokens:
            raise ValueError(
                f"{option} {name}: this model has a {with_tokens.pop()} stream, which reads {branch} tokens; name one "
                "that was trained without them"
            )
        other.check(store, tokens, split)
        missing = [s for s in subjects if s not in other.model.subjects]
        if missing:
            raise ValueError(
                f"{option} {name}: it wasn't fitted to {', '.join(missing)}; train it on the same subjects"
            )
        if (other.n_sessions, other.preprocessing) != (named.n_sessions, named.preprocessing):
            raise ValueError(
                f"{option} {name}: it learned from other sessions than {named.label}; train it on the same"
            )
        found[branch] = other.model
    return found


def _partition(
    command: Ablate, named: NamedModel, store: PooledStore, tokens: TokenReader, split: Split, name: str
) -> Partition:
    prepared: dict[str, Any] = dict(n_sessions=named.n_sessions, preprocessing=named.preprocessing)
    subject = store.subject(name)
    measured, rows = measured_part(subject, split, **prepared)
    train = samples(subject, split, "train", **prepared)
    audit_fit(split.ids, split, {name: train}, {}, parcels={}, pictures=store.picture_digests())
    rng = np.random.default_rng(command.seed)
    return partition_subject(tokens, train, measured, rows, n_bootstraps=command.bootstraps, rng=rng)


def _write(
    path: Path, ablation: Ablation, said: list[str], more: Mapping[str, Any], parts: Mapping[str, Partition]
) -> None:
    write_ablation(path, ablation, sentences=said, more=more)
    for subject, part in parts.items():
        with written_whole(path.with_name(f"{path.stem}-preference-{subject}.npy")) as draft, draft.open("wb") as file:
            np.save(file, part.preference)


def _track(
    command: Ablate,
    named: NamedModel,
    subjects: list[str],
    ablation: Ablation,
    said: list[str],
    more: Mapping[str, Any],
    parts: Mapping[str, Partition],
) -> None:
    config = {k: v for k, v in asdict(command).items() if k not in ("session", "track", "json")}
    tags = {"model": named.label, "subjects": ", ".join(subjects), "store": command.store or named.store}
    tags |= {"run": named.run_id} if named.run_id else {}
    name = f"ablate-{named.label.replace('/', '-')}-{datetime.now():%Y%m%d-%H%M%S}"
    with TrackedRun.start(name, kind="ablation", config=config, tags=tags).ending() as tracked:
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch)
            _write(directory / "ablation.json", ablation, said, more, parts)
            if ablation.rows:
                ablation_figure(ablation, directory / "ablation.png")
            for file in sorted(directory.iterdir()):
                tracked.artifact(file)
        tracked.log(
            {
                f"ablation/{d.branch}/{d.intervention.replace(' ', '-')}/{d.subject}": d.difference
                for d in ablation.differentials
            }
        )


def main() -> None:
    """Run the command line."""

    def command(options: Annotated[Ablate, arg(name="")]) -> None:
        """Disable each stream of a trained model, and say what that shows."""
        ablate_model(options)

    run(command, program=PROGRAM, description=__doc__)


if __name__ == "__main__":
    main()

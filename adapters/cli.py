"""``adapt``: a model of a new subject from its first N sessions, scored beside ridge, tracked and registered."""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from tyro.conf import arg

from adapters.fit import Fitted, Method, fit_adapter
from data.audit import audit_fit
from data.command_line import CommonOptions, Session, begin, run
from data.parcels import make_parcels, parse_parcels
from data.preprocess import Preprocessing, n_sessions_of, samples
from data.splits import split_of
from data.store import PooledStore
from foundation.checkpoint import load_model, save_model
from foundation.closed_form.finish import finish_adapter
from foundation.closed_form.roi_weights import weights_of_subject
from foundation.closed_form.threads import threads_for
from foundation.config import LossConfig
from foundation.evaluation.compare import score_subject
from foundation.evaluation.table import print_scores
from foundation.model.encoding_model import EncodingModel
from foundation.tracking.registry import Registered, aliases, find_backbone, register
from foundation.tracking.runs import TrackedRun, tracking_uri
from foundation.tracking.scores import log_scores
from foundation.training.run import code_version
from foundation.training.validation import validation_scores

PROGRAM = "adapt"


@dataclass(frozen=True, kw_only=True)
class Adapt:
    """Fit a new subject's adapter on a registered backbone."""

    subject: str
    """Subject, by number (5) or name (subj05)."""
    sessions: int
    """Learn from the first N sessions that the subject spent in the scanner, and from nothing else."""
    store: str | None = None
    """Store's path or URL (default: the one that the backbone was trained on)."""
    backbone: str | None = None
    """NAME@ALIAS or NAME/VERSION (default: the champion that was registered last)."""
    method: Method = "head"
    """ridge: the closed-form start alone; head: refined by gradient steps while validation improves; lora: these also
    move low-rank updates of the backbone's blocks, which are the subject's."""
    standardise: Literal["session", "first-n"] = "session"
    """What standardises test trials of later sessions: that session's own non-test trials, or the first N sessions."""
    allow_seen: bool = False
    """Allow a subject that the backbone was trained on."""
    seed: int = 0
    """Seed of everything random."""
    session: CommonOptions = Session()


def adapt(command: Adapt) -> None:
    """Run the command."""
    begin(command.session)
    console = Console(soft_wrap=True)
    backbone = find_backbone(command.backbone)
    model, made_from = load_model(backbone.directory())
    where = command.store or made_from["store"]
    store = PooledStore.open(where)
    subject = _check(command, store, made_from, backbone)
    encoder = made_from["recipe"]["data"]["encoder"]
    console.print(f"{subject}, first {command.sessions} sessions, on backbone {backbone.label} and {where}")
    measurements, tokens, split = store.subject(subject), store.tokens(encoder), split_of(store)
    tokens.require(measurements.image)
    train = samples(measurements, split, "train", n_sessions=command.sessions)
    validation = samples(measurements, split, "validation", n_sessions=command.sessions)
    split_digest, pictures = split.digest_of(measurements.image), store.picture_digests()
    preprocessing = Preprocessing(later_sessions=command.standardise)
    parcels = make_parcels(
        parse_parcels(parcels_of(made_from["recipe"]["data"])),
        measurements.voxels,
        responses=train,
        split_digest=split_digest,
        n_sessions=command.sessions,
        seed=command.seed,
    )
    audit_fit(
        store.image_ids(),
        split,
        {subject: train},
        {subject: validation},
        parcels={subject: parcels},
        pictures=pictures,
    )
    lineage = {
        "backbone": backbone.label,
        "backbone_name": backbone.name,
        "backbone_version": str(backbone.version),
        "subject": subject,
        "sessions": str(command.sessions),
        "seed": str(command.seed),
        "method": command.method,
        "store": where,
        "store_digest": store.digest([subject], encoder),
        "split_digest": split_digest,
        "parcels": parcels.key,
        "preprocessing": preprocessing.name,
        "preprocessing_digest": preprocessing.digest,
        "code_version": code_version(),
    }
    name = f"adapt-{subject}-{command.sessions}s-{backbone.name}"
    tracked = TrackedRun.start(name, kind="adapt", config=lineage, tags=lineage)
    try:
        with threads_for(train.responses.size):
            loss, parcel = LossConfig(**made_from["recipe"]["loss"]), torch.from_numpy(parcels.labels).long()
            fitted = fit_adapter(
                model,
                subject,
                parcel,
                tokens,
                train,
                validation,
                method=command.method,
                seed=command.seed,
                loss=loss,
                target_weight=weights_of_subject(
                    loss.roi_target, parcel, measurements, split, train, n_sessions=command.sessions
                ),
                log=tracked.log,
            )
            settled = finish_adapter(
                model,
                measurements,
                tokens,
                split,
                validation,
                seed=command.seed,
                n_sessions=command.sessions,
                preprocessing=preprocessing,
            )
        console.print(_told(fitted, len(train), len(validation)))
        console.print(f"{subject}: {settled}")
        scores = score_subject(
            {"manybrains": model},
            measurements,
            tokens,
            split,
            pictures=pictures,
            n_sessions=command.sessions,
            preprocessing=preprocessing,
            seed=command.seed,
        )
        print_scores(scores)
        log_scores(tracked, scores)
        score = validation_scores(model, tokens, {subject: validation})["validation/voxel_r"]
        found = {"validation_voxel_r": f"{score:.6f}", "kept_epoch": str(fitted.kept_epoch)}
        registered = _register(model, subject, lineage | found, tracked, backbone)
        tracked.tag({"adapter": registered.label})
        console.print(
            f"registered adapter {registered.label} as {aliases(registered)[0]}; runs are in {tracking_uri()}"
        )
        console.print("next: make ui   (compare the runs in MLflow)")
    except BaseException as error:
        tracked.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    tracked.finish()


def parcels_of(data: dict[str, Any]) -> str:
    """Return how a backbone's recipe makes parcels; those of before they had names give their size alone."""
    return data.get("parcels") or f"auto:{data['parcel_size']}"


def _check(command: Adapt, store: PooledStore, made_from: dict, backbone: Registered) -> str:
    """Return the subject's name, if it may be adapted to; before anything is tracked."""
    subject = store.resolve_subject(command.subject)
    have = n_sessions_of(store.subject(subject))
    if have is None:
        raise ValueError(f"{subject} of {store.path} has no session index, so --sessions can't be asked of it")
    if not 1 <= command.sessions <= have:
        raise ValueError(f"{subject} has {have} sessions; --sessions {command.sessions} must be 1 to {have}")
    known = made_from["subject_digests"]
    seen = subject in known or store.subject(subject).digest in known.values()
    if seen and not command.allow_seen:
        raise ValueError(
            f"backbone {backbone.label} was trained on {subject}; pass --allow-seen to adapt to it all the same"
        )
    encoder = made_from["recipe"]["data"]["encoder"]
    if store.tokens(encoder).digest != made_from["encoder_digest"]:
        raise ValueError(
            f"{encoder!r} tokens of {store.path} come from another encoder than backbone {backbone.label} learned"
        )
    return subject


def _told(fitted: Fitted, n_train: int, n_validation: int) -> str:
    kept = "kept as it is" if fitted.kept_epoch == 0 else f"refined to {fitted.kept:.4f} in {fitted.kept_epoch} epochs"
    images = f"{n_train} training and {n_validation} validation images"
    return f"{images}; the network's start in closed form: validation r {fitted.start:.4f}, {kept}"


def _register(
    model: EncodingModel,
    subject: str,
    tags: dict[str, str],
    tracked: TrackedRun,
    backbone: Registered,
) -> Registered:
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "adapter"
        directory.mkdir()
        save_model(model, directory, made_from=tags, only=subject)
        tracked.artifact(directory, "adapter")
    return register(f"{backbone.name}.{subject}", tracked, "adapter", kind="adapter", tags=tags | {"start": "ridge"})


def main() -> None:
    """Run the command line."""

    def command(options: Annotated[Adapt, arg(name="")]) -> None:
        """Fit a new subject's adapter on a registered backbone; score it beside ridge, track it, register it."""
        adapt(options)

    run(command, program=PROGRAM, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

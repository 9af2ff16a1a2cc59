"""``adapt``: a model of a new subject from its first N sessions, scored beside ridge, tracked and registered."""

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from tyro.conf import arg

from adapters.backbone_outputs import BackboneOutputs
from adapters.course import Adapted, Material, Settings, adapt_subject, check_subject, gather
from adapters.fit import Fitted, Method
from data.command_line import CommonOptions, Session, begin, run
from data.places import save_place
from data.preprocess import Preprocessing
from data.store import PooledStore
from foundation.checkpoint import load_model, read_description, save_model
from foundation.evaluation.baselines import BASELINES
from foundation.evaluation.compare import score_subject
from foundation.evaluation.curve import curve_rows, print_curve
from foundation.evaluation.measured import measured_part
from foundation.evaluation.model_outputs import model_prediction
from foundation.evaluation.score import Scores
from foundation.evaluation.table import print_scores
from foundation.model.encoding_model import EncodingModel
from foundation.seen_images import check_images
from foundation.tracking.packaging import backbone_in
from foundation.tracking.publish import publish
from foundation.tracking.registry import Registered, aliases, find_backbone
from foundation.tracking.runs import TrackedRun, tracking_uri
from foundation.tracking.scores import log_baselines, log_curve, log_maps, log_scores
from foundation.training.run import code_version

PROGRAM = "adapt"


@dataclass(frozen=True, kw_only=True)
class Adapt:
    """Fit a new subject's adapter on a registered backbone."""

    subject: str
    """Subject, by number (5) or name (subj05)."""
    sessions: int | None = None
    """Learn from the first N sessions that the subject spent in the scanner, and from nothing else."""
    curve: str | None = None
    """Numbers of sessions, such as 1,2,3,5,10: an adapter for each, and the learning curve."""
    store: str | None = None
    """Store's path or URL (default: the one that the backbone was trained on)."""
    backbone: str | None = None
    """NAME@ALIAS or NAME/VERSION (default: the champion that was registered last)."""
    method: Method = "head"
    """ridge: the network's readouts in closed form alone; head: refined by gradient steps while validation improves;
    lora: these also move low-rank updates of the backbone's blocks, which are the subject's."""
    standardise: Literal["session", "first-n"] = "session"
    """What standardises test trials of later sessions: that session's own non-test trials, or the first N sessions."""
    baselines: tuple[str, ...] = ("ridge",)
    """Baselines to fit on the same sessions, and to log as runs: ridge, banded-ridge, cls-probe, spatial, stacked."""
    allow_seen: bool = False
    """Allow a subject that the backbone was trained on."""
    seed: int = 0
    """Seed of everything random."""
    session: CommonOptions = Session()


@dataclass(frozen=True, kw_only=True)
class Base:
    """The backbone to adapt, the store, and who."""

    registered: Registered
    directory: Path
    made_from: dict[str, Any]
    digest: str
    store: PooledStore
    where: str
    subject: str
    images: str = ""
    """How it was made sure that the backbone hasn't seen the subject's test images."""

    def model(self) -> EncodingModel:
        """Return the backbone, as it was registered."""
        return load_model(self.directory)[0]


def adapt(command: Adapt) -> None:
    """Run the command."""
    begin(command.session)
    console = Console(soft_wrap=True)
    wanted = _sessions(command)
    unknown = [name for name in command.baselines if name not in BASELINES]
    if unknown:
        raise ValueError(f"there is no baseline {', '.join(map(repr, unknown))}; there are {', '.join(BASELINES)}")
    registered = find_backbone(command.backbone)
    directory = backbone_in(registered.directory())
    description = read_description(directory)
    made_from = description["made_from"]
    where = command.store or made_from["store"]
    store = PooledStore.open(where)
    base = Base(
        registered=registered,
        directory=directory,
        made_from=made_from,
        digest=description["weights"],
        store=store,
        where=where,
        subject=check_subject(
            store,
            command.subject,
            made_from,
            most_sessions=max(wanted),
            backbone=registered.label,
            allow_seen=command.allow_seen,
        ),
    )
    base = replace(base, images=check_images(store, base.subject, made_from, label=registered.label))
    if base.images.startswith("not checked"):
        console.print(f"whether the backbone was trained on test images of {base.subject} is {base.images}")
    if command.curve is None:
        adapt_once(command, base, wanted[0], console)
        console.print("next: make ui   (compare the runs in MLflow)")
    else:
        adapt_along(command, base, wanted, console)


def _sessions(command: Adapt) -> list[int]:
    """Return the numbers of sessions that are asked for, rising."""
    if (command.sessions is None) == (command.curve is None):
        raise ValueError("say how much to learn from: --sessions N, or --curve 1,2,3 for several N")
    if command.curve is None:
        wanted = [command.sessions or 0]
    else:
        try:
            wanted = sorted({int(part) for part in command.curve.split(",")})
        except ValueError:
            raise ValueError(f"--curve {command.curve!r} must be numbers of sessions, such as 1,2,3") from None
    if min(wanted) < 1:
        raise ValueError(f"{min(wanted)} sessions are none to learn from; ask for 1 or more")
    return wanted


def adapt_along(command: Adapt, base: Base, wanted: list[int], console: Console) -> None:
    """Fit an adapter for each number of sessions, as runs under one that has the learning curve."""
    lineage = _lineage(command, base) | {"curve": ",".join(map(str, wanted))}
    name = f"curve-{base.subject}-{base.registered.name}"
    with TrackedRun.start(name, kind="curve", config=lineage, tags=lineage).ending() as tracked:
        points: list[tuple[int, Scores]] = []
        n_train: dict[int, int] = {}
        for n_sessions in wanted:
            scores, material = adapt_once(command, base, n_sessions, console, parent=tracked.id)
            points.append((n_sessions, scores))
            n_train[n_sessions] = len(material.train)
        log_curve(tracked, points, n_train=n_train)
    print_curve(curve_rows(points, n_train=n_train))
    console.print(f"curve.png, curve.csv and curve.json are with run {name} in {tracking_uri()}")
    console.print("next: make ui   (compare the runs in MLflow)")


def adapt_once(
    command: Adapt, base: Base, n_sessions: int, console: Console, *, parent: str | None = None
) -> tuple[Scores, Material]:
    """Fit, score, track and register an adapter for the first `n_sessions`."""
    subject, registered = base.subject, base.registered
    console.print(f"{subject}, first {n_sessions} sessions, on backbone {registered.label} and {base.where}")
    settings = Settings(
        method=command.method, preprocessing=Preprocessing(later_sessions=command.standardise), seed=command.seed
    )
    material = gather(base.store, subject, base.made_from, n_sessions=n_sessions, settings=settings)
    lineage = _lineage(command, base) | {
        "sessions": str(n_sessions),
        "split_digest": material.split_digest,
        "parcels": material.parcels.key,
        "preprocessing": settings.preprocessing.name,
        "preprocessing_digest": settings.preprocessing.digest,
    }
    name = f"adapt-{subject}-{n_sessions}s-{registered.name}"
    with TrackedRun.start(name, kind="adapt", config=lineage, tags=lineage, parent=parent).ending() as tracked:
        model = base.model()
        outputs = BackboneOutputs(
            base.model(),
            material.tokens,
            backbone=base.digest,
            images=base.store.image_ids(),
            pictures=base.store.picture_digests(),
        )
        adapted = adapt_subject(model, material, base.made_from, settings=settings, outputs=outputs, log=tracked.log)
        console.print(_told(adapted.fitted, material))
        console.print(f"{subject}: {adapted.settled}")
        console.print(adapted.told())
        scores = _score(command, base, model, material, settings, tracked)
        if parent is None:
            print_scores(scores)
        log_baselines(scores, tags=lineage, parent=parent)
        version = _register(model, base, lineage, adapted, scores, tracked)
        tracked.tag({"adapter": version.label})
        alias = ", ".join(aliases(version)) or "no alias"
        console.print(f"registered adapter {version.label} as {alias}; runs are in {tracking_uri()}")
    return scores, material


def _lineage(command: Adapt, base: Base) -> dict[str, str]:
    encoder = base.made_from["recipe"]["data"]["encoder"]
    return {
        "backbone": base.registered.label,
        "backbone_name": base.registered.name,
        "backbone_version": str(base.registered.version),
        "backbone_digest": base.digest,
        "subject": base.subject,
        "seed": str(command.seed),
        "method": command.method,
        "store": base.where,
        "backbone_images": base.images,
        "store_digest": base.store.digest([base.subject], encoder),
        "code_version": code_version(),
    }


def _score(
    command: Adapt,
    base: Base,
    model: EncodingModel,
    material: Material,
    settings: Settings,
    tracked: TrackedRun,
) -> Scores:
    """Score the model and the baselines on the subject's test images, and log them."""
    subject, n_sessions = base.store.subject(base.subject), material.n_sessions
    scores = score_subject(
        {"manybrains": model},
        subject,
        material.tokens,
        material.split,
        pictures=base.store.picture_digests(),
        baselines=command.baselines,
        n_sessions=n_sessions,
        preprocessing=settings.preprocessing,
        seed=command.seed,
    )
    log_scores(tracked, scores)
    measured, rows = measured_part(subject, material.split, n_sessions=n_sessions, preprocessing=settings.preprocessing)
    ids = base.store.image_ids()
    log_maps(
        tracked,
        model_prediction(model, material.tokens, base.subject, rows),
        measured,
        images=[ids[row] for row in rows],
        place=subject.voxels.place,
    )
    return scores


def _register(
    model: EncodingModel, base: Base, lineage: dict[str, str], adapted: Adapted, scores: Scores, tracked: TrackedRun
) -> Registered:
    made_from: dict[str, Any] = lineage | {
        "validation_voxel_r": f"{adapted.validation_voxel_r:.6f}",
        "kept_epoch": str(adapted.fitted.kept_epoch),
        "composition": adapted.composition,
    }
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "adapter"
        directory.mkdir()
        save_model(model, directory, made_from=made_from, only=base.subject)
        place = base.store.subject(base.subject).voxels.place
        if place is not None:
            save_place(place, directory)
        return publish(
            tracked,
            name=f"{base.registered.name}.{base.subject}",
            kind="adapter",
            backbone=base.directory,
            adapter=directory,
            lineage=made_from,
            scores=scores,
        )


def _told(fitted: Fitted, material: Material) -> str:
    kept = "kept as it is" if fitted.kept_epoch == 0 else f"refined to {fitted.kept:.4f} in {fitted.kept_epoch} epochs"
    images = f"{len(material.train)} training and {len(material.validation)} validation images"
    return f"{images}; the network's start in closed form: validation r {fitted.start:.4f}, {kept}"


def main() -> None:
    """Run the command line."""

    def command(options: Annotated[Adapt, arg(name="")]) -> None:
        """Fit a new subject's adapter on a registered backbone; score it beside ridge, track it, register it."""
        adapt(options)

    run(command, program=PROGRAM, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

"""``python -m foundation.predict --subject 5 IMAGES... --out FILE``: a subject's voxel responses to any images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import Positional, arg

from data.command_line import CommonOptions, Session, begin, progress_bar, run
from data.places import load_place
from data.schema import resolve_subject
from data.voxels import Surface, Volume
from foundation.image_files import Images, open_images
from foundation.model.encoding_model import EncodingModel
from foundation.prediction import BATCH, UNIT, Predictor, encoder_of
from foundation.prediction_files import PredictionFile, check_name
from foundation.tracking.packaging import adapter_in, load_packaged
from foundation.tracking.registry import NoAdapterError, find_adapter, find_backbone

PROGRAM = "python -m foundation.predict"


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Predict a subject's voxel responses to images."""

    images: Positional[tuple[str, ...]]
    """Picture files, a directory of them, a quoted glob, an HDF5 file (FILE.h5::NAME for one data set) or an .npy."""
    subject: str
    """Number or name: 5 is subj05."""
    out: Path
    """File to write: .npy or .zarr (image, voxel), or .nii or .nii.gz with one volume per image."""
    samples: int | None = None
    """Simulated single trials per image, in place of the expected response: (image, sample, voxel)."""
    seed: int = 0
    """Of the samples."""
    adapter: str | None = None
    """NAME@ALIAS or NAME/VERSION in the registry; default: the champion of this subject and backbone."""
    backbone: str | None = None
    """NAME@ALIAS or NAME/VERSION in the registry; default: the newest champion."""
    encoder: str | None = None
    """Directory or hub name of the encoder that the model was trained on; default: where it came from."""
    batch: int = BATCH
    """Images in memory at a time."""
    overwrite: bool = False
    """Replace what is there."""
    session: CommonOptions = Session()


@dataclass(frozen=True, kw_only=True)
class Served:
    """The registered version that predicts a subject, loaded."""

    label: str
    subject: str
    model: EncodingModel
    lineage: dict[str, Any]
    place: Volume | Surface | None
    """Of an adapter's voxels; a backbone's version doesn't know it."""


def predict(command: Predict) -> None:
    """Run the command."""
    begin(command.session)
    console = Console(soft_wrap=True)
    _check(command)
    images = open_images(command.images)
    served = _served(command, console)
    predictor = Predictor(served.model, encoder_of(served.lineage, command.encoder), served.subject)
    samples = () if command.samples is None else (command.samples,)
    shape = (len(images), *samples, predictor.n_voxels)
    file = PredictionFile(path=command.out, shape=shape, place=served.place, overwrite=command.overwrite)
    _write(command, file, predictor, images, served)
    what = f"{len(images)} images, " + (f"{command.samples} samples, " if samples else "")
    console.print(f"{command.out}: {what}{predictor.n_voxels} voxels of {served.subject}, from {served.label}")


def _check(command: Predict) -> None:
    """Refuse what is wrong by itself, before anything is loaded."""
    check_name(command.out, overwrite=command.overwrite)
    for name, value in (("--samples", command.samples), ("--batch", command.batch)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _write(command: Predict, file: PredictionFile, predictor: Predictor, images: Images, served: Served) -> None:
    rows = predictor.batch_size(command.batch, command.samples)
    about = {
        "dims": ["image", "voxel"] if command.samples is None else ["image", "sample", "voxel"],
        "images": list(images.names),
        "subject": served.subject,
        "model": served.label,
        "unit": UNIT,
        "seed": command.seed if command.samples is not None else None,
        "lineage": served.lineage,
    }
    with file.writing(about, rows=rows) as write, progress_bar() as bar:
        task = bar.add_task("predicting", total=len(images))
        for batch in predictor.stream(images.batches(rows), n_samples=command.samples, seed=command.seed):
            write(batch)
            bar.advance(task, len(batch))


def _served(command: Predict, console: Console) -> Served:
    """Return the subject's adapter, or the backbone's own of a subject that it was trained on."""
    if command.adapter is not None and command.backbone is not None:
        raise ValueError("--adapter names a model with its backbone in it: leave out --backbone, or --adapter")
    try:
        version = find_adapter(command.subject, backbone=command.backbone, name=command.adapter)
    except NoAdapterError:
        found = _of_backbone(command)
        if found is None:
            raise
        console.print(f"{found.subject} has no adapter of its own; {found.label} was trained on it, and predicts it")
        return found
    directory = version.directory()
    adapter = adapter_in(directory)
    if adapter is None:
        raise ValueError(f"{version.label} holds no adapter; name one by --adapter, or that backbone by --backbone")
    model, lineage = load_packaged(directory)
    subject = resolve_subject(command.subject, [lineage["subject"]], version.label)
    return Served(label=version.label, subject=subject, model=model, lineage=lineage, place=load_place(adapter))


def _of_backbone(command: Predict) -> Served | None:
    """Return the backbone if it was trained on the subject, else None."""
    version = find_backbone(command.backbone)
    model, lineage = load_packaged(version.directory())
    try:
        subject = resolve_subject(command.subject, model.subjects, version.label)
    except ValueError:
        return None
    return Served(label=version.label, subject=subject, model=model, lineage=lineage, place=None)


def main() -> None:
    """Run the command line."""

    def command(options: Annotated[Predict, arg(name="")]) -> None:
        """Predict a subject's voxel responses to images."""
        predict(options)

    run(command, program=PROGRAM, description=__doc__)


if __name__ == "__main__":
    main()

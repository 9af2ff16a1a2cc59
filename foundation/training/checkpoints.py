"""A run's checkpoints: model directories that also hold where the run stands and its optimiser's state.

::

    checkpoints/step-0000050/
        model.safetensors, model.json    the model (foundation.checkpoint)
        optimiser.safetensors            AdamW's state by the parameters' names (optimiser_state)
        training.json                    format, version, progress; digests of it and of the other files

Whichever engine, ZeRO stage and number of workers wrote one, any other goes on from it.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from data.schema import json_digest
from foundation.checkpoint import (
    StorageError,
    file_digest,
    new_directory,
    read_description,
    replaced_by_new,
    save_model,
    save_tensors,
    standing,
    write_json,
)
from foundation.model.encoding_model import EncodingModel

FORMAT = "manybrains-checkpoint"
FORMAT_VERSION = 1
_TRAINING, _OPTIMISER = "training.json", "optimiser.safetensors"
_FILES = ("model.json", _OPTIMISER)  # model.json has the digest of the weights
Tell = Callable[[str], None]


class NewerFormatError(ValueError):
    """A later version wrote it: not damaged, but not to be passed over either."""


@dataclass(kw_only=True)
class Progress:
    """Where a run stands."""

    step: int = 0
    best_score: float | None = None
    best_step: int | None = None
    losses: list[float] = field(default_factory=list)
    """Losses of the last good steps, oldest first."""
    n_skipped: int = 0
    """Bad steps that were skipped, all told."""
    n_skipped_in_a_row: int = 0


def write_checkpoint(
    run: Path,
    progress: Progress,
    model: EncodingModel,
    *,
    weights: Mapping[str, Tensor],
    optimiser: Mapping[str, Tensor],
    made_from: dict[str, Any],
) -> Path:
    """Write a checkpoint: whole under its final name, or not there; an older one of the same step gives way.

    Raises
    ------
    StorageError
        If it can't be written, say for want of space: the message names the checkpoint that the run would go on from.
    """
    final = run / "checkpoints" / f"step-{progress.step:07d}"
    try:
        with new_directory(final) as directory:
            save_model(model, directory, made_from=made_from, state=weights)
            save_tensors(optimiser, directory / _OPTIMISER)
            described = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "progress": asdict(progress),
                "progress_digest": json_digest(asdict(progress)),
                "files": {name: file_digest(directory / name) for name in _FILES},
            }
            write_json(directory / _TRAINING, described)
    except OSError as error:
        newest = newest_checkpoint(run)
        left = f"the newest whole one is {newest.name}" if newest else "there is no older one"
        raise StorageError(
            f"the checkpoint of step {progress.step} can't be written to {final.parent} ({error}); {left}: make room, "
            "then go on with --resume"
        ) from error
    return final


def read_progress(checkpoint: Path) -> Progress:
    """Return where a run stood; model, optimiser's state and progress are checked to be whole.

    Raises
    ------
    ValueError
        If something in the checkpoint is damaged or missing, or a newer version wrote it.
    """
    read_description(checkpoint)
    path = checkpoint / _TRAINING
    try:
        described = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read ({error})") from error
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise ValueError(f"{path} doesn't describe a checkpoint")
    version = described.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{checkpoint} has checkpoint format {version}; this manybrains reads up to {FORMAT_VERSION}: update it"
        )
    try:
        progress = Progress(**described["progress"])
        digests = {name: described["files"][name] for name in _FILES}
        whole = json_digest(asdict(progress)) == described["progress_digest"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not whole:
        raise ValueError(f"{path} is damaged: what it says isn't what its digest is of")
    for name, digest in digests.items():
        if not (checkpoint / name).exists() or file_digest(checkpoint / name) != digest:
            raise ValueError(f"{checkpoint / name} is damaged or missing: its digest isn't the one in {_TRAINING}")
    return progress


def read_optimiser_state(checkpoint: Path) -> dict[str, Tensor]:
    """Return the optimiser's state of a checkpoint that `read_progress` has found whole."""
    return load_file(checkpoint / _OPTIMISER)


def checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints, oldest first."""
    directory = run / "checkpoints"
    names = {path.name for path in directory.glob("step-*")}
    names |= {path.name.removeprefix(".").removesuffix(".old") for path in directory.glob(".step-*.old")}
    return [standing(directory / name) for name in sorted(names)]


def newest_checkpoint(run: Path, *, tell: Tell = lambda text: None) -> Path | None:
    """Return the newest checkpoint that is whole; a damaged one is passed over, and `tell` is told.

    Raises
    ------
    NewerFormatError
        If a later version wrote one.
    """
    for path in reversed(checkpoints(run)):
        try:
            read_progress(path)
        except NewerFormatError:
            raise
        except (ValueError, OSError) as error:
            tell(f"passing over a damaged checkpoint: {error}")
            continue
        return path
    return None


def newest_step(run: Path) -> int:
    """Return the step of the newest whole checkpoint, 0 if there is none."""
    found = newest_checkpoint(run)
    return 0 if found is None else read_progress(found).step


def prune_checkpoints(run: Path, newest: Path, *, keep: int) -> None:
    """Remove all but `keep` checkpoints, of which `newest` is the last; later ones were damaged and passed over."""
    found = checkpoints(run)
    last = found.index(newest) + 1
    for path in found[: max(0, last - keep)] + found[last:]:
        shutil.rmtree(replaced_by_new(path), ignore_errors=True)  # else it would stand for `path` from then on
        shutil.rmtree(path, ignore_errors=True)  # what can't be removed now is tried again with the next one

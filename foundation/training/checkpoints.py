"""A run's checkpoints: model directories that also hold where the run stands and its optimiser's state.

::

    checkpoints/step-0000050/
        model.safetensors, model.json    the model (foundation.checkpoint)
        optimiser.safetensors            AdamW's state by the parameters' names (optimiser_state)
        training.json                    format, version, progress, digest of optimiser.safetensors

Whichever engine, ZeRO stage and number of workers wrote one, any other goes on from it.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from foundation.checkpoint import (
    file_digest,
    new_directory,
    read_description,
    replaced_by_new,
    save_model,
    standing,
    write_json,
)
from foundation.model.encoding_model import EncodingModel

FORMAT = "manybrains-checkpoint"
FORMAT_VERSION = 1
_TRAINING, _OPTIMISER = "training.json", "optimiser.safetensors"
Tell = Callable[[str], None]


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
    OSError
        If it can't be written, say for want of space: the message names the checkpoint that the run would go on from.
    """
    final = run / "checkpoints" / f"step-{progress.step:07d}"
    try:
        with new_directory(final) as directory:
            save_model(model, directory, made_from=made_from, state=weights)
            save_file(dict(optimiser), directory / _OPTIMISER)
            described = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "progress": asdict(progress),
                "optimiser": file_digest(directory / _OPTIMISER),
            }
            write_json(directory / _TRAINING, described)
    except (OSError, SafetensorError) as error:
        newest = newest_checkpoint(run)
        left = f"the newest whole one is {newest.name}" if newest else "there is no older one"
        raise OSError(
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
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(f"{checkpoint} has checkpoint format {version}; this manybrains reads up to {FORMAT_VERSION}")
    state = checkpoint / _OPTIMISER
    if not state.exists() or file_digest(state) != described["optimiser"]:
        raise ValueError(f"{state} is damaged or missing: its digest isn't the one in {_TRAINING}")
    return Progress(**described["progress"])


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
    """Return the newest checkpoint that is whole; a damaged one is passed over, and `tell` is told."""
    for path in reversed(checkpoints(run)):
        try:
            read_progress(path)
        except (ValueError, OSError) as error:
            tell(f"passing over a damaged checkpoint: {error}")
            continue
        return path
    return None


def prune_checkpoints(run: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for path in checkpoints(run)[:-keep]:
        shutil.rmtree(replaced_by_new(path), ignore_errors=True)  # else it would stand for `path` from then on
        shutil.rmtree(path)

"""Models on disk: safetensors and JSON, written under a temporary name and renamed.

A model directory holds ``model.safetensors`` and ``model.json`` (how to build it, and what it was made from). Nothing
in it is executable. A run's checkpoints (`foundation.training.checkpoints`) are such directories with more in them.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from foundation.config import BackboneConfig, backbone_config
from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel, adapter_key

FORMAT = "manybrains-model"
FORMAT_VERSION = 2
_KEYS = {"format_version", "kind", "token_shape", "backbone", "subjects", "made_from", "weights"}


class StorageError(OSError):
    """Something can't be written, say for want of space."""


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises
    ------
    StorageError
        If it can't be written.
    """
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} can't be written: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Give a temporary directory that becomes `path` when the block ends well, and is removed otherwise.

    A kill between the two renames leaves the old one as ``.NAME.old``, where readers look if `path` is missing; they
    rename nothing themselves, for the writer may be alive, and its second rename would fail.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for made in (*temporary.rglob("*"), temporary):
        _sync(made)
    replaced = replaced_by_new(path)
    if path.exists():  # else what a killed writer moved aside is all there is, and stays until the new one is in place
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    temporary.rename(path)
    _sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have the system write a file or directory to its disk, so that it outlives the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replaced_by_new(path: Path) -> Path:
    """Return where `new_directory` moves the old directory while the new one takes its place."""
    return path.with_name(f".{path.name}.old")


def standing(path: Path) -> Path:
    """Return the directory to read: `path`, or the old one where the new one hasn't taken its place."""
    replaced = replaced_by_new(path)
    return replaced if not path.exists() and replaced.exists() else path


def save_model(
    model: EncodingModel,
    directory: Path,
    *,
    made_from: dict[str, Any],
    only: str | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a model, or with `only` just that subject's adapter, into an existing directory.

    Parameters
    ----------
    made_from : lineage, as JSON; kept in ``model.json``.
    state : the model's state, where its own parameters aren't whole; default: its own.

    Raises
    ------
    StorageError
        If it can't be written.
    """
    state = model.state_dict() if state is None else state
    if only is not None:
        model.adapter(only)
        state = {key: value for key, value in state.items() if key.startswith(_prefix(only))}
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_tensors(tensors, directory / "model.safetensors")
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": "adapter" if only else "model",
        "token_shape": dataclasses.asdict(model.shape),
        "backbone": dataclasses.asdict(model.config),
        "subjects": [only] if only else model.subjects,
        "made_from": made_from,
        "weights": file_digest(directory / "model.safetensors"),
    }
    write_json(directory / "model.json", description)


def _prefix(subject: str) -> str:
    """Return how the names of an adapter's tensors begin."""
    return f"adapters.{adapter_key(subject)}."


def file_digest(path: Path) -> str:
    """Return ``sha256:...`` of a file."""
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def read_description(directory: Path) -> dict[str, Any]:
    """Return a model directory's description, its weights checked against their digest.

    Raises
    ------
    ValueError
        If it is no model directory, was written by a newer version, or its weights aren't those described.
    """
    directory = standing(directory)
    path = directory / "model.json"
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{directory} is not a model: model.json can't be read ({error})") from error
    description = parsed_description(text, path)
    weights = directory / "model.safetensors"
    if not weights.exists() or file_digest(weights) != description["weights"]:
        raise ValueError(f"{weights} is damaged or missing: its digest isn't the one in model.json; use another copy")
    return description


def parsed_description(text: str, path: Path) -> dict[str, Any]:
    """Return the description of a model that `path` has as JSON.

    Raises
    ------
    ValueError
        If it is none, or was written by a version whose models can't be read.
    """
    try:
        description = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a model: its description can't be read ({error})") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{path} doesn't describe a manybrains model")
    found = description.get("format_version")
    if found == 1:
        raise ValueError(f"{path} has model format 1, of before the first release; train it again")
    if not isinstance(found, int) or found > FORMAT_VERSION:
        raise ValueError(f"{path} has model format {found}; this manybrains reads up to {FORMAT_VERSION}: update it")
    if missing := _KEYS - description.keys():
        raise ValueError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}; use another copy")
    return description


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(directory / "model.safetensors", "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{directory / 'model.safetensors'} can't be read: {error}") from error


def _sizes(config: BackboneConfig) -> BackboneConfig:
    """Return the config without what changes neither parameters nor numbers."""
    return dataclasses.replace(config, mamba=dataclasses.replace(config.mamba, backend="auto", chunk_size=1))


def load_model(directory: Path) -> tuple[EncodingModel, dict[str, Any]]:
    """Return the model of a directory on the CPU, and its lineage."""
    directory = standing(directory)
    description = read_description(directory)
    if description["kind"] != "model":
        raise ValueError(f"{directory} holds an adapter only; load it into its backbone")
    return built(description, _tensors(directory)), description["made_from"]


def built(description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> EncodingModel:
    """Return the model that a description and its tensors make, on the CPU."""
    parcels = {name: tensors[f"{_prefix(name)}parcel"] for name in description["subjects"]}
    model = EncodingModel(TokenShape(**description["token_shape"]), backbone_config(description["backbone"]), parcels)
    for name in description["subjects"]:
        make_room(model, name, tensors)
    model.load_state_dict(tensors)
    return model.eval()


def make_room(model: EncodingModel, subject: str, tensors: dict[str, torch.Tensor]) -> None:
    """Give the subject's adapter low-rank updates and a population path where `tensors` have them."""
    found = [tensor for key, tensor in tensors.items() if key.startswith(f"{_prefix(subject)}lora.down.")]
    if found:
        model.add_lora(subject, len(found[0]))
    basis = tensors.get(f"{_prefix(subject)}population.basis")
    if basis is not None:
        model.add_population(subject, *basis.shape)


def load_adapter(model: EncodingModel, directory: Path) -> tuple[str, dict[str, Any]]:
    """Put the adapter of a directory into `model`; return its subject and lineage.

    Raises
    ------
    ValueError
        If the directory holds no single adapter, or one of a backbone of other sizes; `model` is then as it was.
    """
    directory = standing(directory)
    description = read_description(directory)
    if description["kind"] != "adapter":
        raise ValueError(f"{directory} holds a whole model, not an adapter; load it as a model")
    found = TokenShape(**description["token_shape"]), _sizes(backbone_config(description["backbone"]))
    if found != (model.shape, _sizes(model.config)):
        raise ValueError(
            f"the adapter in {directory} is of a backbone with other sizes; load it into the one it came from"
        )
    tensors = _tensors(directory)
    (subject,) = description["subjects"]
    prefix = _prefix(subject)
    adapter = model.add_subject(subject, tensors[f"{prefix}parcel"])
    make_room(model, subject, tensors)
    adapter.load_state_dict({key.removeprefix(prefix): value for key, value in tensors.items()})
    return subject, description["made_from"]

"""A model as one safetensors file: its description is in the file's metadata, so nothing else is needed to build it.

Nothing in it is executable. The tensors' bytes are held by a digest in the description; the same tensors load with
`safetensors` alone.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from foundation.checkpoint import built, parsed_description, read_description, save_tensors, standing
from foundation.model.encoding_model import EncodingModel

METADATA = "manybrains"
_LENGTH_BYTES = 8  # of the header, which comes first


def _tensors_digest(path: Path) -> str:
    """Return ``sha256:...`` of a safetensors file without its header."""
    with open(path, "rb") as file:
        file.seek(int.from_bytes(file.read(_LENGTH_BYTES), "little"), 1)
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def write_bundle(directory: Path, out: Path) -> dict[str, Any]:
    """Write the model of a directory into one file, whole or not at all; return its description.

    Raises
    ------
    ValueError
        If the directory holds no whole model.
    """
    description = read_description(directory)
    if description["kind"] != "model":
        raise ValueError(f"{directory} holds an adapter only; name a run, or the directory of a whole model")
    weights = standing(directory) / "model.safetensors"
    description |= {"weights": _tensors_digest(weights)}
    temporary = out.with_name(f".{out.name}.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_tensors(load_file(weights), temporary, metadata={METADATA: json.dumps(description)})
        temporary.chmod(0o666 & ~_umask())  # safetensors' own files are for their owner alone
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return description


def _umask() -> int:
    """Return this process's mask of permissions, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def load_bundle(path: Path) -> tuple[EncodingModel, dict[str, Any]]:
    """Return the model of a file on the CPU, and its lineage.

    Raises
    ------
    ValueError
        If the file is no whole model of ours, or a newer version wrote it.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(METADATA)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if text is None:
        raise ValueError(f"{path} holds tensors only, no manybrains model: write it with foundation.convert")
    description = parsed_description(text, path)
    if _tensors_digest(path) != description["weights"]:
        raise ValueError(f"{path} is damaged: its tensors aren't those described; use another copy")
    if description["kind"] != "model":
        raise ValueError(f"{path} holds an adapter only; load it into its backbone")
    return built(description, tensors), description["made_from"]

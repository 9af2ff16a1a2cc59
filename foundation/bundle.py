"""A model as one safetensors file: its description is in the file's metadata, so nothing else is needed to build it.

::

    tensor                metadata                what
    (its own name)        manybrains              the whole model, or an adapter's backbone; its description
    adapter:(its name)    manybrains.adapter      the adapter, if there is one, and its description
    place:(its name)      manybrains.place        where the adapter's voxels lie, if that is known
                          manybrains.card         the model card, of what was exported from a registry

Nothing in it is executable, and `read_bundle` checks all of it before it builds anything, so a stranger's file is safe
to open. The tensors' bytes are held by a digest in the first description: it shows damage, not who made the file.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from data.places import FILE as PLACE_FILE
from data.places import load_place
from data.voxels import Volume
from foundation.checkpoint import (
    built,
    file_digest,
    parsed_description,
    read_description,
    save_tensors,
    standing,
    write_json,
)
from foundation.config import BackboneConfig, MambaConfig, backbone_config
from foundation.described_model import check_description, check_tensors, prefix_of
from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel
from foundation.safetensors_header import Declared, Header, plain_json, read_header

METADATA = "manybrains"
_ADAPTER, _PLACE, _CARD = (f"{METADATA}.{part}" for part in ("adapter", "place", "card"))
OF_ADAPTER, OF_PLACE = "adapter:", "place:"
MAX_CELLS = 512**3
"""Of the volume or the surfaces in which voxels lie; a map of them is a number for each."""
_MAY_BE_NAN = ".noise_sd"  # until it is fitted


@dataclass(frozen=True, kw_only=True)
class Part:
    """A model directory's content: a description, or what else the metadata say, and tensors."""

    description: dict[str, Any]
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What a bundle holds, all of it checked."""

    model: Part
    adapter: Part | None
    place: Part | None
    card: dict[str, Any] | None


# -- writing -----------------------------------------------------------------------------------------------------------


def write_bundle(
    directory: Path, out: Path, *, adapter: Path | None = None, card: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write the model of a directory into one file, whole or not at all; return its description.

    Parameters
    ----------
    adapter : directory of an adapter of that model, which goes into the same file.
    card : model card, as JSON.

    Raises
    ------
    ValueError
        If a directory holds something else, or what can't be read again.
    """
    description = read_description(directory)
    if description["kind"] != "model":
        raise ValueError(f"{directory} holds an adapter only; name a run, or the directory of a whole model")
    tensors = load_file(standing(directory) / "model.safetensors")
    metadata: dict[str, Any] = {}
    if adapter is not None:
        metadata[_ADAPTER] = read_description(adapter)
        tensors |= _prefixed(OF_ADAPTER, load_file(standing(adapter) / "model.safetensors"))
        place = standing(adapter) / PLACE_FILE
        if place.exists():
            tensors |= _prefixed(OF_PLACE, load_file(place))
            with safe_open(place, "pt") as file:
                metadata[_PLACE] = file.metadata() or {}
    if card is not None:
        metadata[_CARD] = dict(card)
    temporary = out.with_name(f".{out.name}.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_tensors(tensors, temporary)  # the digest is of what is written, and stands in front of it
        description |= {"weights": _tensors_digest(temporary)}
        save_tensors(
            tensors, temporary, metadata={k: json.dumps(v) for k, v in ({METADATA: description} | metadata).items()}
        )
        read_bundle(temporary)
        temporary.chmod(0o666 & ~_umask())  # safetensors' own files are for their owner alone
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return description


def _prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _umask() -> int:
    """Return this process's mask of permissions, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _tensors_digest(path: Path) -> str:
    """Return ``sha256:...`` of a safetensors file without its header."""
    with open(path, "rb") as file:
        file.seek(int.from_bytes(file.read(8), "little"), 1)
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


# -- reading -----------------------------------------------------------------------------------------------------------


def read_bundle(path: Path) -> Bundle:
    """Return what a file holds, once all of it is found to be what it should be; anybody may have written it.

    Raises
    ------
    ValueError
        If the file is no bundle of ours, is damaged, or holds what no model of ours has.
    """
    header = read_header(path)
    if METADATA not in header.metadata:
        raise ValueError(
            f"{path} holds tensors only, no manybrains model: write it with foundation.convert or foundation.registry"
        )
    described = {key: plain_json(text, path) for key, text in header.metadata.items() if key.startswith(METADATA)}
    description = parsed_description(json.dumps(described[METADATA]), path)
    if unknown := described.keys() - {METADATA, _ADAPTER, _PLACE, _CARD}:
        raise ValueError(f"{path} holds {min(unknown)!r}, which this manybrains doesn't know: update it")
    if description["kind"] != "model":
        raise ValueError(f"{path} holds an adapter only; load it into its backbone")
    for name in header.tensors:
        if ":" in name and not name.startswith((OF_ADAPTER, OF_PLACE)):
            raise ValueError(f"{path} is refused: tensor {name!r} belongs to no part of a bundle")
    model_names = _named("", header)
    check_description(description, model_names, path)
    of_adapter = None
    if _ADAPTER in described:
        of_adapter = _adapter_description(described[_ADAPTER], description, header, path)
    elif _named(OF_ADAPTER, header) or _named(OF_PLACE, header) or _PLACE in described:
        raise ValueError(f"{path} is refused: it has tensors of an adapter that it doesn't describe")
    if _tensors_digest(path) != description["weights"]:
        raise ValueError(f"{path} is damaged: its tensors aren't those described; use another copy")
    for prefix, about in (("", description), (OF_ADAPTER, of_adapter)):
        if about is not None:
            check_tensors(about, _named(prefix, header), _parcels(about, prefix, header, path), path)
    tensors = _loaded(path)
    model = Part(description=description, tensors={name: tensors[name] for name in model_names})
    adapter = None if of_adapter is None else Part(description=of_adapter, tensors=_without(OF_ADAPTER, tensors))
    place = None
    if _PLACE in described:
        if not isinstance(described[_PLACE], dict) or not all(isinstance(v, str) for v in described[_PLACE].values()):
            raise ValueError(f"{path} is refused: what it says of the places of voxels can't be read")
        place = Part(description=described[_PLACE], tensors=_without(OF_PLACE, tensors))
    found = Bundle(model=model, adapter=adapter, place=place, card=described.get(_CARD))
    _check_landmarks(found, path)
    return found


def _whole(bundle: Bundle) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Return subjects and tensors of the whole model; an adapter replaces one of the same subject."""
    subjects, tensors = bundle.model.description["subjects"], bundle.model.tensors
    if bundle.adapter is None:
        return subjects, tensors
    (subject,) = bundle.adapter.description["subjects"]
    others = {name: value for name, value in tensors.items() if not name.startswith(prefix_of(subject))}
    return list(dict.fromkeys([*subjects, subject])), others | bundle.adapter.tensors


def _check_landmarks(bundle: Bundle, path: Path) -> None:
    """Check that the landmarks of population paths (`foundation.model.population`) are voxels of the model's."""
    subjects, tensors = _whole(bundle)
    n_voxel = torch.tensor([len(tensors[f"{prefix_of(subject)}parcel"]) for subject in subjects])
    for name, landmark in tensors.items():
        if name.endswith(".population.landmark"):
            subject, voxel = landmark.T
            known = ((subject >= 0) & (subject < len(subjects))).all()
            if not known or not ((voxel >= 0) & (voxel < n_voxel[subject])).all():
                raise ValueError(f"{path} is refused: {name!r} names voxels that the model doesn't have")


def _adapter_description(found: Any, backbone: Mapping[str, Any], header: Header, path: Path) -> dict[str, Any]:
    """Return the description of the adapter, which is one subject's, on the backbone that lies beside it."""
    description = parsed_description(json.dumps(found), path)
    check_description(description, _named(OF_ADAPTER, header) | _named("", header), path)
    if description["kind"] != "adapter" or len(description["subjects"]) != 1:
        raise ValueError(f"{path} is refused: its adapter isn't that of one subject")
    if _sizes(description, path) != _sizes(backbone, path):
        raise ValueError(f"{path} is refused: its adapter is of another backbone than the one beside it")
    return description


def _sizes(description: Mapping[str, Any], path: Path) -> tuple[TokenShape, BackboneConfig]:
    """Return what a description says of the backbone but for what changes its speed alone; new settings as default."""
    try:
        config = backbone_config(description["backbone"])
        speed = MambaConfig()
        mamba = replace(config.mamba, backend=speed.backend, chunk_size=speed.chunk_size)
        return TokenShape(**description["token_shape"]), replace(config, mamba=mamba)
    except (ValueError, TypeError, ArithmeticError, KeyError) as error:
        raise ValueError(f"{path} is refused: a backbone that it describes can't be: {error}") from error


def _named(prefix: str, header: Header) -> dict[str, Declared]:
    """Return the declared tensors of a part, without its prefix; the model's own names have no colon."""
    if not prefix:
        return {name: tensor for name, tensor in header.tensors.items() if ":" not in name}
    return {name.removeprefix(prefix): t for name, t in header.tensors.items() if name.startswith(prefix)}


def _without(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _parcels(description: Mapping[str, Any], prefix: str, header: Header, path: Path) -> dict[str, torch.Tensor]:
    """Return which ROI each voxel of each subject is in; a model is built from these."""
    names = {subject: f"{prefix}{prefix_of(subject)}parcel" for subject in description["subjects"]}
    if missing := set(names.values()) - header.tensors.keys():
        raise ValueError(f"{path} is damaged: it lacks {min(missing)!r}; use another copy")
    with safe_open(path, "pt") as file:
        return {subject: file.get_tensor(name) for subject, name in names.items()}


def _loaded(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors, which are finite but for what isn't fitted yet."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            if name.endswith(_MAY_BE_NAN) and not torch.isinf(tensor).any():
                continue
            raise ValueError(f"{path} is refused: tensor {name!r} holds values that are NaN or infinite")
    return tensors


def load_bundle(path: Path) -> tuple[EncodingModel, dict[str, Any]]:
    """Return the model of a file on the CPU, an adapter put into its backbone, and its lineage: the adapter's, if any.

    Raises
    ------
    ValueError
        If the file is no whole model of ours, or a newer version wrote it.
    """
    return assembled(read_bundle(path))


def assembled(bundle: Bundle) -> tuple[EncodingModel, dict[str, Any]]:
    """Return the model that a bundle holds, and its lineage, as `load_bundle` does."""
    subjects, tensors = _whole(bundle)
    model = built(bundle.model.description | {"subjects": subjects}, tensors)
    return model, bundle.model.description["made_from"] if bundle.adapter is None else _lineage(bundle)


def _lineage(bundle: Bundle) -> dict[str, Any]:
    """Return the adapter's lineage, with the backbone's encoder."""
    assert bundle.adapter is not None
    of_backbone = bundle.model.description["made_from"]
    encoder = {"encoder": of_backbone["encoder"]} if "encoder" in of_backbone else {}
    return encoder | bundle.adapter.description["made_from"]


def unpack(bundle: Bundle, directory: Path) -> tuple[Path, Path | None]:
    """Write a bundle's model and adapter as model directories into `directory`; return both.

    Raises
    ------
    ValueError
        If the places of the voxels aren't those of the adapter's.
    """
    backbone = _unpacked(bundle.model, directory / "backbone")
    if bundle.adapter is None:
        return backbone, None
    adapter = _unpacked(bundle.adapter, directory / "adapter")
    if bundle.place is not None:
        save_tensors(bundle.place.tensors, adapter / PLACE_FILE, metadata=bundle.place.description)
        _check_place(adapter, bundle.adapter)
    return backbone, adapter


def _unpacked(part: Part, directory: Path) -> Path:
    directory.mkdir(parents=True)
    save_tensors(part.tensors, directory / "model.safetensors")
    weights = file_digest(directory / "model.safetensors")
    write_json(directory / "model.json", part.description | {"weights": weights})
    return directory


def _check_place(directory: Path, adapter: Part) -> None:
    """Check that each of an adapter's voxels has a place, in a space that isn't absurdly large."""
    place = load_place(directory)
    (subject,) = adapter.description["subjects"]
    n_voxel = len(adapter.tensors[f"{prefix_of(subject)}parcel"])
    if isinstance(place, Volume):
        n_placed, n_cells = len(place.index), math.prod(place.shape)
    else:
        assert place is not None
        n_placed, n_cells = len(place.vertex), sum(place.n_vertices)
    if n_placed != n_voxel or n_cells > MAX_CELLS:
        raise ValueError(
            f"the bundle is refused: it places {n_placed} voxels among {n_cells}, and {subject} has {n_voxel}; at most "
            f"{MAX_CELLS} places are taken"
        )

"""Whether a description and declared tensors make one of our models, found out without building it.

The described model is built on torch's meta device, where tensors have shapes and no numbers, so a description that
asks for terabytes costs nothing.
"""

import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from data.schema import check_name
from foundation.checkpoint import make_room
from foundation.config import BackboneConfig, backbone_config
from foundation.model.dual_stream import TokenShape
from foundation.model.encoding_model import EncodingModel, adapter_key
from foundation.safetensors_header import Declared

MAX_SIZE = 2**24
MAX_PATCHES = 128**2
MAX_CHUNK = 1024
MAX_SUBJECTS = 10_000
DTYPES = {torch.float32: "F32", torch.int64: "I64"}
_LAYERS = ("n_cls_layer", "n_patch_layer", "n_encoder_layer", "n_decoder_layer")


def prefix_of(subject: str) -> str:
    """Return how the names of a subject's tensors begin."""
    return f"adapters.{adapter_key(subject)}."


def check_description(description: Mapping[str, Any], declared: Mapping[str, Declared], where: object) -> None:
    """Check the entries of a description that say how to build the model, and the names of its subjects.

    Raises
    ------
    ValueError
        If one has another type than ours, or asks for more than the tensors can hold.
    """
    subjects, shape = description["subjects"], description["token_shape"]
    if not isinstance(subjects, list) or len(set(map(str, subjects))) < len(subjects) or len(subjects) > MAX_SUBJECTS:
        raise ValueError(f"{where} is refused: its subjects aren't a list of names")
    for subject in subjects:
        if not isinstance(subject, str):
            raise ValueError(f"{where} is refused: a subject is {str(subject)[:30]}, no name")
        check_name(subject, f"{where} is refused: subject")
    for part, kind in ((shape, TokenShape), (description["backbone"], BackboneConfig)):
        if not _fits(part, kind):
            raise ValueError(f"{where} is refused: it describes no {kind.__name__} of this version: {str(part)[:200]}")
    if not isinstance(description["made_from"], dict):
        raise ValueError(f"{where} is refused: it doesn't say what it was made from")
    config = description["backbone"]
    bounds = {"patch": MAX_PATCHES, "chunk_size": MAX_CHUNK} | dict.fromkeys(_LAYERS, len(declared))
    for key, size in (*shape.items(), *config.items(), *config.get("mamba", {}).items()):
        most = bounds.get(key, MAX_SIZE)
        if isinstance(size, int) and not isinstance(size, bool) and not 0 <= size <= most:
            raise ValueError(f"{where} is refused: {key} {str(size)[:30]} is out of bounds (0 to {most})")


def _fits(value: Any, hint: Any) -> bool:
    """Return whether JSON `value` has the type `hint`, which is one of those that our configs use."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        names = {field.name for field in fields(hint)}
        return isinstance(value, dict) and value.keys() <= names and all(_fits(v, hints[k]) for k, v in value.items())
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is tuple:
        return isinstance(value, list) and len(value) <= 64 and all(_fits(v, inner[0]) for v in value)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, kind) for kind in inner)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is (types.NoneType if hint is None else hint)


def check_tensors(
    description: Mapping[str, Any],
    declared: Mapping[str, Declared],
    parcels: Mapping[str, Tensor],
    where: object,
) -> None:
    """Check that the declared tensors are those of the described model, name by name; `parcels` are by subject.

    Raises
    ------
    ValueError
        If a tensor is missing, or there is one too many, or one has another shape or type.
    """
    for subject, parcel in parcels.items():
        _check_parcel(subject, parcel, where)
    try:
        expected = _expected(description, declared, parcels)
    except (RuntimeError, ValueError, TypeError, ArithmeticError, KeyError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{where} is refused: the model that it describes can't be built: {reason}") from error
    if missing := expected.keys() - declared.keys():
        raise ValueError(f"{where} is damaged: it lacks {len(missing)} tensors, such as {min(missing)!r}")
    if more := declared.keys() - expected.keys():
        raise ValueError(f"{where} is refused: {len(more)} tensors are none of its model's, such as {min(more)!r}")
    for name, tensor in expected.items():
        if declared[name] != tensor:
            raise ValueError(f"{where} is refused: tensor {name!r} is {declared[name]}, its model has {tensor}")


def _check_parcel(subject: str, parcel: Tensor, where: object) -> None:
    """Check that a subject's ROIs are numbered from 0 on, each with a voxel, for tables of ROIs are made by them."""
    if parcel.ndim != 1 or not len(parcel) or parcel.dtype != torch.int64:
        raise ValueError(f"{where} is refused: the parcels of {subject} aren't a number for each voxel")
    low, high = int(parcel.min()), int(parcel.max())
    if low < 0 or high >= len(parcel) or not torch.bincount(parcel).all():
        raise ValueError(
            f"{where} is refused: the parcels of {subject} are {low} to {high}, not 0, 1, ... with a voxel each"
        )


def _expected(
    description: Mapping[str, Any], declared: Mapping[str, Declared], parcels: Mapping[str, Tensor]
) -> dict[str, Declared]:
    """Return the tensors of the described model, or of its only adapter."""
    with torch.device("meta"):
        config = backbone_config(description["backbone"])
        model = EncodingModel(TokenShape(**description["token_shape"]), config, parcels)
        for subject in parcels:
            make_room(model, subject, {name: torch.empty(tensor.shape) for name, tensor in declared.items()})
    state = model.state_dict()
    if description["kind"] == "adapter":
        state = {name: value for name, value in state.items() if name.startswith(prefix_of(next(iter(parcels))))}
    return {name: Declared(dtype=DTYPES[value.dtype], shape=tuple(value.shape)) for name, value in state.items()}

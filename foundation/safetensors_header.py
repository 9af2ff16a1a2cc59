"""The header of a safetensors file, read from its bytes and checked before anything is allocated by what it says.

::

    8 bytes   n, the header's length, little-endian
    n bytes   JSON: {name: {dtype, shape, data_offsets}, "__metadata__": {text: text}}
    the rest  raw numbers, which the offsets must tile

So a file from a stranger costs as much memory as it has bytes, whatever it declares.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER = 16 * 1024**2
"""Bytes; a card with the scores of a hundred subjects takes a few millions."""
MAX_DEPTH = 32
ITEM_BYTES = {"F32": 4, "F64": 8, "I64": 8, "I32": 4, "I8": 1}
"""The types of tensors that we write."""
_LENGTH_BYTES = 8
_PICKLES = (b"\x80", b"PK\x03\x04", b"PK\x05\x06")
_NAME = re.compile(r"[A-Za-z0-9%._:-]{1,300}")
_SHOWN = 60


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What a header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Header:
    """A file's tensors in the order of its header, its metadata, and where the numbers start."""

    tensors: dict[str, Declared]
    metadata: dict[str, str]
    start: int


def read_header(path: Path) -> Header:
    """Return the header of a file whose every byte it accounts for.

    Raises
    ------
    ValueError
        If the file is a pickle, or its header isn't that of a whole safetensors file with plain names.
    """
    try:
        if not path.is_file():
            raise ValueError(f"{path} can't be read: it is no file")
        size = path.stat().st_size
        with open(path, "rb") as file:
            start, first = file.read(_LENGTH_BYTES), file.read(1)
            if start.startswith(_PICKLES) and first != b"{":  # a length may begin as a pickle does
                raise ValueError(
                    f"{path} is a pickle or a zip with one, as torch.save writes; manybrains never opens pickles, for "
                    "they run code: ask for a file that `foundation.registry export` wrote"
                )
            length = int.from_bytes(start, "little")
            if len(start) < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
                raise ValueError(f"{path} can't be read: it is cut off within its header, or no safetensors file")
            if not 1 < length <= MAX_HEADER:
                raise ValueError(
                    f"{path} can't be read: its header has {length} bytes, where 2 to {MAX_HEADER} are taken"
                )
            text = first + file.read(length - 1)
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    found = plain_json(text, path)
    metadata = found.pop("__metadata__", {}) if isinstance(found, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path} can't be read: its header isn't that of a safetensors file")
    start = _LENGTH_BYTES + length
    return Header(tensors=_tensors(found, size - start, path), metadata=metadata, start=start)


def _tensors(entries: dict[str, Any], n_bytes: int, path: Path) -> dict[str, Declared]:
    """Return the declared tensors, which fill `n_bytes` without a gap."""
    tensors, spans = {}, []
    for name, entry in entries.items():
        if not _NAME.fullmatch(name) or ".." in name:
            raise ValueError(f"{path} is refused: {name[:_SHOWN]!r} can't be the name of a tensor of ours")
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} can't be read: it describes tensor {name!r} in no way we know") from error
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            have = ", ".join(ITEM_BYTES)
            raise ValueError(f"{path} is refused: tensor {name!r} has type {str(dtype)[:_SHOWN]!r}; ours are {have}")
        numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
        if not all(type(number) is int and number >= 0 for number in numbers) or len(shape) > 8:
            raise ValueError(f"{path} can't be read: shape or place of tensor {name!r} aren't whole numbers")
        if math.prod(shape) * ITEM_BYTES[dtype] != end - begin:
            raise ValueError(
                f"{path} is refused: tensor {name!r} has {end - begin} bytes, which aren't those of its declared shape "
                f"{str(shape)[:_SHOWN]}"
            )
        tensors[name] = Declared(dtype=dtype, shape=tuple(shape))
        spans.append((begin, end, name))
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            raise ValueError(f"{path} can't be read: tensor {name!r} starts at byte {begin}, not at {reached}")
        reached = end
    if reached != n_bytes:
        raise ValueError(f"{path} can't be read: its tensors take {reached} bytes and it has {n_bytes}: it is cut off")
    return tensors


def plain_json(text: str | bytes, where: object) -> Any:
    """Return what JSON says, if it is plain: keys once each, not too deep, only characters that can be printed.

    Raises
    ------
    ValueError
        If it isn't.
    """
    try:
        found = json.loads(text, object_pairs_hook=_once)
        _check_plain(found, MAX_DEPTH)
    except (ValueError, RecursionError) as error:  # JSON's and Unicode's own errors are ValueErrors
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{where} can't be read: {reason}") from error
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _check_plain(value: Any, depth: int) -> None:
    if depth < 0:
        raise RecursionError
    if isinstance(value, str):
        if not value.isprintable():
            raise ValueError(f"{value[:_SHOWN]!r} holds characters that can't be printed")
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_plain(key, depth - 1)
            _check_plain(inner, depth - 1)
    elif isinstance(value, list):
        for inner in value:
            _check_plain(inner, depth - 1)

"""Pickled dicts in .npy files, read without running what the file says.

Loading a pickle calls whatever functions it names. Here it may name four, those that numpy writes for arrays and
scalars, and gets stand-ins for them that do nothing but keep plain data: neither code of the file's choice nor numpy's
own constructors, which trust the flags that a pickle gives a dtype, ever run. Everything else is refused by its name.
"""

import pickle
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")  # numpy 1 and 2
_KNOWN = {("numpy", "ndarray"), ("numpy", "dtype")} | {(m, n) for m in _MULTIARRAY for n in ("_reconstruct", "scalar")}
_PLAIN_DTYPE = re.compile(r"[?biuf]\d{0,2}|U\d{1,4}")
_BROKEN = (
    pickle.UnpicklingError, ValueError, EOFError, AttributeError, IndexError, KeyError, TypeError, AssertionError,
    OverflowError, MemoryError, struct.error,
)  # fmt: skip
"""What unpickling raises where a file is cut off or makes no sense."""


class _RefusedError(ValueError):
    """The pickle names something that it may not."""


class _Name:
    """Stands for a function or class that the pickle names; takes no state, so nothing is changed through it."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any) -> Any:
        if self.name == "_reconstruct":
            return _Array()
        if self.name == "dtype":
            return _Dtype(args[0])
        if self.name == "scalar":
            dtype, raw = args
            return np.frombuffer(raw, dtype.plain())[0].item()
        raise _RefusedError("it calls numpy.ndarray")

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError(f"it changes numpy's {self.name}")


class _Dtype:
    """Stands for a dtype: a code such as ``f8`` and its byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def plain(self) -> np.dtype[Any]:
        """Return it if it is one of numbers or text."""
        if not _PLAIN_DTYPE.fullmatch(self.code) or self.order not in ("<", ">", "=", "|"):
            raise _RefusedError(f"it has an array of dtype {self.code!r}")
        return np.dtype(self.order + self.code)


class _Array:
    """Stands for an array: shape, dtype, order and content."""

    __slots__ = ("state",)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def values(self) -> np.ndarray:
        """Return it as an array of numbers."""
        _, shape, dtype, is_fortran, raw = self.state
        return np.frombuffer(raw, dtype.plain()).reshape(shape, order="F" if is_fortran else "C")

    def only_object(self) -> Any:
        """Return what a 0-d array of objects holds."""
        _, shape, dtype, _, content = self.state
        if shape != () or dtype.code not in ("O", "O8") or type(content) is not list or len(content) != 1:
            raise _RefusedError("it is not one object")
        return content[0]


class _Unpickler(pickle._Unpickler):
    """The unpickler in Python: the one in C fills memory for a number that a hostile file makes up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise _RefusedError(f"it asks for {module}.{name}, which could run code")
        return _Name(name)


def _check_header(file: BinaryIO) -> None:
    """Raise ValueError unless an .npy of one object begins; numpy's own parser lets errors of Python's through."""
    magic = file.read(8)
    if magic not in (b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00"):
        raise ValueError("it has no header of version 1 or 2")
    header = file.read(int.from_bytes(file.read(2 if magic[6] == 1 else 4), "little"))
    if header.split() != [b"{'descr':", b"'|O',", b"'fortran_order':", b"False,", b"'shape':", b"(),", b"}"]:
        raise ValueError(f"its header {header.strip()[:100]!r} is of no dict")


def load_pickled_dict(path: Path) -> dict[str | int, Any]:
    """Return the dict that ``np.save(path, {...})`` wrote: text or numbers as keys, plain data and arrays of numbers.

    Numpy's arrays and scalars may be values of the dict, not deeper. Arrays are read-only.

    Raises
    ------
    ValueError
        If the file is something else, or names anything that could run code when it is loaded; nothing has run then.
    """
    remedy = "download it again from its publisher"
    try:
        with path.open("rb") as file:
            _check_header(file)
            array = _Unpickler(file).load()
        found = array.only_object() if isinstance(array, _Array) else array
        if type(found) is not dict or any(type(key) not in (int, str) for key in found):
            raise ValueError("it holds no dict by text or whole numbers")
        return {key: value.values() if isinstance(value, _Array) else value for key, value in found.items()}
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; {remedy}") from error
    except _RefusedError as error:
        raise ValueError(f"{path} is not a plain pickled dict: {error}; nothing was run, {remedy}") from error
    except _BROKEN as error:
        raise ValueError(f"{path} is not a readable .npy of a pickled dict ({error}); {remedy}") from error

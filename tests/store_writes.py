"""What the tests of a store write, and writes that stop in the middle."""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def bytes_of(path: Path) -> dict[str, str]:
    files = (f for f in path.rglob("*") if f.is_file())
    return {str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def token_batches(n: int, *, depth: int = 2, patch: int = 4, width: int = 3, size: int = 16, seed: int = 0):
    rng = np.random.default_rng(seed)
    cls = rng.normal(size=(n, depth, width)).astype(np.float16)
    patches = rng.normal(size=(n, depth, patch, width)).astype(np.float16)
    batches = ({"cls": cls[k : k + size], "patch": patches[k : k + size]} for k in range(0, n, size))
    return cls, patches, batches


class Stop(Exception):
    pass


def stops_of(dying_after, write) -> Iterator[int]:
    """Interrupt `write` at each of its writes in turn; the last time it gets through."""
    for n in itertools.count():
        with dying_after(n):
            try:
                write()
            except Stop:
                yield n
            else:
                return

"""Tokens of frozen encoders in a store: written shard by shard, read by image row.

A block of images has ``patch`` (image, depth, patch, width), one token for the whole image, named for what it is:
``cls``, or ``pooled`` where a model has no CLS token and pools by a head of its own (image, depth, width), and
``register`` (image, depth, register, width) where the encoder has such.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import zarr
from jaxtyping import Float16, Int

from data.store.row_reader import OpenFiles, row_reader
from data.store.zarr_arrays import array_at, attribute, begin, create_array, group_at, shard_rows

TokenBatch = tuple[Float16[np.ndarray, "image depth width"], Float16[np.ndarray, "image depth patch width"]]
NamedTokens = Mapping[str, np.ndarray]
"""Tokens of successive images in half precision, (image, depth, ...), by name."""
GLOBAL_TOKENS = ("cls", "pooled")


def rows_written(features: zarr.Group, block: str) -> int:
    """Return how many images of `block` an interrupted run has encoded already."""
    return int(attribute(group_at(features, block), "rows") or 0) if block in features else 0


def write_tokens(features: zarr.Group, block: str, n_images: int, batches: Iterable[NamedTokens]) -> None:
    """Write one block's tokens as they come, from image `rows_written` on; they count once the last one is in.

    The arrays are written by whole shards, and how far they are is noted after each: an interrupted run loses the
    shard it was in. A block that is complete is left alone, and nothing is asked of `batches`.
    """
    if block in features and attribute(group_at(features, block), "complete"):
        return
    start = rows_written(features, block)
    group = group_at(features, block) if start else begin(features, block)
    arrays: dict[str, zarr.Array] = {}
    waiting: list[NamedTokens] = []

    def flush(n: int) -> None:
        nonlocal start, waiting
        joined = {name: np.concatenate([part[name] for part in waiting]) for name in arrays}
        for name, array in arrays.items():
            array[start : start + n] = joined[name][:n]
        start += n
        group.attrs.put({"rows": start})
        waiting = [{name: values[n:] for name, values in joined.items()}]

    for batch in batches:
        arrays = arrays or _arrays(group, n_images, batch, make=start == 0)
        waiting.append(batch)
        per_shard = shard_rows(arrays["patch"])
        while sum(len(part["patch"]) for part in waiting) >= (room := per_shard - start % per_shard):
            flush(room)
    if left := sum(len(part["patch"]) for part in waiting):
        flush(left)
    assert start == n_images, f"{start} of {n_images} images of block {block} were encoded"
    group.attrs.put({"complete": True, "rows": n_images, "tokens": sorted(group.array_keys())})


def _arrays(group: zarr.Group, n_images: int, first: NamedTokens, *, make: bool) -> dict[str, zarr.Array]:
    """Return the arrays that `first` begins; all have the shards of ``patch``, so that they fill alike."""
    if not make:
        return {name: array_at(group, name) for name in first}
    assert {"patch"} < set(first) <= {"patch", "register", *GLOBAL_TOKENS}, sorted(first)
    patch = create_array(group, "patch", (n_images, *first["patch"].shape[1:]), np.float16, kind="tokens")
    arrays = {"patch": patch}
    for name in set(first) - {"patch"}:
        shape = (n_images, *first[name].shape[1:])
        arrays[name] = create_array(group, name, shape, np.float16, kind="tokens", rows_per_shard=shard_rows(patch))
    return arrays


class TokenReader:
    """One encoder's tokens, read by global image row; may be larger than memory."""

    def __init__(
        self, name: str, store: str, features: zarr.Group, blocks: list[tuple[str, int]], *, missing: set[str]
    ) -> None:
        self.name = name
        self.spec: dict[str, Any] = attribute(features, "spec")
        self.digest: str = attribute(features, "digest")
        self.provenance: dict[str, Any] = attribute(features, "provenance") or {}
        there = next(block for block, _ in blocks if block not in missing)
        self.global_token = next(name for name in GLOBAL_TOKENS if f"{there}/{name}" in features)
        """What the token of the whole image is: ``cls`` or ``pooled``."""
        self._store, self._blocks, self._missing = store, [block for block, _ in blocks], missing
        self._starts = np.cumsum([0] + [n for _, n in blocks])
        arrays = {
            block: (array_at(features, f"{block}/{self.global_token}"), array_at(features, f"{block}/patch"))
            for block in self._blocks
            if block not in missing
        }
        _, *self._shape = arrays[there][1].shape
        files = OpenFiles()
        self._readers = {block: (row_reader(a, files), row_reader(b, files)) for block, (a, b) in arrays.items()}
        self.how = {block: patch.how for block, (_, patch) in self._readers.items()}
        """How each image block is read: by ``byte ranges`` of local files or through ``zarr``."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Depths, patches and width of the tokens."""
        depth, patch, width = self._shape
        return depth, patch, width

    @property
    def image_bytes(self) -> int:
        """Size of one image's tokens."""
        depth, patch, width = self.shape
        return depth * (patch + 1) * width * np.dtype(np.float16).itemsize

    @property
    def depths(self) -> tuple[int, ...]:
        """The encoder blocks that the depths are, 1-based, shallow to deep."""
        return tuple(self.spec["depths"])

    def require(self, rows: Int[np.ndarray, " image"]) -> None:
        """Raise ValueError if some of `rows` are images added since the tokens were computed."""
        self._by_block(rows)

    def _by_block(self, rows: Int[np.ndarray, " image"]) -> dict[int, Int[np.ndarray, " place"]]:
        """Return which places of `rows` are in which block, all of which have tokens."""
        of_block = np.searchsorted(self._starts, rows, side="right") - 1
        found = sorted(set(of_block.tolist()))
        for k in found:
            assert 0 <= k < len(self._blocks), f"an image row is outside the {self._starts[-1]} images"
            if self._blocks[k] in self._missing:
                raise ValueError(
                    f"{self._store} lacks {self.name!r} tokens of image block {self._blocks[k]}; "
                    f"run `python -m data features` again"
                )
        return {k: np.flatnonzero(of_block == k) for k in found}

    def room(self, n: int) -> TokenBatch:
        """Return uninitialised arrays for the tokens of `n` images."""
        depth, patch, width = self.shape
        return np.empty((n, depth, width), np.float16), np.empty((n, depth, patch, width), np.float16)

    def read(self, rows: Int[np.ndarray, " image"], *, out: TokenBatch | None = None) -> TokenBatch:
        """Return global and patch tokens of `rows`, in their order; rows may repeat. `out` is filled where it is given.

        Raises
        ------
        ValueError
            If an image has no tokens yet, or what is stored is damaged.
        """
        rows = np.asarray(rows)
        by_block = self._by_block(rows)
        out = self.room(len(rows)) if out is None else out
        for k, at in by_block.items():
            for reader, tokens in zip(self._readers[self._blocks[k]], out, strict=True):
                reader.read_into(tokens, at, rows[at] - self._starts[k])
        return out

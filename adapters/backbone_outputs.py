"""What a frozen backbone makes of images, kept in the home by digest: adapting again reads it instead.

A directory for each backbone, encoder and list of images, with one file a field (a row per image of the store) and
``done``, a byte per image. A row counts once its byte is set, which is written last, so a killed process leaves rows
that are computed again, and two processes write the same. `rm -r` of the cache loses nothing but time.
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int

from data.home import home
from data.loader import tokens_on
from data.schema import json_digest
from data.store import TokenReader
from foundation.model.dual_stream import Streams
from foundation.model.encoding_model import EncodingModel
from foundation.model.population import PopulationPath

VERSION = 1
_BATCH = 64
_LOGGER = logging.getLogger(__name__)


class BackboneOutputs:
    """The streams of a frozen backbone and its predictions for a path's landmarks, image by image.

    Parameters
    ----------
    model : the backbone; its own weights and subjects mustn't change while this is in use.
    tokens : the encoder's tokens of the store's images.
    backbone : digest of the backbone's weights.
    images : identities of all images of the store, by row.
    pictures : digests of their pictures, by row, of those that have one (`PooledStore.picture_digests`).
    """

    def __init__(
        self,
        model: EncodingModel,
        tokens: TokenReader,
        *,
        backbone: str,
        images: Sequence[str],
        pictures: Mapping[int, str] | None = None,
    ) -> None:
        self._model, self._tokens, self._n_images = model, tokens, len(images)
        self._made_from = {"version": VERSION, "backbone": backbone, "encoder": tokens.digest, "images": list(images)}
        self._made_from |= {"pictures": sorted((pictures or {}).items()), "tokens": tokens.provenance}

    def streams(self, rows: Int[np.ndarray, " image"]) -> Streams:
        """Return the streams' outputs to the images of `rows`."""
        device = self._model.streams.cls_mean.device

        def compute(some: np.ndarray) -> dict[str, np.ndarray]:
            with torch.no_grad():
                found = self._model.streams(*tokens_on(device, self._tokens, some))
            return {name: values.cpu().numpy() for name, values in vars(found).items()}

        names = [field.name for field in dataclasses.fields(Streams)]
        found = self._rows(rows, compute, of="streams", names=names)
        return Streams(**{name: torch.from_numpy(values).to(device) for name, values in found.items()})

    def landmarks(self, path: PopulationPath, rows: Int[np.ndarray, " image"]) -> Float32[np.ndarray, "image landmark"]:
        """Return what the landmarks of `path` are predicted to respond to the images of `rows`."""
        device = self._model.streams.cls_mean.device

        def compute(some: np.ndarray) -> dict[str, np.ndarray]:
            with torch.no_grad():
                found = self._model.population(*tokens_on(device, self._tokens, some), path)
            return {"landmark": found.cpu().numpy()}

        return self._rows(rows, compute, of=path.landmark.tolist(), names=["landmark"])["landmark"]

    def _rows(
        self,
        rows: np.ndarray,
        compute: Callable[[np.ndarray], dict[str, np.ndarray]],
        *,
        of: object,
        names: Sequence[str],
    ) -> dict[str, np.ndarray]:
        """Return the fields of `rows`: those that are kept, and the others computed and kept."""
        digest = json_digest(self._made_from | {"of": of}).removeprefix("sha256:")
        directory = home() / "cache" / "backbone-outputs" / digest[:32]
        done = _flags(directory, names, self._n_images)
        left = rows[~done[rows]]
        fields: dict[str, np.ndarray] = {}
        fresh: dict[str, list[np.ndarray]] = {}
        keep = True
        for start in range(0, len(left), _BATCH):
            some = left[start : start + _BATCH]
            for name, values in compute(some).items():
                fresh.setdefault(name, []).append(values)
            keep = keep and _write(directory, some, {name: parts[-1] for name, parts in fresh.items()}, self._n_images)
        joined = {name: np.concatenate(parts) for name, parts in fresh.items()}
        if len(left) == len(rows):
            return joined
        known = rows[done[rows]]
        for name in names:
            values = np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            out = np.empty((len(rows), *values.shape[1:]), values.dtype)
            out[done[rows]] = values[known]
            if len(left):
                out[~done[rows]] = joined[name]
            fields[name] = out
        return fields


def _flags(directory: Path, names: Sequence[str], n_images: int) -> np.ndarray:
    """Return which images' rows are kept: none where the file of a field is gone, say by a removal that was cut off."""
    found, done = np.zeros(n_images, bool), directory / "done"
    if not done.exists():
        return found
    if not all((directory / f"{name}.npy").exists() for name in names):
        with contextlib.suppress(OSError):
            done.unlink()
        return found
    kept = np.fromfile(done, np.uint8)[:n_images]
    found[: len(kept)] = kept == 1
    return found


def _write(directory: Path, rows: np.ndarray, fields: Mapping[str, np.ndarray], n_images: int) -> bool:
    """Keep rows of all fields; where that can't be done, say so and go on without."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, values in fields.items():
            path = directory / f"{name}.npy"
            if not path.exists():
                _reserve(path, (n_images, *values.shape[1:]))
            start = path.stat().st_size - n_images * values[0].nbytes
            _write_rows(path, rows, values, start)
        _write_rows(directory / "done", rows, np.ones((len(rows), 1), np.uint8), 0)
    except OSError as error:
        _LOGGER.warning("%s can't be written (%s): the backbone's outputs aren't kept", directory, error)
        return False
    return True


def _reserve(path: Path, shape: tuple[int, ...]) -> None:
    """Write the header of an npy file of single-precision numbers, and a hole in place of the numbers."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + 4 * int(np.prod(shape)))
    try:
        os.link(temporary, path)  # not `replace`: another process may have begun to fill its own
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def _write_rows(path: Path, rows: np.ndarray, values: np.ndarray, start: int) -> None:
    """Write rows of a file whose numbers begin at byte `start`; not through a mapping, which a full disk would kill."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        for row, value in zip(rows.tolist(), values, strict=True):
            data = np.ascontiguousarray(value).tobytes()
            if os.pwrite(descriptor, data, start + row * len(data)) != len(data):
                raise OSError(f"{path} took part of a row only")
    finally:
        os.close(descriptor)

"""What baselines predict, kept in the home by digest of all that decides the numbers: a baseline is fitted once.

One file an entry: the array in npy format, then four bytes of checksum (CRC-32, little-endian), which `numpy.load`
doesn't read. What was used last is kept, `CACHE_BYTES` in all. `rm -r` of the cache loses nothing but time.
"""

import contextlib
import io
import logging
import os
import secrets
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int

from data.home import home
from data.preprocess import Samples
from data.schema import digest_of, json_digest
from data.store import SubjectStore, TokenReader
from foundation.evaluation.baselines.roi_transformer import rois_of
from foundation.evaluation.baselines.systems import VERSION, predict

ENTRY_BYTES = 256 * 2**20
"""The largest prediction that is kept: some 4,000 images of 16,000 voxels."""
CACHE_BYTES = 5 * 2**30
"""Of all entries; beyond it, those that were used longest ago are removed."""
_DECIDING = ("torch", "himalaya", "numpy", "scikit-learn")
_LOOKS_AT_ROIS = "roi-transformer"
_CHECKSUM_BYTES = 4
_LOGGER = logging.getLogger(__name__)


def kept_prediction(
    name: str,
    subject: SubjectStore,
    tokens: TokenReader,
    train: Samples,
    rows: Int[np.ndarray, " image"],
    *,
    images: Sequence[str],
    pictures: Mapping[int, str],
    seed: int,
) -> Float32[np.ndarray, "image voxel"]:
    """Return what the baseline `name` predicts for the images in `rows`: kept from before, else fitted and kept.

    Parameters
    ----------
    subject
        The subject of `train`, for its ROI labels.
    images
        Identities of the store's images, by row (`Split.ids`).
    pictures
        Digests of their pictures, by row, of those that have one (`PooledStore.picture_digests`).

    Raises
    ------
    ValueError
        If there is no such baseline, or it can't be fitted.
    """
    roi = rois_of(subject) if name == _LOOKS_AT_ROIS else None
    made_from = {
        "version": VERSION,
        "packages": {package: version(package) for package in _DECIDING},
        "baseline": name,
        "encoder": tokens.digest,
        "tokens": tokens.provenance,
        "samples": digest_of(train.responses),
        "trained on": _shown(train.image, images, pictures),
        "predicts": _shown(rows, images, pictures),
        "roi": None if roi is None else digest_of(roi),
        "seed": seed,
    }
    path = home() / "cache" / "baselines" / f"{json_digest(made_from).removeprefix('sha256:')[:32]}.npy"
    return kept(path, lambda: predict(name, tokens, train, rows, roi=roi, seed=seed))


def kept(path: Path, fit: Callable[[], Float32[np.ndarray, "..."]]) -> Float32[np.ndarray, "..."]:
    """Return the array in `path`; where that is absent or damaged, what `fit` gives, which is then written there.

    A damaged file, and one that can't be written, are told in a warning. More than `ENTRY_BYTES` aren't written.
    """
    try:
        values = _read(path)
        with contextlib.suppress(OSError):  # a cache that only others may write to
            os.utime(path)
        return values
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError) as error:
        _LOGGER.warning("%s is damaged (%s): the baseline is fitted anew", path, error)
    values = fit()
    if values.nbytes > ENTRY_BYTES:
        _LOGGER.info("a prediction of %d MB isn't kept: it has more than %d", values.nbytes >> 20, ENTRY_BYTES >> 20)
        return values
    try:
        _write(path, values)
        _prune(path.parent)
    except OSError as error:
        _LOGGER.warning("%s can't be written (%s): the baseline's prediction isn't kept", path, error)
    return values


def _shown(rows: np.ndarray, images: Sequence[str], pictures: Mapping[int, str]) -> list[tuple[str, str]]:
    return [(images[row], pictures.get(row, "")) for row in map(int, rows)]


def _read(path: Path) -> np.ndarray:
    data = path.read_bytes()
    array, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if zlib.crc32(array) != int.from_bytes(checksum, "little"):
        raise ValueError("its checksum is another")
    return np.load(io.BytesIO(array), allow_pickle=False)


def _write(path: Path, values: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    array = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(array + zlib.crc32(array).to_bytes(_CHECKSUM_BYTES, "little"))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _prune(directory: Path) -> None:
    """Remove the entries that were used longest ago, so that `CACHE_BYTES` remain."""
    entries = []
    for path in directory.glob("*.npy"):
        with contextlib.suppress(FileNotFoundError):  # pruned by another process meanwhile
            found = path.stat()
            entries.append((found.st_mtime_ns, found.st_size, path))
    total = 0
    for _, size, path in sorted(entries, reverse=True):
        total += size
        if total > CACHE_BYTES:
            path.unlink(missing_ok=True)

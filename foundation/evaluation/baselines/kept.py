"""What baselines predict, kept in the home by digest of all that decides the numbers: a baseline is fitted once.

One file an entry: the array in npy format, then four bytes of checksum (CRC-32, little-endian), which `numpy.load`
doesn't read. `rm -r` of the cache loses nothing but time.
"""

import io
import logging
import os
import secrets
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int

from data.home import home
from data.preprocess import Samples
from data.schema import digest_of, json_digest
from data.store import SubjectStore, TokenReader
from foundation.evaluation.baselines.roi_transformer import rois_of
from foundation.evaluation.baselines.systems import VERSION, predict

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
    roi = rois_of(subject)
    made_from = {
        "version": VERSION,
        "baseline": name,
        "encoder": tokens.digest,
        "tokens": tokens.provenance,
        "samples": digest_of(train.responses),
        "trained on": _shown(train.image, images, pictures),
        "predicts": _shown(rows, images, pictures),
        "roi": digest_of(roi),
        "seed": seed,
    }
    path = home() / "cache" / "baselines" / f"{json_digest(made_from).removeprefix('sha256:')[:32]}.npy"
    return kept(path, lambda: predict(name, tokens, train, rows, roi=roi, seed=seed))


def kept(path: Path, fit: Callable[[], Float32[np.ndarray, "..."]]) -> Float32[np.ndarray, "..."]:
    """Return the array in `path`; where that is absent or damaged, what `fit` gives, which is then written there.

    A damaged file, and one that can't be written, are told in a warning.
    """
    try:
        return _read(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError) as error:
        _LOGGER.warning("%s is damaged (%s): the baseline is fitted anew", path, error)
    values = fit()
    try:
        _write(path, values)
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

"""A gzipped NIfTI of many volumes, too large for memory: decompressed once, front to back.

What a flipped byte changes may decompress all the same. It shows in the checksum at the end of the stream, so a reader
has to go on to the end, whatever part it wants.
"""

import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from data.nifti import load_image

BLOCK_BYTES = 64 << 20


def stream_volumes(path: Path) -> Iterator[Shaped[np.ndarray, "trial voxel"]]:
    """Yield blocks of volumes as they are stored: x runs fastest, a scale of the header is not applied.

    Raises
    ------
    ValueError
        If the file is damaged, or holds more or less than its header says; the last blocks may have come by then.
    """
    image = load_image(path)
    dtype, (*grid, n_volumes) = image.get_data_dtype(), image.shape
    n_bytes = math.prod(grid) * dtype.itemsize
    step = max(1, BLOCK_BYTES // n_bytes)
    with gzip.open(path) as file:
        _read_exactly(file, int(image.dataobj.offset), path)
        for start in range(0, n_volumes, step):
            n = min(step, n_volumes - start)
            yield np.frombuffer(_read_exactly(file, n * n_bytes, path), dtype).reshape(n, -1)
        _read_exactly(file, 0, path)  # the checksum is compared where the stream ends


def _read_exactly(file: gzip.GzipFile, n_bytes: int, path: Path) -> bytes:
    """Return the next bytes of a gzip file; of none, that nothing follows and the checksum fits."""
    try:
        read = file.read(n_bytes or 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut off ({error}); fetch it again") from error
    if len(read) != n_bytes:
        raise ValueError(f"{path} holds {'less' if n_bytes else 'more'} than its header says; fetch it again")
    return read

"""Frozen encoders' tokens, computed once and kept in the store."""

from collections.abc import Callable, Iterator

import numpy as np

from data.encoders import Encoder
from data.store import PooledStore, TokenBatch

BATCH = 32


def load_encoder(source: str, *, depths: tuple[int, ...] | None = None) -> Encoder:
    """Return the encoder named ``gabor``, or one that `transformers` loads from a hub name or a directory."""
    if source == "gabor":
        from data.encoders.gabor import GaborEncoder

        return GaborEncoder() if depths is None else GaborEncoder(depths=depths)
    from data.encoders.huggingface import HuggingFaceEncoder

    return HuggingFaceEncoder(source, depths=depths)


def compute_features(
    store: PooledStore, encoder: Encoder, *, name: str | None = None, progress: Callable[[int], None] = lambda n: None
) -> str:
    """Encode the images that have no tokens of `encoder` yet; return the name under which they are kept.

    `progress` is called with the number of images just done. An interrupted run loses the block it was in.

    Raises
    ------
    ValueError
        If another encoder's tokens bear that name, images were stored without pixels, or a token is beyond the range
        of half precision.
    """
    name = name or encoder.name
    store.begin_tokens(name, encoder.spec())

    def batches(block: str) -> Iterator[TokenBatch]:
        for _, first, pixels in store.pixels(batch=BATCH, block=block):
            tokens = encoder.encode(pixels)
            with np.errstate(over="ignore"):
                cls, patch = tokens.cls.astype(np.float16), tokens.patch.astype(np.float16)
            if not (np.isfinite(cls).all() and np.isfinite(patch).all()):
                raise ValueError(
                    f"{name!r} gives tokens that half precision can't hold, within images {first} to "
                    f"{first + len(pixels) - 1} of block {block}; choose other depths or another encoder"
                )
            progress(len(pixels))
            yield cls, patch

    for block in store.missing_tokens(name):
        store.write_tokens(name, block, batches(block))
    return name

"""Frozen encoders' tokens, computed once and kept in the store."""

from collections.abc import Callable, Iterator

import numpy as np

from data.encoders import Encoder
from data.store import PooledStore

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
    """
    name = name or encoder.name
    store.begin_tokens(name, encoder.spec())
    missing = set(store.missing_tokens(name))

    def batches(block: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for at, _, pixels in store.pixels(batch=BATCH):
            if at == block:
                tokens = encoder.encode(pixels)
                progress(len(pixels))
                yield tokens.cls.astype(np.float16), tokens.patch.astype(np.float16)

    for block in sorted(missing):
        store.write_tokens(name, block, batches(block))
    return name

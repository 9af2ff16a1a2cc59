"""Frozen encoders' tokens, computed once and kept in the store."""

from collections.abc import Callable, Iterator

import numpy as np

from data.encoders import Encoder
from data.store import PooledStore
from data.tokens import NamedTokens

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

    `progress` is called with the number of images just done. An interrupted run loses the
    shard that it was filling.

    Raises
    ------
    ValueError
        If another encoder's tokens bear that name, images were stored without pixels, or a token is beyond the range
        of half precision.
    """
    name = name or encoder.name
    store.begin_tokens(name, encoder.spec())

    def batches(block: str) -> Iterator[NamedTokens]:
        done = store.tokens_written(name, block)
        for _, first, pixels in store.pixels(batch=BATCH, block=block, start=done):
            tokens = encoder.encode(pixels).named()
            with np.errstate(over="ignore"):
                halved = {key: values.astype(np.float16) for key, values in tokens.items()}
            if not all(np.isfinite(values).all() for values in halved.values()):
                raise ValueError(
                    f"{name!r} gives tokens that half precision can't hold, within images {first} to "
                    f"{first + len(pixels) - 1} of block {block}; choose other depths or another encoder"
                )
            progress(len(pixels))
            yield halved

    for block in store.missing_tokens(name):
        store.write_tokens(name, block, batches(block))
    return name

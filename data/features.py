"""Frozen encoders' tokens, computed once and kept in the store."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from data.encoders import Encoder
from data.store import NamedTokens, PooledStore

_BATCH = 64
_BATCH_BYTES = 256 << 20  # of tokens in single precision
T = TypeVar("T")


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

    Blocks of images that were stored without pixels are passed over: see `n_without_pixels`. `progress` is called with
    the number of images just done. An interrupted run loses the shard that it was filling; the next one goes on from
    there, and its tokens are bit for bit those of a run without interruption. What another run has finished meanwhile
    is left as it is.

    Raises
    ------
    ValueError
        If another encoder's tokens bear that name, no image was stored with pixels, the encoder can't take their shape,
        or a token is beyond the range of half precision.
    """
    name = name or encoder.name
    blocks = store.image_blocks()
    bare = {block for block, _, shape in blocks if shape is None}
    if bare and len(bare) == len(blocks):
        raise ValueError(
            f"all {store.n_images} images of {store.path} were stored without pixels, so there is nothing to encode; "
            f"import them into a new store without --no-pixels"
        )
    store.begin_tokens(name, encoder.spec(), provenance=encoder.provenance())
    size = _batch_size(encoder)

    def batches(block: str) -> Iterator[NamedTokens]:
        done = store.tokens_written(name, block)
        # The last bits of a matrix product depend on what else is in the batch, so batches begin where they always do.
        pictures = store.pixels(batch=size, block=block, start=done - done % size)
        for _, first, pixels in _read_ahead(pictures):
            try:
                tokens = encoder.encode(pixels).named()
            except ValueError as error:
                raise ValueError(f"images of block {block} of {store.path}: {error}") from error
            new = slice(max(done - first, 0), None)
            with np.errstate(over="ignore"):
                halved = {key: values[new].astype(np.float16) for key, values in tokens.items()}
            if not all(np.isfinite(values).all() for values in halved.values()):
                raise ValueError(
                    f"{name!r} gives tokens that half precision can't hold, within images {first} to "
                    f"{first + len(pixels) - 1} of block {block}; choose other depths or another encoder"
                )
            progress(len(halved["patch"]))
            yield halved

    for block in store.missing_tokens(name):
        if block not in bare:
            store.write_tokens(name, block, batches(block))
    return name


def n_without_pixels(store: PooledStore) -> int:
    """Return how many images were stored without pixels, so that they can't be encoded."""
    return sum(n for _, n, shape in store.image_blocks() if shape is None)


def _batch_size(encoder: Encoder) -> int:
    """Return how many images to encode at once: a power of two, so that an encoder's own batches divide it."""
    rows, columns = encoder.grid
    per_image = len(encoder.depths) * (rows * columns + 1) * encoder.width * 4
    return 1 << (int(np.clip(_BATCH_BYTES // per_image, 1, _BATCH)).bit_length() - 1)


def _read_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield `items`; the next one is fetched while one is in use."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item

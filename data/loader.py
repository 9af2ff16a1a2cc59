"""From step numbers to batches: the sampler says what, this reads it, some steps ahead of the one who asks."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import islice
from time import perf_counter
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from data.batch import Batch, Part
from data.preprocess import Samples
from data.sampler import Sampler
from data.shuffle_buffer import ShuffleBuffer
from data.store import TokenBatch, TokenReader

PREFETCH = 2
READ_BYTES = 4 << 20  # with a shuffle buffer, so much of neighbouring images is read at once

Key = TypeVar("Key")
Value = TypeVar("Value")
_Key = tuple[int, int, TokenBatch]  # step, part, room for what is read


class Loader:
    """Batches of several subjects' samples by global step; the position is the step, so resuming is asking for it.

    Parameters
    ----------
    tokens, samples : where the tokens are, and each subject's samples.
    batch_size : samples of a global batch, over all ranks.
    seed, rank, world : what the order and this rank's share of it depend on.
    parts : batches in which this rank takes its share of a step, each what a rank of ``parts * world`` would take.
    shuffle_buffer : None shuffles each epoch as a whole. A number keeps the shuffle within windows of so many samples
        of each subject, read by neighbouring images: for tokens on a slow disk or far away. In memory are up to two
        windows of every subject.
    prefetch : batches that are read ahead of the one who asks.

    Raises
    ------
    ValueError
        If there is no whole batch, it can't be shared out, or a setting can't be.
    """

    def __init__(
        self,
        tokens: TokenReader,
        samples: dict[str, Samples],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        parts: int = 1,
        shuffle_buffer: int | None = None,
        prefetch: int = PREFETCH,
    ) -> None:
        if prefetch < 1:
            raise ValueError(f"{prefetch} batches can't be read ahead; use 1 or more")
        if shuffle_buffer is not None and shuffle_buffer < 1:
            raise ValueError(f"a shuffle buffer of {shuffle_buffer} samples can't be; use 1 or more, or None")
        if batch_size % (world * parts) and parts > 1:
            raise ValueError(
                f"batch size {batch_size} is not a multiple of {world} workers with {parts} parts each; make it one"
            )
        self._tokens, self._samples, self._prefetch = tokens, samples, prefetch
        whole = Sampler(
            sizes={name: len(s) for name, s in samples.items()},
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world=world * parts,
            buffer=shuffle_buffer,
            block=1 if shuffle_buffer is None else int(np.clip(READ_BYTES // tokens.image_bytes, 1, shuffle_buffer)),
        )
        self.samplers = [replace(whole, rank=rank + world * part) for part in range(parts)]
        self.steps_per_epoch = whole.steps_per_epoch
        self.wait_s = 0.0
        """Seconds that whoever iterates over `steps` has waited for data, all told."""

    def batch(self, step: int, part: int = 0) -> Batch:
        """Return a part of this rank's share of global step `step`."""
        return self._from_store((step, part, self._tokens.room(self.samplers[part].share)))

    def _from_store(self, key: _Key) -> Batch:
        step, part, room = key
        wanted = self.samplers[part].step(step)
        return collate(self._tokens.read(image_rows(self._samples, wanted), out=room), self._samples, wanted)

    def _from_buffers(self, buffers: list[ShuffleBuffer], key: _Key) -> Batch:
        """Return what `batch` does, out of the part's buffer; to be called step by step."""
        step, part, room = key
        wanted = self.samplers[part].step(step)
        return collate(buffers[part].take(wanted, out=room), self._samples, wanted)

    def _read_samples(self, name: str, index: np.ndarray) -> TokenBatch:
        return self._tokens.read(self._samples[name].image[index])

    def _open_buffer(self, sampler: Sampler, start: int, stop: int) -> ShuffleBuffer:
        return ShuffleBuffer(
            {name: partial(self._read_samples, name) for name in self._samples},
            {name: sampler.windows(name, start, stop) for name in self._samples},
            threads=self._prefetch,
        )

    def steps(self, start: int, stop: int) -> Generator[Batch]:
        """Yield the parts of steps `start` to `stop`, read ahead; what goes wrong in reading is raised here."""
        with ExitStack() as stack:
            make, threads = self._from_store, self._prefetch
            if self.samplers[0].buffer is not None:
                buffers = [stack.enter_context(self._open_buffer(part, start, stop)) for part in self.samplers]
                make, threads = partial(self._from_buffers, buffers), 1
            # Room is made here, in the thread that iterates: the C library mostly uses a thread's own memory again, but
            # for other threads has the system map and clear it each time, which can double a warm read.
            keys = (
                (step, part, self._tokens.room(sampler.share))
                for step in range(start, stop)
                for part, sampler in enumerate(self.samplers)
            )
            ahead = read_ahead(make, keys, depth=self._prefetch, threads=threads)
            batches = stack.enter_context(closing(ahead))
            while True:
                asked = perf_counter()
                batch = next(batches, None)
                self.wait_s += perf_counter() - asked
                if batch is None:
                    return
                yield batch
                del batch  # not kept while the next one is waited for


def read_ahead(
    make: Callable[[Key], Value], keys: Iterable[Key], *, depth: int, threads: int
) -> Generator[Value, None, None]:
    """Yield ``make(key)`` in order, up to `depth` of them made ahead by `threads`; no thread outlives the iterator."""
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="read-ahead")
    coming: deque[Future[Value]] = deque()
    left = iter(keys)
    try:
        coming.extend(pool.submit(make, key) for key in islice(left, depth))
        while coming:
            value = coming.popleft().result()
            coming.extend(pool.submit(make, key) for key in islice(left, 1))
            yield value
            del value  # not kept while the next one is waited for
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def image_rows(samples: dict[str, Samples], wanted: dict[str, np.ndarray]) -> np.ndarray:
    """Return the image rows of `wanted` sample indices by subject, one subject after the other."""
    return np.concatenate([samples[name].image[index] for name, index in wanted.items()])


def collate(tokens: TokenBatch, samples: dict[str, Samples], wanted: dict[str, np.ndarray]) -> Batch:
    """Return the batch of `wanted` sample indices by subject, whose images have `tokens`."""
    parts, start = {}, 0
    for name, index in wanted.items():
        responses = torch.from_numpy(samples[name].responses[index])
        parts[name] = Part(rows=slice(start, start + len(index)), responses=responses)
        start += len(index)
    globals_, patches = tokens
    image = torch.from_numpy(image_rows(samples, wanted).astype(np.int64))
    return Batch(cls=torch.from_numpy(globals_), patch=torch.from_numpy(patches), image=image, parts=parts)


def tokens_on(
    device: torch.device, tokens: TokenReader, rows: Int[np.ndarray, " image"]
) -> tuple[Float[Tensor, "image depth width"], Float[Tensor, "image depth patch width"]]:
    """Return the tokens of some images in single precision on `device`."""
    cls, patch = (torch.from_numpy(part).to(device).float() for part in tokens.read(rows))
    return cls, patch


def ordered_batches(tokens: TokenReader, samples: Samples, *, size: int = 64) -> Iterator[Batch]:
    """Yield one subject's samples in their order, for prediction and scoring."""
    of_subject = {samples.subject: samples}

    def make(start: int) -> Batch:
        wanted = {samples.subject: np.arange(start, min(start + size, len(samples)))}
        return collate(tokens.read(image_rows(of_subject, wanted)), of_subject, wanted)

    return read_ahead(make, range(0, len(samples), size), depth=1, threads=1)

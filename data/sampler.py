"""Which samples make which step: index arithmetic on (seed, epoch, rank, world), without any data.

Every subject's samples are shuffled, then interleaved so that each global batch mixes the subjects in proportion to
their sizes. The global order doesn't depend on the number of ranks; a rank takes every `world`-th sample of a batch.
For data on a slow disk or far away, the shuffle can be kept within windows of neighbouring samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64


class EpochOrder(NamedTuple):
    """An epoch's samples in their order over all subjects."""

    subject: Int64[np.ndarray, " n"]
    """Index of the subject, in the order of the sizes."""
    sample: Int64[np.ndarray, " n"]
    """Index of the subject's sample."""
    window: Int64[np.ndarray, " n"]
    """Which of the subject's shuffle windows the sample is in: 0, 1, ... as the epoch goes on."""


class Window(NamedTuple):
    """One subject's shuffle window, as far as a rank takes its samples in some steps."""

    epoch: int
    number: int
    samples: Int64[np.ndarray, " sample"]
    """Sample indices in the order in which they are taken."""


def epoch_order(
    sizes: dict[str, int], *, seed: int, epoch: int, buffer: int | None = None, block: int = 1
) -> EpochOrder:
    """Return an epoch's global order over all subjects.

    With a `buffer`, each subject's blocks of `block` neighbouring samples are shuffled, as many successive blocks as
    the buffer holds (in samples) make a window, and the samples of a window are shuffled: at any time a subject's
    samples come from few places of its data. Without one, a subject's whole epoch is one window.

    The arrays are read-only: the newest epochs' are kept, for every step asks for its epoch's.
    """
    return _epoch_order(tuple(sizes.values()), seed, epoch, buffer, block)


@lru_cache(maxsize=4)
def _epoch_order(sizes: tuple[int, ...], seed: int, epoch: int, buffer: int | None, block: int) -> EpochOrder:
    rng = np.random.default_rng([seed, epoch])
    subject = np.concatenate([np.full(n, s) for s, n in enumerate(sizes)])
    shuffled = [_shuffled(n, buffer, block, rng) for n in sizes]
    place = np.concatenate([(np.arange(n) + rng.random(n)) / n for n in sizes])
    order = np.argsort(place, kind="stable")  # rises within a subject, whose own order is kept
    found = EpochOrder(
        subject=subject[order],
        sample=np.concatenate([sample for sample, _ in shuffled])[order],
        window=np.concatenate([window for _, window in shuffled])[order],
    )
    for array in found:
        array.flags.writeable = False
    return found


def _shuffled(n: int, buffer: int | None, block: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of one subject's `n` samples, and each one's window."""
    if buffer is None:
        return rng.permutation(n), np.zeros(n, np.int64)
    blocks = rng.permutation(-(-n // block))
    samples = (blocks[:, None] * block + np.arange(block)).ravel()
    window = np.repeat(np.arange(len(blocks)) // (buffer // block), block)
    samples, window = samples[samples < n], window[samples < n]  # the last block may be short
    return samples[np.lexsort((rng.random(n), window))], window


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """What one rank takes in which step; steps are counted over epochs, and any can be asked for at once.

    Parameters
    ----------
    sizes : number of samples of each subject.
    batch_size : samples of a global batch, over all ranks. An epoch has whole batches only; the samples left over are
        others in the next epoch.
    buffer, block : samples of a shuffle window and of a block of neighbours; see `epoch_order`.

    Raises
    ------
    ValueError
        If an epoch has no whole batch, a batch can't be shared out, or a window can't hold a block.
    """

    sizes: dict[str, int]
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1
    buffer: int | None = None
    block: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world
        if self.batch_size % self.world:
            raise ValueError(f"batch size {self.batch_size} is not a multiple of {self.world} workers; make it one")
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"batch size {self.batch_size} is more than the {sum(self.sizes.values())} training samples; "
                f"make it smaller"
            )
        if self.block < 1:
            raise ValueError(f"blocks of {self.block} neighbouring samples can't be; use 1 or more")
        if self.buffer is not None and self.buffer < self.block:
            raise ValueError(
                f"a shuffle buffer of {self.buffer} samples can't hold a block of {self.block}; make it larger, or "
                f"leave it out to shuffle whole epochs"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches of an epoch, the same on all ranks."""
        return sum(self.sizes.values()) // self.batch_size

    @property
    def share(self) -> int:
        """Samples of a batch that each rank takes."""
        return self.batch_size // self.world

    def epoch(self, epoch: int) -> EpochOrder:
        """Return what this rank takes in an epoch: every `world`-th sample of the global order."""
        order = epoch_order(self.sizes, seed=self.seed, epoch=epoch, buffer=self.buffer, block=self.block)
        mine = slice(self.rank, self.steps_per_epoch * self.batch_size, self.world)
        return EpochOrder(*(array[mine] for array in order))

    def step(self, step: int) -> dict[str, Int64[np.ndarray, " sample"]]:
        """Return what this rank takes in a global step: sample indices by subject.

        Every subject is there, in the order of `sizes`, if need be with no samples.
        """
        epoch, at = divmod(step, self.steps_per_epoch)
        order, here = self.epoch(epoch), slice(at * self.share, (at + 1) * self.share)
        return {name: order.sample[here][order.subject[here] == s] for s, name in enumerate(self.sizes)}

    def windows(self, subject: str, start: int, stop: int) -> Iterator[Window]:
        """Yield the windows of `subject` that this rank goes through from global step `start` to `stop`."""
        number = list(self.sizes).index(subject)
        for epoch in range(start // self.steps_per_epoch, -(-stop // self.steps_per_epoch)):
            first = epoch * self.steps_per_epoch
            order, here = self.epoch(epoch), slice(max(start - first, 0) * self.share, (stop - first) * self.share)
            mine = order.subject[here] == number
            sample, window = order.sample[here][mine], order.window[here][mine]
            for part in np.split(np.arange(len(sample)), np.flatnonzero(np.diff(window)) + 1):
                if len(part):
                    yield Window(epoch, int(window[part[0]]), sample[part])

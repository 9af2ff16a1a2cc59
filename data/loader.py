"""From step numbers to batches: the sampler says what, this reads it, one step ahead of the one who asks."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from data.batch import Batch, Part
from data.preprocess import Samples
from data.sampler import check_batch_size, step_samples, steps_per_epoch
from data.store import TokenReader


class Loader:
    """Batches of several subjects' samples by global step; the position is the step, so resuming is asking for it."""

    def __init__(
        self,
        tokens: TokenReader,
        samples: dict[str, Samples],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._tokens, self._samples = tokens, samples
        self.sizes = {name: len(s) for name, s in samples.items()}
        check_batch_size(self.sizes, batch_size=batch_size, world=world)
        self.steps_per_epoch = steps_per_epoch(self.sizes, batch_size=batch_size)
        self._settings = {"seed": seed, "batch_size": batch_size, "rank": rank, "world": world}

    def batch(self, step: int) -> Batch:
        """Return this rank's share of global step `step`."""
        return collate(self._tokens, self._samples, step_samples(self.sizes, step=step, **self._settings))

    def steps(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of steps `start` to `stop`, reading one ahead."""
        with ThreadPoolExecutor(max_workers=1) as reader:
            coming = reader.submit(self.batch, start) if start < stop else None
            for step in range(start, stop):
                assert coming is not None
                now = coming.result()
                coming = reader.submit(self.batch, step + 1) if step + 1 < stop else None
                yield now


def collate(tokens: TokenReader, samples: dict[str, Samples], wanted: dict[str, np.ndarray]) -> Batch:
    """Return the batch of `wanted` sample indices by subject."""
    rows = np.concatenate([samples[name].image[index] for name, index in wanted.items()])
    cls, patch = tokens.read(rows)
    parts, start = {}, 0
    for name, index in wanted.items():
        responses = torch.from_numpy(samples[name].responses[index])
        parts[name] = Part(rows=slice(start, start + len(index)), responses=responses)
        start += len(index)
    return Batch(cls=torch.from_numpy(cls).float(), patch=torch.from_numpy(patch).float(), parts=parts)


def ordered_batches(tokens: TokenReader, samples: Samples, *, size: int = 64) -> Iterator[Batch]:
    """Yield one subject's samples in their order, for prediction and scoring."""
    for start in range(0, len(samples), size):
        index = np.arange(start, min(start + size, len(samples)))
        yield collate(tokens, {samples.subject: samples}, {samples.subject: index})

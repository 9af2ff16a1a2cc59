"""Which samples make which step: index arithmetic on (seed, epoch, rank, world), without any data.

Every subject's samples are shuffled, then interleaved so that each global batch mixes the subjects in proportion to
their sizes. The global order doesn't depend on the number of ranks; a rank takes every `world`-th sample of a batch.
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Int64


def steps_per_epoch(sizes: dict[str, int], *, batch_size: int) -> int:
    """Return how many whole global batches an epoch has; the samples left over are others in the next epoch."""
    return sum(sizes.values()) // batch_size


def check_batch_size(sizes: dict[str, int], *, batch_size: int, world: int) -> None:
    """Raise ValueError unless `batch_size` divides among `world` ranks and an epoch has a whole batch."""
    if batch_size % world:
        raise ValueError(f"batch size {batch_size} is not a multiple of {world} workers; make it one")
    if steps_per_epoch(sizes, batch_size=batch_size) == 0:
        raise ValueError(
            f"batch size {batch_size} is more than the {sum(sizes.values())} training samples; make it smaller"
        )


def epoch_order(
    sizes: dict[str, int], *, seed: int, epoch: int
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Return an epoch's order over all subjects: index of the subject (in the order of `sizes`), and of its sample.

    Both are read-only: the newest epochs' are kept, for every step asks for its epoch's.
    """
    return _epoch_order(tuple(sizes.values()), seed, epoch)


@lru_cache(maxsize=4)
def _epoch_order(sizes: tuple[int, ...], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, epoch])
    subject = np.concatenate([np.full(n, s) for s, n in enumerate(sizes)])
    sample = np.concatenate([rng.permutation(n) for n in sizes])
    place = np.concatenate([(np.arange(n) + rng.random(n)) / n for n in sizes])
    order = np.argsort(place, kind="stable")
    found = subject[order], sample[order]
    for array in found:
        array.flags.writeable = False
    return found


def step_samples(
    sizes: dict[str, int], *, seed: int, step: int, batch_size: int, rank: int = 0, world: int = 1
) -> dict[str, Int64[np.ndarray, " sample"]]:
    """Return what `rank` takes in global step `step` (counted over epochs): sample indices by subject.

    Every subject is there, in the order of `sizes`, if need be with no samples.
    """
    per_epoch = steps_per_epoch(sizes, batch_size=batch_size)
    epoch, at = divmod(step, per_epoch)
    subject, sample = epoch_order(sizes, seed=seed, epoch=epoch)
    mine = slice(at * batch_size + rank, (at + 1) * batch_size, world)
    return {name: sample[mine][subject[mine] == s] for s, name in enumerate(sizes)}

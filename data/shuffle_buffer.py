"""Tokens of the shuffle windows that a rank is in, read once by neighbouring rows and kept until they are used.

Of each subject there are at most two windows: the one in use, and the next, which is read meanwhile. So a buffer of B
samples holds the tokens of at most 2 B images of each subject, shared out among the ranks.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from jaxtyping import Float16, Int

from data.sampler import Window
from data.store import TokenBatch

Read = Callable[[Int[np.ndarray, " sample"]], TokenBatch]


class _Subject:
    """One subject's windows, in turn."""

    def __init__(self, read: Read, windows: Iterator[Window], pool: ThreadPoolExecutor) -> None:
        self._read, self._windows, self._pool = read, windows, pool
        self._samples: Int[np.ndarray, " sample"] = np.empty(0, np.int64)
        self._tokens: TokenBatch | None = None
        self._used = 0
        self._coming: tuple[np.ndarray, Future[TokenBatch]] | None = None
        self._begin_next()

    def _begin_next(self) -> None:
        window = next(self._windows, None)
        if window is None:
            self._coming = None
            return
        samples = np.sort(window.samples)
        self._coming = samples, self._pool.submit(self._read, samples)

    def _advance(self) -> None:
        assert self._coming is not None, "more samples are asked for than the windows have"
        self._tokens = None  # given back before the next one is waited for
        self._samples, coming = self._coming
        self._tokens, self._used = coming.result(), 0
        del coming
        self._begin_next()

    def take(
        self,
        samples: Int[np.ndarray, " sample"],
        globals_: Float16[np.ndarray, "sample depth width"],
        patches: Float16[np.ndarray, "sample depth patch width"],
    ) -> None:
        """Copy the tokens of the next `samples` of the order."""
        done = 0
        while done < len(samples):
            if self._used == len(self._samples):
                self._advance()
            assert self._tokens is not None
            n = min(len(samples) - done, len(self._samples) - self._used)
            here = slice(done, done + n)
            place = np.searchsorted(self._samples, samples[here])
            # Not "raise", the default: it copies once more, so as to leave `out` alone where a place doesn't exist.
            np.take(self._tokens[0], place, axis=0, out=globals_[here], mode="clip")
            np.take(self._tokens[1], place, axis=0, out=patches[here], mode="clip")
            done += n
            self._used += n


class ShuffleBuffer:
    """Gives out tokens in the sampler's order; a context manager, at whose end no thread is left."""

    def __init__(
        self,
        read: dict[str, Read],
        windows: dict[str, Iterator[Window]],
        *,
        threads: int,
    ) -> None:
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="shuffle-buffer")
        self._subjects = {name: _Subject(read[name], windows[name], self._pool) for name in read}

    def __enter__(self) -> "ShuffleBuffer":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._subjects.clear()

    def take(self, wanted: dict[str, Int[np.ndarray, " sample"]], *, out: TokenBatch) -> TokenBatch:
        """Fill `out` with the tokens of the next step's samples, which must be those that the order has there."""
        globals_, patches = out
        start = 0
        for name, samples in wanted.items():
            here = slice(start, start := start + len(samples))
            self._subjects[name].take(samples, globals_[here], patches[here])
        return out

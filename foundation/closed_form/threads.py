"""How many threads a closed form is worth."""

import contextlib
from collections.abc import Iterator

import torch
from threadpoolctl import threadpool_limits

MANY_NUMBERS = 4_000_000
"""Images times voxels from which several threads pay."""


@contextlib.contextmanager
def threads_for(n_numbers: int) -> Iterator[None]:
    """Compute on one thread where there is little to compute: several then cost more than they give.

    Torch, numpy and scipy each keep threads of their own, which wait for more by spinning in each other's way. On two
    cores the closed-form start of four V4 recordings took 75 s on one thread; on two, the first alone took 90 s.
    """
    if n_numbers > MANY_NUMBERS:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(before)

"""How the C library's allocator treats what torch frees on the CPU."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let the process keep freed memory for its next step; return whether the C library can (glibc's does).

    Else glibc gives large arrays back to the kernel at every step, which hands them out again page by page, each
    cleared: a tenth of the time of a block's step on two cores. The process stays as large as it was at its largest.
    """
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        return False
    return all(
        library.mallopt(option, size) == 1
        for option, size in ((_M_TRIM_THRESHOLD, 2**31 - 1), (_M_MMAP_THRESHOLD, 2**25))
    )

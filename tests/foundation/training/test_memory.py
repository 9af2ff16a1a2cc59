"""What a step frees is there for the next one, without asking the kernel again."""

import subprocess
import sys

import pytest

PAGES = """
import ctypes, resource, sys
import torch
from foundation.training.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        arrays = [torch.ones(1_600_000) for _ in range(24)]
        del arrays
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

library = ctypes.CDLL(None)
if not hasattr(library, "mallopt"):
    sys.exit("cannot")
library.mallopt(-1, 2**17), library.mallopt(-3, 2**17)  # its thresholds at first, which it else moves by itself
given_back = faults()
assert keep_freed_memory()
faults()
print(given_back, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is what is told")
def test_freed_memory_is_used_again_without_a_fault_for_each_page():
    ran = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=False)
    if "cannot" in ran.stderr:
        pytest.skip("this C library can't be told")
    assert ran.returncode == 0, ran.stderr
    given_back, kept = (int(n) for n in ran.stdout.split())
    pages = 5 * 24 * 1_600_000 * 4 // 4096
    assert given_back > 0.9 * pages
    assert kept < 0.01 * pages

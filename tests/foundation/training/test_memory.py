"""What a step frees is there for the next one, without asking the kernel again."""

import subprocess
import sys

import pytest

PAGES = """
import resource, sys
import torch
from foundation.training.memory import keep_freed_memory

def step():
    arrays = [torch.ones(1_600_000) for _ in range(24)]

if not keep_freed_memory():
    sys.exit("cannot")
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is what is told")
def test_freed_memory_is_used_again_without_a_fault_for_each_page():
    ran = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=False)
    if "cannot" in ran.stderr:
        pytest.skip("this C library can't be told")
    assert ran.returncode == 0, ran.stderr
    pages = 5 * 24 * 1_600_000 * 4 // 4096  # untold, the library asks for most of them anew in about half of all runs
    assert int(ran.stdout) < 0.01 * pages

"""Freed memory is used again rather than mapped anew."""

import platform
import subprocess
import sys

import pytest

NUM_FAULTS = """
import resource, sys
import torch
from data_gen.diffusion.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def num_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for size in (40, 60) * 8:  # in MiB: each is 10,000 pages or more
    torch.ones(size << 18)
before = num_faults()
for size in (40, 60, 40, 60):
    torch.ones(size << 18)
print(num_faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_is_kept_costs_no_page_faults() -> None:
    faults = {
        mode: int(
            subprocess.run([sys.executable, "-c", NUM_FAULTS, mode], capture_output=True, check=True).stdout
        )
        for mode in ("keep", "default")
    }
    assert faults["keep"] < 100
    assert faults["default"] > 10_000

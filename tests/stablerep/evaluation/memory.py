"""The peak of memory of a call, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from /proc"
)

_CODE = """
from pathlib import Path
import torch

def read_status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024

torch.manual_seed(0)
{setup}
before = read_status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
{call}
print(read_status("VmHWM") - before)
"""


def measure_peak_bytes(setup: str, call: str) -> int:
    """Bytes that the process has at most during the call, above what it has before.

    Args:
        setup: Statements that make the inputs and call once on few, for what is set up once; torch is there.
        call: The statement that is measured.
    """
    command = [sys.executable, "-c", _CODE.format(setup=setup, call=call)]
    # Else glibc keeps what was freed, and the peak is that of its holes.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    measured = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=300, env=environment
    )
    return int(measured.stdout)

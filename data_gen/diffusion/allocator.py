"""Memory that an operation on the CPU has freed is kept for the next one.

Every operation of a network allocates its output. For large ones glibc maps fresh pages and unmaps them
afterwards, and each page costs a fault when it is first written: a sixth of the time with 16 images a batch
of the embedded model. The share grows with the batch, so that batching would give back what it gains.

Reference: mallopt(3).
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
_MAX_INT = 2**31 - 1
_TOP_PAD_BYTES = 64 << 20
_MMAP_THRESHOLDS_BYTES = (1 << 30, 32 << 20)  # the second is the most that an older glibc takes


def keep_freed_memory() -> bool:
    """Tells glibc, for the whole process, to hold on to freed memory; its peak stays what it was.

    Returns:
        Whether it took effect; False where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    has_threshold = any(mallopt(_M_MMAP_THRESHOLD, size) for size in _MMAP_THRESHOLDS_BYTES)
    mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)
    return bool(mallopt(_M_TRIM_THRESHOLD, _MAX_INT)) and has_threshold

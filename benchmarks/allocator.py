"""The C library's allocator, told to keep what was freed.

A training step frees tens of megabytes at its end. glibc gives memory back to the system by a rule that depends on what
was allocated before, and a step that has to fetch it again pays for pages to be zeroed: one and the same loop over 2 MB
took 0.12 or 0.49 ms, and our compiled step 1.01 to 1.13 times the float model's from one process to the next. PyTorch's
tuning guide recommends allocators that keep memory; here all ways of a benchmark run with glibc's own, set likewise.
"""

from __future__ import annotations

import ctypes
import sys

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more


def keep_freed_memory() -> bool:
    """Keep freed memory from here on, in this process. False where the C library has no such setting."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    done = mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD), mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    return all(done)

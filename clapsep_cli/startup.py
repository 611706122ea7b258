"""How the command's process is set up before torch is imported: memory and threads, for speed.

Measured on two cores: the defaults cost a tenth of the time in memory that is mapped anew for each large tensor, and,
as soon as another process is busy, a factor of 3 to 8 in threads that spin while they wait for each other.
"""

from __future__ import annotations

import ctypes
import os
import sys

SPINS = 3000  # of a waiting OpenMP thread, before it sleeps; alone as fast as the default of 300,000
LARGEST_HEAP_BLOCK_BYTES = 1 << 30
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def prepare() -> None:
    """Choose how threads wait and where large blocks of memory come from, unless the user's environment says."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, others may not
        if mallopt:
            mallopt(_M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK_BYTES)
            mallopt(_M_TRIM_THRESHOLD, LARGEST_HEAP_BLOCK_BYTES)


def set_threads(count: int | None) -> None:
    """Compute with so many threads; by default with as many as there are cores for this process."""
    if count:
        import torch

        torch.set_num_threads(count)

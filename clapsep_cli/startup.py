"""Sets up the process: standard streams, threads before torch is imported, and memory."""

from __future__ import annotations

import ctypes
import gc
import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Spins of a waiting OpenMP thread before it sleeps. On two free cores as fast as the default (300,000). If another
# process uses one of the cores, the default makes everything 3 to 8 times slower, and this only 2 times.
SPINS = 3000

# Of glibc's mallopt.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = 2**31 - 1

UNKNOWN_BYTES = 2**33  # free memory that is assumed if the system does not report it


def prepare() -> None:
    """Set how long threads wait for each other, unless the user's environment does."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    # NumPy only measures levels. Its threads, one on each core, would wait beside the model's workers: ten minutes of
    # stereo took 13 s instead of 10 on two cores, and a third more processor time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def replace_closed_streams() -> io.StringIO | None:
    """Replace closed standard streams (`>&-`), so that no opened file gets their number.

    Returns:
        The replacement of stdout if it is closed; it holds the output that could not be printed.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    if sys.stderr is None:
        sys.stderr = io.StringIO()
    if sys.stdout is not None:
        return None
    sys.stdout = unprinted = io.StringIO()
    return unprinted


def set_threads(count: int | None) -> None:
    """Import torch, and set its number of threads; by default that is the number of cores of this process."""
    gc.disable()  # importing makes no garbage, and searching for it takes a twelfth of the time
    try:
        import torch
    finally:
        gc.freeze()  # nor is any found there later, which takes as long
        gc.enable()
    if count:
        torch.set_num_threads(count)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, as windows are: the last bits then do not depend on the number of cores."""
    import torch

    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(cores)


def keep_memory() -> None:
    """Keep freed memory for the next step of training, which needs as much: saves a tenth of a step on a CPU.

    By default glibc returns large blocks to the system, and each step waits until they are mapped and cleared again.
    """
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)


def free_bytes(system: Path = Path("/")) -> int:
    """Return the free memory of this process, within its container's limit, in bytes.

    Args:
        system: where the system's `proc` and `sys` are mounted.
    """
    known = []
    with suppress(OSError, ValueError):
        told = re.search(r"^MemAvailable:\s+(\d+) kB", (system / "proc/meminfo").read_text(), re.M)
        known += [int(told[1]) * 1024] if told else []
    with suppress(OSError, ValueError):  # "max" for no limit
        group = system / "sys/fs/cgroup"
        used = int((group / "memory.current").read_text())
        known.append(int((group / "memory.max").read_text()) - used)
    if not known:
        with suppress(OSError, ValueError, AttributeError):  # not on Windows
            known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    return max(0, min(known, default=UNKNOWN_BYTES))

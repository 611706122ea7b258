"""Sets up the process: its standard streams, threads before torch is imported, and memory; tells what is free of it."""

from __future__ import annotations

import ctypes
import gc
import io
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

# Of a waiting OpenMP thread, before it sleeps. On two cores as fast as the default (300,000) when the machine is free;
# with another process on one of them, the default makes everything 3 to 8 times slower, and this 2 times.
SPINS = 3000

# Of glibc's mallopt.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = 2**31 - 1

UNKNOWN_BYTES = 2**33  # assumed where the system does not tell


def prepare() -> None:
    """Choose how threads wait for each other, unless the user's environment says."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    # NumPy only measures levels. With a thread on each core it waits beside the model's workers: ten minutes of stereo
    # took 13 s in place of 10 on two cores, and a third more processor time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def replace_closed_streams() -> io.StringIO | None:
    """Give standard streams that are closed (`>&-`) a stand-in, so that no file that is opened gets their number.

    Returns:
        What stands in for stdout, if that is closed: it holds what could not be printed.
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
    """Import torch and compute with so many threads; by default with as many as there are cores for this process."""
    gc.disable()  # importing makes no garbage, and looking for it takes a twelfth of that time
    try:
        import torch
    finally:
        gc.freeze()  # nor is any found there later, which takes as long
        gc.enable()
    if count:
        torch.set_num_threads(count)


def keep_memory() -> None:
    """Keep what is freed for the next step of training, which needs just as much: a step takes a tenth less on a CPU.

    Otherwise glibc gives large pieces back to the system, and each step waits for them to be mapped and cleared anew.
    """
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)


def free_bytes(system: Path = Path("/")) -> int:
    """Return the memory that is left to this process, within its container's limit, in bytes.

    Args:
        system: where the system's `proc` and `sys` are mounted.
    """
    known = []
    with suppress(OSError, ValueError):
        told = re.search(r"^MemAvailable:\s+(\d+) kB", (system / "proc/meminfo").read_text(), re.M)
        known += [int(told[1]) * 1024] if told else []
    with suppress(OSError, ValueError):  # "max" where there is no limit
        group = system / "sys/fs/cgroup"
        used = int((group / "memory.current").read_text())
        known.append(int((group / "memory.max").read_text()) - used)
    if not known:
        with suppress(OSError, ValueError, AttributeError):  # not on Windows
            known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    return max(0, min(known, default=UNKNOWN_BYTES))

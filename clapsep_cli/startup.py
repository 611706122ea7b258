"""How the command's process is set up before torch is imported: threads, for speed."""

from __future__ import annotations

import os

# Of a waiting OpenMP thread, before it sleeps. On two cores as fast as the default (300,000) when the machine is free;
# with another process on one of them, the default makes everything 3 to 8 times slower, and this 2 times.
SPINS = 3000


def prepare() -> None:
    """Choose how threads wait for each other, unless the user's environment says."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def set_threads(count: int | None) -> None:
    """Compute with so many threads; by default with as many as there are cores for this process."""
    if count:
        import torch

        torch.set_num_threads(count)

"""Makes recordings to separate, and reads the outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

Audio = NDArray[np.float64]


def noise(*shape: int, seed: int = 0) -> Audio:
    return 0.1 * np.random.default_rng(seed).standard_normal(shape)


def noise32(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return 0.1 * np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def read(path: Path) -> Audio:
    return np.asarray(soundfile.read(path, dtype="float64", always_2d=True)[0])


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

"""Separation metrics by the paper's equations (arXiv 2402.17455, Eq. 14–16)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FLOOR = 1e-10  # energy ratio under which a figure says nothing more: ±100 dB


def _decibel(signal: float, noise: float) -> float:
    return float(10 * np.log10((signal + FLOOR * noise + 1e-30) / (noise + FLOOR * signal + 1e-30)))


def sdr(estimate: NDArray[np.float32], target: NDArray[np.float32]) -> float:
    """Signal-to-distortion ratio in dB (Eq. 15): energy of the target over energy of the error. Mono `[samples]`."""
    e, t = estimate.astype(np.float64), target.astype(np.float64)
    return _decibel(float(t @ t), float((e - t) @ (e - t)))


def si_sdr(estimate: NDArray[np.float32], target: NDArray[np.float32]) -> float:
    """Scale-invariant SDR in dB (Eq. 16): the target is first scaled to fit the estimate best. Mono `[samples]`."""
    e, t = estimate.astype(np.float64), target.astype(np.float64)
    fitted = t * ((e @ t) / max(float(t @ t), 1e-30))
    return _decibel(float(fitted @ fitted), float((e - fitted) @ (e - fitted)))

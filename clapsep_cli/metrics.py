"""Separation metrics: the paper's equations (arXiv 2402.17455, Eq. 14–16), and BSS-eval as its code reports it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FLOOR = 1e-10  # energy ratio under which a figure says nothing more: ±100 dB
LIMIT_DB = 100.0
FILTER_TAPS = 512  # of the distortion that BSS-eval forgives
DIAGONAL = 1e-12  # keeps BSS-eval's equations solvable for a silent target; moves nothing between ±100 dB


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


def bss_sdr(estimates: NDArray[np.float32], target: NDArray[np.float32], device: str = "cpu") -> list[float]:
    """BSS-eval SDR in dB of each of `estimates` (`[estimates, samples]`) against a mono `target` (`[samples]`).

    The target is first filtered, by 512 taps, to fit the estimate best (Vincent et al. 2006, bss_eval_sources with one
    source). Computed by torchmetrics, as in the test step of the paper's code, in float64 on `device`.
    """
    import torch
    from torchmetrics.functional.audio import signal_distortion_ratio

    given, wanted = (torch.from_numpy(x).to(device, torch.float64) for x in (estimates, target))
    found = signal_distortion_ratio(given, wanted.expand_as(given), filter_length=FILTER_TAPS, load_diag=DIAGONAL)
    decibels: list[float] = found.clamp(-LIMIT_DB, LIMIT_DB).tolist()
    return decibels

"""Separation metrics of the paper (arXiv 2402.17455, Eq. 15 and 16), and BSS-eval as its code reports it.

They are computed in float64 and limited to ±100 dB. `training.recipes.objective` has the same equations as losses: in
float32, with gradients, and with a floor in energy, which limits the weight of examples that are already separated.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FLOOR = 1e-10  # lowest energy ratio to tell apart: ±100 dB
LIMIT_DB = 100.0
FILTER_TAPS = 512  # of the filter that BSS-eval allows between estimate and target
DIAGONAL = 1e-12  # keeps BSS-eval's equations solvable for a silent target; no effect within ±100 dB


def _decibel(signal: float, noise: float) -> float:
    return float(10 * np.log10((signal + FLOOR * noise + 1e-30) / (noise + FLOOR * signal + 1e-30)))


def sdr(estimate: NDArray[np.float32], target: NDArray[np.float32]) -> float:
    """Compute the signal-to-distortion ratio (Eq. 15): energy of the target over energy of the error.

    Args:
        estimate: mono, float32 `[samples]`.
        target: likewise.

    Returns:
        SDR in dB, within ±100.
    """
    e, t = estimate.astype(np.float64), target.astype(np.float64)
    return _decibel(float(t @ t), float((e - t) @ (e - t)))


def si_sdr(estimate: NDArray[np.float32], target: NDArray[np.float32]) -> float:
    """Compute the scale-invariant SDR (Eq. 16): the target is first scaled to fit the estimate best.

    Args:
        estimate: mono, float32 `[samples]`.
        target: likewise.

    Returns:
        SI-SDR in dB, within ±100.
    """
    e, t = estimate.astype(np.float64), target.astype(np.float64)
    fitted = t * ((e @ t) / max(float(t @ t), 1e-30))
    return _decibel(float(fitted @ fitted), float((e - fitted) @ (e - fitted)))


def bss_sdr(estimates: NDArray[np.float32], target: NDArray[np.float32], device: str = "cpu") -> list[float]:
    """Compute BSS-eval SDR (Vincent et al. 2006): the target is first filtered by 512 taps to fit the estimate best.

    This is bss_eval_sources with one source, by torchmetrics, as in the test step of the paper's code.

    Args:
        estimates: mono, float32 `[estimates, samples]`.
        target: mono, float32 `[samples]`.
        device: where to compute; it needs float64.

    Returns:
        SDR of each estimate in dB, within ±100.
    """
    import torch
    from torchmetrics.functional.audio import signal_distortion_ratio

    given, wanted = (torch.from_numpy(x).to(device, torch.float64) for x in (estimates, target))
    found = signal_distortion_ratio(given, wanted.expand_as(given), filter_length=FILTER_TAPS, load_diag=DIAGONAL)
    decibels: list[float] = found.clamp(-LIMIT_DB, LIMIT_DB).tolist()
    return decibels

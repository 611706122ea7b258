from __future__ import annotations

import numpy as np
import pytest

from clapsep_cli.metrics import LIMIT_DB, bss_sdr, sdr, si_sdr

RNG = np.random.default_rng(0)
TARGET, OTHER = RNG.standard_normal((2, 32_000)).astype(np.float32)
OTHER -= TARGET * (OTHER @ TARGET) / (TARGET @ TARGET)  # at right angles
OTHER *= np.linalg.norm(TARGET) / np.linalg.norm(OTHER)


@pytest.mark.parametrize("snr", [-10.0, 0.0, 20.0])
def test_sdr_of_an_orthogonal_error_is_the_snr(snr: float) -> None:
    estimate = TARGET + OTHER * np.float32(10 ** (-snr / 20))
    assert sdr(estimate, TARGET) == pytest.approx(snr, abs=1e-3)
    assert si_sdr(estimate, TARGET) == pytest.approx(snr, abs=1e-3)


def test_half_of_a_mixture_at_0_db_gains_sdr_but_no_si_sdr() -> None:
    mixture = TARGET + OTHER
    assert sdr(mixture / 2, TARGET) - sdr(mixture, TARGET) == pytest.approx(3.01, abs=0.01)
    assert si_sdr(mixture / 2, TARGET) - si_sdr(mixture, TARGET) == pytest.approx(0, abs=0.01)


def test_extremes_are_finite() -> None:
    silence = np.zeros_like(TARGET)
    for metric in (sdr, si_sdr):
        assert metric(TARGET, TARGET) == pytest.approx(100, abs=0.1)
        for pair in ((silence, TARGET), (TARGET, silence), (silence, silence)):
            assert np.isfinite(metric(*pair))


def test_bss_eval_is_the_ratio_to_the_best_filtered_target() -> None:
    """Against its definition: least squares over the target delayed by 0 to 511 samples."""
    target, noise = np.random.default_rng(1).standard_normal((2, 3000)).astype(np.float32)
    estimate = (0.5 * target + 0.3 * np.roll(target, 7) + 0.4 * noise).astype(np.float32)
    delayed = np.stack([np.concatenate([np.zeros(k), target, np.zeros(511 - k)]) for k in range(512)], 1)
    heard = np.concatenate([estimate, np.zeros(511)]).astype(np.float64)
    fitted = delayed @ np.linalg.lstsq(delayed, heard, rcond=None)[0]
    expected = 10 * np.log10(np.sum(fitted**2) / np.sum((heard - fitted) ** 2))
    assert bss_sdr(estimate[None], target) == [pytest.approx(expected, abs=1e-3)]


def test_bss_eval_forgives_a_filter_that_si_sdr_does_not() -> None:
    echoed = TARGET + np.float32(0.9) * np.roll(TARGET, 100)
    assert si_sdr(echoed, TARGET) < 2
    (alone, scaled) = bss_sdr(np.stack([echoed, echoed / 5]), TARGET)
    assert alone > 20
    assert scaled == pytest.approx(alone)


def test_bss_eval_has_an_answer_for_silence() -> None:
    silence = np.zeros_like(TARGET)
    assert bss_sdr(np.stack([TARGET, silence]), TARGET) == [LIMIT_DB, -LIMIT_DB]
    assert bss_sdr(np.stack([TARGET, silence]), silence) == [-LIMIT_DB, -LIMIT_DB]

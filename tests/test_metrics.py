from __future__ import annotations

import numpy as np
import pytest

from clapsep_cli.metrics import sdr, si_sdr

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

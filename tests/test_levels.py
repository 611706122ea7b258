"""Tests levels and presence scores."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from clapsep_cli.audio.samples import downmix
from clapsep_cli.listening.levels import EXCERPT_SECONDS, EXCERPTS, Meter, Presence

RATE = 100
EXCERPT = round(EXCERPT_SECONDS * RATE)


def noise(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def test_level_and_peak_over_all_blocks_and_channels() -> None:
    meter = Meter()
    assert meter.read() == {"rms_db": None, "peak_db": None}
    meter.add(np.array([[0.5, -0.5], [0.5, 0.5]], np.float32))
    meter.add(np.array([[0.0], [-1.0]], np.float32))
    rms = (4 * 0.25 + 1) / 6
    assert meter.read() == {"rms_db": round(10 * np.log10(rms), 2), "peak_db": 0.0}


@pytest.mark.parametrize(("gain", "score"), [(1.0, 0.5), (0.5, 0.5 - 0.02 * 6.02), (1e-3, 0.5 - 0.02 * 20)])
@pytest.mark.parametrize("block", [7, EXCERPT, 5 * EXCERPT])
def test_a_quiet_target_counts_less_whatever_the_blocks(gain: float, score: float, block: int) -> None:
    mixture = noise(2, 2 * EXCERPT + 30)
    presence = Presence(RATE)
    for at in range(0, mixture.shape[1], block):
        presence.add(mixture[:, at : at + block], gain * mixture[:, at : at + block])
    heard: list[int] = []

    def likeness(mono: NDArray[np.float32]) -> float:
        heard.append(len(mono))
        return 0.5

    told = presence.read(likeness)
    assert told == {"before": 0.5, "after": 0.5, "score": pytest.approx(score, abs=1e-3)}
    assert sorted(heard) == [30] * 2 + [EXCERPT] * 4


def test_the_loudest_excerpts_tell() -> None:
    presence = Presence(RATE)
    for loudness in (1, 5, 2, 4, 3):
        presence.add(noise(1, EXCERPT), np.full((1, EXCERPT), loudness, np.float32))
    asked: list[float] = []

    def likeness(mono: NDArray[np.float32]) -> float:
        asked.append(round(float(np.abs(mono).max()), 3))
        return 0.0

    presence.read(likeness)
    assert len(asked) == 2 * EXCERPTS
    assert asked[1::2] == [5, 4, 3]


def test_nothing_is_told_of_silence_and_of_what_nobody_asked_for() -> None:
    silent, unasked = Presence(RATE), Presence(RATE)
    silent.add(noise(1, EXCERPT), np.zeros((1, EXCERPT), np.float32))
    unasked.add(noise(1, EXCERPT), noise(1, EXCERPT))
    assert silent.read(lambda mono: 1.0) is None
    assert unasked.read(lambda mono: None) is None
    assert Presence(RATE).read(lambda mono: 1.0) is None


def test_downmix_is_the_mean_unless_the_channels_cancel() -> None:
    left, right = np.random.default_rng(0).standard_normal((2, 1000)).astype(np.float32)
    np.testing.assert_array_equal(downmix(left[None]), left)
    np.testing.assert_allclose(downmix(np.stack([left, right])), (left + right) / 2, rtol=1e-5)
    np.testing.assert_allclose(downmix(np.stack([left, np.zeros_like(left)])), left / 2)
    np.testing.assert_array_equal(downmix(np.stack([left, -1.1 * left])), left)  # about as loud: the first
    np.testing.assert_array_equal(downmix(np.stack([-0.8 * left, left, -0.2 * left, 0 * left])), -0.8 * left)
    np.testing.assert_array_equal(downmix(np.stack([-0.6 * left, left, -0.4 * left])), left)
    assert not downmix(np.zeros((2, 10), np.float32)).any()

"""Windows join without an audible seam."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from clapsep_cli import Query, load_model, separate
from clapsep_cli.dsp import HOP, N_FFT, RATE_HZ
from clapsep_cli.store.checkpoint import Model

MIX = Path(__file__).parents[1] / "examples" / "mix.flac"
WINDOW, FADE = 10 * RATE_HZ, RATE_HZ
EVERY = WINDOW - FADE
REACH = 4  # frames to each side of a border in which a seam would show

Audio = NDArray[np.float32]


@pytest.fixture(scope="module")
def mini() -> Model:
    return load_model("mini", "cpu", "high")


def rain(seconds: int) -> Audio:
    """A stationary sound: noise with the spectrum of the rain in the example."""
    heard, _ = soundfile.read(MIX.with_name("rain.flac"), dtype="float32")
    spectrum = np.abs(np.fft.rfft(heard, 2 * RATE_HZ * seconds)[: RATE_HZ * seconds + 1])
    smooth = np.convolve(spectrum, np.ones(2001) / 2001, "same")
    phases = np.exp(2j * np.pi * np.random.default_rng(0).random(len(smooth)))
    sound = np.fft.irfft(smooth * phases, 2 * (len(smooth) - 1))[: RATE_HZ * seconds]
    return np.asarray(0.05 * sound / sound.std(), np.float32)


def tiled(seconds: int) -> Audio:
    """A real one: the example again and again, by a length that has nothing to do with the windows'."""
    heard, _ = soundfile.read(MIX, dtype="float32")
    piece = heard[: round(7.3 * RATE_HZ)].copy()
    ramp = np.linspace(0, 1, 3200, dtype=np.float32)
    piece[:3200] = ramp * piece[:3200] + ramp[::-1] * heard[len(piece) : len(piece) + 3200]
    return np.tile(piece, seconds)[: seconds * RATE_HZ]


def flux(audio: Audio) -> NDArray[np.float64]:
    """Spectral flux, frame by frame: the mean step of the log magnitude from one to the next."""
    frames = np.lib.stride_tricks.sliding_window_view(audio, N_FFT)[::HOP] * np.hanning(N_FFT)
    level = np.log(np.abs(np.fft.rfft(frames)) + 1e-4)
    return np.asarray(np.abs(np.diff(level, axis=0)).mean(1), np.float64)


def shares(mixture: Audio, part: Audio) -> list[float]:
    """For each border of windows, the share of places whose flux, beside the mixture's, is less than at the border."""
    excess = flux(part) - flux(mixture)
    peaks = np.array([excess[at - REACH : at + REACH + 1].max() for at in range(REACH, len(excess) - REACH)])
    starts = range(EVERY, len(mixture) - WINDOW + 1, EVERY)
    borders = {edge // HOP for start in starts for edge in (start, start + FADE)}
    centre = N_FFT // 2 // HOP  # a frame is named by its start
    return [float((peaks < peaks[border - centre - REACH]).mean()) for border in borders]


def looks_sewn(found: list[float]) -> bool:
    """Whether the borders rank higher than chance would have it: a one-sided z test at 1 in 1,000."""
    return (np.mean(found) - 0.5) * np.sqrt(12 * len(found)) > 3.1


@pytest.mark.parametrize("sound", [rain, tiled])
def test_the_borders_of_windows_do_not_show(mini: Model, sound: object) -> None:
    mixture = sound(118)  # type: ignore[operator]
    result = separate(mixture, RATE_HZ, Query("dog barking", "rain"), mini)
    for part in (result.target, result.residual):
        found = shares(mixture, part)
        assert len(found) >= 24
        assert not looks_sewn(found), f"borders rank at {np.mean(found):.2f}"


@pytest.mark.parametrize("sound", [rain, tiled])
def test_windows_that_are_only_put_side_by_side_would_show(mini: Model, sound: object) -> None:
    mixture = sound(118)  # type: ignore[operator]
    parts = [mixture[at : at + EVERY] for at in range(0, len(mixture), EVERY)]
    apart = [separate(part, RATE_HZ, Query("dog barking", "rain"), mini).target for part in parts]
    assert looks_sewn(shares(mixture, np.concatenate(apart)))

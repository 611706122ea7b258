"""Complex masks are applied correctly to recordings of every rate and length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import soxr
import torch
from audiosep_stand_in import TINY, condition, separator
from fill import noise, signal
from numpy.typing import NDArray
from torch import Tensor

from clapsep_cli.dsp import HOP, RATE_HZ
from clapsep_cli.models.audiosep import FEWEST, N_FFT, AudioSep
from clapsep_cli.stitch.complex_masks import FADE, ComplexMaskStream

Audio = NDArray[np.float32]
CPU = torch.device("cpu")


class Constant(AudioSep):
    """One mask for all, but for the hole at the top; remembers what it heard."""

    def __init__(self, value: complex) -> None:
        super().__init__(TINY)
        self.value, self.heard = value, []  # type: ignore[var-annotated]

    def infer(self, windows: Tensor, wanted: Tensor, check: Any = None) -> Tensor:
        self.heard.append(windows[0])
        mask = torch.full((1, 1, max(FEWEST, windows.shape[1]) // HOP + 1, 1025), self.value, dtype=torch.complex64)
        mask[..., -1] = 0
        return mask


def separated(model: AudioSep, audio: Audio, rate: int = RATE_HZ, cuts: Sequence[int] = ()) -> Audio:
    """`audio`, `[channels, samples]`, as the pipeline has it separated, in blocks from cut to cut."""
    wanted, done = condition(1, TINY.dim), []
    sizes = model.window, model.config.grid, N_FFT, len(wanted), rate, len(audio)
    stream = ComplexMaskStream(*sizes, CPU)
    ear = soxr.ResampleStream(rate, RATE_HZ, len(audio), "float32", "HQ")
    with torch.inference_mode():
        for block in [*np.split(audio, cuts, 1), audio[:, :0]]:
            last = block.shape[1] == 0
            heard = ear.resample_chunk(np.ascontiguousarray(block.T), last).reshape(-1, len(audio)).T
            for window in stream.push(block, heard if rate != RATE_HZ else block, last):
                stream.accept(model.infer(window[None], wanted)[0])
            done.append(stream.pull()[0].numpy())
    return np.concatenate(done, 1)


def whole(model: AudioSep, audio: Audio) -> Audio:
    with torch.inference_mode():
        return model(torch.from_numpy(audio), condition(1, TINY.dim).expand(len(audio), -1)).numpy()


def stereo(samples: int, rate: int) -> Audio:
    """Coloured noise that rises and falls, and a sweep in one channel."""
    sweep = signal(samples / rate, rate, 3).numpy()[:samples]
    left = sweep + 0.1 * noise(samples, 4)
    return np.stack([left, 0.5 * sweep[::-1] + 0.1 * noise(samples, 5)]).astype(np.float32)


def decibels(wanted: Any, got: Any) -> float:
    return float(10 * np.log10(np.square(wanted).sum() / np.square(wanted - got).sum()))


@pytest.mark.parametrize("samples", [1, 1000, 1025, 5000, 12_801, TINY.window])
def test_a_recording_no_longer_than_a_window_is_heard_as_it_is(samples: int) -> None:
    model, audio = separator(), signal(samples / RATE_HZ, RATE_HZ, 5).numpy()[None]
    np.testing.assert_allclose(separated(model, audio), whole(model, audio), rtol=0, atol=1e-6)


@pytest.mark.parametrize("samples", [801_234, 500_000])
def test_windows_are_joined_to_the_whole(samples: int) -> None:
    model = separator(replace(TINY, widths=(2, 2, 2, 2, 2, 2), window=1023 * HOP))
    audio = signal(samples / RATE_HZ, RATE_HZ, 6).numpy()[None]
    expected = whole(model, audio)
    assert decibels(expected, separated(model, audio)) > 80
    assert decibels(expected, audio) < 20


def test_windows_start_on_the_grid_and_end_with_the_recording() -> None:
    model, audio = Constant(1), np.arange(100_003, dtype=np.float32)[None]
    separated(model, audio)
    starts = [int(window[0]) for window in model.heard]
    assert len(starts) > 3
    assert all(start % TINY.grid == 0 for start in starts)
    assert [len(window) for window in model.heard[:-1]] == [TINY.window] * (len(starts) - 1)
    assert model.heard[-1][-1] == 100_002
    assert all(b - a <= TINY.window // 2 + TINY.grid for a, b in pairwise(starts))


@pytest.mark.parametrize("rate", [22_050, 32_000, 44_100])
def test_blocks_do_not_change_a_bit(rate: int) -> None:
    model, audio = separator(), stereo(90_001, rate)
    expected = separated(model, audio, rate)
    assert expected.shape == audio.shape
    for cuts in ([1], [700, 701, 40_000], list(range(5000, 90_001, 5000))):
        np.testing.assert_array_equal(separated(model, audio, rate, cuts), expected)


@pytest.mark.parametrize("rate", [44_100, 48_000, 96_000])
def test_other_rates_and_channels_sound_as_at_32_khz(rate: int) -> None:
    """Below 14 kHz, of what the network makes of the downmix; each channel by itself under the same mask."""
    model, audio = separator(replace(TINY, window=1023 * HOP)), stereo(6 * rate, rate)
    stems = separated(model, audio, rate)
    heard = soxr.resample(audio.mean(0), rate, RATE_HZ)
    expected = whole(model, heard[None])[0]
    ours = soxr.resample(stems.mean(0), rate, RATE_HZ)
    spectra = [np.fft.rfft(x * np.hanning(len(x)))[: len(x) * 14 // 32] for x in (expected, ours)]
    assert decibels(*(np.stack([x.real, x.imag]) for x in spectra)) > 40


@pytest.mark.parametrize("rate", [8000, 12_345, 22_050, 32_000, 44_100, 48_000, 192_000])
def test_a_constant_real_mask_is_a_gain_up_to_the_highest_frequency(rate: int) -> None:
    audio = stereo(2 * rate + 17, rate)
    if rate == RATE_HZ:  # the hole is exactly there
        audio = soxr.resample(soxr.resample(audio.T, rate, 24_000), 24_000, rate).T[:, : audio.shape[1]].copy()
    np.testing.assert_allclose(separated(Constant(0.25), audio, rate), 0.25 * audio, rtol=0, atol=2e-4)


def test_what_the_network_hears_is_turned_and_what_it_does_not_is_not() -> None:
    rate, t = 48_000, np.arange(48_000) / 48_000
    low, high = (np.sin(2 * np.pi * hz * t).astype(np.float32) for hz in (3000, 20_000))
    inside = slice(4800, -4800)
    made = separated(Constant(0.5j), (low + high)[None], rate)[0]
    expected = 0.5 * np.cos(2 * np.pi * 3000 * t) + 0.5 * high
    np.testing.assert_allclose(made[inside], expected[inside], rtol=0, atol=2e-3)


def test_a_recording_is_heard_as_loud_as_it_is() -> None:
    model, audio = Constant(1), 40 * signal(0.5, RATE_HZ, 5).numpy()[None]
    separated(model, audio)
    np.testing.assert_array_equal(model.heard[0], audio[0])


@pytest.mark.parametrize("rate", [32_000, 44_100])
def test_silence_stays_silent(rate: int) -> None:
    assert not separated(separator(), np.zeros((2, 3 * rate), np.float32), rate).any()


def test_masks_of_windows_fade_into_each_other_in_the_middle() -> None:
    window, second, hop = 1023 * HOP, 22 * 10_240, 2 * HOP  # frames reach half their length beyond their middle
    stream, audio = ComplexMaskStream(window, 10_240, N_FFT, 1, RATE_HZ, 1, CPU), np.ones((1, second + window))
    stream.push(audio.astype(np.float32), audio.astype(np.float32), last=True)
    assert stream.starts == [0, second]
    for value in (0, 1):
        stream.accept(torch.full((1, 1024, 1025), value, dtype=torch.complex64))
    gain = stream.pull()[0, 0].numpy()
    middle, half = (second + window) // 2, FADE * HOP // 2
    assert np.abs(gain[: middle - half - hop * 2]).max() < 1e-6
    assert np.abs(gain[middle + half + hop * 2 :] - 1).max() < 1e-6
    assert (np.diff(gain) > -1e-6).all()
    assert 0.45 < gain[middle] < 0.55
    assert np.diff(gain[::HOP]).max() < 1.1 / FADE

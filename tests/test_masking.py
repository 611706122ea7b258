"""Masks are applied correctly to recordings of every rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from clapsep_cli import dsp
from clapsep_cli.dsp import HOP
from clapsep_cli.models.mini import band_matrix
from clapsep_cli.stitch import masking
from clapsep_cli.stitch.masking import MaskedRecording

CPU = torch.device("cpu")
WINDOW = 100 * HOP
RATES = [8000, 11025, 12345, 16000, 22050, 32000, 44100, 48000, 96000, 192000]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frames(samples: int, rate: int) -> int:
    return math.ceil(samples * 100 / rate) + 1


def masked(
    audio: Tensor,
    rate: int,
    masks: Tensor,
    cuts: Sequence[int] = (),
    late: int = 0,
    spread: Tensor | None = None,
) -> Tensor:
    """`audio` (`[channels, samples]`) under `masks` (`[stems, frames, 513]`), of which each window gets its part.

    The audio arrives in blocks of the sizes `cuts`, the masks of a window when `late` others wait.
    """
    samples = audio.shape[1]
    stream, out, fed = MaskedRecording(WINDOW, len(masks), rate, len(audio), CPU, spread), [], 0
    heard = np.zeros((1, round(samples * 32_000 / rate)), np.float32)
    masks = F.pad(masks, (0, 0, 0, WINDOW // HOP), mode="replicate")
    for block in [*_cut(audio, cuts), audio[:, :0]]:
        fed, last = fed + block.shape[1], block.shape[1] == 0
        part, heard = np.split(heard, [heard.shape[1] - round((samples - fed) * 32_000 / rate)], 1)
        stream.push(block.numpy(), part, last)
        while len(stream.starts) > (0 if last else late):
            first = stream.starts[0] // HOP
            stream.accept(masks[:, first : first + WINDOW // HOP + 1])
        out.append(stream.pull())
    return torch.cat(out, 2)


def _cut(audio: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    parts, at = [], 0
    for size in [*sizes, audio.shape[1]]:
        parts.append(audio[:, at : at + size])
        at += size
    return [part for part in parts if part.shape[1]]


def test_at_32_khz_it_is_the_models_own_stft() -> None:
    audio, mask = noise(2, 96_000), torch.rand(301, 513, generator=torch.Generator().manual_seed(1))
    expected = dsp.waveform(dsp.spectrum(audio) * mask, 96_000)
    torch.testing.assert_close(masked(audio, 32_000, mask[None])[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("gain", [1.0, 0.25, 0.0])
def test_a_constant_mask_is_a_gain_up_to_the_highest_frequency(rate: int, gain: float) -> None:
    audio = noise(2, rate + 17)
    out = masked(audio, rate, torch.full((1, frames(rate + 17, rate), 513), gain))[0]
    assert out.shape == audio.shape
    torch.testing.assert_close(out, gain * audio, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", RATES)
def test_the_mask_lies_at_the_right_time_and_frequency(rate: int) -> None:
    seconds, tone = 2.0, min(3000.0, rate / 4)
    t = np.arange(int(rate * seconds)) / rate
    audio = torch.from_numpy(np.sin(2 * np.pi * tone * t).astype(np.float32))[None]
    count = frames(audio.shape[1], rate)
    hidden = torch.ones(count, 513)
    hidden[count // 2 :, round(tone / 31.25) - 8 : round(tone / 31.25) + 9] = 0  # the tone, from 1 s on
    out = masked(audio, rate, hidden[None])[0, 0]
    edge = int(0.05 * rate)
    torch.testing.assert_close(out[edge : rate - edge], audio[0, edge : rate - edge], rtol=0, atol=2e-2)
    assert out[rate + edge : -edge].abs().max() < 2e-2
    crossing = int((out.abs().unfold(0, rate // 100, rate // 100).amax(1) > 0.5).sum())
    assert abs(crossing - 100) <= 2  # in hundredths of a second


def test_above_16_khz_the_top_band_carries_on() -> None:
    rate = 48_000
    t = np.arange(rate) / rate
    high = torch.from_numpy(np.sin(2 * np.pi * 20_000 * t).astype(np.float32))[None]
    mask = torch.zeros(101, 513)
    mask[:, -64:] = torch.linspace(0.2, 0.8, 64)  # of which the mean counts, 14 to 16 kHz
    inside = slice(rate // 20, -rate // 20)  # a tone cut off at the ends is not confined to its band there
    torch.testing.assert_close(masked(high, rate, mask[None])[0][:, inside], 0.5 * high[:, inside], rtol=0, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    rate=st.sampled_from([8000, 22050, 32000, 44100]),
    cuts=st.lists(st.integers(1, 30_000), min_size=1, max_size=20),
    late=st.integers(0, 6),
)
def test_blocks_do_not_change_a_bit(rate: int, cuts: list[int], late: int) -> None:
    audio = noise(2, 70_001)
    masks = torch.rand(1, frames(70_001, rate), 513, generator=torch.Generator().manual_seed(1))
    expected = masked(audio, rate, masks)
    assert expected.shape == (1, 2, 70_001)
    assert torch.equal(masked(audio, rate, masks, cuts, late), expected)


@pytest.mark.parametrize("rate", RATES)
def test_a_mask_of_bands_is_the_mask_of_bins_that_it_spreads_to(rate: int) -> None:
    spread = band_matrix(64, 16)
    audio, bands = noise(2, 3 * rate), torch.rand(1, frames(3 * rate, rate), 64)
    expected = masked(audio, rate, bands @ spread)
    torch.testing.assert_close(masked(audio, rate, bands, spread=spread), expected, rtol=0, atol=1e-6)


def test_stems_share_the_mixture_and_have_masks_of_their_own() -> None:
    audio, masks = noise(2, 50_000), torch.rand(3, frames(50_000, 44_100), 513)
    together = masked(audio, 44_100, masks)
    assert together.shape == (3, 2, 50_000)
    for stem, mask in zip(together, masks, strict=True):
        assert torch.equal(stem, masked(audio, 44_100, mask[None])[0])


@pytest.mark.parametrize("rate", [8000, 11025, 48000])
def test_steps_of_one_frame_complete_the_beginning_too(rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a recording of many channels has a high rate: what begins with half a frame takes several steps."""
    audio, masks = noise(2, 2 * rate), torch.rand(1, frames(2 * rate, rate), 513)
    expected = masked(audio, rate, masks)
    monkeypatch.setattr(masking, "VALUES_AT_ONCE", 1)
    torch.testing.assert_close(masked(audio, rate, masks, [rate // 300] * 500), expected, rtol=0, atol=1e-6)


def test_a_stream_that_begins_with_half_a_frame_waits_for_more() -> None:
    stream = MaskedRecording(WINDOW, 1, 8000, 1, CPU)
    stream.push(noise(1, stream.half).numpy(), np.zeros((1, 2 * WINDOW), np.float32))
    while stream.starts:
        stream.accept(torch.ones(1, WINDOW // HOP + 1, 513))
    assert stream.pull().shape == (1, 1, 0)

"""Segments join into whole stems without a seam, and equal prompts keep their sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clapsep_cli.stitch.stems import StemStream, align_channels, best_order, continuing

RATE = 48_000
WINDOW, OVERLAP = 24_000, 6000
Swap = Callable[[int, int], bool]  # whether the equal stems of a segment (by number) and channel are exchanged


def cut(samples: int) -> list[int]:
    """Starts of segments; the last ends with the recording."""
    starts = [*range(0, max(1, samples - WINDOW), WINDOW - OVERLAP)]
    return [*starts, samples - WINDOW] if samples > WINDOW and starts[-1] + WINDOW < samples else starts


def joined(
    prompts: Sequence[object], stems: Tensor, change: Callable[[int, Tensor], Tensor], samples: int | None = None
) -> Tensor:
    """The stems of a stream that gets `stems` as its windows' results, changed on the way."""
    samples = samples or stems.shape[-1]
    stream, parts, starts = stream_of(prompts, stems.shape[1], samples), [], cut(samples)
    assert stream.starts == starts
    for number, start in enumerate(starts):
        for row in change(number, stems[..., start : start + WINDOW].clone()).unbind(1):
            stream.accept(row)
        parts.append(stream.pull())
    return torch.cat(parts, -1)


def stream_of(prompts: Sequence[object], channels: int, samples: int) -> StemStream:
    """A stream to which a whole recording was pushed."""
    stream = StemStream(WINDOW, prompts, RATE, RATE, channels, torch.device("cpu"), OVERLAP)
    mixture = np.zeros((channels, samples), np.float32)
    stream.push(mixture, mixture, last=True)
    return stream


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(0.1 * np.random.default_rng(seed).standard_normal(shape, np.float32))


def talk(samples: int, seed: int, pauses: Sequence[tuple[int, int]] = ()) -> Tensor:
    """A voice-like sound: noise of its own colour, in syllables; silent in the `pauses`."""
    spectrum = torch.fft.rfft(noise(samples, seed=seed))
    hz = torch.linspace(0, RATE / 2, len(spectrum))
    coloured = torch.fft.irfft(spectrum * torch.exp(-(((hz - 600 * (seed + 1)) / 500) ** 2)), samples)
    syllables = ((torch.arange(samples) // 2000 + seed) % 5 > 0).float()
    for start, stop in pauses:
        syllables[start:stop] = 0
    return 5 * coloured * syllables


def swapping(swaps: Swap, alike: tuple[int, int] = (0, 1), leak: float = 0.2) -> Callable[[int, Tensor], Tensor]:
    """Exchange two stems as planned, and let each leak into the other as separated ones do."""

    def change(number: int, stems: Tensor) -> Tensor:
        a, b = alike
        stems[[a, b]] += leak * stems[[b, a]] + 1e-3 * noise(2, *stems.shape[1:], seed=number)
        for channel in range(stems.shape[1]):
            if swaps(number, channel):
                stems[[a, b], channel] = stems[[b, a], channel]
        return stems

    return change


def assert_unswapped(result: Tensor, stems: Tensor) -> None:
    """Wherever all stems sound, each result holds its own stem and little of another, in every channel."""
    compared = 0
    for start in range(0, stems.shape[-1] - 4000, 4000):
        part = slice(start, start + 4000)
        if not stems[..., part].square().mean(-1).gt(1e-6).all():
            continue
        likeness = (result[:, None, :, part] * stems[None, ..., part]).sum(-1) / stems[None, ..., part].square().sum(-1)
        assert (likeness.diagonal().T > 0.9).all(), f"at {start}: {likeness}"
        compared += 1
    assert compared > 5


@settings(max_examples=30, deadline=None)
@given(samples=st.integers(1, 4 * WINDOW), channels=st.integers(1, 2))
def test_stems_that_agree_join_to_themselves_bit_for_bit(samples: int, channels: int) -> None:
    stems = noise(3, channels, max(samples, WINDOW))
    result = joined(["speech", "speech", "sfxbg"], stems, lambda _, part: part, samples)
    assert torch.equal(result, stems[..., :samples])


def test_equal_gains_reproduce_the_mixture_exactly() -> None:
    mixture = noise(1, 2, 100_000)
    result = joined(["speech", "sfxbg"], torch.cat([0.25 * mixture, 0.75 * mixture]), lambda _, stems: stems)
    assert torch.equal(result[0], 0.25 * mixture[0])
    assert torch.equal(result[1], 0.75 * mixture[0])


def test_what_differs_cross_fades_slowly() -> None:
    result = joined(["bass"], torch.zeros(1, 1, 100_000), lambda number, stems: stems + number % 2)[0, 0]
    steps = result.diff().abs()
    assert steps.max() < 2 / OVERLAP
    assert result[: WINDOW - OVERLAP].max() == 0
    assert result[WINDOW : 2 * (WINDOW - OVERLAP)].min() == 1


def test_nothing_shows_at_the_seams_of_a_stationary_sound() -> None:
    stems = noise(2, 1, 200_000)
    result = joined(["speech", "sfxbg"], stems, lambda number, part: part + 0.1 * noise(*part.shape, seed=number + 1))
    level = result.unfold(-1, 1000, 1000).square().mean(-1)[0, 0]
    seams = torch.tensor([start // 1000 for start in cut(200_000)[1:]])
    around = torch.cat([level[seam - 1 : seam + 8] for seam in seams])
    assert 0.97 < around.mean() / level.mean() < 1.03
    assert abs(result.diff()[0, 0]).max() < 1.3 * abs(stems.diff()[0, 0]).max()


@pytest.mark.parametrize("swaps", [[1], [0], [1, 2], [0, 2, 4], [5]])
def test_order_swapped_between_segments_is_restored(swaps: list[int]) -> None:
    stems = torch.stack([talk(110_000, 0), talk(110_000, 1), talk(110_000, 2)])[:, None]
    result = joined(["speech", "speech", "sfxbg"], stems, swapping(lambda number, _: number in swaps))
    if 0 in swaps:  # what the first segment says holds
        stems = stems[[1, 0, 2]]
    assert_unswapped(result, stems)


def test_order_swapped_between_channels_is_restored() -> None:
    voices = torch.stack([talk(110_000, 0), talk(110_000, 1)])
    panned = torch.stack([voices * torch.tensor([[1.0], [0.3]]), voices * torch.tensor([[0.4], [1.0]])], 1)
    result = joined(["sfx", "sfx"], panned, swapping(lambda number, channel: (number * 2 + channel) % 3 == 1))
    assert_unswapped(result, panned)


def test_channels_that_hear_later_or_inverted_are_matched() -> None:
    voices = torch.stack([talk(110_000, 0), talk(110_000, 1)])
    spaced = torch.stack([voices, -voices.roll(40, -1)], 1)
    result = joined(["sfx", "sfx"], spaced, swapping(lambda number, channel: channel == 1 and number % 2 == 0))
    assert_unswapped(result, spaced)


def test_channels_with_nothing_in_common_are_each_continued() -> None:
    left, right = talk(110_000, 0), talk(110_000, 1)
    apart = torch.stack([torch.stack([left, torch.zeros_like(left)]), torch.stack([torch.zeros_like(right), right])])
    result = joined(
        ["sfx", "sfx"], apart, swapping(lambda number, channel: number > 0 and number % 2 == channel, leak=0)
    )
    assert (result - apart).square().mean() < 1e-4 * apart.square().mean() + 1e-5


def test_a_pause_of_one_channel_leaves_the_other_to_decide() -> None:
    seam = (WINDOW - OVERLAP, WINDOW)
    voices = torch.stack([talk(42_000, 0), talk(42_000, 1)])
    both = torch.stack([torch.stack([talk(42_000, i, [seam]) for i in range(2)]), voices], 1)
    result = joined(["sfx", "sfx"], both, swapping(lambda number, channel: number == 1))
    assert_unswapped(result, both)


def test_channels_of_low_sounds_are_matched_whatever_their_polarity() -> None:
    cycles = torch.arange(WINDOW) * 2 * torch.pi / RATE
    low = torch.stack([torch.sin(cycles * 40).relu(), torch.sin(cycles * 60).relu()])
    low -= low.mean(1, keepdim=True)
    stems = torch.stack([low, -low.flip(0)], 1)
    assert align_channels(stems) == [[0, 1]]
    assert torch.equal(stems[:, 1], -low)


@given(
    st.integers(1, 6).flatmap(
        lambda n: st.lists(st.lists(st.integers(-3, 3), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
def test_the_best_order_of_all(likeness: list[list[float]]) -> None:
    count = len(likeness)
    totals = [sum(likeness[row][column] for row, column in enumerate(order)) for order in permutations(range(count))]
    total, order = best_order(likeness)
    assert total == max(totals) == sum(likeness[row][column] for row, column in enumerate(order))
    assert sorted(order) == list(range(count))


def test_many_equal_prompts_are_matched() -> None:
    """Twelve have 479 million orders."""
    sources = torch.randn(12, 1, 3000, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    stereo = torch.cat([sources, sources[order]], 1)
    assert align_channels(stereo) == [[0, 1]]
    assert torch.equal(stereo[:, 0], stereo[:, 1])
    assert torch.equal(sources[order][continuing(sources, sources[order])], sources)


def test_an_order_is_changed_for_a_reason_only() -> None:
    for seed in range(20):
        before, after = noise(2, 3, 1, OVERLAP, seed=seed)
        assert continuing(before, after) == [0, 1, 2]
        assert continuing(before, 0.01 * before[[2, 0, 1]] + 1e-4 * after) == [1, 2, 0]


def test_only_equal_prompts_change_places() -> None:
    stems = torch.stack([talk(60_000, 0), talk(60_000, 1)])[:, None]
    swapped = swapping(lambda number, _: number == 1, leak=0)
    kept = joined(["speech", "sfx"], stems, swapped)
    assert (kept[0, 0, 30_000:36_000] - stems[1, 0, 30_000:36_000]).abs().max() < 0.05
    restored = joined(["speech", "speech"], stems, swapped)
    assert (restored[0, 0, 30_000:36_000] - stems[0, 0, 30_000:36_000]).abs().max() < 0.05


def test_silence_keeps_the_order_and_stays_silence() -> None:
    stems = torch.zeros(3, 2, 100_000)
    assert torch.equal(joined(["speech"] * 3, stems, lambda _, part: part), stems)
    faint = 1e-9 * noise(3, 2, 100_000)
    assert torch.equal(joined(["speech"] * 3, faint, lambda _, part: part), faint)


def test_little_is_held() -> None:
    stream, starts = stream_of(["speech"], 1, 500_000), cut(500_000)
    for number, start in enumerate(starts[:-1]):
        stream.accept(noise(1, WINDOW, seed=number))
        assert stream.held is not None
        assert stream.held.shape[-1] == WINDOW
        assert stream.pull().shape[-1] == (start - starts[number - 1] if number else 0)


def test_the_input_is_left_alone() -> None:
    stems = torch.stack([talk(WINDOW, 0), talk(WINDOW, 1)])[:, None]
    stream = stream_of(["speech", "speech"], 1, 2 * WINDOW - OVERLAP)
    stream.accept(stems[:, 0])
    given_ = stems[:, 0].flip(0).roll(-(WINDOW - OVERLAP), -1)
    kept = given_.clone()
    stream.accept(given_)
    assert torch.equal(given_, kept)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield

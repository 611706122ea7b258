"""Windows cover a stream for any sizes of blocks, and their masks join smoothly."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clapsep_cli.dsp import HOP
from clapsep_cli.stitch.masking import MaskTrack
from clapsep_cli.stitch.windows import OVERLAP_FRAMES, Windower

WINDOW = 500 * HOP
CPU = torch.device("cpu")


def cut(samples: int, blocks: list[int]) -> list[tuple[int, np.ndarray]]:
    audio = np.arange(1, samples + 1, dtype=np.float32)
    windower, windows, at = Windower(WINDOW, 1), [], 0
    for size in [*blocks, samples]:
        windows += list(windower.push(audio[None, at : at + size]))
        at = min(samples, at + size)
    return windows + list(windower.finish())


@settings(max_examples=60, deadline=None)
@given(samples=st.integers(1, 4 * WINDOW), blocks=st.lists(st.integers(1, WINDOW), max_size=8))
def test_windows_cover_the_stream_whatever_its_blocks(samples: int, blocks: list[int]) -> None:
    windows = cut(samples, blocks)
    starts = [start for start, _ in windows]
    assert starts == [start for start, _ in cut(samples, [])]
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert not any(start % HOP for start in starts)
    assert starts[-1] + WINDOW >= samples
    for start, window in windows:
        expected = np.arange(start + 1, start + WINDOW + 1, dtype=np.float32)
        np.testing.assert_array_equal(window[0], np.where(expected <= samples, expected, 0))
    for left, right in pairwise(starts):
        assert left + WINDOW - right >= OVERLAP_FRAMES * HOP
    if len(starts) > 1:  # the last window ends with the stream, to within a frame
        assert starts[-1] + WINDOW - samples < HOP


def test_one_window_is_handed_through() -> None:
    mask = torch.rand(2, 501, 7)
    track = MaskTrack(2, 7, CPU)
    assert not track.add(0, mask).numel()
    torch.testing.assert_close(track.finish(), mask, rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.integers(1, 300), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_masks_that_agree_join_to_themselves(steps: list[int], seed: int) -> None:
    whole = torch.rand(2, sum(steps) + 501, 3, generator=torch.Generator().manual_seed(seed))
    track, parts, start = MaskTrack(2, 3, CPU), [], 0
    for step in [0, *steps]:
        start += step
        parts.append(track.add(start, whole[:, start : start + 501]))
    parts.append(track.finish())
    joined = torch.cat(parts, 1)
    torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-6)


def test_masks_that_differ_cross_fade_slowly() -> None:
    track = MaskTrack(1, 1, CPU)
    first = track.add(0, torch.zeros(1, 501, 1))
    assert not first.numel()
    before = track.add(300, torch.ones(1, 501, 1))
    after = track.finish()
    joined = torch.cat([before, after], 1)[0, :, 0]
    assert joined.shape == (801,)
    assert joined[:300].max() == 0
    assert joined[501:].min() == 1
    steps = joined.diff()
    assert steps.min() >= 0
    assert steps.max() < 1.5 / OVERLAP_FRAMES

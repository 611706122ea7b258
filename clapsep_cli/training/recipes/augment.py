"""Mixes and augments clips in training, on the device. The caller seeds all random generators."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep_cli import dsp
from clapsep_cli.audio.samples import Audio
from clapsep_cli.models.base import full_scale_gain
from clapsep_cli.training.loop.settings import Share, settings

EQ_POINTS = 8  # control points of a random equaliser, evenly on a log scale …
LOWEST_HZ = 20.0  # … from here to half the rate
LOWEST_CUT_HZ, HIGHEST_CUT_HZ = 2500.0, 15_000.0  # of a low-pass: from telephones to lossy codecs
CUT_WIDTH = 0.06  # of the cut's frequency, over which a low-pass falls by 1/e in amplitude
LOWEST_RUMBLE_HZ, RUMBLE_OCTAVES = 40.0, 3.0  # of a high-pass
QUIETEST_FLOOR_DB, LOUDEST_FLOOR_DB = -60.0, -20.0  # of a noise floor, relative to the clip
ROOM_SECONDS = 1.0  # of an impulse response; the rest is cut


@settings
class Acoustics:
    """Shares of the clips that get a simulated other recording: equaliser, band limits, room, noise floor.

    `eq_db`: standard deviation of the random equaliser at its control points, in dB.
    """

    eq: Share = 0.6
    eq_db: NonNegativeFloat = 5.0
    low_pass: Share = 0.3
    high_pass: Share = 0.2
    room: Share = 0.25  # if there are impulse responses
    floor: Share = 0.5  # a noise floor of its own


def seeded(*key: int) -> torch.Generator:
    """Make a generator that depends only on the numbers of `key`."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def levelled(targets: Tensor, interferers: Tensor, snr_db: Tensor) -> tuple[Tensor, Tensor]:
    """Scale targets and interferers, float32 `[batch, samples]`, to sum up to mixtures at `snr_db` (`[batch]`).

    A mixture whose peak would exceed 1 is scaled (see `full_scale_gain`).
    """
    wanted, others = torch.empty_like(targets), torch.empty_like(interferers)
    for row, snr in enumerate(snr_db):  # one by one, they stay in a processor's cache
        target, interferer = targets[row], interferers[row]
        ratio = (target.norm() + 1e-6) / (interferer.norm() + 1e-6)
        torch.mul(interferer, ratio * torch.pow(10, -snr / 20), out=others[row])
        scale = full_scale_gain(torch.add(target, others[row]).abs_().max())
        torch.mul(target, scale, out=wanted[row])
        others[row] *= scale
    return wanted, others


def elsewhere(
    audio: Tensor, rooms: Tensor | None, acoustics: Acoustics, generators: Sequence[torch.Generator]
) -> Tensor:
    """Simulate other recordings of clips: a random equaliser and band limits, a room, and a noise floor.

    Args:
        audio: float32 `[clips, samples]`.
        rooms: from `room_spectra`, for clips of this length; None for no rooms.
        acoustics: the share of each.
        generators: one for each clip, on the CPU, so that the draws do not depend on the device.

    Returns:
        Float32 `[clips, samples]`, each clip at the energy it had before the noise floor was added.
    """
    made, samples = [], audio.shape[1]
    size = samples + int(ROOM_SECONDS * dsp.RATE_HZ)
    for clip, generator in zip(audio, generators, strict=True):  # one by one, they stay in a processor's cache
        response = _response(size, acoustics, generator)
        in_room, which = torch.rand(2, generator=generator).tolist()
        if rooms is not None and in_room < acoustics.room:
            room = rooms[int(which * len(rooms))]
            response = room if response is None else response.to(room.device) * room
        energy, heard = clip.norm(), clip
        if response is not None:
            heard = torch.fft.irfft(torch.fft.rfft(clip, n=size) * response.to(clip.device), n=size)[:samples]
            heard = heard * (energy / (heard.norm() + 1e-6))
        floor = _floor(samples, acoustics, generator)
        made.append(heard if floor is None else heard + floor.to(clip.device) * energy)
    return torch.stack(made)


def _response(size: int, acoustics: Acoustics, generator: torch.Generator) -> Tensor | None:
    """Draw an amplitude response for a transform of `size` samples, `[size // 2 + 1]`; None where it is flat."""
    eq, low_pass, cut, high_pass, rumble = torch.rand(5, generator=generator).tolist()
    points = torch.randn(EQ_POINTS, generator=generator) * acoustics.eq_db
    hertz = torch.arange(size // 2 + 1) * (dsp.RATE_HZ / size)
    parts = []
    if eq < acoustics.eq:
        octaves = torch.log(hertz.clamp(min=LOWEST_HZ) / LOWEST_HZ) / math.log(dsp.RATE_HZ / 2 / LOWEST_HZ)
        at = octaves * (EQ_POINTS - 1)
        lower = at.long().clamp(max=EQ_POINTS - 2)
        points -= points.mean()
        parts.append(torch.pow(10, torch.lerp(points[lower], points[lower + 1], at - lower) / 20))
    if low_pass < acoustics.low_pass:
        edge = LOWEST_CUT_HZ * (HIGHEST_CUT_HZ / LOWEST_CUT_HZ) ** cut
        parts.append(torch.exp(-(hertz / edge - 1).clamp(min=0) / CUT_WIDTH))
    if high_pass < acoustics.high_pass:
        slope = (hertz / (LOWEST_RUMBLE_HZ * 2 ** (RUMBLE_OCTAVES * rumble))).square()
        parts.append(slope / (1 + slope))
    response: Tensor | None = torch.stack(parts).prod(0) if parts else None
    return response


def _floor(samples: int, acoustics: Acoustics, generator: torch.Generator) -> Tensor | None:
    """Draw a noise floor between white and dull for a clip of energy 1, float32 `[samples]`, or None for none."""
    happens, level, dullness = torch.rand(3, generator=generator).tolist()
    if happens >= acoustics.floor:
        return None
    noise = torch.randn(samples, generator=generator)
    noise += 3 * dullness * F.avg_pool1d(F.pad(noise[None], (8, 7)), 16, 1)[0]
    decibel = QUIETEST_FLOOR_DB + (LOUDEST_FLOOR_DB - QUIETEST_FLOOR_DB) * level
    gain: float = math.pow(10, decibel / 20) / noise.norm().item()
    return noise * gain


def room_spectra(rooms: Sequence[Audio], samples: int) -> Tensor:
    """Compute spectra of impulse responses at `RATE_HZ`, cut to `ROOM_SECONDS`, for `elsewhere` on clips of `samples`:
    complex64 `[rooms, bins]`."""
    longest = int(ROOM_SECONDS * dsp.RATE_HZ)
    cut = np.stack([np.pad(room[:longest], (0, max(0, longest - len(room)))) for room in rooms])
    spectra: Tensor = torch.fft.rfft(torch.from_numpy(np.asarray(cut, np.float32)), n=samples + longest)
    return spectra


def stripes(count: int, size: int, widest: int, generator: torch.Generator) -> Tensor:
    """Draw SpecAugment along one axis: 1 `[count, size]`, and 0 in two random stripes, each narrower than `widest`.

    The paper names SpecAugment (IV-B); two stripes and their widths are the released code's.
    """
    at, kept = torch.arange(size), torch.ones(count, size)
    for _ in range(2):
        width = torch.randint(0, widest, (count, 1), generator=generator)
        start = (torch.rand(count, 1, generator=generator) * (size - width)).long()
        kept *= ((at < start) | (at >= start + width)).float()
    return kept


@contextmanager
def masked(layer: nn.Module, kept: Tensor) -> Iterator[None]:
    """Multiply what `layer` returns by `kept` inside this context: SpecAugment inside an encoder."""
    hook = layer.register_forward_hook(lambda module, arguments, output: output * kept)
    try:
        yield
    finally:
        hook.remove()

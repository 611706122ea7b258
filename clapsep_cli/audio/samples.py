"""Samples as arrays: what every reader yields, every writer takes, and the few things done to them on the way."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from operator import index
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

from clapsep_cli.errors import AudioError

Audio = NDArray[np.float32]

PEAK = 0.9  # to which what is over full scale is brought before a model hears it (paper IV-A)
MAX_CHANNELS = 32
DROPPED_AT_ONCE = 2**16  # samples
CANCELLED = 0.02  # channels cancel if their mean has less than this share of their energy (−17 dB)


class Decoder(ABC):
    """A recording being decoded, from its first sample to its last.

    `frames` is the length in samples as far as it is known in advance, 0 if it is not; `exact` tells that it is that to
    the sample. `bits` is the depth that an output needs to hold the samples: 16, 24, 32, None for float and lossy.
    """

    rate: int
    channels: int
    frames: int = 0
    exact: bool = True
    bits: int | None = None
    tags: dict[str, str]

    @abstractmethod
    def read(self, samples: int) -> Audio:
        """The next `samples`, float32 `[channels, samples]`: fewer before the end, none at it.

        Raises `AudioError` where the recording is damaged, or ends before it should.
        """

    def skip(self, samples: int) -> None:
        """Pass over `samples`. Here they are decoded and dropped, which is exact for every codec."""
        while samples > 0 and (dropped := self.read(min(samples, DROPPED_AT_ONCE)).shape[1]):
            samples -= dropped

    @abstractmethod
    def close(self) -> None:
        """Let go of files and processes; may be called again."""


def from_array(audio: Any, rate: Any, name: str) -> tuple[Audio, int]:
    """`audio` as float32 `[channels, samples]`, and its `rate` as an int; `name` stands for it in messages.

    Args:
        audio: `[samples]` or `[channels, samples]`, NumPy or torch, of real numbers. Integers are taken as PCM of their
            width: full scale is ±1 for floats, −32768 to 32767 for int16.
        rate: sample rate in Hz, a whole number.
        name: what it is, e.g. "audio".

    Raises:
        AudioError: for another shape or type, no samples, a sample that is not a finite number, or an impossible rate.
    """
    if isinstance(audio, bytes | str | os.PathLike):
        raise AudioError(f"{name}: is {audio!r}, not samples; to separate a file, use extract")
    if callable(getattr(audio, "detach", None)):  # a tensor, perhaps on a GPU or of a type that NumPy does not know
        audio = audio.detach().cpu()
        audio = audio.float() if audio.is_floating_point() else audio
    values = np.asarray(audio)
    if values.dtype.kind not in "fi" and values.dtype != np.uint8:
        raise AudioError(f"{name}: is of type {values.dtype}; use floats, or PCM as signed integers")
    if values.ndim not in (1, 2) or not values.size:
        raise AudioError(f"{name}: is [samples] or [channels, samples], at least one of each, not {list(values.shape)}")
    if values.ndim == 2 and len(values) > MAX_CHANNELS:
        raise AudioError(
            f"{name}: is [channels, samples] with at most {MAX_CHANNELS} channels, not {list(values.shape)}; "
            "transpose it if channels come last"
        )
    try:
        whole = int(rate) if isinstance(rate, float | np.floating) and float(rate).is_integer() else index(rate)
    except TypeError as error:
        raise AudioError(f"{name}: has the rate {rate!r}; give a whole number of Hz, e.g. 44100") from error
    if whole < 1:
        raise AudioError(f"{name}: has the rate {whole} Hz; give one above 0, e.g. 44100")
    samples = np.atleast_2d(_scaled(values))
    check_finite(samples, name, whole)
    return samples, whole


def _scaled(values: NDArray[Any]) -> Audio:
    if values.dtype.kind == "f":
        return np.asarray(values, np.float32)
    zero = 128 if values.dtype == np.uint8 else 0  # as WAV has it
    return np.asarray((values.astype(np.float64) - zero) / 2.0 ** (8 * values.dtype.itemsize - 1), np.float32)


def check_finite(audio: Audio, name: str, rate: int, offset: int = 0) -> None:
    """Raise `AudioError`, with the first position, if `audio` (`[channels, samples]`) holds NaN or infinity."""
    if not np.isfinite(audio).all():
        channel, sample = min(np.argwhere(~np.isfinite(audio)).tolist(), key=lambda at: at[1])
        at = offset + sample
        raise AudioError(f"{name}: sample {at} ({at / rate:.3f} s) of channel {channel + 1} is not a finite number")


def downmix(audio: Audio) -> Audio:
    """What a model hears of `audio` (float32 `[channels, samples]`): the mean of its channels, float32 `[samples]`.

    Where they cancel (a channel with its polarity reversed, say), it is the loudest channel instead.
    """
    mean = audio.mean(0)
    energies = np.square(audio).sum(1)
    if np.square(mean).sum() >= CANCELLED * energies.mean():
        return np.asarray(mean, np.float32)
    return np.asarray(audio[int(energies.argmax())], np.float32)


def to_rate(mono: Audio, rate_in: int, rate_out: int) -> Audio:
    """Resample float32 `[samples]`, at least one sample."""
    if rate_in == rate_out:
        return mono
    resampled = np.asarray(soxr.resample(mono, rate_in, rate_out, "HQ"), np.float32)
    return np.pad(resampled, (0, max(0, -(-len(mono) * rate_out // rate_in) - len(resampled))))


def on_grid(audio: Audio, bits: int | None) -> Audio:
    """Round to the steps of a PCM depth, so that differences of such signals are exact; unchanged for None.

    Float32 holds 24 bits below full scale; 32-bit recordings are read, and so written, with that precision.
    """
    if bits is None:
        return audio
    steps = np.float32(2.0 ** (min(bits, 24) - 1))
    rounded = audio * steps  # exact, as is the way back: by a power of two
    np.rint(rounded, out=rounded)
    rounded /= steps
    return rounded


def quantise(audio: Audio, bits: int) -> tuple[NDArray[np.int32], int]:
    """`audio` as integers of a PCM depth, clipped to it, and how many samples had to be."""
    # libsndfile would scale by 32767 where reading divides by 32768: convert here, to return what was read.
    full = 2.0 ** (bits - 1)
    scaled = audio * np.float32(full) if bits <= 24 else audio.astype(np.float64) * full  # exact in either case
    np.rint(scaled, out=scaled)
    if scaled.size == 0 or (scaled.min() >= -full and scaled.max() <= full - 1):
        return scaled.astype(np.int32), 0
    clipped = int(np.count_nonzero((scaled > full - 1) | (scaled < -full)))
    return scaled.clip(-full, full - 1).astype(np.int32), clipped

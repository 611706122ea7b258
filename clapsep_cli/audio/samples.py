"""Defines arrays of samples, the interfaces of decoders and encoders, and functions of samples."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from types import MappingProxyType
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

from clapsep_cli.errors import AudioError, UsageError

Audio = NDArray[np.float32]
Samples = NDArray[np.floating[Any]]  # float64 holds 32-bit integers exactly, float32 those of 24 bits

LARGEST = 2.0**50  # 301 dB over full scale; float32 can still hold the sum of squares
PEAK = 0.9  # to which a signal over full scale is scaled before a model hears it, as the released code does
MAX_CHANNELS = 32
LOWEST_HZ = 8_000  # lowest rate of a recording
DROPPED_AT_ONCE = 2**16  # samples dropped at a time
CANCELLED = 0.02  # channels cancel if their mean has less than this share of their energy (−17 dB)


class Decoder(ABC):
    """Decodes a recording from its first sample to its last.

    Attributes:
        name: name of the recording in messages.
        lenient: report damage in `notes` and continue, instead of raising `AudioError`.
        notes: the damage so far, one line each.
        rate: in Hz.
        channels: their number.
        frames: length in samples, 0 if unknown; `exact` is False if it is approximate.
        bits: PCM depth that an output needs to hold the samples: 16, 24 or 32; None for float and lossy.
        speakers: the mask of speaker positions that WAVEFORMATEXTENSIBLE defines; None if the recording states none.
        tags: by libsndfile's names.
        tracks: description of each sound track of a film; empty for formats with a single one.
    """

    rate: int
    channels: int
    frames: int = 0
    exact: bool = True
    bits: int | None = None
    speakers: int | None = None
    tags: Mapping[str, str] = MappingProxyType({})
    tracks: Sequence[str] = ()

    def __init__(self, name: str, lenient: bool) -> None:
        self.name, self.lenient = name, lenient
        self.notes: list[str] = []

    def report(self, damage: str) -> None:
        """Raise `AudioError` for `damage`, or note it if the decoder is lenient."""
        if not self.lenient:
            raise AudioError(f"{self.name}: {damage}; --lenient reads the rest")
        self.notes.append(f"{self.name}: {damage}; the rest was read")

    @abstractmethod
    def read(self, samples: int) -> Samples:
        """Read up to `samples` as `[channels, samples]`: fewer near the end, none at the end.

        Returns float64 if `bits` is 32, else float32. Raises `AudioError` if the recording is damaged or ends too
        early.
        """

    def skip(self, samples: int) -> None:
        """Skip `samples`. This decodes and drops them, which is exact for every codec."""
        while samples > 0 and (dropped := self.read(min(samples, DROPPED_AT_ONCE)).shape[1]):
            samples -= dropped

    @abstractmethod
    def close(self) -> None:
        """Close all files. May be called again."""


@dataclass(frozen=True)
class Form:
    """Describes the audio of outputs.

    Attributes:
        rate: in Hz.
        channels: their number.
        bits: depth of PCM, 16, 24 or 32; None for float and lossy formats.
        tags: by libsndfile's names.
        speakers: mask of speaker positions, which WAV, m4a and films hold; None for the usual ones.
    """

    rate: int
    channels: int
    bits: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    speakers: int | None = None


class Encoder(ABC):
    """Writes samples into a stream, and leaves it open. Raises every `OSError`, also those that libraries hide."""

    @abstractmethod
    def write(self, audio: Samples) -> int:
        """Append `[channels, samples]`, rounded to the format's steps; return the number of clipped samples."""

    @abstractmethod
    def finish(self) -> None:
        """Write buffered samples, and complete the header."""

    @abstractmethod
    def discard(self) -> None:
        """Close without finishing the file."""


def seconds(samples: int, rate: int) -> str:
    """Format a length for messages, e.g. "1.04 s"."""
    return f"{samples / rate:.2f} s"


def check_finite(audio: Samples, name: str, rate: int, offset: int = 0) -> None:
    """Raise `AudioError` for samples that are NaN, infinite or beyond any level of audio.

    Args:
        audio: `[channels, samples]`, the samples from `offset` on of the recording `name` at `rate` Hz.
    """
    if audio.size and not (audio.max() <= LARGEST and audio.min() >= -LARGEST):  # NaN is neither
        channel, sample = min(np.argwhere(~(np.abs(audio) <= LARGEST)).tolist(), key=lambda at: at[1])
        at, value = offset + sample, audio[channel, sample]
        what = (
            f"is {value:.1e}, which is no audio: scale it to ±1 first"
            if np.isfinite(value)
            else "is not a finite number"
        )
        raise AudioError(f"{name}: sample {at} ({at / rate:.3f} s) of channel {channel + 1} {what}")


def from_array(audio: Any, rate: Any, name: str) -> tuple[Audio, int]:
    """Convert and check an array of samples.

    Args:
        audio: `[samples]` or `[channels, samples]`, NumPy or torch, real numbers. Full scale is ±1 for floats, and that
            of the type for integers: −32768 to 32767 for int16.
        rate: sample rate in Hz, a whole number.
        name: the name in messages, e.g. "audio".

    Returns:
        The samples as float32 `[channels, samples]`, and the rate as an int.

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
    if values.dtype.kind != "f":
        zero = 128 if values.dtype == np.uint8 else 0  # as WAV has it
        values = (values.astype(np.float64) - zero) / 2.0 ** (8 * values.dtype.itemsize - 1)
    samples = np.atleast_2d(np.asarray(values, np.float32))
    check_finite(samples, name, whole)
    return samples, whole


def downmix(audio: Audio) -> Audio:
    """Mix channels to mono, as a model hears them: float32 `[channels, samples]` to their mean, float32 `[samples]`.

    If the channels cancel, as with reversed polarity, return the first channel with half the energy of the loudest.
    """
    mean = audio.sum(0) * np.float32(1 / len(audio))
    energies = np.einsum("cs,cs->c", audio, audio)
    if mean @ mean >= CANCELLED * energies.mean():
        return np.asarray(mean, np.float32)
    return np.asarray(audio[int((energies >= energies.max() / 2).argmax())], np.float32)


def check_expand(expand: float) -> None:
    """Raise `UsageError` unless `expand` is 1 or more."""
    if not 1 <= expand < math.inf:
        raise UsageError(f"--expand is {expand:g}: give how many times slower to hear, 10 for bats")


def slowed(rate: int, expand: float, name: str) -> int:
    """Return the rate in Hz at which a recording plays `expand` times slower, and its pitch is as much lower.

    Raises `AudioError` if the rate is too low for that, `UsageError` if `expand` is below 1. `name`: of the recording,
    for messages.
    """
    check_expand(expand)
    slow = round(rate / expand)
    if slow < LOWEST_HZ:
        most = rate // LOWEST_HZ
        advice = f"use at most --expand {most}" if most > 1 else "leave it out"
        raise AudioError(f"{name}: is at {rate} Hz, so --expand {expand:g} would leave {slow} Hz to hear; {advice}")
    return slow


def to_rate(mono: Audio, rate_in: int, rate_out: int) -> Audio:
    """Resample float32 `[samples]`, at least one sample, from `rate_in` to `rate_out` Hz."""
    if rate_in == rate_out:
        return mono
    resampled = np.asarray(soxr.resample(mono, rate_in, rate_out, "HQ"), np.float32)
    return np.pad(resampled, (0, max(0, -(-len(mono) * rate_out // rate_in) - len(resampled))))


def on_grid(audio: Samples, bits: int | None) -> Samples:
    """Round to the steps of a PCM depth, so that differences of such signals are exact.

    Returns float64 for 32 bits, the type of `audio` for 16 and 24, and `audio` itself for None.
    """
    if bits is None:
        return audio
    steps = 2.0 ** (bits - 1)
    rounded = _wide_enough(audio, bits) * steps  # exact, as is the way back: by a power of two
    np.rint(rounded, out=rounded)
    rounded *= 1 / steps
    return rounded


def quantise(audio: Samples, bits: int) -> tuple[NDArray[np.signedinteger[Any]], int]:
    """Convert `audio` to integers of a PCM depth.

    Returns the integers, int16 for 16 bits and int32 for more, and the number of samples that were clipped to fit.
    """
    # libsndfile would scale by 32767 where reading divides by 32768: convert here, to return what was read.
    full = 2.0 ** (bits - 1)
    scaled, clipped, kind = _wide_enough(audio, bits) * full, 0, np.int16 if bits == 16 else np.int32
    np.rint(scaled, out=scaled)
    if scaled.size and (scaled.min() < -full or scaled.max() > full - 1):
        clipped = int(np.count_nonzero((scaled > full - 1) | (scaled < -full)))
        np.clip(scaled, -full, full - 1, out=scaled)
    return scaled.astype(kind), clipped


def _wide_enough(audio: Samples, bits: int) -> Samples:
    return audio if bits <= 24 else audio.astype(np.float64, copy=False)

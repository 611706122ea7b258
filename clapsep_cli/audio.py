"""Reading and writing recordings, block by block."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from clapsep_cli.errors import AudioError, OutputError

Audio = NDArray[np.float32]

PEAK = 0.9  # to which what is over full scale is brought before a model hears it (paper IV-A)

BITS = {"PCM_S8": 16, "PCM_U8": 16, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32}  # outputs keep the depth, at least 16
SUBTYPES = {16: "PCM_16", 24: "PCM_24", 32: "PCM_32", None: "FLOAT"}
WAV_LIMIT_BYTES = 2**32 - 2**16  # a longer file has to be an RF64
SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".caf", ".w64", ".rf64", ".au"}


class Source:
    """A recording open for reading. `frames` is what its header says; `bits` its depth, None for float and lossy."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            raise AudioError(f"{path}: is a folder; name the recordings in it, e.g. {path}/*.wav")
        if not path.exists():
            raise AudioError(f"{path}: no such file")
        try:
            self._file = soundfile.SoundFile(path)
        except (soundfile.LibsndfileError, OSError) as error:
            raise AudioError(f"{path}: cannot be read as audio ({_reason(error)})") from error
        self.rate: int = self._file.samplerate
        self.channels: int = self._file.channels
        self.frames: int = self._file.frames
        self.bits = BITS.get(self._file.subtype)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def blocks(self, seconds: float) -> Iterator[Audio]:
        """Yield all of it, float32 `[channels, samples]`. Raises `AudioError` at a sample that is NaN or infinite, for
        an empty file, and for one that ends before its header says."""
        size, done = max(1, round(seconds * self.rate)), 0
        while True:
            try:
                block = self._file.read(size, dtype="float32", always_2d=True).T
            except (soundfile.LibsndfileError, OSError) as error:
                raise AudioError(f"{self.path}: damaged after {done / self.rate:.2f} s ({_reason(error)})") from error
            if not block.shape[1]:
                break
            check_finite(block, str(self.path), self.rate, done)
            done += block.shape[1]
            yield np.ascontiguousarray(block)
        if not done:
            raise AudioError(f"{self.path}: has no samples")
        if done < self.frames:
            missing = (self.frames - done) / self.rate
            raise AudioError(f"{self.path}: ends {missing:.2f} s before its header says; the file is cut short")


def check_finite(audio: Audio, name: str, rate: int, offset: int = 0) -> None:
    """Raise `AudioError`, with the first position, if `audio` (`[channels, samples]`) holds NaN or infinity."""
    if not np.isfinite(audio).all():
        channel, sample = min(np.argwhere(~np.isfinite(audio)).tolist(), key=lambda at: at[1])
        at = offset + sample
        raise AudioError(f"{name}: sample {at} ({at / rate:.3f} s) of channel {channel + 1} is not a finite number")


def read_mono(path: Path, rate: int) -> Audio:
    """All of a recording as the mean of its channels at `rate` Hz, float32 `[samples]`."""
    with Source(path) as source:
        mono = np.concatenate([block.mean(0) for block in source.blocks(60)])
        return to_rate(mono, source.rate, rate)


def to_rate(mono: Audio, rate_in: int, rate_out: int) -> Audio:
    """Resample float32 `[samples]`, at least one sample."""
    if rate_in == rate_out:
        return mono
    resampled = np.asarray(soxr.resample(mono, rate_in, rate_out, "HQ"), np.float32)
    return np.pad(resampled, (0, max(0, -(-len(mono) * rate_out // rate_in) - len(resampled))))


def recordings(path: Path) -> list[Path]:
    """`path` itself, or the recordings directly in it if it is a folder. Raises `AudioError` if there are none."""
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise AudioError(f"{path}: no recordings in this folder")
    return found


def on_grid(audio: Audio, bits: int | None) -> Audio:
    """Round to the steps of a PCM depth, so that differences of such signals are exact; unchanged for None.

    Float32 holds 24 bits below full scale; 32-bit recordings are read, and so written, with that precision.
    """
    if bits is None:
        return audio
    step = np.float32(2.0 ** (1 - min(bits, 24)))
    return np.asarray(np.round(audio / step) * step, np.float32)


class Writer:
    """Writes a WAV under a temporary name, which `commit` turns into `path`. Left without `commit`, nothing remains.

    `clipped` counts the samples that an integer format could not hold.
    """

    def __init__(self, path: Path, rate: int, channels: int, bits: int | None, frames: int) -> None:
        self.path, self.bits, self.clipped = path, bits, 0
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
        size = frames * channels * (bits or 32) // 8
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = soundfile.SoundFile(
                self._temporary,
                "w",
                rate,
                channels,
                SUBTYPES[bits],
                format="WAV" if size < WAV_LIMIT_BYTES else "RF64",
            )
        except (soundfile.LibsndfileError, OSError) as error:
            raise OutputError(f"{path}: cannot be written ({_reason(error)})") from error

    def write(self, audio: Audio) -> None:
        """Append float32 `[channels, samples]`, rounded to the format's steps; never scaled."""
        samples: NDArray[np.float32] | NDArray[np.int16] | NDArray[np.int32] = audio.T
        if self.bits is not None:
            # libsndfile would scale by 32767 where reading divides by 32768: convert here, to return what was read.
            full = 2.0 ** (self.bits - 1)
            scaled = np.round(audio.T.astype(np.float64) * full)
            self.clipped += int(np.count_nonzero((scaled > full - 1) | (scaled < -full)))
            scaled = scaled.clip(-full, full - 1)
            samples = (
                scaled.astype(np.int16) if self.bits == 16 else (scaled * 2.0 ** (32 - self.bits)).astype(np.int32)
            )
        try:
            self._file.write(samples)
        except (soundfile.LibsndfileError, OSError) as error:
            raise OutputError(f"{self.path}: writing failed ({_reason(error)}); is the disk full?") from error

    def commit(self) -> None:
        """Finish the file and give it its name."""
        try:
            self._file.close()
            self._temporary.replace(self.path)
        except (soundfile.LibsndfileError, OSError) as error:
            raise OutputError(f"{self.path}: writing failed ({_reason(error)})") from error

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return str(text).strip().rstrip(".")

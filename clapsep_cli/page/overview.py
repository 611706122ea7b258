"""Reads a recording once, and writes peaks, a spectrogram and samples to disk for the page."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from math import ceil, floor, log2, log10
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from clapsep_cli.audio.samples import Audio
from clapsep_cli.audio.sources import Source
from clapsep_cli.errors import OutputError, StoppedError

PIECES_PER_SECOND = 200  # roughly: a piece of the waveform is a whole number of samples
PIECES_PER_COLUMN = 4  # pieces of the waveform for a column of the spectrogram
BANDS = 128
LOWEST_HZ = 30.0
WINDOW_SECONDS = 0.046  # of the transform, roughly: it has a power of two samples
DETAIL_SECONDS = 30.0  # longest stretch whose spectrogram is computed again
FLOOR_DB = -100.0  # relative to full scale; stored as 0, and full scale as 255
BLOCK_COLUMNS = 200  # columns read at a time
SEEKABLE = ("WAV", "WAVEX", "RF64", "FLAC")  # formats that can be read from any sample on
LOSSLESS = ("PCM", "FLOAT", "DOUBLE")

Progress = Callable[[float, float], None]


@dataclass(frozen=True)
class Overview:
    """Data of a recording for the page.

    Attributes:
        peaks: a file of int8 pairs, the lowest and highest sample of each piece.
        levels: a file of uint8 [columns, bands], a column for each four pieces.
        audio: a file that can be read from any sample.
        rate: in Hz.
        channels: to listen to, 1 or 2.
        frames: its length in samples.
        piece: the length of a piece in samples.
        loudest: the highest of the levels.
    """

    peaks: Path
    levels: Path
    audio: Path
    rate: int
    channels: int
    frames: int
    piece: int
    loudest: int

    @property
    def seconds(self) -> float:
        """Length of the recording."""
        return self.frames / self.rate

    def picture(self, start: float, end: float, columns: int) -> NDArray[np.uint8]:
        """Return the spectrogram of a stretch for a screen: each column shows its loudest moment.

        For a short stretch, where the stored columns are too coarse, it is computed again.

        Args:
            start: in seconds.
            end: in seconds.
            columns: number to return at most; a stored spectrogram may have fewer.

        Returns:
            uint8 [columns, bands], the lowest band first.
        """
        per_second = self.rate / (self.piece * PIECES_PER_COLUMN)
        if 0 < end - start <= min(DETAIL_SECONDS, columns / (2 * per_second)):
            return self._detail(start, end, columns)
        whole = np.memmap(self.levels, np.uint8, "r").reshape(-1, BANDS)
        first = min(max(0, round(start * per_second)), len(whole) - 1)
        last = min(max(first + 1, round(end * per_second)), len(whole))
        edges = np.unique(np.linspace(0, last - first, max(1, columns), endpoint=False).astype(np.int64))
        return np.asarray(np.maximum.reduceat(whole[first:last], edges, axis=0))

    def _detail(self, start: float, end: float, columns: int) -> NDArray[np.uint8]:
        transform = _Transform(self.rate)
        half, first = transform.size // 2, floor(start * self.rate)
        length = ceil((end - start) * self.rate)
        before = min(first, half)
        mono = self.samples(first - before, before + length + half).mean(1)
        mono = np.pad(mono, (half - before, max(0, before + length + half - len(mono))))
        starts = np.linspace(0, length, columns, endpoint=False).astype(np.int64)
        return transform.levels(mono, starts)

    def samples(self, start: int, frames: int) -> Audio:
        """Return float32 `[frames, channels]` from sample `start` on: fewer before the end, none behind it."""
        with soundfile.SoundFile(self.audio) as file:
            file.seek(min(start, file.frames))
            return np.ascontiguousarray(_to_listen(file.read(frames, "float32", always_2d=True).T).T)


def look(path: Path, folder: Path, progress: Progress, stop: threading.Event, stream: int | None = None) -> Overview:
    """Read a recording once, and store its overview in `folder`.

    Args:
        path: the recording.
        folder: an existing folder for the files, of this recording alone.
        progress: called with the seconds that are read, and all (0 if unknown).
        stop: ends the reading when set.
        stream: number of the sound track, from 1; None for the first.

    Raises:
        AudioError: the recording cannot be read.
        OutputError: the folder cannot be written.
        StoppedError: `stop` was set.
    """
    try:
        return _look(path, folder, progress, stop, stream)
    except (OSError, soundfile.SoundFileError) as error:
        raise OutputError(f"{folder}: cannot be written ({getattr(error, 'strerror', None) or error})") from error


def _look(path: Path, folder: Path, progress: Progress, stop: threading.Event, stream: int | None) -> Overview:
    peaks, levels, copy = folder / "peaks", folder / "levels", folder / "listen.wav"
    with Source(path, stream=stream) as source, ExitStack() as stack:
        peaks_file = stack.enter_context(peaks.open("wb"))
        levels_file = stack.enter_context(levels.open("wb"))
        listening = None
        if not _is_seekable(path):
            # As RF64, which becomes a plain WAV below 4 GB. Lossy recordings may be over full scale, so in floats.
            writer = soundfile.SoundFile(copy, "w", source.rate, min(2, source.channels), "FLOAT", format="RF64")
            listening = stack.enter_context(writer)
        transform, piece = _Transform(source.rate), source.rate // PIECES_PER_SECOND
        column, frames, loudest = piece * PIECES_PER_COLUMN, 0, 0
        waiting = np.zeros(transform.size // 2, np.float32)  # columns are centred on their moment
        for block in chain(source.blocks(BLOCK_COLUMNS * column / source.rate), [None]):
            if stop.is_set():
                raise StoppedError("stopped")
            if block is None:  # the end
                waiting = np.append(waiting, np.zeros(transform.size // 2, np.float32))
            else:
                audio = _to_listen(block)
                if listening is not None:
                    listening.write(audio.T)
                peaks_file.write(_extremes(audio, piece).tobytes())
                waiting = np.append(waiting, audio.mean(0, dtype=np.float32))
                frames += audio.shape[1]
            starts = np.arange(0, len(waiting) - transform.size + 1, column)
            columns = transform.levels(waiting, starts)
            waiting = waiting[len(starts) * column :]
            loudest = max(loudest, int(columns.max(initial=0)))
            levels_file.write(columns.tobytes())
            progress(frames / source.rate, source.frames / source.rate)
        playable = path if listening is None else copy
        return Overview(peaks, levels, playable, source.rate, min(2, source.channels), frames, piece, loudest)


def _extremes(audio: Audio, piece: int) -> NDArray[np.int8]:
    """Return the lowest and highest value of each `piece` samples of `[channels, samples]`; the last may be short."""
    starts = np.arange(0, audio.shape[1], piece)
    lowest = np.minimum.reduceat(audio.min(0), starts)
    highest = np.maximum.reduceat(audio.max(0), starts)
    return np.asarray(np.rint(np.clip(np.stack([lowest, highest], 1), -1, 1) * 127), np.int8)


def _is_seekable(path: Path) -> bool:
    """Return True if a recording can be played from any sample on; others are decoded into a WAV."""
    try:
        with soundfile.SoundFile(path) as file:
            return file.format in SEEKABLE and file.subtype.startswith(LOSSLESS)
    except soundfile.SoundFileError:
        return False


def _to_listen(audio: Audio) -> Audio:
    """Mix `[channels, samples]` to stereo if there are more than 2: the means of the odd and of the even channels."""
    return audio if len(audio) <= 2 else np.stack([audio[::2].mean(0), audio[1::2].mean(0)])


class _Transform:
    """Computes levels of mel bands at given moments of a mono signal."""

    def __init__(self, rate: int) -> None:
        self.size = 1 << round(log2(rate * WINDOW_SECONDS))
        window = np.hanning(self.size + 1)[:-1]
        self._window = (window * 2 / window.sum()).astype(np.float32)  # a full-scale sine has the power 1
        self._bands = mel_bands(rate, self.size)

    def levels(self, mono: Audio, starts: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the levels of the `size` samples from each of `starts` on, uint8 `[starts, bands]`."""
        if not len(starts):
            return np.zeros((0, BANDS), np.uint8)
        frames = np.lib.stride_tricks.sliding_window_view(mono, self.size)[starts] * self._window
        spectrum = np.fft.rfft(frames, axis=1)
        power = (spectrum.real**2 + spectrum.imag**2) @ self._bands
        decibels = 10 * np.log10(np.maximum(power, 10 ** (FLOOR_DB / 10)))
        return np.rint(np.clip(1 - decibels / FLOOR_DB, 0, 1) * 255).astype(np.uint8)


def mel_bands(rate: int, size: int) -> Audio:
    """Make triangular filters for a transform of `size` samples, float32 `[bins, bands]`; each averages its bins.

    Centres are evenly spaced on the mel scale from 30 Hz to half the rate; none is narrower than a bin.
    """
    lowest, highest = (2595 * log10(1 + hz / 700) for hz in (LOWEST_HZ, rate / 2))
    mels = np.linspace(lowest, highest, BANDS + 2)
    edges = 700 * (10 ** (mels / 2595) - 1) * size / rate
    bins, centre = np.arange(size // 2 + 1)[:, None], edges[1:-1]
    rise = (bins - centre) / np.maximum(1, centre - edges[:-2])
    fall = (centre - bins) / np.maximum(1, edges[2:] - centre)
    triangles = np.maximum(0, 1 - np.maximum(-rise, -fall))
    return np.asarray(triangles / np.maximum(triangles.sum(0), 1e-9), np.float32)

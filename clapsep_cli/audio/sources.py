"""Recordings as they are given to the command: any file, a part of one, a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from clapsep_cli.audio import decoders, media
from clapsep_cli.audio.samples import MAX_CHANNELS, Audio, Decoder, check_finite, downmix, to_rate
from clapsep_cli.audio.wav import WavStream
from clapsep_cli.errors import AudioError

STDIN = Path("-")
RATES_HZ = (8_000, 192_000)
HEARD_SECONDS = 10.0  # of which one downmix is made at a time, as models hear windows of this length
SUFFIXES = decoders.SUFFIXES | media.SUFFIXES  # of recordings; some of them need a decoder that may not be here


class Source:
    """A recording open for reading, from `start` to `end` (seconds; to its end if None). `-` is a WAV from stdin.

    `rate` in Hz, `channels`, `tags`; `bits` is the depth an output needs (16, 24, 32; None for float and lossy).
    `frames` is the length in samples of the part to be read as far as it is known in advance: to the sample for what
    libsndfile reads, within 0.1 s for what ffmpeg does; 0 if it is not. `name` stands for it in messages.

    Raises `AudioError` for what is no recording, is cut short or damaged, or is too odd; see `blocks` for the rest.
    """

    def __init__(self, path: Path, start: float = 0.0, end: float | None = None) -> None:
        self.path, self.name = path, "standard input" if path == STDIN else str(path)
        self._start, self._end = start, end
        if start < 0 or (end is not None and end <= start):
            raise AudioError(f"{self.name}: there is nothing between {start:g} s and {end} s")
        self._decoder = _open(path, self.name)
        try:
            self._check()
        except BaseException:
            self._decoder.close()
            raise

    def _check(self) -> None:
        decoder = self._decoder
        self.rate, self.channels, self.bits, self.tags = decoder.rate, decoder.channels, decoder.bits, decoder.tags
        if not RATES_HZ[0] <= self.rate <= RATES_HZ[1]:
            raise AudioError(f"{self.name}: is at {self.rate} Hz; resample it to between 8000 and 192000 Hz first")
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise AudioError(f"{self.name}: has {self.channels} channels; 1 to {MAX_CHANNELS} can be separated")
        self._first = round(self._start * self.rate)
        self._wanted = None if self._end is None else max(1, round(self._end * self.rate) - self._first)
        if decoder.frames and decoder.exact:
            self._check_part(decoder.frames)
        self.frames = max(0, decoder.frames - self._first) if self._wanted is None else self._wanted

    def _check_part(self, frames: int) -> None:
        """Raise `AudioError` if a recording of `frames` has no such part."""
        for name, limit, at in (("start", self._start, self._first + 1), ("end", self._end, self._last())):
            if frames < at:
                raise AudioError(f"{self.name}: ends at {frames / self.rate:.2f} s, so it has no {name} at {limit:g} s")

    def _last(self) -> int:
        return 0 if self._wanted is None else self._first + self._wanted

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._decoder.close()

    def blocks(self, seconds: float) -> Iterator[Audio]:
        """Yield all of it, once, float32 `[channels, samples]`. Raises `AudioError` at a sample that is NaN or
        infinite, for no samples at all, where the recording is damaged, and if it ends before its header says."""
        size, done = max(1, round(seconds * self.rate)), 0
        try:
            if self._first:
                self._decoder.skip(self._first)
            while self._wanted is None or done < self._wanted:
                block = self._decoder.read(size if self._wanted is None else min(size, self._wanted - done))
                if not block.shape[1]:
                    break
                check_finite(block, self.name, self.rate, self._first + done)
                done += block.shape[1]
                yield block
        except OSError as error:
            raise AudioError(f"{self.name}: reading failed ({decoders.reason(error)})") from error
        if not done and not self._first:
            raise AudioError(f"{self.name}: has no samples")
        if not done or self._wanted is not None:
            self._check_part(self._first + done)


def _open(path: Path, name: str) -> Decoder:
    try:
        if path == STDIN:
            return _open_stdin(name)
        if path.is_dir():
            raise AudioError(f"{path}: is a folder; name the recordings in it, e.g. {path}/*.wav")
        if not path.exists():
            raise AudioError(f"{path}: no such file")
        if path.is_fifo():
            return _open_fifo(path, name)
        if not path.is_file():
            raise AudioError(f"{path}: is no file; use - to read a WAV from a pipe")
        return _open_file(path)
    except (OSError, ValueError) as error:  # a name that no file can have is a ValueError
        raise AudioError(f"{path}: cannot be read ({decoders.reason(error)})") from error


def _open_stdin(name: str) -> Decoder:
    if sys.stdin is None or sys.stdin.closed:
        raise AudioError(f"{name}: is closed")
    if sys.stdin.isatty():
        raise AudioError(f"{name}: is a terminal; pipe a WAV into it, e.g. ffmpeg -i FILE -f wav - | clapsep …")
    return WavStream(sys.stdin.buffer, name)


def _open_fifo(path: Path, name: str) -> Decoder:
    stream = path.open("rb")
    try:
        return WavStream(stream, name)
    except BaseException:
        stream.close()
        raise


def _open_file(path: Path) -> Decoder:
    try:
        return decoders.SoundFileDecoder(path)
    except decoders.UnknownFormatError as refused:
        decoder = media.open_media(path)
        if decoder is not None:
            return decoder
        if path.suffix.lower() in decoders.SUFFIXES:
            raise
        raise AudioError(f"{path}: {media.MISSING}") from refused


def read_mono(path: Path, rate: int, start: float = 0.0, end: float | None = None) -> Audio:
    """All of a recording, or of its part in seconds, as a model hears it: its `downmix` at `rate` Hz, `[samples]`."""
    with Source(path, start, end) as source:
        mono = np.concatenate([downmix(block) for block in source.blocks(HEARD_SECONDS)])
        return to_rate(mono, source.rate, rate)


def recordings(path: Path) -> list[Path]:
    """`path` itself, or the recordings directly in it if it is a folder: those that can be decoded here.

    Raises `AudioError` if there are none.
    """
    if not path.is_dir():
        return [path]
    known = SUFFIXES if media.available() else decoders.SUFFIXES
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in known and p.is_file())
    if not found:
        raise AudioError(f"{path}: no recordings in this folder")
    return found

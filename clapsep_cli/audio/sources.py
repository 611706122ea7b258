"""Opens and reads recordings: files, parts of them, pipes."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from clapsep_cli.audio import decoders
from clapsep_cli.audio.samples import (
    LOWEST_HZ,
    MAX_CHANNELS,
    Audio,
    Decoder,
    Samples,
    check_finite,
    downmix,
    slowed,
    to_rate,
)
from clapsep_cli.audio.wav import WavStream, is_wav
from clapsep_cli.errors import AudioError

STDIN = Path("-")
RATES_HZ = (LOWEST_HZ, 1_000_000)
HEARD_SECONDS = 10.0  # length mixed to mono at a time, that of a model's window
SUFFIXES = decoders.SNDFILE_SUFFIXES | decoders.AV_SUFFIXES  # some need PyAV


class Source:
    """Reads a recording.

    Args:
        path: a file, a named pipe, or `-` for standard input.
        start: where to begin, in seconds.
        end: where to end, in seconds; None for the recording's end.
        lenient: read a damaged or truncated recording as far as possible, and report the damage in `notes`.
        stream: number of the sound track, from 1; None for the first, which `notes` then mention if there are more.

    Attributes:
        name: name of the recording in messages.
        rate: in Hz.
        channels: their number.
        frames: length in samples of the part to be read: exact for libsndfile, within 0.1 s for PyAV; 0 if unknown.
        bits: PCM depth that an output needs: 16, 24 or 32; None for float and lossy.
        speakers: the mask of speaker positions that WAVEFORMATEXTENSIBLE defines; None if the recording states none.
        tags: by libsndfile's names.
        tracks: description of each sound track of a film; none for formats with a single one.

    Raises:
        AudioError: the file is no recording, truncated or damaged, or cannot be separated; see also `blocks`.
    """

    def __init__(
        self,
        path: Path,
        start: float = 0.0,
        end: float | None = None,
        lenient: bool = False,
        stream: int | None = None,
    ) -> None:
        self.path, self.name = path, "standard input" if path == STDIN else str(path)
        self._start, self._end = start, end
        if start < 0 or (end is not None and end <= start):
            raise AudioError(f"{self.name}: there is nothing between {start:g} s and {end} s")
        self._decoder = _open(path, self.name, lenient, stream)
        try:
            self._check()
        except BaseException:
            self._decoder.close()
            raise

    @property
    def notes(self) -> list[str]:
        """Remarks so far: damage that was skipped, other sound tracks."""
        return self._decoder.notes

    def _check(self) -> None:
        decoder = self._decoder
        self.rate, self.channels, self.bits, self.tags = decoder.rate, decoder.channels, decoder.bits, decoder.tags
        self.speakers, self.tracks = decoder.speakers, decoder.tracks
        if not RATES_HZ[0] <= self.rate <= RATES_HZ[1]:
            raise AudioError(f"{self.name}: is at {self.rate} Hz; resample it to between 8000 and 1000000 Hz first")
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise AudioError(f"{self.name}: has {self.channels} channels; 1 to {MAX_CHANNELS} can be separated")
        self._first = round(self._start * self.rate)
        self._wanted = None if self._end is None else max(1, round(self._end * self.rate) - self._first)
        if decoder.frames and decoder.exact:
            self._check_part(decoder.frames)
        self.frames = max(0, decoder.frames - self._first) if self._wanted is None else self._wanted

    def _check_part(self, frames: int) -> None:
        """Raise `AudioError` if a recording of `frames` samples ends before the part to be read."""
        last = 0 if self._wanted is None else self._first + self._wanted
        for name, limit, at in (("start", self._start, self._first + 1), ("end", self._end, last)):
            if frames < at:
                raise AudioError(f"{self.name}: ends at {frames / self.rate:.2f} s, so it has no {name} at {limit:g} s")

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._decoder.close()

    def blocks(self, seconds: float) -> Iterator[Samples]:
        """Yield the recording once, in blocks of this length.

        Blocks are `[channels, samples]`, full scale ±1, float64 where `bits` is 32 and float32 elsewhere.

        Raises:
            AudioError: a sample is no finite number, there is none, or the recording is damaged or ends too early.
        """
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


def _open(path: Path, name: str, lenient: bool, stream: int | None) -> Decoder:
    try:
        if path == STDIN:
            return _open_pipe(_stdin(name), name, lenient, stream)
        if path.is_dir():
            raise AudioError(f"{path}: is a folder; name the recordings in it, e.g. {path}/*.wav")
        if not path.exists():
            raise AudioError(f"{path}: no such file")
        if path.is_fifo():
            return _open_pipe(path.open("rb"), name, lenient, stream)
        if not path.is_file():
            raise AudioError(f"{path}: is no file; use - to read from a pipe")
        return _open_file(path.open("rb", buffering=2**16), name, path.suffix.lower(), lenient, stream)
    except (OSError, ValueError) as error:  # a name that no file can have is a ValueError
        raise AudioError(f"{path}: cannot be read ({decoders.reason(error)})") from error


def _stdin(name: str) -> BinaryIO:
    if sys.stdin is None or sys.stdin.closed:
        raise AudioError(f"{name}: is closed")
    if sys.stdin.isatty():
        raise AudioError(f"{name}: is a terminal; pipe a recording into it, e.g. clapsep extract - <FILE")
    return sys.stdin.buffer


def _open_pipe(pipe: BinaryIO, name: str, lenient: bool, stream: int | None) -> Decoder:
    """Decode a WAV as it arrives; copy other formats to a temporary file first, as their decoders have to seek."""
    try:
        start = pipe.read(12)
        if not start:
            raise AudioError(f"{name}: is empty")
        if is_wav(start):
            decoders.check_track(name, stream, 1)
            return WavStream(pipe, name, start, lenient)
    except BaseException:
        pipe.close()
        raise
    with pipe:
        file = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            file.write(start)
            shutil.copyfileobj(pipe, file, 2**20)
        except BaseException:
            file.close()
            raise
    return _open_file(file, name, "", lenient, stream)


def _open_file(file: BinaryIO, name: str, suffix: str, lenient: bool, stream: int | None) -> Decoder:
    """Decode `file`. The decoder closes it; so does an error here."""
    try:
        try:
            decoder = decoders.SoundFileDecoder(file, name, suffix, lenient)
        except decoders.UnknownFormatError as refused:
            if decoders.has_av():
                return decoders.AvDecoder(file, name, lenient, stream)
            if suffix in decoders.SNDFILE_SUFFIXES:
                raise
            raise AudioError(f"{name}: {decoders.AV_MISSING}") from refused
        decoders.check_track(name, stream, 1)
        if decoder.frames or not decoder.notes:
            return decoder
        file.seek(0)
        start = file.read(12)
        if not is_wav(start):
            return decoder
        unfinished = WavStream(file, name, start, lenient=True)  # its header states no samples: read it to its end
        unfinished.notes = decoder.notes
        return unfinished
    except BaseException:
        file.close()
        raise


def read_mono(
    path: Path,
    rate: int,
    start: float = 0.0,
    end: float | None = None,
    lenient: bool = False,
    stream: int | None = None,
    expand: float = 1.0,
) -> Audio:
    """Read a recording as a model hears it: mixed to mono (see `downmix`) and resampled.

    Args:
        path: the recording.
        rate: to resample to, in Hz.
        start, end, lenient, stream: as of `Source`.
        expand: how many times slower it is heard.

    Returns:
        float32 `[samples]`.

    Raises:
        AudioError: as of `Source`.
    """
    with Source(path, start, end, lenient, stream) as source:
        mono = np.concatenate([downmix(block) for block in source.blocks(HEARD_SECONDS)])
        return to_rate(mono, slowed(source.rate, expand, source.name), rate)


def recordings(path: Path) -> list[Path]:
    """Return `path` itself, or, for a folder, all recordings in it that can be decoded here.

    Raises `AudioError` for a folder without recordings.
    """
    if not path.is_dir():
        return [path]
    known = SUFFIXES if decoders.has_av() else decoders.SNDFILE_SUFFIXES
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in known and p.is_file())
    if not found:
        raise AudioError(f"{path}: no recordings in this folder")
    return found

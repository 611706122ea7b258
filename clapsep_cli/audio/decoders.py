"""Decoding through libsndfile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from clapsep_cli.audio import mpeg
from clapsep_cli.audio.containers import CHUNKED, check_whole, tags_end
from clapsep_cli.audio.samples import Audio, Decoder
from clapsep_cli.errors import AudioError

BITS = {  # outputs keep the depth, at least 16
    "PCM_S8": 16,
    "PCM_U8": 16,
    "PCM_16": 16,
    "PCM_24": 24,
    "PCM_32": 32,
    "ALAC_16": 16,
    "ALAC_20": 24,
    "ALAC_24": 24,
    "ALAC_32": 32,
}
SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".caf", ".w64", ".rf64", ".au"}
MPEG_SUFFIXES = {".mp3", ".mp2", ".mpga"}
TAGS = ("title", "artist", "album", "comment", "date", "tracknumber", "genre", "copyright", "license")
OTHERS = {*CHUNKED, b"OggS", b"fLaC", b".snd"}
NO_LENGTH = 2**62  # libsndfile says at least that of a FLAC that does not state its length
READ_AHEAD_BYTES = 2**16  # by which a FLAC may go on behind its last sample, with tags


class UnknownFormatError(AudioError):
    """Not a file that libsndfile opens; another decoder may."""


class _File(soundfile.SoundFile):  # type: ignore[misc]
    """libsndfile cannot seek in a FLAC of unknown length, which soundfile would have it do after every block."""

    def seekable(self) -> bool:
        return self.frames < NO_LENGTH and bool(super().seekable())


class _Fed:
    """A file as libsndfile gets it: from `start` on, `front` before it. Errors cannot pass through C: they are kept."""

    def __init__(self, file: BinaryIO, start: int = 0, front: bytes = b"") -> None:
        self._file, self._front, self._skipped, self._at = file, front, start - len(front), 0
        self.size = file.seek(0, os.SEEK_END) - self._skipped
        self.error: OSError | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self.size)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        content = self._front[self._at : self._at + size]
        try:
            if len(content) < size:
                self._file.seek(self._skipped + self._at + len(content))
                content += self._file.read(size - len(content))
        except OSError as error:
            self.error = error
        self._at += len(content)
        return content


class SoundFileDecoder(Decoder):
    """A file that libsndfile reads. Raises `AudioError` for one that is cut short, `UnknownFormatError` for others."""

    def __init__(self, path: Path) -> None:
        self.name, self._done = str(path), 0
        try:
            self._handle: BinaryIO = path.open("rb", buffering=2**16)
        except OSError as error:
            raise AudioError(f"{path}: cannot be read ({reason(error)})") from error
        try:
            self._open(path)
        except BaseException:
            self._handle.close()
            raise

    def _open(self, path: Path) -> None:
        try:
            check_whole(self._handle, self.name)
            stream = mpeg.scan(self._handle, self.name) if _may_be_mpeg(path, self._handle) else None
            self._fed = _Fed(self._handle)
            if stream is not None and stream.layer == 3 and stream.stated != stream.frames:
                self._fed = _Fed(self._handle, stream.sound, mpeg.note_length(stream, self._fed.size))
            self._file = _File(self._fed)
        except (soundfile.SoundFileError, OSError, ValueError) as error:
            raise UnknownFormatError(f"{path}: cannot be read as audio ({reason(error)})") from error
        self.rate, self.channels = self._file.samplerate, self._file.channels
        self.frames = 0 if self._file.frames >= NO_LENGTH else self._file.frames
        if stream is not None and stream.layer != 3:
            self.frames = stream.frames * stream.samples
        self.bits = BITS.get(self._file.subtype)
        self.tags = {name: text for name in TAGS if (text := getattr(self._file, name))}

    def read(self, samples: int) -> Audio:
        try:
            block = self._file.read(samples, dtype="float32", always_2d=True).T
        except (soundfile.SoundFileError, OSError) as error:
            at = self._done / self.rate
            raise AudioError(f"{self.name}: is damaged after {at:.2f} s ({reason(error)})") from error
        if self._fed.error is not None:
            raise self._fed.error
        self._done += block.shape[1]
        if block.shape[1] < samples:
            self._check_end()
        return np.ascontiguousarray(block)

    def _check_end(self) -> None:
        if self._done < self.frames:
            missing = (self.frames - self._done) / self.rate
            raise AudioError(f"{self.name}: ends {missing:.2f} s before its header says; the file is cut short")
        left = self._fed.size - self._handle.tell()
        if self._file.format == "FLAC" and left > READ_AHEAD_BYTES:
            raise AudioError(f"{self.name}: goes on behind the end that its header states, by {left} bytes")

    def skip(self, samples: int) -> None:
        if not self.frames:  # libsndfile does not find its way in a FLAC of unknown length
            return super().skip(samples)
        try:
            self._done = self._file.seek(samples)  # exact for lossy codecs too, see the tests
        except (soundfile.SoundFileError, OSError) as error:
            raise AudioError(f"{self.name}: is damaged ({reason(error)})") from error

    def close(self) -> None:
        self._file.close()
        self._handle.close()


def _may_be_mpeg(path: Path, file: BinaryIO) -> bool:
    file.seek(tags_end(file))
    magic = file.read(4)
    named = path.suffix.lower() in MPEG_SUFFIXES and magic not in OTHERS
    return named or mpeg.read_frame(magic) is not None


def reason(error: Exception) -> str:
    """The cause of an error in a few words, without what its message says beside."""
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return str(text).strip().rstrip(".")

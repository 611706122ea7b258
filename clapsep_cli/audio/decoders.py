"""Decodes through libsndfile."""

from __future__ import annotations

import re
from typing import BinaryIO

import numpy as np
import soundfile

from clapsep_cli.audio.containers import (
    Fed,
    check_ogg,
    check_samples,
    note_length,
    read_frame,
    scan_mpeg,
    tags_end,
)
from clapsep_cli.audio.samples import Decoder, Samples, seconds
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
NO_MPEG = {b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM", b"caff", b"riff", b"OggS", b"fLaC", b".snd"}
NO_LENGTH = 2**62  # libsndfile says at least that of a FLAC that does not state its length
READ_AHEAD_BYTES = 2**16  # by which a FLAC may go on behind its last sample, with tags
MALFORMED = 3  # libsndfile's number for a file of a known format that it cannot make sense of
SPEAKERS = re.compile(r"^ *Channel Mask *: 0x([0-9A-F]+)", re.MULTILINE)  # in libsndfile's log
# Of FLAC (RFC 9639, 9.1.3) and Ogg, by number of channels.
USUAL_SPEAKERS = (0x4, 0x3, 0x7, 0x33, 0x37, 0x3F, 0x70F, 0x63F)
# Where Ogg has the channels of WAV and FLAC, by their number (Vorbis I, 4.3.9). libsndfile leaves that to its callers.
OGG_ORDER = {
    3: [0, 2, 1],
    5: [0, 2, 1, 3, 4],
    6: [0, 2, 1, 5, 3, 4],
    7: [0, 2, 1, 6, 5, 3, 4],
    8: [0, 2, 1, 7, 5, 6, 3, 4],
}


class UnknownFormatError(AudioError):
    """libsndfile does not open the file; another decoder may."""


class _File(soundfile.SoundFile):  # type: ignore[misc]
    """Keeps soundfile from seeking after every block, which libsndfile cannot do in a FLAC of unknown length."""

    def seekable(self) -> bool:
        return self.frames < NO_LENGTH and bool(super().seekable())


class SoundFileDecoder(Decoder):
    """Decodes a file that libsndfile reads.

    Args:
        file: the file, which stays open if this raises.
        name: for messages.
        suffix: of the file's name, in lower case, with its dot.
        lenient: take what there is of a damaged file.

    Raises `UnknownFormatError` for a file of another format, `AudioError` for a damaged one.
    """

    def __init__(self, file: BinaryIO, name: str, suffix: str, lenient: bool = False) -> None:
        super().__init__(name, lenient)
        self._handle, self._done, self._ended = file, 0, False
        try:
            check_ogg(file, name, self.report)
            stream = scan_mpeg(file, self.report) if _may_be_mpeg(suffix, file) else None
            self._fed = Fed(file)
            if stream is not None and (stream.stated != stream.frames or self.notes):
                size = sum(end - begin for begin, end in stream.spans)
                true = stream.stated == stream.frames or stream.layer != 3
                note = stream.note if true else note_length(stream, size)
                self._fed = Fed(file, stream.spans, note)
            self._file = _File(self._fed)
        except (soundfile.SoundFileError, OSError, ValueError) as error:
            what = "is damaged or cut short" if getattr(error, "code", 0) == MALFORMED else "cannot be read as audio"
            raise UnknownFormatError(f"{name}: {what} ({reason(error)})") from error
        check_samples(self._file, self._fed.tell(), file, self.report)
        self.rate, self.channels = self._file.samplerate, self._file.channels
        self.frames = 0 if self._file.frames >= NO_LENGTH else self._file.frames
        if stream is not None and stream.layer != 3:
            self.frames = stream.frames * stream.samples
        self.bits, self.speakers = BITS.get(self._file.subtype), self._read_speakers()
        self.tags = {name: text for name in TAGS if (text := getattr(self._file, name))}

    def _read_speakers(self) -> int | None:
        if self._file.format in ("FLAC", "OGG") and self.channels <= len(USUAL_SPEAKERS):
            return USUAL_SPEAKERS[self.channels - 1]
        mask = SPEAKERS.search(self._file.extra_info)
        return int(mask[1], 16) if mask else None

    def read(self, samples: int) -> Samples:
        wanted = max(0, min(samples, self._file.frames - self._done))
        # Samples that libsndfile fails to read stay NaN.
        block = np.full((wanted, self.channels), np.nan, np.float64 if self.bits == 32 else np.float32)
        if self._ended:
            return np.ascontiguousarray(block[:0].T)
        damaged = False
        try:
            block = self._file.read(out=block)
        except (soundfile.SoundFileError, OSError):
            missing = np.isnan(block[:, 0])
            damaged, block = True, block[: int(missing.argmax()) if missing.any() else wanted]
        if self._fed.error is not None:
            raise self._fed.error
        self._done += len(block)
        if damaged:
            self._ended = True
            rest = f", of {seconds(self.frames, self.rate)}" if self.frames else ""
            self.report(f"is damaged or cut short after {seconds(self._done, self.rate)}{rest}")
        elif len(block) < samples:
            self._check_end()
        if self._file.format == "OGG" and self.channels in OGG_ORDER:
            block = block[:, OGG_ORDER[self.channels]]
        return np.ascontiguousarray(block.T)

    def _check_end(self) -> None:
        self._ended = True
        if self._done < self.frames:
            missing = seconds(self.frames - self._done, self.rate)
            self.report(f"ends {missing} before its header says, it is cut short")
        left = self._fed.size - self._fed.tell()
        if self._file.format == "FLAC" and left > READ_AHEAD_BYTES:
            self.report(f"goes on behind the end that its header states, by {left} bytes")

    def skip(self, samples: int) -> None:
        if not self.frames:  # libsndfile cannot seek in a FLAC of unknown length
            return super().skip(samples)
        try:
            self._done = self._file.seek(samples)  # exact for lossy codecs too, see the tests
        except (soundfile.SoundFileError, OSError) as error:
            raise AudioError(f"{self.name}: is damaged ({reason(error)})") from error

    def close(self) -> None:
        self._file.close()
        self._handle.close()


def _may_be_mpeg(suffix: str, file: BinaryIO) -> bool:
    file.seek(tags_end(file))
    magic = file.read(4)
    return (suffix in MPEG_SUFFIXES and magic not in NO_MPEG) or read_frame(magic) is not None


def reason(error: Exception) -> str:
    """Return the cause of an error in a few words."""
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return str(text).strip().rstrip(".")

"""Encodes outputs: chooses formats and depths, and writes samples."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import soundfile
from numpy.typing import NDArray

from clapsep_cli.audio.decoders import OGG_ORDER, TAGS, reason
from clapsep_cli.audio.film import MUXERS, Film, MediaEncoder
from clapsep_cli.audio.samples import Encoder, Form, Samples, quantise
from clapsep_cli.audio.wav import WavWriter
from clapsep_cli.errors import OutputError

SUBTYPES: dict[str, int | None] = {"pcm16": 16, "pcm24": 24, "pcm32": 32, "float": None}
SOFTWARE_BYTES = 100  # libsndfile cuts a longer one in FLAC and Ogg, where it adds its own name
PIECE = 2**14  # samples written at a time; libsndfile's Vorbis puts them all on its stack
ID3 = {
    "title": "TIT2",
    "artist": "TPE1",
    "album": "TALB",
    "comment": "COMM",
    "date": "TDRC",
    "tracknumber": "TRCK",
    "genre": "TCON",
    "copyright": "TCOP",
    "software": "TSSE",
}


@dataclass(frozen=True)
class Format:
    """A format of outputs. `depths`: the PCM depths it can hold, None for float; empty for lossy formats."""

    depths: tuple[int | None, ...]
    major: str = ""  # libsndfile's names
    codec: str = ""
    level: float = 0.0  # of compression: 0 for the best quality, 1 for the smallest file


FORMATS = {
    "wav": Format((16, 24, 32, None)),
    "flac": Format((16, 24), "FLAC", level=0.6),  # the level that flac itself takes
    "ogg": Format((), "OGG", "VORBIS", level=0.3),
    "opus": Format((), "OGG", "OPUS", level=0.2),
    "mp3": Format((), "MP3", "MPEG_LAYER_III", level=0.1),
    "m4a": Format(()),  # AAC, by PyAV
}


@dataclass(frozen=True)
class Encoding:
    """The encoding of outputs: a key of `FORMATS`, also the suffix, and the PCM depth, None for float and lossy."""

    format: str = "wav"
    bits: int | None = None

    @property
    def lossy(self) -> bool:
        """True for formats that change samples."""
        return not FORMATS[self.format].depths

    def describe(self) -> str:
        """Format the encoding for a summary, e.g. "flac, 24 bit"."""
        return self.format if self.lossy else f"{self.format}, {f'{self.bits} bit' if self.bits else 'float'}"


def choose_encoding(
    format: str,  # noqa: A002
    subtype: str | None,
    rate: int,
    channels: int,
    bits: int | None = None,
) -> Encoding:
    """Choose the encoding for the parts of a recording, before anything is computed.

    Args:
        format: a key of `FORMATS`.
        subtype: a key of `SUBTYPES`; None for the recording's own depth: for float and lossy recordings float, or 24
            bit if the format has no float.
        rate: of the recording in Hz.
        channels: of the recording.
        bits: depth of the recording; None for float and lossy.

    Raises:
        OutputError: the format is unknown, or cannot hold the subtype, the channels or the rate.
    """
    form = FORMATS.get(format)
    if form is None:
        raise OutputError(f"there is no output format {format!r}; there are {', '.join(FORMATS)}")
    if subtype is not None and subtype not in SUBTYPES:
        raise OutputError(f"there is no subtype {subtype!r}; there are {', '.join(SUBTYPES)}")
    if not form.depths:
        if subtype is not None:
            raise OutputError(f"--subtype {subtype}: {format} is lossy and has none; leave it out, or use wav or flac")
        encoding = Encoding(format)
    elif subtype is not None and SUBTYPES[subtype] not in form.depths:
        able = ", ".join(name for name, bits in SUBTYPES.items() if bits in form.depths)
        raise OutputError(f"--subtype {subtype}: {format} cannot hold it; it holds {able}")
    else:
        bits = bits if subtype is None else SUBTYPES[subtype]
        encoding = Encoding(format, bits if bits in form.depths else 24)
    try:
        open_encoder(io.BytesIO(), encoding.format, Form(rate, channels, encoding.bits)).discard()
    except OutputError as error:
        what = f"{channels} channel{'s' * (channels > 1)} at {rate} Hz"
        raise OutputError(f"{format} cannot hold {what}; use wav, which can ({error})") from error
    return encoding


def encoding_of(film: Film, bits: int | None) -> Encoding:
    """Choose the encoding of a film's new sound track: with `bits` of the recording if the track is lossless."""
    return Encoding("wav", bits or 24) if film.lossless else Encoding("m4a")


def open_encoder(
    stream: BinaryIO,
    format: str,  # noqa: A002
    form: Form,
    seek: bool = True,
    film: Film | None = None,
) -> Encoder:
    """Open an encoder.

    Args:
        stream: what to write to, empty.
        format: a key of `FORMATS`.
        form: of the audio.
        seek: True if `stream` is a file rather than a pipe.
        film: to write again with this sound; None for sound alone.

    Raises:
        OutputError: the format cannot hold this audio.
    """
    if film is not None:
        return MediaEncoder(stream, MUXERS[film.suffix], film.codec(), form, film)
    if format == "m4a":
        return MediaEncoder(stream, "ipod", "aac", form)
    if format == "wav":
        return WavWriter(stream, form, seek)
    return SoundFileEncoder(stream, format, form)


class SoundFileEncoder(Encoder):
    """Encodes FLAC, Ogg, Opus and MP3 through libsndfile."""

    def __init__(self, stream: BinaryIO, format: str, form: Form) -> None:  # noqa: A002
        known, tags, self._bits = FORMATS[format], form.tags, form.bits
        if format == "mp3":  # libsndfile writes its tags as Latin-1, and no software
            stream.write(_id3(tags))
            tags = {}
        self._stream = _Rest(stream)
        kind = {"subtype": known.codec or f"PCM_{self._bits}", "format": known.major, "compression_level": known.level}
        try:
            self._file = soundfile.SoundFile(self._stream, "w", form.rate, form.channels, **kind)
            for name in set(tags) & {*TAGS, "software"}:
                setattr(self._file, name, tags[name])
        except soundfile.SoundFileError as error:
            raise OutputError(reason(error)) from error

    def write(self, audio: Samples) -> int:
        samples: NDArray[Any] = audio.astype(np.float32, copy=False)
        if self._bits is None:
            clipped = int(np.count_nonzero(np.abs(audio) > 1))  # by the player
        else:
            integers, clipped = quantise(audio, self._bits)
            samples = integers << (8 * integers.itemsize - self._bits)
        if self._file.format == "OGG" and len(samples) in OGG_ORDER:
            samples = samples[np.argsort(OGG_ORDER[len(samples)])]
        try:
            for at in range(0, samples.shape[1], PIECE):
                self._file.write(np.stack(list(samples[:, at : at + PIECE]), 1))
        except (soundfile.SoundFileError, AssertionError) as error:
            self._stream.check()
            raise OSError(reason(error)) from error
        self._stream.check()
        return clipped

    def finish(self) -> None:
        self._file.close()
        self._stream.check()

    def discard(self) -> None:
        self._file.close()


class _Rest:
    """File object for libsndfile: a stream from its current position. Keeps errors, which cannot pass through C."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._start = stream, stream.tell()
        self._error: OSError | None = None

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            self._stream.seek(offset + (self._start if whence == os.SEEK_SET else 0), whence)
        except OSError as error:
            self._error = error
        return self.tell()

    def tell(self) -> int:
        return self._stream.tell() - self._start

    def write(self, content: bytes) -> int:
        try:
            return self._stream.write(content)
        except OSError as error:
            self._error = error
            return 0


def _id3(tags: Mapping[str, str]) -> bytes:
    """Build an ID3v2.4 tag in UTF-8."""
    frames = b""
    for name, text in tags.items():
        if name in ID3:
            content = b"\x03" + (b"eng\0" if name == "comment" else b"") + text.encode()
            frames += ID3[name].encode() + _id3_size(len(content)) + bytes(2) + content
    return b"ID3\x04\0\0" + _id3_size(len(frames)) + frames if frames else b""


def _id3_size(size: int) -> bytes:
    return bytes(size >> shift & 127 for shift in (21, 14, 7, 0))

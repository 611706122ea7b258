"""Encodes outputs: the formats, the depths that each holds, and how samples are written."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import numpy as np
import soundfile
from numpy.typing import NDArray

from clapsep_cli.audio.decoders import OGG_ORDER, TAGS, reason
from clapsep_cli.audio.film import MUXERS, Film, MediaEncoder
from clapsep_cli.audio.samples import Audio, Encoder, Samples, quantise
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
    """A format of outputs. `depths` are those of PCM it can hold, None among them for float; lossy ones hold none."""

    depths: tuple[int | None, ...]
    major: str = ""  # libsndfile's names
    codec: str = ""
    level: float = 0.0  # of compression: 0 best, 1 smallest


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
    """A format, which is a key of `FORMATS` and the extension of outputs, and the depth of PCM.

    `bits` is None for float and for lossy formats.
    """

    format: str = "wav"
    bits: int | None = None

    @property
    def lossy(self) -> bool:
        """True for formats that do not return exactly the samples that were written."""
        return not FORMATS[self.format].depths

    def describe(self) -> str:
        """Format the encoding for a summary, e.g. "flac, 24 bit"."""
        return self.format if self.lossy else f"{self.format}, {f'{self.bits} bit' if self.bits else 'float'}"


class Recorded(Protocol):
    """The properties of a recording that decide how its parts are written; a `Source` has them."""

    rate: int
    channels: int
    bits: int | None


def choose_encoding(format: str, subtype: str | None, source: Recorded) -> Encoding:  # noqa: A002
    """Choose the encoding for the parts of a recording, before anything is computed.

    Args:
        format: a key of `FORMATS`.
        subtype: a key of `SUBTYPES`; None for the recording's own depth. Float and lossy recordings then give float, or
            24 bit where the format holds integers alone.
        source: the recording.

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
        bits = source.bits if subtype is None else SUBTYPES[subtype]
        encoding = Encoding(format, bits if bits in form.depths else 24)
    _try(encoding, source)
    return encoding


def encoding_of(film: Film, source: Recorded) -> Encoding:
    """Choose the depth of a film's new sound track: that of the recording, where the track holds samples exactly."""
    return Encoding("wav", source.bits or 24) if film.lossless else Encoding("m4a")


def _try(encoding: Encoding, source: Recorded) -> None:
    """Ask libsndfile whether it writes this many channels at this rate."""
    try:
        open_encoder(io.BytesIO(), encoding, source.rate, source.channels, {}).discard()
    except OutputError as error:
        raise OutputError(
            f"{encoding.format} cannot hold {source.channels} channel{'s' * (source.channels > 1)} at "
            f"{source.rate} Hz; use wav, which can ({error})"
        ) from error


def open_encoder(
    stream: BinaryIO,
    encoding: Encoding,
    rate: int,
    channels: int,
    tags: Mapping[str, str],
    seek: bool = True,
    speakers: int | None = None,
    film: Film | None = None,
) -> Encoder:
    """Open an encoder.

    Args:
        stream: what to write to, empty.
        encoding: the format and its depth.
        rate: in Hz.
        channels: their number.
        tags: by libsndfile's names.
        seek: whether `stream` is a file rather than a pipe.
        speakers: mask of speaker positions, which WAV, m4a and films hold; None for the usual ones.
        film: to write again with this sound; None for sound alone.
    """
    if film is not None:
        muxer, codec = MUXERS[film.suffix], film.codec()
        return MediaEncoder(stream, muxer, codec, rate, channels, encoding.bits, tags, speakers, film)
    if encoding.format == "m4a":
        return MediaEncoder(stream, "ipod", "aac", rate, channels, None, tags, speakers)
    if encoding.format == "wav":
        return WavEncoder(encoding.bits, WavWriter(stream, rate, channels, encoding.bits, tags, seek, speakers))
    return SoundFileEncoder(stream, encoding, rate, channels, tags)


class WavEncoder(Encoder):
    """WAV, and RF64 beyond 4 GB."""

    def __init__(self, bits: int | None, writer: WavWriter) -> None:
        self._bits, self._writer = bits, writer

    def write(self, audio: Samples) -> int:
        samples, clipped = (audio, 0) if self._bits is None else quantise(audio, self._bits)
        self._writer.write(samples)
        return clipped

    def finish(self) -> None:
        self._writer.finish()

    def discard(self) -> None:
        pass  # nothing is held


class SoundFileEncoder(Encoder):
    """FLAC, Ogg, Opus and MP3, through libsndfile."""

    def __init__(self, stream: BinaryIO, encoding: Encoding, rate: int, channels: int, tags: Mapping[str, str]) -> None:
        form, self._bits = FORMATS[encoding.format], encoding.bits
        if encoding.format == "mp3":  # whose tags libsndfile takes for Latin-1, and whose software it does not write
            stream.write(_id3(tags))
            tags = {}
        self._stream = _Rest(stream)
        subtype = form.codec or f"PCM_{self._bits}"
        try:
            self._file = soundfile.SoundFile(
                self._stream, "w", rate, channels, subtype, format=form.major, compression_level=form.level
            )
            for name in set(tags) & {*TAGS, "software"}:
                setattr(self._file, name, tags[name])
        except soundfile.SoundFileError as error:
            raise OutputError(reason(error)) from error

    def write(self, audio: Samples) -> int:
        samples: Audio | NDArray[np.int32] = audio.astype(np.float32, copy=False)
        if self._bits is None:
            clipped = int(np.count_nonzero(np.abs(audio) > 1))  # by whoever plays it
        else:
            integers, clipped = quantise(audio, self._bits)
            samples = integers << (32 - self._bits)
        if self._file.format == "OGG" and len(samples) in OGG_ORDER:
            samples = samples[np.argsort(OGG_ORDER[len(samples)])]
        try:
            for at in range(0, samples.shape[1], PIECE):
                self._file.write(np.ascontiguousarray(samples[:, at : at + PIECE].T))
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
    """A stream from its present position on, as libsndfile's file; keeps errors, which cannot pass through C."""

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

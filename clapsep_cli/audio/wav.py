"""Reads and writes WAV as a stream: through pipes, which cannot seek, and above 4 GB (RF64, EBU 3306)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from clapsep_cli.audio.samples import Decoder, Encoder, Form, Samples, quantise, seconds
from clapsep_cli.errors import AudioError

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
GUID_END = bytes.fromhex("000000001000800000aa00389b71")  # end of the GUIDs of sample types in an EXTENSIBLE
USUAL = ((1, 0x4), (2, 0x3))  # channels and speaker masks that need no EXTENSIBLE
UNKNOWN = 0xFFFFFFFF
# What programs write as a size that they cannot know yet: nothing, ffmpeg's, GStreamer's, and SoX's.
UNFINISHED = {0, UNKNOWN, 0x7FFFFFFF, 0x7FFFF000}
LIMIT_BYTES = 2**32 - 2**16  # a longer file has to be an RF64
DS64_BYTES = 28
HEADER_CHUNK_BYTES = 2**26  # more than any real chunk before the samples

INFO = {  # chunk of a LIST INFO, by the name of the tag
    "title": "INAM",
    "artist": "IART",
    "album": "IPRD",
    "comment": "ICMT",
    "date": "ICRD",
    "tracknumber": "ITRK",
    "genre": "IGNR",
    "copyright": "ICOP",
    "software": "ISFT",
}


class WavStream(Decoder):
    """Decodes a WAV or RF64 from its start: PCM of 8 to 32 bits, or float. A size of 0 or −1 means: to the end.

    Args:
        stream: the bytes after `start`.
        name: for messages.
        lenient: read a truncated WAV as far as possible.
        start: its first 12 bytes, which `is_wav` accepts.

    Raises `AudioError` for a damaged header, and for samples of another kind.
    """

    def __init__(self, stream: BinaryIO, name: str, start: bytes, lenient: bool = False) -> None:
        super().__init__(name, lenient)
        self._stream, self._done, self._ended, self.tags = stream, 0, False, {}
        long_size, layout = 0, None
        while len(head := stream.read(8)) == 8:
            chunk, size = head[:4], int.from_bytes(head[4:], "little")
            if chunk == b"data":
                if layout is None:
                    raise AudioError(f"{name}: samples come before their format; the WAV is damaged")
                self._set_format(layout, long_size if start[:4] != b"RIFF" and size == UNKNOWN else size)
                return
            content = self._content(size)
            if chunk == b"ds64":
                long_size = int.from_bytes(content[8:16], "little")
            elif chunk == b"fmt ":
                layout = content
            elif chunk == b"LIST" and content[:4] == b"INFO":
                self.tags = dict(_read_info(content[4:]))
        raise AudioError(f"{name}: ends before its first sample; the WAV is cut short")

    def _content(self, size: int) -> bytes:
        if size > HEADER_CHUNK_BYTES:
            raise AudioError(f"{self.name}: has a header of {size} bytes; the WAV is damaged")
        content = self._stream.read(size + size % 2)
        if len(content) < size:
            raise AudioError(f"{self.name}: ends before its first sample; the WAV is cut short")
        return content[:size]

    def _set_format(self, layout: bytes, size: int) -> None:
        if len(layout) < 16:
            raise AudioError(f"{self.name}: its format chunk is too short; the WAV is damaged")
        code, self.channels, self.rate, _, self._frame, _ = struct.unpack("<HHIIHH", layout[:16])
        if code == EXTENSIBLE and len(layout) >= 26:
            self.speakers, code = struct.unpack("<IH", layout[20:26])
        width = self._frame // max(1, self.channels)
        if (code, width) not in {(PCM, 1), (PCM, 2), (PCM, 3), (PCM, 4), (FLOAT, 4), (FLOAT, 8)}:
            raise AudioError(f"{self.name}: a WAV of format {code} with {8 * width} bits; a pipe carries PCM or float")
        if self._frame != width * self.channels:
            raise AudioError(f"{self.name}: states inconsistent sample sizes; the WAV is damaged")
        self._float, self._width = code == FLOAT, width
        self.bits = None if self._float else max(16, 8 * width)
        self.frames = 0 if size in UNFINISHED else size // self._frame

    def read(self, samples: int) -> Samples:
        wanted = min(samples, self.frames - self._done) if self.frames else samples
        raw = b"" if self._ended else self._stream.read(wanted * self._frame)
        got, rest = divmod(len(raw), self._frame)
        self._done += got
        if got < wanted and not self._ended:
            self._ended = True
            if self._done < self.frames:
                missing = seconds(self.frames - self._done, self.rate)
                self.report(f"ends {missing} before its header says, it is cut short")
            elif rest:
                self.report("ends within a sample, it is cut short")
        values = self._samples(raw[: got * self._frame])
        return np.ascontiguousarray(values.reshape(got, self.channels).T)

    def _samples(self, raw: bytes) -> Samples:
        if self._float:
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is reported as such
                return np.frombuffer(raw, f"<f{self._width}").astype(np.float32)
        if self._width == 1:  # the only unsigned one
            return (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / np.float32(128)
        if self._width == 2:
            return np.frombuffer(raw, "<i2").astype(np.float32) * np.float32(2.0**-15)
        if self._width == 3:
            padded = np.zeros((len(raw) // 3, 4), np.uint8)
            padded[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
            return padded.view("<i4")[:, 0].astype(np.float32) * np.float32(2.0**-31)
        return np.frombuffer(raw, "<i4") * 2.0**-31

    def close(self) -> None:
        self._stream.close()


def is_wav(start: bytes) -> bool:
    """Return True if a file that begins with these 12 bytes is a WAV or RF64."""
    return start[:4] in (b"RIFF", b"RF64", b"BW64") and start[8:12] == b"WAVE"


class WavWriter(Encoder):
    """Writes a WAV.

    Where the stream can seek, `finish` enters the sizes, and makes it an RF64 if they need more than 32 bits;
    elsewhere they stay at 0xFFFFFFFF, which readers of pipes take for "until the end".

    Args:
        stream: what to write to.
        form: of the audio; without `bits`, samples are float32.
        seek: True if `stream` can seek.
    """

    def __init__(self, stream: BinaryIO, form: Form, seek: bool) -> None:
        self._stream, self._seek, self._bytes = stream, seek, 0
        self._bits, depth, channels = form.bits, form.bits or 32, form.channels
        self._frame = channels * depth // 8
        code = PCM if form.bits else FLOAT
        if extensible := form.speakers is not None and (channels, form.speakers) not in USUAL:
            more = struct.pack("<HHIH", 22, depth, form.speakers, code) + GUID_END
        else:
            more = b"" if form.bits else bytes(2)
        kind, per_second = EXTENSIBLE if extensible else code, form.rate * self._frame
        layout = struct.pack("<HHIIHH", kind, channels, form.rate, per_second, self._frame, depth)
        chunks = [_chunk("JUNK", bytes(DS64_BYTES))] if seek else []  # room for the sizes of an RF64
        chunks.append(_chunk("fmt ", layout + more))
        self._fact = 12 + sum(map(len, chunks)) + 8
        chunks += [] if form.bits else [_chunk("fact", struct.pack("<I", UNKNOWN))]
        named = ((INFO[name], text) for name, text in form.tags.items() if name in INFO)
        if info := b"".join(_chunk(name, text.encode() + b"\0") for name, text in named):
            chunks.append(_chunk("LIST", b"INFO" + info))
        header = struct.pack("<4sI4s", b"RIFF", UNKNOWN, b"WAVE") + b"".join(chunks)
        self._data = len(header) + 8
        stream.write(header + struct.pack("<4sI", b"data", UNKNOWN))

    def write(self, audio: Samples) -> int:
        samples, clipped = (audio, 0) if self._bits is None else quantise(audio, self._bits)
        kind = "<f4" if self._bits is None else "<i2" if self._bits == 16 else "<i4"
        interleaved = np.stack(list(samples.astype(kind, copy=False)), 1)  # faster than to copy the transpose
        raw = interleaved.view(np.uint8).reshape(-1, 4)[:, :3].tobytes() if self._bits == 24 else interleaved.tobytes()
        self._stream.write(raw)
        self._bytes += len(raw)
        return clipped

    def finish(self) -> None:
        self._stream.write(bytes(self._bytes % 2))
        if self._seek:
            riff, frames = self._data + self._bytes + self._bytes % 2 - 8, self._bytes // self._frame
            if riff < LIMIT_BYTES:
                self._patch(4, struct.pack("<I", riff))
                self._patch(self._data - 4, struct.pack("<I", self._bytes))
            else:
                self._patch(0, b"RF64")
                self._patch(12, _chunk("ds64", struct.pack("<QQQI", riff, self._bytes, frames, 0)))
            if self._bits is None:
                self._patch(self._fact, struct.pack("<I", min(frames, UNKNOWN)))
        self._stream.flush()

    def discard(self) -> None:
        pass  # nothing is held

    def _patch(self, at: int, content: bytes) -> None:
        self._stream.seek(at)
        self._stream.write(content)


def _chunk(name: str, content: bytes) -> bytes:
    return struct.pack("<4sI", name.encode(), len(content)) + content + bytes(len(content) % 2)


def _read_info(content: bytes) -> Iterator[tuple[str, str]]:
    names, at = {chunk: name for name, chunk in INFO.items()} | {"IPRT": "tracknumber"}, 0
    while at + 8 <= len(content):
        name, size = struct.unpack_from("<4sI", content, at)
        text = content[at + 8 : at + 8 + size].split(b"\0")[0].decode("utf-8", "replace").strip()
        if text and (known := names.get(name.decode("latin-1"))):
            yield known, text
        at += 8 + size + size % 2

"""Checks whether a file is whole: libsndfile plays what there is of a file that was cut short, and says nothing."""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from soundfile import SoundFile

from clapsep_cli.audio.wav import LIMIT_BYTES, UNFINISHED, UNKNOWN
from clapsep_cli.errors import AudioError

Report = Callable[[str], None]  # raises `AudioError` for damage, or notes it

# The lines of libsndfile's log that state how many bytes of samples there are, and how many of these are none.
STATED = {
    "WAV": ("data", 0),
    "WAVEX": ("data", 0),
    "RF64": ("Data size", 0),
    "W64": ("data", 24),
    "AIFF": ("SSND", 8),
    "CAF": ("data", 4),
    "AU": ("Data Size", 0),
}
WHOLE = "RIFF|RIFX|riff|FORM|Riff size"  # its lines about the size of the file; they come first, if chunks fill the log
FOLLOWED_BY_CHUNKS = ("WAV", "WAVEX", "RF64", "AIFF")
BYTE_FOR_BYTE = ("PCM", "FLOAT", "DOUBLE", "ULAW", "ALAW")  # kinds of samples; of others, libsndfile has read some


class Fed:
    """A file as libraries in C get it: `front`, then spans of bytes. Keeps errors, which cannot pass through C."""

    def __init__(self, file: BinaryIO, spans: Sequence[tuple[int, int]] | None = None, front: bytes = b"") -> None:
        self._file, self._front, self._at = file, front, 0
        self.name = str(getattr(file, "name", ""))  # whose suffix helps some decoders
        self._spans = [(0, file.seek(0, os.SEEK_END))] if spans is None else spans
        self.size = len(front) + sum(end - begin for begin, end in self._spans)
        self.error: OSError | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self.size)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        content, before = self._front[self._at : self._at + size], len(self._front)
        try:
            for begin, end in self._spans:
                at = self._at + len(content) - before
                if len(content) < size and 0 <= at < end - begin:
                    self._file.seek(begin + at)
                    content += self._file.read(min(size - len(content), end - begin - at))
                before += end - begin
        except OSError as error:
            self.error = error
        self._at += len(content)
        return content


def id3_size(head: bytes) -> int:
    """Return the size in bytes of the ID3v2 tag that begins with these 10 bytes; 0 if none does."""
    if len(head) < 10 or head[:3] != b"ID3" or max(head[6:10]) > 127:
        return 0
    content = sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    return 10 + content + (10 if head[5] & 0x10 else 0)  # and a footer


def tags_end(file: BinaryIO) -> int:
    """Return the first byte behind the ID3v2 tags, which a file of any format may begin with."""
    at = 0
    while True:
        file.seek(at)
        if not (size := id3_size(file.read(10))):
            return at
        at += size


def check_samples(opened: SoundFile, first: int, file: BinaryIO, report: Report) -> None:
    """Report a file that holds less sound than its header states, or something else behind it.

    Formats that state no length pass.

    Args:
        opened: `file` as libsndfile has it.
        first: byte of the first sample, where they are stored as they are.
    """
    if opened.format not in STATED:
        return
    size, (line, overhead) = file.seek(0, os.SEEK_END), STATED[opened.format]
    inner, outer = _logged(opened.extra_info, line), _logged(opened.extra_info, WHOLE)
    plain = opened.subtype.startswith(BYTE_FOR_BYTE)
    stated, held = inner or outer or (0, 0)
    if inner and plain:
        stated, held = stated - overhead, size - first
    unknown = stated in UNFINISHED - {0} and opened.format in ("WAV", "WAVEX")
    slack = 0 if inner else 1  # the size of the whole may count a padding that is not there
    if stated > held + slack and not unknown:
        missing = opened.frames / opened.samplerate * (stated - held) / max(1, held)
        what = f"the last {missing:.2f} s are missing" if missing else "all of its sound is missing"
        report(f"is cut short by {stated - held} of {stated} bytes: {what}")
    elif inner and plain and held > stated and opened.format in FOLLOWED_BY_CHUNKS and not unknown:
        never_closed = stated == 0 and outer is not None and outer[0] <= first
        if never_closed or held - stated > LIMIT_BYTES or not _is_chunk(file, first + stated):
            report(
                f"is followed by {held - stated} bytes that its header, which states {stated} bytes of sound, "
                "does not explain: it was never finished, or something was appended"
            )


def _logged(log: str, names: str) -> tuple[int, int] | None:
    """Return the size in bytes that libsndfile logged by one of these names, and the one that it should be."""
    found = re.findall(rf"^ *(?:{names}) *: (\d+)(?: \(should be (\d+)\))?$", log, re.MULTILINE)
    return max(((int(stated), int(held or stated)) for stated, held in found), default=None)


def _is_chunk(file: BinaryIO, at: int) -> bool:
    """Whether a chunk begins at this byte, or nothing but zeros follows."""
    file.seek(at)
    behind = file.read(2**16)
    names = behind[:4], behind[1:5]  # a chunk of odd length may lack its padding, or count it
    return not behind.strip(b"\0") or any(name.isascii() and name.decode("ascii").isprintable() for name in names)


@dataclass(frozen=True)
class Page:
    """A page of an Ogg stream (RFC 3533, section 6)."""

    at: int
    first: bool
    last: bool
    serial: int
    number: int
    whole: bool  # all of it there, and its checksum right


def check_ogg(file: BinaryIO, name: str, report: Report) -> None:
    """Report missing and damaged pages of an Ogg; raise `AudioError` for several recordings in a row.

    Other files pass.
    """
    size, start = file.seek(0, os.SEEK_END), tags_end(file)
    file.seek(start)
    if file.read(4) != b"OggS":
        return
    following: dict[int, int] = {}  # the number of each stream's next page
    ended: set[int] = set()
    begun = damaged = False
    for page in _pages(file, start, size):
        if page.first and begun:
            raise AudioError(f"{name}: holds several recordings in a row, from byte {page.at} on; cut it there")
        if not damaged and (not page.whole or page.number != following.get(page.serial, page.number)):
            report(f"is damaged at byte {page.at} of {size}")
            damaged = True
        begun = begun or not page.first
        following[page.serial] = page.number + 1
        if page.last:
            ended.add(page.serial)
    if not ended.issuperset(following):
        report("is cut short, its last page is missing")


def _pages(file: BinaryIO, at: int, size: int) -> Iterator[Page]:
    """Yield the pages from byte `at` on, up to what is no page: a tag at the end, or nothing."""
    while at < size:
        file.seek(at)
        head = file.read(27)
        if head[:4] != b"OggS":
            yield from _astray(file, at)
            return
        segments = file.read(head[26]) if len(head) == 27 else b""
        body = file.read(sum(segments))
        length = 27 + (head[26] if len(head) == 27 else 0) + sum(segments)
        if at + length > size or len(head) < 27:
            return  # cut within a page: the last one is missing
        flags, serial, number, stated = head[5], *struct.unpack("<III", head[14:26])
        whole = _crc(head[:22] + bytes(4) + head[26:] + segments + body) == stated
        yield Page(at, bool(flags & 2), bool(flags & 4), serial, number, whole)
        at += length


def _astray(file: BinaryIO, at: int) -> Iterator[Page]:
    """Yield a damaged page if pages follow what is none at `at`; a tag or padding is nothing."""
    file.seek(at)
    tail = b""
    while block := file.read(2**20):
        if b"OggS" in tail + block:
            yield Page(at, False, False, 0, 0, whole=False)
            return
        tail = block[-3:]


REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _crc(content: bytes) -> int:
    """Return Ogg's checksum: zlib's with bits in the opposite order, and nothing inverted before or after."""
    reflected = zlib.crc32(content.translate(REVERSED_BITS), UNKNOWN) ^ UNKNOWN
    return int(f"{reflected:032b}"[::-1], 2)

"""Whether a file is whole. libsndfile plays what there is of a file that was cut short, and says nothing."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from clapsep_cli.audio.wav import LIMIT_BYTES, UNFINISHED, UNKNOWN
from clapsep_cli.errors import AudioError

REPAIR = "ffmpeg -i FILE OTHER.wav takes what there is"


@dataclass(frozen=True)
class Chunked:
    """A format made of chunks: a name, a size, then as many bytes."""

    first: int  # byte of the first chunk
    layout: str  # of a chunk's name and size
    data: bytes  # name of the chunk with the samples
    align: int = 2
    inclusive: bool = False  # whether the size counts name and size themselves
    unknown: frozenset[int] = frozenset()  # sizes that mean "until the end"


W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"
CHUNKED = {
    b"RIFF": Chunked(12, "<4sI", b"data", unknown=frozenset(UNFINISHED - {0})),
    b"RIFX": Chunked(12, ">4sI", b"data"),
    b"RF64": Chunked(12, "<4sI", b"data"),
    b"BW64": Chunked(12, "<4sI", b"data"),
    b"FORM": Chunked(12, ">4sI", b"SSND"),
    b"caff": Chunked(8, ">4sQ", b"data", align=1, unknown=frozenset({2**64 - 1})),
    b"riff": Chunked(40, "<16sQ", W64_DATA, align=8, inclusive=True),
}


def id3_size(head: bytes) -> int:
    """The size in bytes of the ID3v2 tag that begins with these 10 bytes; 0 if none does."""
    if len(head) < 10 or head[:3] != b"ID3" or max(head[6:10]) > 127:
        return 0
    content = sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    return 10 + content + (10 if head[5] & 0x10 else 0)  # and a footer


def tags_end(file: BinaryIO) -> int:
    """The byte at which the file begins behind its ID3v2 tags, which any format may carry in front."""
    at = 0
    while True:
        file.seek(at)
        if not (size := id3_size(file.read(10))):
            return at
        at += size


def check_whole(file: BinaryIO, name: str) -> None:
    """Raise `AudioError` if `file` ends before its header says, or if pages of an Ogg are missing or damaged.

    Formats without a stated length pass; so does what is no such file at all, which its decoder will say.
    """
    size, start = file.seek(0, os.SEEK_END), tags_end(file)
    file.seek(start)
    magic = file.read(4)
    if magic == b"OggS":
        _check_ogg(file, start, size, name)
    elif magic == b".snd":
        at, stated = struct.unpack(">II", file.read(8).ljust(8, b"\0"))
        if stated != UNKNOWN:
            _compare(name, start + at, stated, size)
    elif magic in CHUNKED:
        _check_chunks(file, start, CHUNKED[magic], magic, size, name)


def _check_chunks(file: BinaryIO, start: int, form: Chunked, magic: bytes, size: int, name: str) -> None:
    head, at, long_size = struct.calcsize(form.layout), start + form.first, 0
    while at + head <= size:
        file.seek(at)
        chunk, stated = struct.unpack(form.layout, file.read(head))
        body = at + head
        if chunk == b"ds64":
            long_size = int.from_bytes(file.read(16)[8:], "little")
        if chunk == form.data:
            if stated == UNKNOWN and magic in (b"RF64", b"BW64"):
                stated = long_size
            if stated in form.unknown:
                return
            stated -= head if form.inclusive else 0
            _compare(name, body, stated, size)
            if head == 8:
                _check_behind(file, start, magic, body, stated, size, name)
            return
        step = max(stated, head) if form.inclusive else head + stated
        at += -(-step // form.align) * form.align
    if start + form.first < size <= at - form.align:
        raise AudioError(f"{name}: is cut short, its last part is missing; {REPAIR}")


def _check_behind(file: BinaryIO, start: int, magic: bytes, body: int, stated: int, size: int, name: str) -> None:
    """What follows the samples has to be chunks, or padding: else the header lies, e.g. as that of a WAV never closed,
    which states no samples, and one beyond 4 GB, which states what is left of its size modulo 2³²."""
    file.seek(start + 4)
    riff, end = int.from_bytes(file.read(4), "little"), body + stated
    never_closed = magic == b"RIFF" and stated == 0 and start + 8 + riff <= body < size
    file.seek(end)
    behind = file.read(2**16)
    chunk = any(name.isascii() and name.decode("ascii").isprintable() for name in (behind[:4], behind[1:5]))
    if never_closed or not (chunk or not behind.strip(b"\0")) or (magic == b"RIFF" and size - end > LIMIT_BYTES):
        raise AudioError(
            f"{name}: its header speaks of {stated} bytes of samples, but {size - body} bytes follow: "
            f"it lies, or was never finished; {REPAIR}"
        )


def _compare(name: str, body: int, stated: int, size: int) -> None:
    if body + stated > size:
        missing = body + stated - size
        raise AudioError(f"{name}: is cut short by {missing} of the {stated} bytes that its header says; {REPAIR}")


@dataclass(frozen=True)
class Page:
    """A page of an Ogg stream (RFC 3533, section 6)."""

    at: int
    first: bool
    last: bool
    serial: int
    number: int
    whole: bool  # all of it there, and its checksum right


def _check_ogg(file: BinaryIO, start: int, size: int, name: str) -> None:
    following: dict[int, int] = {}  # the number of each stream's next page
    ended: set[int] = set()
    begun = False
    for page in _pages(file, start, size):
        if page.first and begun:
            raise AudioError(f"{name}: holds several recordings in a row, from byte {page.at} on; cut it there")
        if not page.whole or page.number != following.get(page.serial, page.number):
            raise AudioError(f"{name}: is damaged at byte {page.at}; {REPAIR}")
        begun = begun or not page.first
        following[page.serial] = page.number + 1
        if page.last:
            ended.add(page.serial)
    if not ended.issuperset(following):
        raise AudioError(f"{name}: is cut short, its last page is missing; {REPAIR}")


def _pages(file: BinaryIO, at: int, size: int) -> Iterator[Page]:
    """The pages from byte `at` on, up to what is no page: a tag at the end, or nothing."""
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
    """Something between pages is damage if pages follow it, and a tag or padding if none do."""
    file.seek(at)
    tail = b""
    while block := file.read(2**20):
        if b"OggS" in tail + block:
            yield Page(at, False, False, 0, 0, whole=False)
            return
        tail = block[-3:]


REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _crc(content: bytes) -> int:
    """Ogg's checksum: that of zlib with bits in the opposite order, and nothing inverted before or after."""
    reflected = zlib.crc32(content.translate(REVERSED_BITS), UNKNOWN) ^ UNKNOWN
    return int(f"{reflected:032b}"[::-1], 2)

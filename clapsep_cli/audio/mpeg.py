"""Counts the frames of an MP3.

Without the length that some encoders note in front, libsndfile guesses one from the first frames, and stops there or
beyond; with a wrong one, it stops where that says.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

from clapsep_cli.audio.containers import Report, id3_size, tags_end

VERSION_1, VERSION_2 = 3, 2  # as headers have it; 0 is version 2.5
RATES = (44100, 48000, 32000)  # of version 1, in Hz; halved for version 2, and again for 2.5
KBITS = {  # by (version 1, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
LEADING_JUNK_BYTES = 2**16  # through which a first frame is looked for
CHAIN = 3  # frames in a row that cannot be chance


@dataclass(frozen=True)
class Frame:
    """A frame as its header describes it (ISO 11172-3, 2.4.1.3): size in bytes, length in samples, rate in Hz."""

    size: int
    samples: int
    rate: int
    kind: tuple[int, int]  # version and layer, the same throughout a stream


def read_frame(head: bytes) -> Frame | None:
    """Read the frame that begins with these 4 bytes; None if they are no header, or one of free bit rate."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer, rate, kbits = (head[1] >> 3) & 3, 4 - ((head[1] >> 1) & 3), (head[2] >> 2) & 3, head[2] >> 4
    if version == 1 or layer == 4 or rate == 3 or kbits in (0, 15):
        return None
    first = version == VERSION_1
    hz = RATES[rate] // (1 if first else 2 if version == VERSION_2 else 4)
    samples = 384 if layer == 1 else 1152 if layer == 2 or first else 576
    slot = 4 if layer == 1 else 1
    size = (samples // 8 * 1000 * KBITS[first, layer][kbits - 1] // hz // slot + ((head[2] >> 1) & 1)) * slot
    return Frame(size, samples, hz, (version, layer))


@dataclass(frozen=True)
class Stream:
    """The frames of a file: where they are, how many there are, and what was noted in front of them."""

    spans: list[tuple[int, int]]  # bytes of sound, from and to; several where something else lies between
    note: bytes  # the frame before them that has no sound, but a note of their number
    stated: int | None  # the number of frames noted, None if there is no note, or none in it
    frames: int
    head: bytes  # of a frame
    layer: int
    samples: int  # of a frame


def scan(file: BinaryIO, report: Report) -> Stream | None:
    """Walk through all frames; None if there are none. Damage is passed over once `report` has noted it."""
    size, start = file.seek(0, os.SEEK_END), tags_end(file)
    first = _find(file, start, size)
    if first is None:
        return None
    file.seek(first)
    content = file.read(200)
    kind = read_frame(content)
    assert kind is not None
    if first - start >= kind.size and not _zeros(file, start, first):
        report("is damaged at its beginning")
    stated, noted = _note(content)
    frames, spans, end = -int(noted), [], _end(file, size)
    begin: int | None = first
    while begin is not None:
        count, at = _walk(file, begin, end, kind)
        frames += count - (at > end)
        seconds = frames * kind.samples / kind.rate
        spans.append((begin, min(at, end)))
        if at > end and (stated is None or frames >= stated):
            report(f"is cut short within its last frame, after {seconds:.2f} s")
        begin = None
        if at < end and not _zeros(file, at, end):
            if len(spans) == 1:
                report(f"is damaged after {seconds:.2f} s, at byte {at} of {size}")
            begin = _find(file, at + 1, end)
    if stated is not None and frames < stated:
        missing = (stated - frames) * kind.samples / kind.rate
        report(f"is cut short, the last {missing:.2f} s that its header states are missing")
    sound = first + kind.size if noted else first
    file.seek(first)
    note = file.read(sound - first)
    spans[0] = sound, max(spans[0][1], sound)
    return Stream(spans, note, stated, frames, content[:4], layer=kind.kind[1], samples=kind.samples)


def _walk(file: BinaryIO, at: int, end: int, kind: Frame) -> tuple[int, int]:
    """Count the frames of one kind from byte `at` on; also returns where they end, which may be beyond `end`."""
    frames = 0
    while at < end:
        file.seek(at)
        head = file.read(10)
        frame = read_frame(head)
        if frame is not None and frame.kind == kind.kind and frame.rate == kind.rate:
            frames, at = frames + 1, at + frame.size
        elif step := _tag(head):
            at += step
        else:
            break
    return frames, at


def _find(file: BinaryIO, start: int, size: int) -> int | None:
    file.seek(start)
    junk = file.read(LEADING_JUNK_BYTES)
    at = junk.find(0xFF)
    while at >= 0:
        if _chains(file, start + at, size):
            return start + at
        at = junk.find(0xFF, at + 1)
    return None


def _chains(file: BinaryIO, at: int, size: int) -> bool:
    """Whether frames of one kind follow one another from `at` on: a few, or to the end of a short file."""
    kind = None
    for _ in range(CHAIN):
        file.seek(at)
        frame = read_frame(file.read(4))
        if frame is None or (kind is not None and (frame.kind, frame.rate) != kind):
            return kind is not None and at >= size
        kind, at = (frame.kind, frame.rate), at + frame.size
    return True


def _note(content: bytes) -> tuple[int | None, bool]:
    """Return the frames that a Xing, Info or VBRI note counts, and whether there is a note."""
    for word in (b"Xing", b"Info"):
        if (at := content.find(word, 0, 64)) > 0:
            flags, frames = struct.unpack(">II", content[at + 4 : at + 12].ljust(8, b"\0"))
            return (frames if flags & 1 else None), True
    return None, content[36:40] == b"VBRI"


def _tag(head: bytes) -> int:
    """Return the size of an ID3 tag, which joined files have between their frames; 0 if there is none."""
    return 128 if head[:3] == b"TAG" else id3_size(head)


def _end(file: BinaryIO, end: int) -> int:
    """Return the byte at which the tags behind the frames begin: ID3v1, APE and Lyrics3, in any order."""
    for _ in range(3):
        file.seek(max(0, end - 160))
        tail = file.read(min(end, 160))
        if tail[-128:-125] == b"TAG":
            end -= 128
        elif tail[-32:-24] == b"APETAGEX":
            end -= int.from_bytes(tail[-20:-16], "little") + (32 if tail[-9] & 0x80 else 0)
        elif tail[-9:] == b"LYRICS200" and tail[-15:-9].isdigit():
            end -= int(tail[-15:-9]) + 15
    return max(0, end)


def _zeros(file: BinaryIO, at: int, end: int) -> bool:
    file.seek(at)
    while at < end and (block := file.read(min(2**20, end - at))):
        if block.strip(b"\0"):
            return False
        at += len(block)
    return True


def note_length(stream: Stream, size: int) -> bytes:
    """Make a frame that notes the true length of `stream`, whose sound has `size` bytes, to go before it."""
    head = bytearray(stream.head)
    head[1] |= 1  # no checksum follows
    head[2] = (head[2] & 0x0D) | 0xA0  # of a bit rate whose frames have room for a note
    frame, mono = read_frame(bytes(head)), head[3] >> 6 == 3
    assert frame is not None
    side = (17 if mono else 32) if frame.kind[0] == VERSION_1 else (9 if mono else 17)
    note = struct.pack(">4sIII", b"Xing", 3, stream.frames, size + frame.size)
    return (bytes(head) + bytes(side) + note).ljust(frame.size, b"\0")

"""Finds damage that decoders miss: libsndfile decodes a truncated file without a warning.

The frames of an MP3 are counted. If its encoder wrote no length, libsndfile guesses it from the first frames; if the
length is wrong, libsndfile stops there.
"""

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
WHOLE = "RIFF|RIFX|riff|FORM|Riff size"  # lines with the size of the file; they come first, should chunks fill the log
FOLLOWED_BY_CHUNKS = ("WAV", "WAVEX", "RF64", "AIFF")
BYTE_FOR_BYTE = ("PCM", "FLOAT", "DOUBLE", "ULAW", "ALAW")  # subtypes whose samples are not read ahead
VERSION_1, VERSION_2 = 3, 2  # of MPEG, as headers encode it; 0 is version 2.5
RATES = (44100, 48000, 32000)  # of version 1, in Hz; halved for version 2, and again for 2.5
KBITS = {  # by (version 1, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
LEADING_JUNK_BYTES = 2**16  # searched for the first frame
CHAIN = 3  # number of frames in a row that is no chance


class Fed:
    """File object for libraries in C: `front`, then `spans` of a file. Keeps errors, which cannot pass through C."""

    def __init__(self, file: BinaryIO, spans: Sequence[tuple[int, int]] | None = None, front: bytes = b"") -> None:
        self._file, self._front, self._at = file, front, 0
        self.name = str(getattr(file, "name", ""))  # its suffix helps some decoders
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
    """Report a file with less sound than its header states, or with other data after the sound.

    Formats that state no length pass.

    Args:
        opened: the file, open in libsndfile.
        first: byte of the first sample.
        file: the file.
        report: raises `AudioError` for damage, or notes it.
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
    slack = 0 if inner else 1  # the size of the file may count a missing padding byte
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
    """Return the size in bytes that libsndfile logged under one of these names, and the expected size."""
    found = re.findall(rf"^ *(?:{names}) *: (\d+)(?: \(should be (\d+)\))?$", log, re.MULTILINE)
    return max(((int(stated), int(held or stated)) for stated, held in found), default=None)


def _is_chunk(file: BinaryIO, at: int) -> bool:
    """Return True if a chunk begins at this byte, or only zeros follow."""
    file.seek(at)
    behind = file.read(2**16)
    names = behind[:4], behind[1:5]  # a chunk of odd length may lack its padding, or count it
    return not behind.strip(b"\0") or any(name.isascii() and name.decode("ascii").isprintable() for name in names)


@dataclass(frozen=True)
class OggPage:
    """A page of an Ogg stream (RFC 3533, section 6)."""

    at: int
    first: bool
    last: bool
    serial: int
    number: int
    whole: bool  # complete, and its checksum right


def check_ogg(file: BinaryIO, name: str, report: Report) -> None:
    """Report missing and damaged pages of an Ogg; other files pass.

    Args:
        file: the file.
        name: for messages.
        report: raises `AudioError` for damage, or notes it.

    Raises:
        AudioError: the file holds several recordings in a row.
    """
    size, start = file.seek(0, os.SEEK_END), tags_end(file)
    file.seek(start)
    if file.read(4) != b"OggS":
        return
    following: dict[int, int] = {}  # the number of each stream's next page
    ended: set[int] = set()
    begun = damaged = False
    for page in _ogg_pages(file, start, size):
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


def _ogg_pages(file: BinaryIO, at: int, size: int) -> Iterator[OggPage]:
    """Yield the pages from byte `at` on, up to a tag or the end."""
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
        yield OggPage(at, bool(flags & 2), bool(flags & 4), serial, number, whole)
        at += length


def _astray(file: BinaryIO, at: int) -> Iterator[OggPage]:
    """Yield a damaged page if more pages follow the bytes at `at`, which are no page; skip a tag or padding."""
    file.seek(at)
    tail = b""
    while block := file.read(2**20):
        if b"OggS" in tail + block:
            yield OggPage(at, False, False, 0, 0, whole=False)
            return
        tail = block[-3:]


REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _crc(content: bytes) -> int:
    """Return Ogg's checksum: zlib's with bits in the opposite order, and nothing inverted before or after."""
    reflected = zlib.crc32(content.translate(REVERSED_BITS), UNKNOWN) ^ UNKNOWN
    return int(f"{reflected:032b}"[::-1], 2)


@dataclass(frozen=True)
class MpegFrame:
    """A frame as its header describes it (ISO 11172-3, 2.4.1.3): size in bytes, length in samples, rate in Hz."""

    size: int
    samples: int
    rate: int
    kind: tuple[int, int]  # version and layer, the same throughout a stream


def read_frame(head: bytes) -> MpegFrame | None:
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
    return MpegFrame(size, samples, hz, (version, layer))


@dataclass(frozen=True)
class MpegStream:
    """The frames of an MP3: their positions, their number, and the header that states it."""

    spans: list[tuple[int, int]]  # bytes of sound, from and to; several where something else lies between
    note: bytes  # a frame without sound before them that states their number
    stated: int | None  # number of frames that the note states, if any
    frames: int
    head: bytes  # of a frame
    layer: int
    samples: int  # of a frame


def scan_mpeg(file: BinaryIO, report: Report) -> MpegStream | None:
    """Find all frames of an MP3; None if there are none. Damage is skipped once `report` has noted it."""
    size, start = file.seek(0, os.SEEK_END), tags_end(file)
    first = _find_frame(file, start, size)
    if first is None:
        return None
    file.seek(first)
    content = file.read(200)
    kind = read_frame(content)
    assert kind is not None
    if first - start >= kind.size and not _zeros(file, start, first):
        report("is damaged at its beginning")
    stated, noted = _read_note(content)
    frames, spans, end = -int(noted), [], _sound_end(file, size)
    begin: int | None = first
    while begin is not None:
        count, at = _count_frames(file, begin, end, kind)
        frames += count - (at > end)
        seconds = frames * kind.samples / kind.rate
        spans.append((begin, min(at, end)))
        if at > end and (stated is None or frames >= stated):
            report(f"is cut short within its last frame, after {seconds:.2f} s")
        begin = None
        if at < end and not _zeros(file, at, end):
            if len(spans) == 1:
                report(f"is damaged after {seconds:.2f} s, at byte {at} of {size}")
            begin = _find_frame(file, at + 1, end)
    if stated is not None and frames < stated:
        missing = (stated - frames) * kind.samples / kind.rate
        report(f"is cut short, the last {missing:.2f} s that its header states are missing")
    sound = first + kind.size if noted else first
    file.seek(first)
    note = file.read(sound - first)
    spans[0] = sound, max(spans[0][1], sound)
    return MpegStream(spans, note, stated, frames, content[:4], layer=kind.kind[1], samples=kind.samples)


def _count_frames(file: BinaryIO, at: int, end: int, kind: MpegFrame) -> tuple[int, int]:
    """Count the frames of one kind from byte `at` on; also returns where they end, which may be beyond `end`."""
    frames = 0
    while at < end:
        file.seek(at)
        head = file.read(10)
        frame = read_frame(head)
        if frame is not None and frame.kind == kind.kind and frame.rate == kind.rate:
            frames, at = frames + 1, at + frame.size
        elif step := 128 if head[:3] == b"TAG" else id3_size(head):
            at += step  # joined files have tags between their frames
        else:
            break
    return frames, at


def _find_frame(file: BinaryIO, start: int, size: int) -> int | None:
    file.seek(start)
    junk = file.read(LEADING_JUNK_BYTES)
    at = junk.find(0xFF)
    while at >= 0:
        if _chains(file, start + at, size):
            return start + at
        at = junk.find(0xFF, at + 1)
    return None


def _chains(file: BinaryIO, at: int, size: int) -> bool:
    """Return True if frames of one kind follow one another from `at` on: a few, or to the end of a short file."""
    kind = None
    for _ in range(CHAIN):
        file.seek(at)
        frame = read_frame(file.read(4))
        if frame is None or (kind is not None and (frame.kind, frame.rate) != kind):
            return kind is not None and at >= size
        kind, at = (frame.kind, frame.rate), at + frame.size
    return True


def _read_note(content: bytes) -> tuple[int | None, bool]:
    """Return the number of frames that a Xing, Info or VBRI header states, and True if there is such a header."""
    for word in (b"Xing", b"Info"):
        if (at := content.find(word, 0, 64)) > 0:
            flags, frames = struct.unpack(">II", content[at + 4 : at + 12].ljust(8, b"\0"))
            return (frames if flags & 1 else None), True
    return None, content[36:40] == b"VBRI"


def _sound_end(file: BinaryIO, end: int) -> int:
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


def note_length(stream: MpegStream, size: int) -> bytes:
    """Make a header frame that states the true length of `stream`, whose sound has `size` bytes."""
    head = bytearray(stream.head)
    head[1] |= 1  # no checksum follows
    head[2] = (head[2] & 0x0D) | 0xA0  # of a bit rate whose frames have room for a note
    frame, mono = read_frame(bytes(head)), head[3] >> 6 == 3
    assert frame is not None
    side = (17 if mono else 32) if frame.kind[0] == VERSION_1 else (9 if mono else 17)
    note = struct.pack(">4sIII", b"Xing", 3, stream.frames, size + frame.size)
    return (bytes(head) + bytes(side) + note).ljust(frame.size, b"\0")

"""Decodes by libsndfile, and by PyAV the formats that it does not read: m4a, mp4, mkv, wma and many more."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import soundfile

from clapsep_cli.audio.containers import Fed, check_ogg, check_samples, note_length, read_frame, scan_mpeg, tags_end
from clapsep_cli.audio.samples import Decoder, Samples, seconds
from clapsep_cli.errors import AudioError

if TYPE_CHECKING:
    from av import AudioFrame, AudioLayout, AudioStream, Packet
    from av.audio.codeccontext import AudioCodecContext

BITS = {"PCM_S8": 16, "PCM_U8": 16, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32}  # outputs keep the depth, at least 16
BITS |= {"ALAC_16": 16, "ALAC_20": 24, "ALAC_24": 24, "ALAC_32": 32}
SNDFILE_SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".caf", ".w64", ".rf64", ".au"}
MPEG_SUFFIXES = {".mp3", ".mp2", ".mpga"}
TAGS = ("title", "artist", "album", "comment", "date", "tracknumber", "genre", "copyright", "license")
NO_MPEG = {b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM", b"caff", b"riff", b"OggS", b"fLaC", b".snd"}
NO_LENGTH = 2**62  # libsndfile returns at least this for a FLAC that states no length
READ_AHEAD_BYTES = 2**16  # of tags that may follow the last sample of a FLAC
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
AV_SUFFIXES = {
    *(".m4a", ".m4b", ".aac", ".mp4", ".m4v", ".mov", ".mkv", ".mka", ".webm", ".wma", ".wmv", ".asf", ".avi", ".flv"),
    *(".3gp", ".amr", ".ac3", ".ape", ".wv", ".tta", ".ts", ".mpg", ".mpeg", ".ogv", ".oga"),
}
# Recordings and films only: no playlists or scripts, which name further files, and no pictures or texts.
CONTAINERS = (
    "mov,matroska,asf,avi,flv,ogg,wav,w64,wv,tta,ape,caf,aiff,au,flac,mpegts,mpeg,"
    "aac,ac3,eac3,dts,dtshd,amr,mp3,loas,truehd,tak,dsf,mpc,mpc8,voc"
)
STRICT = "crccheck+bitstream+buffer+explode"  # without it, decoders pass over most damage and say nothing
STATING = ("mov", "matroska", "asf", "avi", "ogg", "wav", "w64", "wv", "tta", "ape", "caf", "aiff", "flac", "au")
LOSSLESS = ("pcm_s", "pcm_u", "alac", "flac", "wavpack", "tta", "ape", "tak", "truehd", "mlp", "shorten")
AV_SPEAKERS = (  # in the order of the mask's bits
    *("FL", "FR", "FC", "LFE", "BL", "BR", "FLC", "FRC", "BC", "SL", "SR", "TC"),
    *("TFL", "TFC", "TFR", "TBL", "TBC", "TBR"),
)
AV_TAGS = {name: name for name in TAGS} | {"track": "tracknumber"}
TOLERANCE_SECONDS = 0.1  # by which lengths in containers are off: priming, and whole frames
AV_MISSING = 'reading this format takes PyAV: pip install "clapsep[av]"'


class UnknownFormatError(AudioError):
    """A file that libsndfile does not open; another decoder may."""


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
        lenient: read a damaged file as far as possible.

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
        # Samples that libsndfile needs not decode: NumPy converts them several times as fast.
        self._plain = self._file.subtype == "PCM_16" and self._file.format != "FLAC"
        self.tags = {name: text for name in TAGS if (text := getattr(self._file, name))}

    def _read_speakers(self) -> int | None:
        if self._file.format in ("FLAC", "OGG") and self.channels <= len(USUAL_SPEAKERS):
            return USUAL_SPEAKERS[self.channels - 1]
        mask = SPEAKERS.search(self._file.extra_info)
        return int(mask[1], 16) if mask else None

    def read(self, samples: int) -> Samples:
        if self._ended:
            return np.zeros((self.channels, 0), np.float32)
        wanted = max(0, min(samples, self._file.frames - self._done))
        # Samples that libsndfile fails to read stay NaN.
        kind = np.int16 if self._plain else np.float64 if self.bits == 32 else np.float32
        block = np.full((wanted, self.channels), 0 if self._plain else np.nan, kind)
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
        block = np.ascontiguousarray(block.T)
        return block * np.float32(2**-15) if self._plain else block

    def _check_end(self) -> None:
        self._ended = True
        if self._done < self.frames:
            missing = seconds(self.frames - self._done, self.rate)
            self.report(f"ends {missing} before its header says, it is cut short")
        left = self._fed.size - self._fed.tell()
        if self._file.format == "FLAC" and left > READ_AHEAD_BYTES:
            self.report(f"continues after the end that its header states, by {left} bytes")

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


def has_av() -> bool:
    """Return True if PyAV is installed."""
    return importlib.util.find_spec("av") is not None


class AvDecoder(Decoder):
    """Decodes one sound track of a file with PyAV.

    Args:
        file: the file, which stays open if this raises.
        name: for messages.
        lenient: read a damaged file as far as possible.
        stream: number of the sound track, from 1; None for the first, which `notes` then mention if there are more.

    Raises `AudioError` for a file that is no recording, is damaged, or has no such track.
    """

    exact = False

    def __init__(self, file: BinaryIO, name: str, lenient: bool = False, stream: int | None = None) -> None:
        import av

        super().__init__(name, lenient)
        self._file, self._done, self._short, self._error, self.rate = file, 0, False, av.FFmpegError, 0
        options = {"protocol_whitelist": "none", "format_whitelist": CONTAINERS}  # so that no other file is opened
        if not lenient:
            options["err_detect"] = STRICT
        self._check_avi(file)
        self._fed = Fed(file)
        try:
            self._container = av.open(self._fed, "r", options=options, metadata_errors="replace")
        except (self._error, ValueError) as error:
            raise AudioError(f"{name}: cannot be read as audio ({_cause(error)})") from error
        try:
            self._begin(stream)
        except BaseException:
            self._container.close()
            raise

    def _check_avi(self, file: BinaryIO) -> None:
        """Report an AVI that is shorter than its header states, which libavformat accepts."""
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(12)
        stated = int.from_bytes(head[4:8], "little") + 8
        if head[:4] == b"RIFF" and head[8:] == b"AVI " and stated > size:
            self.report(f"is cut short by {stated - size} of {stated} bytes")

    def _begin(self, number: int | None) -> None:
        track, whole = self._choose(number), self._container.duration
        codec: AudioCodecContext | None = track.codec_context
        if codec is None or codec.format is None:
            raise AudioError(f"{self.name}: cannot be read as audio (unknown codec)")
        if not self.lenient:
            codec.options = {"err_detect": STRICT}
        found = {**track.metadata, **self._container.metadata}
        named = ((AV_TAGS.get(name.lower()), text.strip()) for name, text in found.items())
        self.tags = {name: text for name, text in named if name and text}
        self.bits = _bits(codec)
        self._type = np.float64 if self.bits == 32 else np.float32
        own = float(track.duration * track.time_base) if track.duration and track.time_base else None
        alone = len(self._container.streams.audio) == len(self._container.streams)
        container = whole / 1e6 if whole and alone else None
        self._stated = _stated(self._container.format.name, track.metadata, own, container)
        self._parts = self._decode(track)
        self._waiting = next(self._parts, None)
        if self._waiting is None:
            raise AudioError(f"{self.name}: has no samples")
        self.frames = round((self._stated or (whole or 0) / 1e6) * self.rate)

    def _choose(self, number: int | None) -> AudioStream:
        tracks = self._container.streams.audio
        if not tracks:
            raise AudioError(f"{self.name}: has no sound, only pictures or other data")
        check_track(self.name, number, len(tracks))
        self.tracks = [_label(track) for track in tracks]
        if number is None and len(tracks) > 1:
            listed = ", ".join(f"{at}: {label}" for at, label in enumerate(self.tracks, 1))
            self.notes.append(f"{self.name}: has {len(tracks)} sound tracks ({listed}); took 1, see --stream")
        return tracks[(number or 1) - 1]

    def _decode(self, track: AudioStream) -> Iterator[Samples]:
        from av import AudioResampler

        self._damaged, resampler, kind = False, None, "dbl" if self.bits == 32 else "flt"
        try:
            for packet in self._container.demux(track):
                if packet.is_corrupt:
                    self._damage("a packet is corrupt")
                for frame in self._frames(packet):
                    if resampler is None:  # the first frame is more reliable than the container
                        self.rate, self.channels = frame.sample_rate, frame.layout.nb_channels
                        self.speakers = _speakers(frame.layout)
                        # By channel it is faster, but PyAV crashes at 8 and more.
                        resampler = AudioResampler(kind + "p" * (self.channels < 8))
                    for part in resampler.resample(frame):
                        block: Samples = np.asarray(part.to_ndarray(), self._type)
                        yield block if len(block) == self.channels else block.reshape(-1, self.channels).T
        except (self._error, ValueError) as error:
            self._damage(_cause(error))

    def _frames(self, packet: Packet[AudioStream]) -> list[AudioFrame]:
        try:
            frames = packet.decode()
        except (self._error, ValueError) as error:
            self._damage(_cause(error))
            return []
        if any(frame.is_corrupt for frame in frames):
            self._damage("a frame is corrupt")
        return frames

    def _damage(self, why: str) -> None:
        if not self._damaged:
            self._damaged = True
            self.report(f"is damaged after {seconds(self._done, self.rate or 1)} ({why})")

    def read(self, samples: int) -> Samples:
        held, got = [np.zeros((self.channels, 0), self._type)], 0
        while got < samples and self._waiting is not None:
            held.append(self._waiting[:, : samples - got])
            got += held[-1].shape[1]
            rest = self._waiting[:, held[-1].shape[1] :]
            self._waiting = rest if rest.shape[1] else next(self._parts, None)
        self._done += got
        if self._fed.error is not None:
            raise self._fed.error
        missing = (self._stated or 0) - self._done / self.rate
        if got < samples and missing > TOLERANCE_SECONDS and not self._short:
            self._short = True
            self.report(f"ends {missing:.2f} s before its header says, it is cut short")
        return np.ascontiguousarray(np.concatenate(held, 1))

    def close(self) -> None:
        self._container.close()
        self._file.close()


def check_track(name: str, number: int | None, tracks: int) -> None:
    """Raise `AudioError` if a recording with `tracks` sound tracks has no track of this number."""
    if number is not None and not 1 <= number <= tracks:
        raise AudioError(f"{name}: has {tracks} sound track{'s' * (tracks > 1)}, so no --stream {number}")


def _label(track: AudioStream) -> str:
    codec: AudioCodecContext | None = track.codec_context
    told = (track.metadata.get("title"), track.language, codec and codec.name, codec and codec.layout.name)
    return " ".join(text for text in told if text)


def _cause(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _stated(container: str, tags: Mapping[str, str], own: float | None, whole: float | None) -> float | None:
    """Return the length in seconds that a file states: of its stream, in a tag of Matroska, or of its container.

    None if it states none: libavformat then guesses from the bit rate.
    """
    if container.split(",")[0] not in STATING:
        return None
    clock = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", tags.get("DURATION", ""))
    if own is None and clock is not None:
        own = 3600 * int(clock[1]) + 60 * int(clock[2]) + float(clock[3])
    return own or whole


def _bits(codec: AudioCodecContext) -> int | None:
    """Return the PCM depth that an output needs for this codec; libavcodec decodes 24 bits to 32."""
    if not codec.name.startswith(LOSSLESS):
        return None
    extra = codec.extradata or b""
    if codec.name == "flac" and len(extra) >= 14:
        bits = (int.from_bytes(extra[12:14], "big") >> 4 & 31) + 1
    elif codec.name == "alac" and len(extra) >= 18:
        bits = extra[17]
    elif codec.name in ("mlp", "truehd", "ape", "tak") or codec.name.startswith("pcm_s24"):
        bits = 24
    else:
        bits = 32
    held = {"u8": 16, "s16": 16, "s32": 32}.get(codec.format.name.removesuffix("p"))
    return held and min(held, next(depth for depth in (16, 24, 32) if bits <= depth))


def _speakers(layout: AudioLayout) -> int | None:
    names = [channel.name for channel in layout.channels]
    return sum(1 << AV_SPEAKERS.index(name) for name in names) if set(names) <= set(AV_SPEAKERS) else None

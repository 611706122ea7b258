"""Decodes through PyAV what libsndfile does not read: m4a, mp4, mkv, wma and many more."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from clapsep_cli.audio.containers import Fed
from clapsep_cli.audio.samples import Decoder, Samples, seconds
from clapsep_cli.errors import AudioError

if TYPE_CHECKING:
    from av import AudioFrame, AudioLayout, AudioResampler, AudioStream, Packet
    from av.audio.codeccontext import AudioCodecContext

SUFFIXES = {
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
SPEAKERS = (  # in the order of the mask's bits
    *("FL", "FR", "FC", "LFE", "BL", "BR", "FLC", "FRC", "BC", "SL", "SR", "TC"),
    *("TFL", "TFC", "TFR", "TBL", "TBC", "TBR"),
)
TAGS = {"track": "tracknumber", "tracknumber": "tracknumber"} | {
    name: name for name in ("title", "artist", "album", "comment", "date", "genre", "copyright", "license")
}
TOLERANCE_SECONDS = 0.1  # by which lengths in containers are off: priming, and whole frames
MISSING = 'reading this format takes PyAV: pip install "clapsep[av]"'


def available() -> bool:
    """Whether PyAV is installed."""
    return importlib.util.find_spec("av") is not None


class AvDecoder(Decoder):
    """Decodes one sound track of a file with PyAV.

    Args:
        file: the file, which stays open if this raises.
        name: for messages.
        lenient: take what there is of a damaged file.
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
        """Report an AVI that is shorter than its header states: libavformat then believes the file."""
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
            raise AudioError(f"{self.name}: cannot be read as audio (its sound is of no known kind)")
        if not self.lenient:
            codec.options = {"err_detect": STRICT}
        self.tags = _tags({**track.metadata, **self._container.metadata})
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
        self._damaged = False
        resampler = None
        try:
            for packet in self._container.demux(track):
                if packet.is_corrupt:
                    self._damage("a packet is corrupt")
                for frame in self._frames(packet):
                    if resampler is None:  # the first frame knows better than the container
                        self.rate, self.channels = frame.sample_rate, frame.layout.nb_channels
                        self.speakers = _speakers(frame.layout)
                        resampler = self._resampler()
                    for part in resampler.resample(frame):
                        block: Samples = np.asarray(part.to_ndarray(), self._type)
                        yield block if len(block) == self.channels else block.reshape(-1, self.channels).T
        except (self._error, ValueError) as error:
            self._damage(_cause(error))

    def _resampler(self) -> AudioResampler:
        from av import AudioResampler

        kind = "dbl" if self.bits == 32 else "flt"
        # By channel it is faster, but PyAV crashes at 8 and more.
        return AudioResampler(f"{kind}p" if self.channels < 8 else kind)

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
        if got < samples:
            self._check_length()
        return np.ascontiguousarray(np.concatenate(held, 1))

    def _check_length(self) -> None:
        missing = (self._stated or 0) - self._done / self.rate
        if missing > TOLERANCE_SECONDS and not self._short:
            self._short = True
            self.report(f"ends {missing:.2f} s before its header says, it is cut short")

    def close(self) -> None:
        self._container.close()
        self._file.close()


def check_track(name: str, number: int | None, tracks: int) -> None:
    """Raise `AudioError` if a recording of so many sound tracks has none of this number."""
    if number is not None and not 1 <= number <= tracks:
        raise AudioError(f"{name}: has {tracks} sound track{'s' * (tracks > 1)}, so no --stream {number}")


def _label(track: AudioStream) -> str:
    codec: AudioCodecContext | None = track.codec_context
    told = (track.metadata.get("title"), track.language, codec and codec.name, codec and codec.layout.name)
    return " ".join(text for text in told if text)


def _cause(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _stated(container: str, tags: Mapping[str, str], own: float | None, whole: float | None) -> float | None:
    """Return how many seconds of sound a file states: its stream, that stream's tag in a Matroska, or the container.

    None where it does not say so: libavformat then guesses from the bit rate.
    """
    if container.split(",")[0] not in STATING:
        return None
    clock = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", tags.get("DURATION", ""))
    if own is None and clock is not None:
        own = 3600 * int(clock[1]) + 60 * int(clock[2]) + float(clock[3])
    return own or whole


def _bits(codec: AudioCodecContext) -> int | None:
    """Return the depth that an output needs for what this codec decodes; libavcodec hands on 24 bits as 32."""
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
    return sum(1 << SPEAKERS.index(name) for name in names) if set(names) <= set(SPEAKERS) else None


def _tags(found: Mapping[str, str]) -> dict[str, str]:
    named = ((TAGS.get(name.lower()), text.strip()) for name, text in found.items())
    return {name: text for name, text in named if name and text}

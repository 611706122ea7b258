"""Encodes by PyAV the formats that libsndfile does not write: m4a, and films with a new sound track."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from clapsep_cli.audio.decoders import AV_SPEAKERS, CONTAINERS, has_av
from clapsep_cli.audio.samples import Encoder, Form, Samples
from clapsep_cli.errors import OutputError

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer

MUXERS = {
    "mp4": "mp4",
    "m4v": "mp4",
    "m4a": "ipod",
    "mov": "mov",
    "mkv": "matroska",
    "mka": "matroska",
    "webm": "webm",
    "avi": "avi",
    "ts": "mpegts",
}
ENCODERS = {  # by the track's codec; others become FLAC in Matroska, else AAC
    **{name: name for name in ("aac", "ac3", "eac3", "flac", "alac", "mp2")},
    "opus": "libopus",
    "libopus": "libopus",
    "vorbis": "libvorbis",
    "mp3": "libmp3lame",
    "mp3float": "libmp3lame",
}
LAYOUTS = ("", "mono", "stereo", "3.0", "4.0", "5.0", "5.1", "6.1", "7.1")  # by number of channels
CHANNEL_BIT_RATE = 96_000  # of lossy codecs
LOSSLESS = ("flac", "alac", "pcm_")
LEAST_AV = 18  # for films: 14 and 15 set no chapters, 16 and 17 shift AAC and take no dispositions as they give them
SOFTWARE = {"mp4": "encoding_tool", "ipod": "encoding_tool", "avi": "encoded_by"}  # as it is stored
MISSING = 'writing this takes PyAV: pip install "clapsep[av]"'


@dataclass(frozen=True)
class Film:
    """The film at `path`, whose sound track number `track`, from 1, is replaced."""

    path: Path
    track: int = 1

    @property
    def suffix(self) -> str:
        """The suffix without the dot, as outputs have it. Raises `OutputError` if it cannot be written."""
        suffix = self.path.suffix.lower().removeprefix(".")
        if not has_av():
            raise OutputError(f"--remux: {MISSING}")
        import av

        if int(av.__version__.partition(".")[0]) < LEAST_AV:
            raise OutputError(f'--remux: PyAV {av.__version__} is too old for it: pip install "av>={LEAST_AV}"')
        if suffix not in MUXERS:
            raise OutputError(f"{self.path}: --remux writes {', '.join(MUXERS)}, not {suffix or 'this'}")
        return suffix

    def open(self) -> InputContainer:
        """Open it; no other file is read."""
        import av

        options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
        return av.open(f"file:{self.path}", "r", options=options, metadata_errors="replace")

    def codec(self) -> str:
        """Return the encoder for its new sound track."""
        with self.open() as film:
            tracks = film.streams.audio
            if not 1 <= self.track <= len(tracks):
                raise OutputError(f"{self.path}: has no sound track to replace")
            name = tracks[self.track - 1].codec_context.name
        if name.startswith("pcm_"):
            return name
        return ENCODERS.get(name, "flac" if MUXERS[self.suffix] == "matroska" else "aac")

    @property
    def lossless(self) -> bool:
        """True if its new sound track holds samples exactly."""
        return self.codec().startswith(LOSSLESS)


class MediaEncoder(Encoder):
    """Encodes sound, alone or into a copy of a film with its pictures, subtitles, chapters and other tracks.

    Args:
        stream: empty and seekable, to write to.
        muxer: libavformat's name of the container.
        codec: libavcodec's name of the encoder.
        form: of the audio; `bits` is the depth of lossless codecs.
        film: to copy; None for sound alone.

    Raises `OutputError` if this cannot be encoded.
    """

    def __init__(
        self,
        stream: BinaryIO,
        muxer: str,
        codec: str,
        form: Form,
        film: Film | None = None,
    ) -> None:
        if not has_av():
            raise OutputError(MISSING)
        import av

        self._av, self._rate, self._done = av, form.rate, 0
        self._film: InputContainer | None = None
        options = {"movflags": "use_metadata_tags"} if muxer == "mov" else {}  # to store the software tag
        try:
            self._out: Any = av.open(stream, "w", format=muxer, options=options)
            layout = _layout(form.channels, form.speakers)
            if codec == "aac" and "B" not in layout:  # it knows surround at the back alone, as 5.1
                layout = layout.replace("SL+SR", "BL+BR")
            if film is None:
                self._track: Any = self._out.add_stream(codec, rate=form.rate, layout=layout)
                self._first = 0
            else:
                self._begin(film, codec, layout)
            known = {"tracknumber": "track", "software": SOFTWARE.get(muxer, "software")}
            self._out.metadata.update({known.get(name, name): text for name, text in form.tags.items()})
            context = self._track.codec_context
            able = [kind.name for kind in context.codec.audio_formats or ()]
            fitting = [name for name in able if name.removesuffix("p") == ("s16" if form.bits == 16 else "s32")]
            context.format = (fitting or able)[0] if form.bits else able[0]
            if not codec.startswith(LOSSLESS):
                context.bit_rate = CHANNEL_BIT_RATE * form.channels
            context.time_base = Fraction(1, form.rate)
            context.open()
            self._resampler = av.AudioResampler(context.format, context.layout, form.rate, context.frame_size or 4096)
            self._layout = layout
        except (av.FFmpegError, ValueError, IndexError) as error:
            self.discard()
            raise OutputError(str(getattr(error, "strerror", None) or error)) from error

    def _begin(self, film: Film, codec: str, layout: str) -> None:
        """Make the streams of the copy, and find when the sound begins."""
        with film.open() as whole:
            first = next(whole.decode(whole.streams.audio[film.track - 1]))
            self._first = round((first.time or 0.0) * self._rate)
        self._film = copied = film.open()
        self._out.metadata.update(copied.metadata)
        self._out.set_chapters(copied.chapters())
        replaced = copied.streams.audio[film.track - 1]
        self._copies: dict[int, Any] = {}
        for one in copied.streams:
            if one.index == replaced.index:
                copy = self._track = self._out.add_stream(codec, rate=self._rate, layout=layout)
            elif one.type == "attachment":
                attached: Any = one
                self._out.add_attachment(attached.name, attached.mimetype or "application/octet-stream", attached.data)
                continue
            elif one.type in ("video", "audio", "subtitle"):
                copy = self._copies[one.index] = self._out.add_stream_from_template(one)
            else:
                continue
            copy.metadata.update(one.metadata)
            copy.disposition = one.disposition
        packets = copied.demux([one for one in copied.streams if one.index in self._copies])
        self._packets = (packet for packet in packets if packet.dts is not None or packet.pts is not None)
        self._next: Packet[Any] | None = next(self._packets, None)

    def _copy(self, until: float) -> None:
        """Copy the packets before this time, in seconds."""
        while self._film is not None and self._next is not None:
            packet = self._next
            at = packet.dts if packet.dts is not None else packet.pts
            if float((at or 0) * packet.time_base) > until:
                return
            packet.stream = self._copies[packet.stream.index]
            self._out.mux(packet)
            self._next = next(self._packets, None)

    def write(self, audio: Samples) -> int:
        clipped = int(np.count_nonzero(np.abs(audio) > 1))
        wide = audio.dtype == np.float64
        samples: Any = np.clip(audio, -1, 1).T.astype(np.float64 if wide else np.float32).reshape(1, -1)
        frame = self._av.AudioFrame.from_ndarray(samples, "dbl" if wide else "flt", self._layout)
        frame.sample_rate, frame.time_base = self._rate, Fraction(1, self._rate)
        frame.pts = self._first + self._done
        self._done += audio.shape[1]
        self._encode(frame)
        return clipped

    def _encode(self, frame: Any) -> None:
        try:
            for part in self._resampler.resample(frame):
                for packet in self._track.encode(part):
                    self._copy(float((packet.dts or 0) * packet.time_base))
                    self._out.mux(packet)
        except (self._av.FFmpegError, ValueError) as error:
            raise OSError(str(getattr(error, "strerror", None) or error)) from error

    def finish(self) -> None:
        self._encode(None)
        try:
            for packet in self._track.encode(None):
                self._out.mux(packet)
            self._copy(float("inf"))
            self._out.close()
        except (self._av.FFmpegError, ValueError) as error:
            raise OSError(str(getattr(error, "strerror", None) or error)) from error
        if self._film is not None:
            self._film.close()

    def discard(self) -> None:
        if self._film is not None:
            self._film.close()


def read_software(path: Path) -> str:
    """Return the `software` that an output was written with; "" for a file that has none, or is no recording."""
    if path.suffix.lower().removeprefix(".") not in MUXERS or not has_av():
        return ""
    import av

    try:
        with Film(path).open() as file:
            told = {name.lower(): text for name, text in file.metadata.items()}
    except (av.FFmpegError, OSError, ValueError):
        return ""
    name = "encoded_by" if path.suffix.lower() == ".avi" else "software"
    return told.get(name) or told.get("encoder", "")


def _layout(channels: int, speakers: int | None) -> str:
    if speakers and speakers.bit_count() == channels and speakers < 1 << len(AV_SPEAKERS):
        return "+".join(name for bit, name in enumerate(AV_SPEAKERS) if speakers >> bit & 1)
    if channels >= len(LAYOUTS):
        raise ValueError(f"{channels} channels have no usual layout")
    return LAYOUTS[channels]

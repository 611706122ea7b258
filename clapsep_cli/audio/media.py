"""Decoding what libsndfile does not: through an ffmpeg on the PATH, or PyAV, the same libraries as a package."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clapsep_cli.audio.samples import Audio, Decoder
from clapsep_cli.audio.wav import WavStream
from clapsep_cli.errors import AudioError

if TYPE_CHECKING:
    from av import AudioResampler, AudioStream

SUFFIXES = {
    *(".m4a", ".m4b", ".aac", ".mp4", ".m4v", ".mov", ".mkv", ".mka", ".webm", ".wma", ".wmv", ".asf", ".avi", ".flv"),
    *(".3gp", ".amr", ".ac3", ".ape", ".wv", ".tta", ".ts", ".mpg", ".mpeg", ".ogv", ".oga"),
}
# Recordings and films only: no playlists or scripts, which name further files, and no pictures or texts.
CONTAINERS = (
    "mov,matroska,asf,avi,flv,ogg,wav,w64,wv,tta,ape,caf,aiff,au,flac,mpegts,mpeg,"
    "aac,ac3,eac3,dts,dtshd,amr,mp3,loas,truehd,tak,dsf,mpc,mpc8,voc"
)
STATING = ("mov", "matroska", "asf", "avi", "ogg", "wav", "w64", "wv", "tta", "ape", "caf", "aiff", "flac", "au")
LOSSLESS = ("pcm_s", "pcm_u", "alac", "flac", "wavpack", "tta", "ape", "tak", "truehd", "mlp", "shorten")
TAGS = {"track": "tracknumber", "tracknumber": "tracknumber"} | {
    name: name for name in ("title", "artist", "album", "comment", "date", "genre", "copyright", "license")
}
TOLERANCE_SECONDS = 0.1  # by which lengths in containers are off: priming, and whole frames
PROBE_SECONDS = 60
SILENT_FILM = "has no sound, only pictures or other data"
MISSING = "needs a decoder: install ffmpeg (with ffprobe) so that it is on the PATH, or pip install clapsep[av]"


def available() -> bool:
    """Whether there is a decoder for what libsndfile does not read."""
    return _ffmpeg() is not None or _has_av()


def open_media(path: Path) -> Decoder | None:
    """Decode `path` with what is installed; None if nothing is. Raises `AudioError` if it is no media file."""
    if (tools := _ffmpeg()) is not None:
        return FfmpegDecoder(path, *tools)
    return AvDecoder(path) if _has_av() else None


def _ffmpeg() -> tuple[str, str] | None:
    ffmpeg, ffprobe = shutil.which("ffmpeg"), shutil.which("ffprobe")
    return (ffmpeg, ffprobe) if ffmpeg and ffprobe else None


def _has_av() -> bool:
    return importlib.util.find_spec("av") is not None


class FfmpegDecoder(Decoder):
    """A file decoded by a process of ffmpeg, which sends it as a float WAV at its own rate and channels."""

    exact = False

    def __init__(self, path: Path, ffmpeg: str, ffprobe: str) -> None:
        self.name, self._done = str(path), 0
        # A name may look like an option or a protocol: "file:" takes it for what it is.
        source = ["-protocol_whitelist", "file", "-format_whitelist", CONTAINERS, "-i", f"file:{path}"]
        found = _probe([ffprobe, "-v", "error", *source], self.name)
        stream, form = _audio_stream(found, self.name), found.get("format", {})
        tags = {**stream.get("tags", {}), **form.get("tags", {})}
        self.tags, self.bits = _tags(tags), _bits(str(stream.get("codec_name")), str(stream.get("sample_fmt")))
        own, whole = _seconds(stream), _seconds(form)
        alone = all(other.get("codec_type") == "audio" for other in found["streams"])
        self._stated = _stated(form.get("format_name", ""), stream.get("tags", {}), own, whole if alone else None)
        output = ["-map", "0:a:0", "-map_metadata", "-1", "-c:a", "pcm_f32le", "-f", "wav", "pipe:1"]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        # A session of its own: Ctrl-C is for us to handle, and must not cut the recording short here.
        self._process = subprocess.Popen(
            [ffmpeg, "-v", "error", "-nostdin", "-xerror", *source, *output],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        try:
            self._begin(whole or 0)
        except BaseException:
            self.close()
            raise

    def _begin(self, seconds: float) -> None:
        assert self._process.stdout is not None
        self.rate = 0
        try:
            self._wav = WavStream(self._process.stdout, self.name)  # type: ignore[arg-type]
        except AudioError:
            self._check_end()
            raise
        self.rate, self.channels = self._wav.rate, self._wav.channels
        self.frames = round((self._stated or seconds) * self.rate)

    def read(self, samples: int) -> Audio:
        try:
            block = self._wav.read(samples)
        except AudioError:  # the stream breaks off within a sample
            self._check_end()
            raise
        self._done += block.shape[1]
        if block.shape[1] < samples:
            self._check_end()
        return block

    def _check_end(self) -> None:
        if self._process.wait():
            self._log.seek(0)
            why = _first_line(self._log.read(), self.name)
            raise AudioError(f"{self.name}: is damaged after {self._done / (self.rate or 1):.2f} s (ffmpeg: {why})")
        _check_length(self.name, self._done, self.rate, self._stated)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()


def _probe(command: list[str], name: str) -> dict[str, Any]:
    entries = "format=format_name,duration:format_tags:stream=codec_type,codec_name,sample_fmt,duration:stream_tags"
    try:
        done = subprocess.run(
            [*command, "-show_entries", entries, "-of", "json"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_SECONDS,
            check=False,
        )
        if done.returncode:
            raise AudioError(f"{name}: cannot be read as audio ({_first_line(done.stderr, name)})")
        found: dict[str, Any] = json.loads(done.stdout.decode("utf-8", "replace"))
    except (subprocess.TimeoutExpired, OSError, ValueError) as error:
        raise AudioError(f"{name}: cannot be read as audio (ffprobe: {error})") from error
    return found


def _audio_stream(found: dict[str, Any], name: str) -> dict[str, Any]:
    for stream in found.get("streams", []):
        if stream.get("codec_type") == "audio":
            return dict(stream)
    raise AudioError(f"{name}: {SILENT_FILM}")


def _seconds(of: dict[str, Any]) -> float | None:
    try:
        return float(of.get("duration", "")) or None
    except ValueError:
        return None


def _first_line(log: bytes, name: str) -> str:
    if b"not on whitelist" in log:
        return "it is of no known format"
    lines = [re.sub(r"^\[[^]]*] *", "", line) for line in log.decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[0].replace(f"file:{name}: ", "").strip() if lines else "it does not say why"


class AvDecoder(Decoder):
    """A file decoded by PyAV."""

    exact = False

    def __init__(self, path: Path) -> None:
        import av

        self.name, self._done, self._error, self.rate = str(path), 0, av.FFmpegError, 0
        options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
        try:
            self._container = av.open(f"file:{path}", options=options, metadata_errors="replace")
        except self._error as error:
            raise AudioError(f"{path}: cannot be read as audio ({error.strerror})") from error
        try:
            self._begin(av.AudioResampler("fltp"))
        except BaseException:
            self.close()
            raise

    def _begin(self, resampler: AudioResampler) -> None:
        streams, whole = self._container.streams, self._container.duration
        if not streams.audio:
            raise AudioError(f"{self.name}: {SILENT_FILM}")
        stream = streams.audio[0]
        self.tags = _tags({**stream.metadata, **self._container.metadata})
        self.bits = _bits(stream.codec_context.name, stream.codec_context.format.name)
        own = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None
        container = whole / 1e6 if whole and len(streams.audio) == len(streams) else None
        self._stated = _stated(self._container.format.name, stream.metadata, own, container)
        self._parts = self._planar(stream, resampler)
        self._waiting = self._next()
        self.frames = round((self._stated or (whole or 0) / 1e6) * self.rate)

    def _planar(self, stream: AudioStream, resampler: AudioResampler) -> Iterator[Audio]:
        for frame in self._container.decode(stream):
            if frame.is_corrupt:
                raise AudioError(f"{self.name}: is damaged after {self._done / (self.rate or 1):.2f} s")
            if not self.rate:  # the first frame knows better than the container
                self.rate, self.channels = frame.sample_rate, frame.layout.nb_channels
            for part in resampler.resample(frame):
                yield part.to_ndarray().astype(np.float32, copy=False)

    def _next(self) -> Audio | None:
        try:
            return next(self._parts, None)
        except (self._error, ValueError) as error:
            at, why = self._done / (self.rate or 1), getattr(error, "strerror", None) or error
            raise AudioError(f"{self.name}: is damaged after {at:.2f} s ({why})") from error

    def read(self, samples: int) -> Audio:
        held, got = [np.zeros((self.channels, 0), np.float32)], 0
        while got < samples and self._waiting is not None:
            held.append(self._waiting[:, : samples - got])
            got += held[-1].shape[1]
            rest = self._waiting[:, held[-1].shape[1] :]
            self._waiting = rest if rest.shape[1] else self._next()
        self._done += got
        if got < samples:
            _check_length(self.name, self._done, self.rate, self._stated)
        return np.concatenate(held, 1)

    def close(self) -> None:
        self._container.close()


def _stated(container: str, tags: Mapping[str, str], own: float | None, whole: float | None) -> float | None:
    """How many seconds of sound a file says it has: its stream, that stream's tag in a Matroska, or the container.

    None where it does not say so: libavformat then guesses from the bit rate.
    """
    if container.split(",")[0] not in STATING:
        return None
    clock = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", tags.get("DURATION", ""))
    if own is None and clock is not None:
        own = 3600 * int(clock[1]) + 60 * int(clock[2]) + float(clock[3])
    return own or whole


def _check_length(name: str, samples: int, rate: int, stated: float | None) -> None:
    if not samples:
        raise AudioError(f"{name}: has no samples")
    missing = (stated or 0) - samples / rate
    if missing > TOLERANCE_SECONDS:
        raise AudioError(f"{name}: ends {missing:.2f} s before its header says; the file is cut short")


def _bits(codec: str, sample_format: str) -> int | None:
    if not codec.startswith(LOSSLESS):
        return None
    return {"u8": 16, "s16": 16, "s32": 24}.get(sample_format.removesuffix("p"))  # 24 bits come as 32


def _tags(found: Mapping[str, str]) -> dict[str, str]:
    named = ((TAGS.get(name.lower()), text.strip()) for name, text in found.items())
    return {name: text for name, text in named if name and text}

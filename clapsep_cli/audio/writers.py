"""Writes the parts of a recording together; none appears before all are complete."""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import BinaryIO, Literal

import numpy as np
import soundfile
from numpy.typing import NDArray

from clapsep_cli.audio import film
from clapsep_cli.audio.decoders import reason
from clapsep_cli.audio.encoding import SOFTWARE_BYTES, Encoding, open_encoder
from clapsep_cli.audio.samples import Encoder, Form, Samples
from clapsep_cli.errors import OutputError, TakenError
from clapsep_cli.files import claim, unfinished

STDOUT = Path("-")
CONVERTED_AT_ONCE = 2**18  # samples scaled at a time
LIBSNDFILE = re.compile(r" \(libsndfile-[^)]*\)$")  # libsndfile adds it to the software tag

Clipping = Literal["warn", "rescale", "error"]  # what to do about samples over full scale
_FOLDERS = Lock()  # prevents that a failed output removes a folder that another one creates


@dataclass(frozen=True)
class Written:
    """The number of clipped samples by part, and the gain that all parts got."""

    clipped: dict[str, int]
    gain: float


class Part:
    """One output being written: a file under a temporary name beside `path`, or stdout. Raises `OutputError`.

    `encode` opens the encoder on a stream, which can seek or not.
    """

    def __init__(self, path: Path, encode: Callable[[BinaryIO, bool], Encoder]) -> None:
        self.path, self.name, self.clipped = path, "standard output" if path == STDOUT else str(path), 0
        self.temporary: Path | None = None
        self._claim: int | None = None
        with _reported(self.name, "cannot be written"):
            if path == STDOUT:
                self._stream, seek = sys.stdout.buffer, _is_file(sys.stdout.buffer)
            else:
                self.temporary, seek = unfinished(path), True
                self._stream = self.temporary.open("x+b", buffering=2**16)
                self._claim = claim(self._stream)
            try:
                self._encoder = encode(self._stream, seek)
            except BaseException:
                self._drop()
                raise

    def write(self, audio: Samples) -> int:
        """Append `[channels, samples]`; returns how many samples were clipped."""
        with _reported(self.name, "writing failed"):
            clipped = self._encoder.write(audio)
        self.clipped += clipped
        return clipped

    def finish(self) -> None:
        """Complete the temporary file."""
        with _reported(self.name, "writing failed"):
            self._encoder.finish()
            if self.temporary is not None:
                self._stream.close()

    def place(self, overwrite: bool) -> list[Path]:
        """Rename the finished file; returns its path if it is new, nothing if it replaced a file."""
        if self.temporary is None:
            return []
        with _reported(self.name, "cannot be written"):
            if overwrite:
                new = [] if self.path.exists() else [self.path]
                self.temporary.replace(self.path)
                return new
            try:
                os.link(self.temporary, self.path)  # unlike renaming, this never replaces a file
            except FileExistsError:
                _check_free(self.path, overwrite)
                raise
            except OSError:  # a file system without links
                _check_free(self.path, overwrite)
                self.temporary.rename(self.path)
            return [self.path]

    def discard(self) -> None:
        """Remove the temporary file, if it still has that name."""
        with suppress(OSError, ValueError, soundfile.SoundFileError):
            self._encoder.discard()
        self._drop()

    def _drop(self) -> None:
        if self.temporary is not None:
            with suppress(OSError):
                self._stream.close()
            with suppress(OSError):
                self.temporary.unlink(missing_ok=True)
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None


class Outputs:
    """Writes the parts of one recording side by side.

    Use it as a context manager, and call `commit` at the end; without it nothing remains, not even new folders. Samples
    change only by rounding to the encoding's steps, and by `clip`.

    Args:
        paths: of the files, by part; `-` is a WAV to stdout.
        rate: in Hz.
        channels: their number.
        encoding: the format and depth of all parts.
        clip: for samples over full scale, unless the encoding is float: "warn" clips and counts them, "error" raises
            `OutputError`, "rescale" applies one gain to all parts, so that the loudest sample fits; until `commit` the
            samples are then kept in unnamed files.
        tags: by libsndfile's names, stored if the format has a place for them.
        software: tag to be read by `read_software`.
        overwrite: replace existing files.
        speakers: mask of speaker positions that outputs get; None for the usual ones.
        film: the film to copy with each part as its sound track; None for sound alone.

    Raises:
        OutputError: an output exists and `overwrite` is not set, or it cannot be written.
        ValueError: `software` has more than 100 bytes.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        rate: int,
        channels: int,
        encoding: Encoding,
        clip: Clipping = "warn",
        tags: Mapping[str, str] | None = None,
        software: str = "",
        overwrite: bool = False,
        speakers: int | None = None,
        film: film.Film | None = None,
    ) -> None:
        if len(software.encode("utf-8", "replace")) > SOFTWARE_BYTES:
            raise ValueError(f"software is limited to {SOFTWARE_BYTES} bytes, which all formats hold: {software!r}")
        if len(set(paths.values())) < len(paths):
            raise OutputError(f"{' and '.join(paths)} would be written to one file, {next(iter(paths.values()))}")
        if STDOUT in paths.values() and encoding.format != "wav":
            raise OutputError(f"standard output carries WAV alone, not {encoding.format}")
        given = {**(tags or {}), "software": software}
        clean = {name: text.encode("utf-8", "replace").decode().replace("\0", " ") for name, text in given.items()}
        stored = {name: text for name, text in clean.items() if text}
        self._form = form = Form(rate, channels, encoding.bits, stored, speakers)
        self._encode = lambda stream, seek: open_encoder(stream, encoding.format, form, seek, film)
        self._clip, self._overwrite, self._done = clip, overwrite, 0
        self._exact = encoding.bits is None and not encoding.lossy
        self._drafts: dict[str, BinaryIO] = {}  # samples as they came, where the gain is known only at the end
        self._draft_type = "<f8" if encoding.bits == 32 else "<f4"
        self._range = (0.0, 0.0)
        self._made: list[Path] = []  # folders that are new, outermost first
        self._parts: dict[str, Part] = {}
        try:
            for part, path in paths.items():
                self._begin(part, path)
        except BaseException:
            self._discard()
            raise

    def _begin(self, part: str, path: Path) -> None:
        later = self._clip == "rescale" and not self._exact
        if path == STDOUT:
            if getattr(sys.stdout, "buffer", None) is None:
                raise OutputError("standard output: is closed")
            if sys.stdout.isatty():
                raise OutputError("standard output is a terminal; redirect it to a file or a program")
            self._parts[part] = Part(path, self._encode)
        else:
            _check_free(path, self._overwrite)
            with _FOLDERS, _reported(str(path), "cannot be written"):
                folder = path.parent
                self._made += [above for above in (*reversed(folder.parents), folder) if not above.exists()]
                folder.mkdir(parents=True, exist_ok=True)
                self._parts[part] = Part(path, self._encode)
        if later:
            with _reported(str(path), "cannot be written"):
                self._drafts[part] = tempfile.TemporaryFile(  # noqa: SIM115
                    dir=None if path == STDOUT else path.parent
                )

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *_: object) -> None:
        self._discard()

    def write(self, parts: Mapping[str, Samples]) -> None:
        """Append `[channels, samples]` to every part; float64 where float32 does not hold the encoding's depth."""
        for part, audio in parts.items():
            if part in self._drafts:
                least, most = self._range
                self._range = float(audio.min(initial=least)), float(audio.max(initial=most))
                with _reported(self._parts[part].name, "writing failed"):
                    self._drafts[part].write(np.ascontiguousarray(audio.T, self._draft_type).tobytes())
            elif self._parts[part].write(audio) and self._clip == "error":
                level = 20 * np.log10(float(np.abs(audio).max()))
                raise OutputError(
                    f"{self._parts[part].name}: would clip, at {level:+.2f} dB of full scale within the "
                    f"{audio.shape[1] / self._form.rate:.1f} s after {self._done / self._form.rate:.1f} s; "
                    "use --clip rescale, or --subtype float"
                )
        self._done += max(audio.shape[1] for audio in parts.values())

    def drop(self, part: str) -> None:
        """Discard a part: no file is written for it."""
        self._parts.pop(part).discard()
        if part in self._drafts:
            self._drafts.pop(part).close()

    def commit(self) -> Written:
        """Finish all parts and rename them to their paths. If one fails, the others are removed again."""
        gain = self._gain() if self._drafts else 1.0
        for part, draft in self._drafts.items():
            with _reported(self._parts[part].name, "writing failed"):
                for block in self._drafted(draft):
                    self._parts[part].write(block * gain)
        for writer in self._parts.values():
            writer.finish()
        placed: list[Path] = []
        try:
            for writer in self._parts.values():
                placed += writer.place(self._overwrite)
        except BaseException:
            for path in placed:
                path.unlink(missing_ok=True)
            raise
        self._made = []
        return Written({part: writer.clipped for part, writer in self._parts.items()}, gain)

    def _gain(self) -> float:
        """Return the gain with which the loudest sample of all parts fits the encoding; 1 if none is too loud."""
        bits, (least, most) = self._form.bits, self._range
        if bits is None:
            return 1 / max(1.0, -least, most)
        full = 2.0 ** (bits - 1)
        fits = round(most * full) <= full - 1 and round(least * full) >= -full
        return 1.0 if fits else 1 / max(-least, most * full / (full - 1))

    def _drafted(self, draft: BinaryIO) -> Iterator[NDArray[np.float64]]:
        kind = np.dtype(self._draft_type)
        draft.seek(0)
        while raw := draft.read(CONVERTED_AT_ONCE * self._form.channels * kind.itemsize):
            # As float64: rounded to float32, the loudest sample may be half a step of 24 bits over full scale.
            yield np.frombuffer(raw, kind).astype(np.float64).reshape(-1, self._form.channels).T

    def _discard(self) -> None:
        for writer in self._parts.values():
            writer.discard()
        for draft in self._drafts.values():
            with suppress(OSError):
                draft.close()
        with _FOLDERS:
            for folder in reversed(self._made):
                with suppress(OSError):  # another output is in it by now
                    folder.rmdir()


def read_software(path: Path) -> str:
    """Return the `software` tag of a file; "" for a file without one, and one that is no recording."""
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:  # names need not be UTF-8
            return LIBSNDFILE.sub("", file.software)
    except (soundfile.SoundFileError, OSError):
        return film.read_software(path)


def is_output(path: Path) -> bool:
    """Return True if this program wrote a file."""
    return read_software(path).startswith("clapsep ")


@contextmanager
def _reported(name: str, what: str) -> Iterator[None]:
    """Raise `OutputError` for errors of the system or of libsndfile."""
    try:
        yield
    except BrokenPipeError as error:
        raise OutputError(f"{name}: the output pipe was closed") from error
    except OSError as error:
        full = "; make room on the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise OutputError(f"{name}: {what} ({reason(error)}){full}") from error


def _check_free(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise OutputError(f"{path}: is a folder")
    if not overwrite and os.path.lexists(path):
        raise TakenError(f"{path}: exists already; use --overwrite to replace it, or -o for another folder")


def _is_file(stream: BinaryIO) -> bool:
    """Return True if stdout is an empty file, whose header can be completed at the end."""
    try:
        import fcntl

        appends = fcntl.fcntl(stream.fileno(), fcntl.F_GETFL) & os.O_APPEND
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode) and not appends and stream.tell() == 0
    except (ImportError, OSError):
        return False

"""Tests reading and writing recordings: complete or not at all, exact to the sample, in every format."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fuzz_audio
import media_files
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from clapsep_cli.audio import decoders, wav, writers
from clapsep_cli.audio.containers import read_frame, scan_mpeg
from clapsep_cli.audio.encoding import SOFTWARE_BYTES, Encoding, choose_encoding
from clapsep_cli.audio.samples import on_grid, to_rate
from clapsep_cli.audio.sources import Source, read_mono, recordings
from clapsep_cli.audio.writers import STDOUT, Outputs, read_software
from clapsep_cli.errors import AudioError, OutputError

Audio = NDArray[np.float32]

needs_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="PyAV is not installed")
FORMATS = {suffix: form for suffix, form in fuzz_audio.SOUNDFILE.items() if suffix != "ext.wav"}
TAGS = {
    "title": "Regen – 雨",
    "artist": "Æ",
    "album": "al",
    "comment": "two\nlines",
    "date": "2024-05-01",
    "tracknumber": "3",
    "genre": "Field",
    "copyright": "© me",
}


def noise(samples: int, channels: int = 2, level: float = 0.1, seed: int = 0) -> Audio:
    return level * np.random.default_rng(seed).standard_normal((channels, samples), dtype=np.float32)


def read(path: Path, start: float = 0.0, end: float | None = None, block: float = 0.3) -> Audio:
    with Source(path, start, end) as source:
        return np.concatenate(list(source.blocks(block)), 1)


def write(path: Path, audio: Audio, rate: int, encoding: Encoding, **options: object) -> None:
    with Outputs({"only": path}, rate, len(audio), encoding, **options) as outputs:  # type: ignore[arg-type]
        outputs.write({"only": audio})
        outputs.commit()


def refused(path: Path, block: float = 0.3, **options: float) -> str:
    """The one line that reading this file ends with."""
    with pytest.raises(AudioError) as caught, Source(path, **options) as source:  # type: ignore[arg-type]
        for _ in source.blocks(block):
            pass
    line = str(caught.value)
    assert "\n" not in line
    assert path.name in line
    return line


@pytest.fixture
def recording(tmp_path: Path) -> Callable[..., Path]:
    """Makes a recording of noise by suffix of a format."""

    def make(suffix: str, samples: int = 50_000, rate: int = 48_000) -> Path:
        form, subtype = fuzz_audio.SOUNDFILE[suffix]
        path = tmp_path / f"mix.{suffix}"
        with soundfile.SoundFile(path, "w", rate, 2, subtype, format=form) as file:
            for at in range(0, samples, 10_000):
                file.write(noise(samples).T[at : at + 10_000])
        return path

    return make


@contextmanager
def piped_in(content: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """stdin as a pipe that this comes out of in small portions."""
    receiving, sending = os.pipe()

    def feed() -> None:
        with os.fdopen(sending, "wb", buffering=0) as pipe:
            try:
                for at in range(0, len(content), 5000):
                    pipe.write(content[at : at + 5000])
            except BrokenPipeError:
                pass

    feeder = threading.Thread(target=feed)
    feeder.start()
    with os.fdopen(receiving, "r", encoding="latin-1") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield
    feeder.join()


# What comes in


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_is_read_like_libsndfile_and_from_any_sample_on(
    recording: Callable[..., Path], suffix: str
) -> None:
    path = recording(suffix)
    expected = soundfile.read(path, dtype="float32")[0].T
    with Source(path) as source:
        assert (source.rate, source.channels, source.frames) == (48_000, 2, expected.shape[1])
        lossless = {"16": 16, "24": 24, "8": 16, "rf64": 16, "w64": 16, "aiff": 16, "caf": 16, "alac": 16, "au": 16}
        assert source.bits == (lossless | {"flac": 16}).get(suffix.split(".")[0])
    np.testing.assert_array_equal(read(path), expected)
    for start, end in ((0.6001, None), (0.02, 0.9), (1.0, 1.0001), (0, 0.5)):
        part = expected[:, round(start * 48_000) : None if end is None else round(end * 48_000)]
        np.testing.assert_array_equal(read(path, start, end), part)
        with Source(path, start, end) as source:
            assert source.frames == part.shape[1]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("share", [0.3, 0.75, 0.995])
def test_a_file_that_was_cut_short_is_reported(recording: Callable[..., Path], suffix: str, share: float) -> None:
    path = recording(suffix)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    line = refused(path)
    assert "cut short" in line or ("caf" in suffix and "damaged after" in line)  # which PyAV tells, if it is there


@pytest.mark.parametrize("suffix", ["flac", "ogg", "opus", "mp3"])
def test_damage_in_the_middle_is_reported(recording: Callable[..., Path], suffix: str) -> None:
    path = recording(suffix)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 600] = bytes(600)
    path.write_bytes(data)
    assert "damaged" in refused(path)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("share", [0.75, 0.995])
def test_of_a_file_that_was_cut_short_what_there_is_can_be_taken(
    recording: Callable[..., Path], suffix: str, share: float
) -> None:
    path = recording(suffix, 200_000)
    whole, data = read(path), path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    if suffix == "alac.caf" and importlib.util.find_spec("av") is None:
        return  # libsndfile cannot
    with Source(path, lenient=True) as source:
        got = np.concatenate(list(source.blocks(0.1)), 1)
        assert any("the rest was read" in note for note in source.notes)
    assert share - 0.3 < got.shape[1] / whole.shape[1] <= share + 0.02
    if suffix not in ("ogg", "opus", "mp3", "adpcm.wav"):
        np.testing.assert_array_equal(got, whole[:, : got.shape[1]])


@pytest.mark.parametrize("suffix", ["16.wav", "8.wav", "24.wav", "float.wav", "rf64", "aiff"])
def test_what_follows_the_samples_has_to_be_chunks(recording: Callable[..., Path], suffix: str) -> None:
    path = recording(suffix)
    expected, data = read(path), path.read_bytes()
    for harmless in (bytes(999), b"LIST" + struct.pack("<I", 4) + b"INFO"):
        path.write_bytes(data + harmless)
        np.testing.assert_array_equal(read(path), expected)
    path.write_bytes(data + b"\1\2\xff\xfe\3" * 9)
    assert "is followed by 45 bytes" in refused(path)
    with Source(path, lenient=True) as source:
        np.testing.assert_array_equal(np.concatenate(list(source.blocks(0.3)), 1), expected)
        assert "is followed by 45 bytes" in source.notes[0]


def test_a_header_of_many_chunks_does_not_hide_that_a_wav_is_cut(recording: Callable[..., Path]) -> None:
    """libsndfile's log then ends before it comes to the samples."""
    path = recording("16.wav")
    expected, data = read(path), path.read_bytes()
    many = b"".join(b"q%03d" % n + struct.pack("<I", 2) + b"zz" for n in range(100))
    full = data[:36] + many + data[36:]
    path.write_bytes(data[:4] + struct.pack("<I", len(full) - 8) + full[8:])
    np.testing.assert_array_equal(read(path), expected)
    path.write_bytes(path.read_bytes()[:-5000])
    assert "is cut short by 5000 of" in refused(path)


def test_mp3s_with_junk_are_read_leniently(recording: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    path = recording("mp3")
    expected, data = read(path), path.read_bytes()
    with path.open("rb") as file:
        stream = scan_mpeg(file, pytest.fail)
    assert stream is not None
    middle = stream.spans[0][0]
    while middle < len(data) // 2:
        frame = read_frame(data[middle : middle + 4])
        assert frame is not None
        middle += frame.size
    junk = b"this is no sound. " * 50
    for name, content in (
        ("is damaged after", data + junk),
        ("is damaged after", data[:middle] + junk + data[middle:]),
        ("is cut short", data[:-50]),
    ):
        path.write_bytes(content)
        assert name in refused(path)
        with Source(path, lenient=True) as source:
            got = np.concatenate(list(source.blocks(0.3)), 1)
            assert name in source.notes[0]
        assert abs(got.shape[1] - expected.shape[1]) <= 2 * 1152
        if name == "is damaged after":
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
    assert capfd.readouterr().err == ""


def test_damage_in_a_flac_is_told_where_it_is(recording: Callable[..., Path]) -> None:
    path = recording("flac")
    data = path.read_bytes()
    path.write_bytes(data[: int(0.75 * len(data))])
    line = refused(path, block=5.0)
    assert "is damaged or cut short after 0.77 s, of 1.04 s; --lenient reads the rest" in line


@pytest.mark.parametrize("suffix", ["ogg", "opus", "flac"])
def test_recordings_in_a_row_are_not_taken_for_the_first_alone(recording: Callable[..., Path], suffix: str) -> None:
    path = recording(suffix)
    path.write_bytes(2 * path.read_bytes())
    assert ("in a row" if suffix != "flac" else "continues after the end") in refused(path)


def without_note(path: Path) -> None:
    """Take the first frame of an MP3, which notes its length."""
    with path.open("rb") as file:
        stream = scan_mpeg(file, pytest.fail)
    assert stream is not None
    assert stream.stated is not None
    ((begin, end),) = stream.spans
    path.write_bytes(path.read_bytes()[begin:end])


@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
def test_an_mp3_without_a_stated_length_is_read_to_its_end(tmp_path: Path, rate: int, channels: int) -> None:
    """Its bit rate drops: whoever guesses the length from the first frames stops too early."""
    path, loud = tmp_path / "mix.mp3", noise(rate, channels)
    write(path, np.concatenate([loud, np.zeros((channels, 9 * rate), np.float32)], 1), rate, Encoding("mp3"))
    without_note(path)
    guessed = soundfile.info(path).frames
    assert guessed < 9.5 * rate, "libsndfile got better: is the counting of frames still needed?"
    audio = read(path)
    assert 10 * rate <= audio.shape[1] < 10.5 * rate
    level = np.sqrt(np.square(audio[:, rate // 10 : rate]).mean())
    assert level == pytest.approx(0.1, rel=0.2)
    part = audio[:, round(0.5 * rate) : round(0.7 * rate)]
    np.testing.assert_allclose(read(path, 0.5, 0.7), part, rtol=0, atol=1e-7)


def test_joined_mp3s_are_read_whole(tmp_path: Path) -> None:
    """As podcasts are, with tags between; libsndfile would stop where the first one says."""
    path = tmp_path / "mix.mp3"
    write(path, noise(48_000), 48_000, Encoding("mp3"), tags=TAGS)
    path.write_bytes(3 * path.read_bytes() + b"TAG" + bytes(125))
    assert soundfile.info(path).frames == 48_000
    assert 3 * 48_000 <= read(path).shape[1] < 3 * 48_000 + 3 * 3 * 1152


def test_a_flac_from_a_pipe_states_no_length(recording: Callable[..., Path]) -> None:
    path = recording("flac")
    whole, data = read(path), bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(data)
    with Source(path) as source:
        assert source.frames == 0
    np.testing.assert_array_equal(read(path), whole)
    np.testing.assert_array_equal(read(path, 0.5, 0.9), whole[:, 24_000:43_200])
    assert "ends at 1.04 s" in refused(path, start=0.5, end=9)


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (2, None, "ends at 1.00 s, so it has no start at 2 s"),
        (0, 1.5, "no end at 1.5 s"),
        (0.5, 0.5, "nothing"),
        (-1, 1, "nothing"),
    ],
)
def test_parts_that_are_not_there(
    recording: Callable[..., Path], start: float, end: float | None, message: str
) -> None:
    path = recording("16.wav", 48_000)
    with pytest.raises(AudioError, match=message):
        Source(path, start, end)


def test_not_a_number_is_reported_with_its_place(tmp_path: Path) -> None:
    path, bad = tmp_path / "mix.wav", noise(10_000)
    bad[1, 7001] = np.nan
    bad[0, 8000] = np.inf
    soundfile.write(path, bad.T, 10_000, "FLOAT")
    assert "sample 7001 (0.700 s) of channel 2" in refused(path)
    assert "sample 7001 (0.700 s) of channel 2" in refused(path, start=0.5)
    assert read(path, 0.75, 0.8).shape == (2, 500)
    soundfile.write(path, np.full(100, 1e300), 10_000, "DOUBLE")
    assert "sample 0" in refused(path)


@pytest.mark.parametrize(
    ("rate", "channels", "samples", "message"),
    [
        (7999, 1, 10, "7999 Hz"),
        (1_000_001, 1, 10, "1000001 Hz"),
        (8000, 33, 10, "33 channels"),
        (8000, 1, 0, "no samples"),
    ],
)
def test_recordings_that_are_too_odd(tmp_path: Path, rate: int, channels: int, samples: int, message: str) -> None:
    path = tmp_path / "mix.wav"
    soundfile.write(path, np.zeros((samples, channels)), rate)
    assert message in refused(path)


def test_what_is_no_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is a folder" in refused(tmp_path)
    assert "no such file" in refused(tmp_path / "none.wav")
    (tmp_path / "empty.wav").touch()
    assert "cannot be read as audio" in refused(tmp_path / "empty.wav")
    assert "no file" in refused(Path("/dev/null"))
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    assert "cannot be read" in refused(tmp_path / "bad.wav")
    with pytest.raises(AudioError, match="no such file"):
        Source(Path("a\0b"))


def test_a_wav_that_was_never_finished_is_reported(recording: Callable[..., Path]) -> None:
    path = recording("16.wav")
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = bytes(4)
    path.write_bytes(data)
    assert "was never finished" in refused(path)
    with Source(path, lenient=True) as source:
        assert np.concatenate(list(source.blocks(0.3)), 1).shape == (2, 50_000)
        assert "was never finished" in source.notes[0]


# Pipes


@pytest.mark.parametrize("suffix", ["16.wav", "24.wav", "8.wav", "float.wav", "double.wav", "ext.wav", "rf64"])
@pytest.mark.parametrize("size", ["stated", "zero", "ones"])
def test_a_pipe_gives_what_the_file_does(
    recording: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, suffix: str, size: str
) -> None:
    path = recording(suffix)
    content, expected = bytearray(path.read_bytes()), soundfile.read(path, dtype="float32")[0].T
    at = content.index(b"data")
    if size != "stated":
        content[at + 4 : at + 8] = bytes(4) if size == "zero" else b"\xff" * 4
        content = content.replace(b"ds64", b"JUNK")
    with piped_in(bytes(content), monkeypatch), Source(Path("-")) as source:
        assert (source.rate, source.channels) == (48_000, 2)
        assert source.frames == (expected.shape[1] if size == "stated" else 0)
        got = np.concatenate(list(source.blocks(0.1)), 1)
    np.testing.assert_array_equal(got, expected)


def test_a_pipe_that_breaks_off_is_reported(recording: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    content = recording("16.wav").read_bytes()
    for share, message in (
        (20, "before its first sample"),
        (6, "cannot be read"),
        (0, "empty"),
        (100_001, "cut short"),
    ):
        with piped_in(content[:share], monkeypatch), pytest.raises(AudioError, match=message):
            for _ in Source(Path("-")).blocks(1):
                pass
    unknown = bytearray(content[:100_001])
    unknown[40:44] = b"\xff" * 4
    with piped_in(bytes(unknown), monkeypatch), pytest.raises(AudioError, match="within a sample"):
        for _ in Source(Path("-")).blocks(1):
            pass


def test_part_and_tags_of_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mix.wav"
    write(path, noise(48_000), 48_000, Encoding("wav", 24), tags=TAGS)
    with piped_in(path.read_bytes(), monkeypatch), Source(Path("-"), 0.25, 0.5) as source:
        assert source.tags == TAGS
        assert source.name == "standard input"
        got = np.concatenate(list(source.blocks(0.1)), 1)
    np.testing.assert_array_equal(got, read(path)[:, 12_000:24_000])


def test_a_named_pipe_is_a_pipe(recording: Callable[..., Path], tmp_path: Path) -> None:
    path, pipe = recording("16.wav"), tmp_path / "pipe"
    os.mkfifo(pipe)
    feeder = threading.Thread(target=lambda: pipe.write_bytes(path.read_bytes()))
    feeder.start()
    np.testing.assert_array_equal(read(pipe), read(path))
    feeder.join()


@pytest.mark.parametrize("clip", ["warn", "rescale"])
def test_the_target_goes_to_stdout_and_nothing_else_does(clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    receiving, sending = os.pipe()
    heard: list[bytes] = []

    def listen() -> None:
        with os.fdopen(receiving, "rb") as pipe:
            heard.append(pipe.read())

    reader = threading.Thread(target=listen)
    reader.start()
    audio = noise(30_000)
    with os.fdopen(sending, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with Outputs({"target": STDOUT}, 44_100, 2, Encoding("wav", 16), clip, software="us") as outputs:
            for at in range(0, 30_000, 7000):
                outputs.write({"target": audio[:, at : at + 7000]})
            outputs.commit()
    reader.join()
    (content,) = heard
    assert content[4:8] == b"\xff" * 4
    assert content[-2 * 2 * 30_000 - 4 :][:4] == b"\xff" * 4
    with piped_in(content, monkeypatch), Source(Path("-")) as source:
        np.testing.assert_array_equal(np.concatenate(list(source.blocks(1)), 1), on_grid(audio, 16))


def test_stdout_that_is_a_file_gets_a_finished_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for mode, stated in (("w", 30_000 * 4), ("a", 2**32 - 1)):
        path = tmp_path / f"{mode}.wav"
        with path.open(mode) as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            write(STDOUT, noise(30_000), 44_100, Encoding("wav", 16))
        assert struct.unpack("<I", path.read_bytes()[-30_000 * 4 - 4 :][:4]) == (stated,)
        np.testing.assert_array_equal(read(path), on_grid(noise(30_000), 16))


def test_stdout_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    receiving, sending = os.pipe()
    os.close(receiving)
    with io.TextIOWrapper(os.fdopen(sending, "wb", buffering=0)) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(OutputError, match="the output pipe was closed"):
            write(STDOUT, noise(30_000), 44_100, Encoding("wav", 16))
    monkeypatch.undo()
    with pytest.raises(OutputError, match="WAV alone"):
        Outputs({"target": STDOUT}, 44_100, 2, Encoding("flac", 16))


# What goes out

LOSSLESS = [
    Encoding("wav", 16),
    Encoding("wav", 24),
    Encoding("wav", 32),
    Encoding("wav"),
    Encoding("flac", 16),
    Encoding("flac", 24),
]


@settings(max_examples=60, deadline=None)
@given(
    encoding=st.sampled_from(LOSSLESS),
    rate=st.sampled_from([8000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 88_200, 96_000, 192_000]),
    channels=st.integers(1, 32),
    samples=st.one_of(st.integers(1, 20), st.integers(21, 40_000)),
    blocks=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_what_is_written_is_read_again_and_parts_add_up(
    tmp_path_factory: pytest.TempPathFactory,
    encoding: Encoding,
    rate: int,
    channels: int,
    samples: int,
    blocks: int,
    seed: int,
) -> None:
    folder, channels = tmp_path_factory.mktemp("trip"), min(channels, 8 if encoding.format == "flac" else 32)
    mixture = on_grid(noise(samples, channels, 0.2, seed).clip(-0.99, 0.99), encoding.bits)
    target = on_grid(mixture * np.float32(0.37), encoding.bits)
    paths = {part: folder / f"{part}.{encoding.format}" for part in ("target", "residual")}
    with Outputs(paths, rate, channels, encoding) as outputs:
        for at in np.array_split(np.arange(samples), min(blocks, samples)):
            outputs.write({"target": target[:, at], "residual": (mixture - target)[:, at]})
        assert outputs.commit() == writers.Written({"target": 0, "residual": 0}, 1.0)
    back = {part: read(path) for part, path in paths.items()}
    for part, path in paths.items():
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.frames) == (rate, channels, samples), part
        assert info.subtype == (f"PCM_{encoding.bits}" if encoding.bits else "FLOAT")
    np.testing.assert_array_equal(back["target"], target)
    np.testing.assert_array_equal(back["residual"], mixture - target)
    total = back["target"].astype(np.float64) + back["residual"]
    np.testing.assert_allclose(total, mixture, rtol=0, atol=0 if encoding.bits else 1e-7)
    shutil.rmtree(folder)


@pytest.mark.parametrize("form", ["ogg", "opus", "mp3"])
@pytest.mark.parametrize("samples", [1, 1000, 48_001])
def test_lossy_formats_keep_length_and_place(tmp_path: Path, form: str, samples: int) -> None:
    sine = 0.2 * np.sin(np.arange(samples) * 0.1, dtype=np.float32)
    path, audio = tmp_path / f"x.{form}", noise(samples, level=0.01) + sine
    write(path, audio, 48_000, Encoding(form))
    back = read(path)
    assert back.shape == audio.shape
    if samples > 10_000:
        error = 10 * np.log10(np.square(back - audio).mean() / np.square(audio).mean())
        assert error < -20


@pytest.mark.parametrize("encoding", [*LOSSLESS, Encoding("ogg"), Encoding("opus"), Encoding("mp3")], ids=str)
def test_tags_and_software_are_kept(tmp_path: Path, encoding: Encoding) -> None:
    path, software = tmp_path / f"x.{encoding.format}", "clapsep 0.2.0 key=" + 40 * "é"
    write(path, noise(5000), 48_000, encoding, tags={**TAGS, "license": "CC0"}, software=software)
    assert read_software(path) == software
    with Source(path) as source:
        assert source.tags == (TAGS if encoding.format in ("wav", "mp3") else {**TAGS, "license": "CC0"})
    longest = "x" * SOFTWARE_BYTES
    write(path, noise(5000), 48_000, encoding, software=longest, overwrite=True)
    assert read_software(path) == longest
    with pytest.raises(ValueError, match="100 bytes"):
        Outputs({"only": path}, 48_000, 2, encoding, software=longest + "x", overwrite=True)


def test_software_of_what_has_none(tmp_path: Path, recording: Callable[..., Path]) -> None:
    assert read_software(recording("16.wav")) == ""
    assert read_software(tmp_path / "none.wav") == ""
    (tmp_path / "text.wav").write_text("I am not audio")
    assert read_software(tmp_path / "text.wav") == ""


def test_beyond_four_gigabytes_a_wav_is_an_rf64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wav, "LIMIT_BYTES", 100_000)
    for samples, form in ((10_000, "WAV"), (30_000, "RF64")):
        path = tmp_path / f"{form}.wav"
        write(path, noise(samples, 3), 48_000, Encoding("wav", 24), tags=TAGS)
        info = soundfile.info(path)
        assert (info.format, info.frames, info.channels) == (form, samples, 3)
        np.testing.assert_array_equal(read(path), on_grid(noise(samples, 3), 24))
        with path.open("rb") as stream:
            piped = wav.WavStream(stream, "it", stream.read(12))
            np.testing.assert_array_equal(piped.read(samples), on_grid(noise(samples, 3), 24))


@dataclass
class Like:
    rate: int = 48_000
    channels: int = 2
    bits: int | None = 16


@pytest.mark.parametrize(
    ("form", "subtype", "like", "expected"),
    [
        ("wav", None, Like(), Encoding("wav", 16)),
        ("wav", None, Like(bits=24), Encoding("wav", 24)),
        ("wav", None, Like(bits=32), Encoding("wav", 32)),
        ("wav", None, Like(bits=None), Encoding("wav", None)),
        ("wav", "pcm16", Like(bits=None), Encoding("wav", 16)),
        ("wav", "float", Like(channels=32, rate=192_000), Encoding("wav", None)),
        ("flac", None, Like(), Encoding("flac", 16)),
        ("flac", None, Like(bits=32), Encoding("flac", 24)),
        ("flac", None, Like(bits=None), Encoding("flac", 24)),
        ("flac", "pcm24", Like(channels=8, rate=192_000), Encoding("flac", 24)),
        ("ogg", None, Like(channels=6, rate=192_000), Encoding("ogg", None)),
        ("opus", None, Like(), Encoding("opus", None)),
        ("mp3", None, Like(rate=44_100), Encoding("mp3", None)),
        ("flac", "float", Like(), "flac cannot hold it; it holds pcm16, pcm24"),
        ("flac", "pcm32", Like(), "flac cannot hold it"),
        ("flac", None, Like(channels=9), "flac cannot hold 9 channels at 48000 Hz"),
        ("mp3", None, Like(channels=6), "mp3 cannot hold 6 channels"),
        ("mp3", None, Like(rate=96_000), "mp3 cannot hold 2 channels at 96000 Hz"),
        ("opus", None, Like(rate=44_100), "opus cannot hold 2 channels at 44100 Hz"),
        ("mp3", "pcm16", Like(), "mp3 is lossy"),
        ("aac", None, Like(), "no output format 'aac'"),
        ("wav", "pcm8", Like(), "no subtype 'pcm8'"),
    ],
)
def test_what_formats_can_hold(form: str, subtype: str | None, like: Like, expected: Encoding | str) -> None:
    if isinstance(expected, Encoding):
        assert choose_encoding(form, subtype, like.rate, like.channels, like.bits) == expected
        return
    with pytest.raises(OutputError, match=expected) as caught:
        choose_encoding(form, subtype, like.rate, like.channels, like.bits)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["wav", "flac", "ogg", "mp3"])
def test_samples_over_full_scale(tmp_path: Path, form: str) -> None:
    encoding = Encoding(form, 16 if form in ("wav", "flac") else None)
    loud = noise(20_000, level=0.9)
    parts = {"target": loud, "residual": on_grid(loud / 4, 16)}
    over = int(np.count_nonzero(np.abs(loud) > 1))
    paths = {part: tmp_path / f"{part}.{form}" for part in parts}
    with Outputs(paths, 48_000, 2, encoding, "warn") as outputs:
        outputs.write(parts)
        warned = outputs.commit()
    assert warned.clipped["target"] == pytest.approx(over, abs=2)
    assert warned.gain == 1
    with Outputs(paths, 48_000, 2, encoding, "rescale", overwrite=True) as outputs:
        for half in (slice(0, 9000), slice(9000, None)):
            outputs.write({part: audio[:, half] for part, audio in parts.items()})
        rescaled = outputs.commit()
    assert rescaled.clipped == {"target": 0, "residual": 0}
    assert rescaled.gain == pytest.approx(1 / np.abs(loud).max(), rel=1e-4)
    if encoding.bits:
        for part, audio in parts.items():
            np.testing.assert_allclose(read(paths[part]), audio * rescaled.gain, rtol=0, atol=0.51 / 32768)
        assert np.abs(read(paths["target"])).max() >= 32767 / 32768
    before = {path: path.read_bytes() for path in paths.values()}
    with (
        pytest.raises(OutputError, match=r"would clip.*--clip rescale"),
        Outputs(paths, 48_000, 2, encoding, "error", overwrite=True) as outputs,
    ):
        outputs.write(parts)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_rescaled_the_loudest_sample_fits_exactly(tmp_path: Path, bits: int) -> None:
    for seed in range(60):
        loud = noise(2000, 1, 0.5, seed)
        loud[0, 777] = 2.5 + seed / 100
        with Outputs({"a": tmp_path / "x.wav"}, 8000, 1, Encoding("wav", bits), "rescale", overwrite=True) as outputs:
            outputs.write({"a": loud})
            assert outputs.commit().clipped == {"a": 0}
        peak = soundfile.read(tmp_path / "x.wav", dtype="int32")[0].max() >> (32 - bits)
        assert 2 ** (bits - 1) - 2 <= peak < 2 ** (bits - 1)


@pytest.mark.parametrize(("channels", "speakers"), [(6, 0x3F), (6, 0x60F), (4, 0), (2, 0x600), (2, 0x3), (3, None)])
@pytest.mark.parametrize("encoding", [Encoding("wav", 16), Encoding("wav", 24), Encoding("wav", 32), Encoding("wav")])
def test_speakers_are_kept(tmp_path: Path, encoding: Encoding, channels: int, speakers: int | None) -> None:
    path, audio = tmp_path / "mix.wav", on_grid(noise(5000, channels), encoding.bits)
    write(path, audio, 48_000, encoding, speakers=speakers, tags=TAGS)
    np.testing.assert_array_equal(read(path), audio)
    extensible = soundfile.info(path).format == "WAVEX"
    assert extensible == (speakers is not None and speakers != 0x3)
    with path.open("rb") as stream, Source(path) as source:
        piped = wav.WavStream(stream, "it", stream.read(12))
        assert source.speakers == piped.speakers == (speakers if extensible else None)
        np.testing.assert_array_equal(piped.read(5000), audio)


@needs_av
@pytest.mark.parametrize("form", ["ogg", "opus", "flac"])
@pytest.mark.parametrize("channels", [3, 5, 6, 7, 8])
def test_channels_keep_their_speakers_in_formats_of_another_order(tmp_path: Path, form: str, channels: int) -> None:
    path, time = tmp_path / f"mix.{form}", np.arange(48_000) / 48_000
    tones = [30 + 20 * n for n in range(channels)]  # which are low enough for a subwoofer
    audio = np.stack([0.1 * np.sin(2 * np.pi * tone * time) for tone in tones]).astype(np.float32)
    write(path, audio, 48_000, Encoding(form, 16 if form == "flac" else None))

    def heard(audio: Audio) -> list[int]:
        return [int(np.abs(np.fft.rfft(channel[:48_000], 48_000)).argmax()) for channel in audio]

    assert heard(read(path)) == tones
    with Source(path) as source:
        speakers = source.speakers
    with path.open("rb") as file, contextlib.closing(decoders.AvDecoder(file, "it")) as decoder:
        assert heard(np.asarray(decoder.read(48_000))) == tones
        assert decoder.speakers in (speakers, 0x60F, 0x607)  # its "side" is our "back"


def test_the_speakers_of_a_flac_are_those_of_its_format(tmp_path: Path) -> None:
    write(tmp_path / "mix.flac", noise(5000, 6), 48_000, Encoding("flac", 16))
    with Source(tmp_path / "mix.flac") as source:
        assert source.speakers == 0x3F


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_what_fits_is_not_rescaled(tmp_path: Path, bits: int) -> None:
    full = np.array([[-1, 1 - 2.0 ** (1 - min(bits, 24)), 0.25]], np.float32)
    for clip in ("warn", "rescale", "error"):
        with Outputs({"a": tmp_path / f"{clip}.wav"}, 8000, 1, Encoding("wav", bits), clip) as outputs:
            outputs.write({"a": full})
            assert outputs.commit() == writers.Written({"a": 0}, 1.0)
        np.testing.assert_array_equal(read(tmp_path / f"{clip}.wav"), full)
    with Outputs({"a": tmp_path / "over.wav"}, 8000, 1, Encoding("wav", bits), "rescale") as outputs:
        outputs.write({"a": 3 * full})
        assert outputs.commit().clipped == {"a": 0}
    assert np.abs(read(tmp_path / "over.wav")).max() <= 1


def test_float_outputs_hold_anything(tmp_path: Path) -> None:
    loud = noise(1000, level=9)
    for clip in ("warn", "rescale", "error"):
        with Outputs({"a": tmp_path / f"{clip}.wav"}, 8000, 2, Encoding("wav"), clip) as outputs:
            outputs.write({"a": loud})
            assert outputs.commit() == writers.Written({"a": 0}, 1.0)
        np.testing.assert_array_equal(read(tmp_path / f"{clip}.wav"), loud)


@pytest.mark.parametrize("form", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("clip", ["warn", "rescale"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, AudioError, SystemExit])
def test_without_commit_nothing_remains(tmp_path: Path, form: str, clip: str, error: type[BaseException]) -> None:
    paths = {part: tmp_path / "new" / part / f"x.{form}" for part in ("target", "residual")}
    encoding = Encoding(form, 16 if form in ("wav", "flac") else None)

    def fail() -> None:
        with Outputs(paths, 48_000, 2, encoding, clip) as outputs:  # type: ignore[arg-type]
            outputs.write(dict.fromkeys(paths, noise(5000)))
            raise error

    with pytest.raises(error):
        fail()
    assert not any(tmp_path.iterdir())


def test_all_parts_get_their_names_or_none(tmp_path: Path) -> None:
    paths = {part: tmp_path / f"{part}.wav" for part in ("a", "b", "c")}
    with Outputs(paths, 8000, 2, Encoding("wav", 16)) as outputs:
        outputs.write(dict.fromkeys(paths, noise(5000)))
        paths["b"].write_text("came in between")
        with pytest.raises(OutputError, match=r"b\.wav: exists already"):
            outputs.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["b.wav"]
    assert paths["b"].read_text() == "came in between"
    with pytest.raises(OutputError, match="exists already; use --overwrite"):
        Outputs(paths, 8000, 2, Encoding("wav", 16))
    with Outputs(paths, 8000, 2, Encoding("wav", 16), overwrite=True) as outputs:
        outputs.write(dict.fromkeys(paths, noise(5000)))
        outputs.commit()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "b.wav", "c.wav"]


def test_parts_of_one_name_and_blocks_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="target and residual would be written to one file"):
        Outputs(dict.fromkeys(("target", "residual"), tmp_path / "x.wav"), 8000, 2, Encoding("wav", 16))
    for form, clip in (("wav", "warn"), ("wav", "rescale"), ("flac", "error")):
        path = tmp_path / f"{clip}.{form}"
        with Outputs({"a": path}, 8000, 2, Encoding(form, 16), clip) as outputs:  # type: ignore[arg-type]
            for samples in (0, 100, 0):
                outputs.write({"a": noise(samples)})
            outputs.commit()
        np.testing.assert_array_equal(read(path), on_grid(noise(100), 16))


def test_a_folder_that_another_output_came_into_stays(tmp_path: Path) -> None:
    first = Outputs({"a": tmp_path / "new" / "a.wav"}, 8000, 2, Encoding("wav", 16))
    write(tmp_path / "new" / "b.wav", noise(100), 8000, Encoding("wav", 16))
    first.__exit__(None, None, None)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["b.wav"]


@pytest.mark.parametrize("form", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("clip", ["warn", "rescale"])
def test_a_disk_without_room(tmp_path: Path, form: str, clip: str) -> None:
    """In a process of its own, whose files may not grow beyond 20 kB."""
    code = f"""
import resource, sys
from pathlib import Path
import numpy as np
from clapsep_cli.audio.encoding import Encoding
from clapsep_cli.errors import OutputError
from clapsep_cli.audio.writers import Outputs
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
audio = np.random.default_rng(0).standard_normal((2, 48_000)).astype("f")
encoding = Encoding({form!r}, 16 if {form!r} in ("wav", "flac") else None)
try:
    with Outputs({{"a": Path({str(tmp_path / "new" / "a")!r})}}, 48_000, 2, encoding, {clip!r}) as outputs:
        for _ in range(20):
            outputs.write({{"a": audio}})
        outputs.commit()
except OutputError as error:
    sys.exit(str(error))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 1
    assert "writing failed (File too large)" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["file.txt/x.wav", "folder"])
def test_outputs_that_cannot_be(tmp_path: Path, where: str) -> None:
    (tmp_path / "file.txt").write_text("not a folder")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=where.split("/")[0]):
        Outputs({"a": tmp_path / "new" / "a.wav", "b": tmp_path / where}, 8000, 2, Encoding("wav", 16), overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


# PyAV


def encode(path: Path, codec: str = "", seconds: float = 2.0, channels: int = 2) -> Audio:
    """Make a media file with PyAV; what is in it."""
    audio = on_grid(noise(round(48_000 * seconds), channels), 16)
    media_files.encode(path, audio, 48_000, codec, TAGS)
    return audio


LOSSY_MEDIA = ["aac.m4a", "libopus.webm", "aac.mkv", "wmav2.wma", "aac.mp4", "aac.aac", "libmp3lame.avi", "ac3.ac3"]
LOSSLESS_MEDIA = ["alac.m4a", "flac.mkv", "wavpack.wv", "pcm_s16le.mkv"]


@pytest.fixture(scope="session")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Audio]]:
    """Makes a media file once, by codec and suffix; its path, and what is in it."""
    folder = tmp_path_factory.mktemp("media")

    @functools.cache
    def make(name: str) -> tuple[Path, Audio]:
        return folder / name, encode(folder / name, name.split(".")[0])

    return make


@needs_av
@pytest.mark.parametrize("name", [*LOSSY_MEDIA, *LOSSLESS_MEDIA])
def test_media_files(medium: Callable[[str], tuple[Path, Audio]], name: str) -> None:
    path, audio = medium(name)
    with Source(path) as source:
        assert (source.rate, source.channels) == (48_000, 2)
        assert source.bits == (None if name in LOSSY_MEDIA else 16)
        if name not in ("aac.aac", "ac3.ac3", "libmp3lame.avi"):
            assert source.tags["title"] == TAGS["title"]
        if name != "aac.aac":
            assert abs(source.frames - audio.shape[1]) <= 0.1 * 48_000
        got = np.concatenate(list(source.blocks(0.3)), 1)
    if name in LOSSY_MEDIA:
        assert abs(got.shape[1] - audio.shape[1]) < 0.1 * 48_000
    else:
        np.testing.assert_array_equal(got, audio)
    np.testing.assert_array_equal(read(path, 0.5, 1.25), got[:, 24_000:60_000])
    assert "so it has no end at 9 s" in refused(path, end=9)


@needs_av
@pytest.mark.parametrize(
    "name", ["aac.m4a", "aac.mkv", "libopus.webm", "wmav2.wma", "libmp3lame.avi", "ac3.ac3", *LOSSLESS_MEDIA]
)
def test_media_files_that_were_cut_short_are_reported(
    medium: Callable[[str], tuple[Path, Audio]], tmp_path: Path, name: str
) -> None:
    (whole_path, audio), path = medium(name), tmp_path / name
    whole = whole_path.read_bytes()
    path.write_bytes(whole[: int(0.7 * len(whole))])
    line = refused(path)
    assert "cut short" in line or "damaged after" in line
    assert "--lenient" in line
    with Source(path, lenient=True) as source:
        got = np.concatenate(list(source.blocks(0.3)), 1).shape[1]
        assert len(source.notes) >= 1
    assert 0.45 < got / audio.shape[1] < 0.8


@needs_av
@pytest.mark.parametrize("name", ["flac.mkv", "wavpack.wv", "ac3.ac3"])
def test_one_flipped_bit_is_reported_where_the_codec_has_checksums(
    medium: Callable[[str], tuple[Path, Audio]], tmp_path: Path, name: str
) -> None:
    whole, path = medium(name)[0].read_bytes(), tmp_path / name
    for share in np.linspace(0.2, 0.8, 16):
        data = bytearray(whole)
        data[int(share * len(data))] ^= 0x40
        path.write_bytes(data)
        assert "damaged" in refused(path)


@needs_av
@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("codec", ["pcm_s{}le", "wavpack", "flac", "alac"])
def test_media_files_of_more_than_16_bits_are_exact(tmp_path: Path, codec: str, bits: int) -> None:
    if bits == 32 and codec in ("flac", "alac"):
        pytest.skip("PyAV does not encode it")
    integers = np.random.default_rng(0).integers(-(2**31), 2**31, (2, 20_000)) >> (32 - bits) << (32 - bits)
    path = tmp_path / "mix.mkv"
    media_files.encode(path, integers * 2.0**-31, 48_000, codec.format(bits), depth=32)
    with Source(path) as source:
        assert source.bits == (32 if codec == "wavpack" else bits)  # which does not tell
        got = np.concatenate(list(source.blocks(0.3)), 1)
    np.testing.assert_array_equal(got * 2.0**31, integers)


@needs_av
def test_films(tmp_path: Path) -> None:
    """Their sound is read, and may end before the pictures do."""
    path = tmp_path / "film.mkv"
    audio = on_grid(noise(96_000), 16)
    media_files.encode(path, audio, 48_000, "flac", pictures=20)
    np.testing.assert_array_equal(read(path), audio)
    media_files.encode(tmp_path / "silent.mp4", pictures=20)
    assert "has no sound" in refused(tmp_path / "silent.mp4")


@needs_av
def test_the_sound_track_of_a_film_is_chosen_or_told(tmp_path: Path) -> None:
    path, tracks = tmp_path / "film.mkv", [on_grid(noise(96_000, seed=seed), 16) for seed in range(3)]
    media_files.encode(path, tracks[0], 48_000, "flac", further=tracks[1:])
    for number, audio in enumerate(tracks, 1):
        with Source(path, stream=number) as source:
            assert source.notes == []
            np.testing.assert_array_equal(np.concatenate(list(source.blocks(0.3)), 1), audio)
    with Source(path) as source:
        (note,) = source.notes
        np.testing.assert_array_equal(np.concatenate(list(source.blocks(0.3)), 1), tracks[0])
    assert "3 sound tracks (1: flac stereo, 2: flac stereo, 3: flac stereo); took 1, see --stream" in note
    assert "has 3 sound tracks, so no --stream 4" in refused(path, stream=4)


@needs_av
@pytest.mark.parametrize("name", ["-x.m4a", "concat:a|b.m4a", "http:x.m4a", "pipe:0.m4a", "%03d [x] 'y'.m4a", "雨.m4a"])
def test_names_are_nothing_but_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    audio = encode(tmp_path / name, "alac")
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(read(Path(name)), audio)


@needs_av
@pytest.mark.parametrize(
    "script",
    [
        "ffconcat version 1.0\nfile secret.m4a\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nsecret.m4a\n#EXT-X-ENDLIST\n",
    ],
)
def test_no_other_file_is_read_than_the_one_named(tmp_path: Path, script: str) -> None:
    encode(tmp_path / "secret.m4a", "alac")
    for name in ("list.m4a", "list.m3u8", "list.wav"):
        (tmp_path / name).write_text(script)
        assert "cannot be read as audio" in refused(tmp_path / name)


def test_without_a_decoder_a_line_says_which_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recording: Callable[..., Path]
) -> None:
    monkeypatch.setattr(decoders, "has_av", lambda: False)
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x20ftypM4A ")
    assert 'takes PyAV: pip install "clapsep[av]"' in refused(tmp_path / "a.m4a")
    (tmp_path / "a.wav").write_text("I am not audio")
    assert "PyAV" not in refused(tmp_path / "a.wav")
    assert recordings(tmp_path) == [tmp_path / "a.wav"]
    monkeypatch.setattr(decoders, "has_av", lambda: True)
    assert recordings(tmp_path) == [tmp_path / "a.m4a", tmp_path / "a.wav"]
    assert recordings(tmp_path / "a.m4a") == [tmp_path / "a.m4a"]


def test_read_mono(recording: Callable[..., Path]) -> None:
    path = recording("16.wav")
    expected = read(path).mean(0)
    np.testing.assert_array_equal(read_mono(path, 48_000), expected)
    np.testing.assert_array_equal(read_mono(path, 32_000), to_rate(expected, 48_000, 32_000))
    np.testing.assert_array_equal(read_mono(path, 32_000, 0.5, 0.75), to_rate(expected[24_000:36_000], 48_000, 32_000))


def test_mangled_recordings_end_with_one_line_and_leave_nothing() -> None:
    """The first hundred of `fuzz_audio.py`."""
    outcomes, found = fuzz_audio.fuzz(100, seed=0)
    assert not found
    assert sum(outcomes.values()) == 100
    assert 10 < outcomes["read"] < 60

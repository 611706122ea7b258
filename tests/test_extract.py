"""Tests `clapsep extract` option by option: files, messages and exit codes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import media_files
import numpy as np
import pytest
import soundfile
import torch
from conftest import Clapsep, Done, Fixed, Stub
from recordings import Audio, names, noise, read
from stand_ins import Moody
from torch import Tensor

from clapsep_cli.errors import ModelError
from clapsep_cli.models.base import Separator
from clapsep_cli.store import library
from clapsep_cli.store.checkpoint import Model

ROOT = Path(__file__).parents[1]
RATE = 16_000


@pytest.fixture
def mix(tmp_path: Path) -> Path:
    path = tmp_path / "mix.wav"
    soundfile.write(path, noise(3 * RATE, 2), RATE, "PCM_16")
    return path


@pytest.fixture
def separator() -> Separator:
    return Moody()


@pytest.fixture
def model(separator: Separator) -> Model:
    return Stub(separator)


@pytest.fixture
def stub(clapsep: Clapsep, tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """`clapsep extract` in `tmp_path`, with a model that takes no time."""
    monkeypatch.setattr(library, "load_model", lambda *_, **__: model)
    return lambda *arguments: clapsep("extract", *arguments, cwd=tmp_path)


@pytest.fixture
def unloaded(clapsep: Clapsep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """`clapsep extract`, where no model can be had: for what has to be found out before."""

    def load(*_: object, **__: object) -> Model:
        raise ModelError("a model was loaded")

    monkeypatch.setattr(library, "load_model", load)
    return lambda *arguments: clapsep("extract", *arguments, cwd=tmp_path)


# What is read


@pytest.mark.parametrize(
    ("arguments", "first", "last"),
    [
        (["--start", "1.5"], 1.5, 3),
        (["--end", "0:01"], 0, 1),
        (["--start", "0:00:00.25", "--end", "2.75"], 0.25, 2.75),
    ],
)
def test_a_part_of_a_recording(
    stub: Callable[..., Done], mix: Path, arguments: list[str], first: float, last: float
) -> None:
    done = stub("mix.wav", "--pos", "dog", *arguments)
    assert done.returncode == 0
    parts = [read(mix.with_name(f"mix.{part}.wav")) for part in ("target", "residual")]
    np.testing.assert_array_equal(sum(parts), read(mix)[round(first * RATE) : round(last * RATE)])


def test_what_is_damaged_is_taken_leniently_with_a_warning(stub: Callable[..., Done], mix: Path) -> None:
    whole = mix.read_bytes()
    mix.write_bytes(whole[: len(whole) - RATE])
    done = stub("mix.wav", "--pos", "dog")
    assert done.returncode == 1
    assert "--lenient reads the rest" in done.stderr
    assert names(mix.parent) == ["mix.wav"]
    done = stub("mix.wav", "--pos", "dog", "--lenient", "--json")
    assert done.returncode == 0
    assert "the last 0.25 s are missing; the rest was read" in done.stderr
    assert "the last 0.25 s are missing" in json.loads(done.stdout)["notes"][0]
    assert len(read(mix.with_name("mix.target.wav"))) == 2.75 * RATE
    for more in ([], ["--lenient"]):  # what is sound does not depend on it
        assert stub("mix.wav", "--pos", "dog", "--skip-existing", *more).stdout.startswith("mix.wav: done before")


def test_a_span_is_heard_on_the_sound_track_that_is_separated(
    clapsep: Clapsep, tmp_path: Path, tiny_folder: Path
) -> None:
    pytest.importorskip("av")
    tracks = [noise(2, 2 * RATE, seed=seed) for seed in range(2)]
    media_files.encode(tmp_path / "film.mkv", tracks[0], RATE, "flac", further=tracks[1:])
    soundfile.write(tmp_path / "alone.wav", np.rint(tracks[1].T * 2**15).astype(np.int16), RATE, "PCM_16")
    asked = ["--pos-span", "0.5-1.5", "--model", tiny_folder]
    assert clapsep("extract", "alone.wav", *asked, cwd=tmp_path).returncode == 0
    done = clapsep("extract", "film.mkv", "--stream", "2", *asked, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("target", "residual"):
        np.testing.assert_array_equal(read(tmp_path / f"film.{part}.wav"), read(tmp_path / f"alone.{part}.wav"))
    done = clapsep("extract", "film.mkv", "--overwrite", *asked, cwd=tmp_path)
    assert "film.mkv: has 2 sound tracks" in done.stderr
    assert np.any(read(tmp_path / "film.target.wav") != read(tmp_path / "alone.target.wav"))
    done = clapsep("extract", "alone.wav", "--stream", "2", "--overwrite", *asked, cwd=tmp_path)
    assert (done.returncode, "has 1 sound track, so no --stream 2" in done.stderr) == (1, True)


def test_anything_but_wav_on_stdin_is_read_too(mix: Path) -> None:
    for form, subtype in (("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III")):
        file = io.BytesIO()
        soundfile.write(file, read(mix), RATE, subtype, format=form)
        with stand_in(
            "extract", "-", "-o", "-", "--pos", "dog", "-q", cwd=mix.parent, stdin=subprocess.PIPE
        ) as process:
            target, said = process.communicate(file.getvalue())
        assert (process.returncode, said) == (0, b"")
        assert soundfile.info(io.BytesIO(target)).frames == 3 * RATE


def test_very_high_rates(stub: Callable[..., Done], mix: Path) -> None:
    bats = 0.1 * np.random.default_rng(0).standard_normal((500_000, 1))
    soundfile.write(mix.with_name("bats.wav"), bats, 1_000_000, "PCM_16")
    assert stub("bats.wav", "--pos", "bat").returncode == 0
    parts = [read(mix.with_name(f"bats.{part}.wav")) for part in ("target", "residual")]
    np.testing.assert_array_equal(sum(parts), read(mix.with_name("bats.wav")))


@pytest.mark.parametrize("arguments", [[], ["--clip", "rescale"], ["--subtype", "pcm24"], ["--subtype", "float"]])
@pytest.mark.parametrize("channels", [1, 2])
def test_integers_of_32_bits_add_up(stub: Callable[..., Done], mix: Path, channels: int, arguments: list[str]) -> None:
    integers = np.random.default_rng(0).integers(-(2**29), 2**29, (3 * RATE, channels), dtype=np.int32)
    soundfile.write(mix, integers, RATE, "PCM_32")
    assert stub("mix.wav", "--pos", "dog", "--overwrite", *arguments).returncode == 0
    parts = [mix.with_name(f"mix.{part}.wav") for part in ("target", "residual")]
    off = np.abs(sum(read(part) for part in parts) * 2.0**31 - integers.reshape(read(mix).shape))
    written = soundfile.info(parts[0]).subtype
    assert off.max() <= {"PCM_32": 0, "PCM_24": 2**7, "FLOAT": 2**6}[written]
    assert written == ("PCM_32" if "--subtype" not in arguments else "PCM_24" if "pcm24" in arguments else "FLOAT")


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (lambda: np.zeros((5000, 2)), 0, ""),
        (lambda: np.full((5000, 1), 0.25), 0, ""),
        (lambda: 1e-4 * noise(5000, 1), 0, ""),
        (lambda: np.sign(noise(5000, 1)), 0, ""),
        (lambda: noise(1, 1), 0, ""),
        (lambda: noise(3000, 32), 0, ""),
        (lambda: np.where(np.arange(5000) == 700, np.inf, 0.1)[:, None], 1, "sample 700 "),
        (lambda: np.where(np.arange(5000) == 4999, np.nan, 0.1)[:, None], 1, "sample 4999 "),
        (lambda: 1e30 * noise(5000, 1), 1, "which is no audio"),
        (lambda: 1e14 * noise(5000, 1), 0, ""),
        (lambda: np.zeros((0, 1)), 1, "no samples"),
    ],
)
def test_odd_recordings_have_defined_results(
    clapsep: Clapsep, tmp_path: Path, tiny_folder: Path, make: Callable[[], Audio], code: int, message: str
) -> None:
    soundfile.write(tmp_path / "odd.wav", make(), 44_100, "FLOAT")
    done = clapsep("extract", "odd.wav", "--pos", "dog", "--model", tiny_folder, "--json", cwd=tmp_path)
    assert (done.returncode, message in done.stderr) == (code, True)
    assert "Traceback" not in done.stderr
    if code:
        assert names(tmp_path) == ["odd.wav"]
        return
    parts = [read(tmp_path / f"odd.{part}.wav") for part in ("target", "residual")]
    mixture = read(tmp_path / "odd.wav")
    np.testing.assert_allclose(sum(parts), mixture, rtol=0, atol=1e-6 * max(1, np.abs(mixture).max()))


def wav(audio: Audio, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio, rate, "PCM_16", format="WAV")
    return file.getvalue()


def stand_in(*arguments: str | Path, cwd: Path, seconds: float = 0, **settings: Any) -> subprocess.Popen[bytes]:
    """The command as a process of its own, with a model that takes so many `seconds` for a window."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(ROOT / "tests" / "stand_ins.py"), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SECONDS": str(seconds)},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings},
    )


def test_from_pipe_to_pipe(stub: Callable[..., Done], mix: Path) -> None:
    """Nothing but audio on stdout, and the very audio that files get."""
    assert stub("mix.wav", "--pos", "dog").returncode == 0
    for extra in (["--subtype", "float"], ["--remove"], ["-q"]):
        with stand_in(
            "extract", "-", "-o", "-", "--pos", "dog", *extra, cwd=mix.parent, stdin=subprocess.PIPE
        ) as process:
            out, errors = process.communicate(mix.read_bytes(), timeout=60)
        assert process.returncode == 0
        expected = read(mix.with_name("mix.residual.wav" if "--remove" in extra else "mix.target.wav"))
        heard, rate = soundfile.read(io.BytesIO(out), dtype="float64")
        assert rate == RATE
        assert heard.shape == expected.shape
        np.testing.assert_allclose(heard, expected, rtol=0, atol=2**-15)
        assert (b"standard input: 3.00 s" in errors) == ("-q" not in extra)
    assert names(mix.parent) == ["mix.residual.wav", "mix.target.wav", "mix.wav"]


def test_a_pipe_may_be_split_into_files_named_after_it(mix: Path) -> None:
    with stand_in("extract", "-", "--pos", "dog", "--json", cwd=mix.parent, stdin=subprocess.PIPE) as process:
        out, errors = process.communicate(mix.read_bytes(), timeout=60)
    assert (process.returncode, errors) == (0, b"")
    assert json.loads(out)["outputs"] == {"target": "stdin.target.wav", "residual": "stdin.residual.wav"}


def test_a_pipe_of_unknown_length(mix: Path) -> None:
    content = bytearray(mix.read_bytes())
    at = content.index(b"data") + 4
    content[4:8] = content[at : at + 4] = b"\xff\xff\xff\xff"
    arguments = ["extract", "-", "-o", "out", "--pos", "dog", "--json", "--progress", "json"]
    with stand_in(*arguments, cwd=mix.parent, stdin=subprocess.PIPE) as process:
        out, errors = process.communicate(bytes(content), timeout=60)
    assert process.returncode == 0
    assert json.loads(out)["seconds"] == 3
    events = [json.loads(line) for line in errors.splitlines()]
    assert {event["total"] for event in events[:-1]} == {None}
    assert events[-2]["seconds"] == 3


def test_a_pipe_that_breaks_off_fails(mix: Path) -> None:
    with stand_in("extract", "-", "-o", "out", "--pos", "dog", cwd=mix.parent, stdin=subprocess.PIPE) as process:
        _, errors = process.communicate(mix.read_bytes()[:50_000], timeout=60)
    assert process.returncode == 1
    assert b"standard input: ends" in errors
    assert names(mix.parent) == ["mix.wav"]


def test_whoever_stops_listening_stops_the_run(mix: Path) -> None:
    soundfile.write(mix, noise(60 * RATE, 2), RATE, "PCM_16")
    with stand_in("extract", "mix.wav", "-o", "-", "--pos", "dog", cwd=mix.parent) as process:
        assert process.stdout is not None
        process.stdout.read(1000)
        process.stdout.close()
        process.stdout = None
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"the output pipe was closed" in errors
    assert b"Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mix.wav", "two.wav", "-o", "-", "--pos", "dog"], "one recording"),
        (["mix.wav", "-o", "-", "--target", "a=dog", "--target", "b=rain"], "one part"),
        (["mix.wav", "-o", "-", "--pos", "dog", "--json"], "--json"),
        (["mix.wav", "-o", "-", "--pos", "dog", "--plot"], "--plot"),
        (["mix.wav", "-o", "-", "--pos", "dog", "--filename", "{stem}.{ext}"], "--filename"),
        (["mix.wav", "-o", "-", "--pos", "dog", "--skip-existing"], "--skip-existing"),
        (["mix.wav", "-o", "-", "--pos", "dog", "-f", "flac"], "WAV alone"),
        (["-", "--pos-span", "0-1"], "standard input"),
        (["-", "mix.wav", "--pos", "dog"], "only input"),
    ],
)
def test_what_pipes_cannot_do(unloaded: Callable[..., Done], mix: Path, arguments: list[str], message: str) -> None:
    shutil.copy(mix, mix.with_name("two.wav"))
    done = unloaded(*arguments)
    assert done.returncode == (1 if "only input" in message else 2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


# What is written


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ([], ["mix.residual.wav", "mix.target.wav"]),
        (["--no-residual"], ["mix.target.wav"]),
        (["--remove"], ["mix.residual.wav"]),
        (["-f", "flac"], ["mix.residual.flac", "mix.target.flac"]),
        (
            ["--filename", "{query}/{stem}-{part}.{ext}"],
            ["dog_not_rain/mix-residual.wav", "dog_not_rain/mix-target.wav"],
        ),
        (["--remove", "--filename", "{stem} ohne {query}.{ext}"], ["mix ohne dog_not_rain.wav"]),
        (["-o", "out/more"], ["out/more/mix.residual.wav", "out/more/mix.target.wav"]),
        (["--target", "Ein-Hund=a dog", "--target", "犬=x"], ["mix.Ein-Hund.wav", "mix.residual.wav", "mix.犬.wav"]),
    ],
)
def test_which_files_are_written(
    stub: Callable[..., Done], mix: Path, arguments: list[str], written: list[str]
) -> None:
    query = [] if "--target" in arguments else ["--pos", "dog"]
    done = stub("mix.wav", *query, "--neg", "rain", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert names(mix.parent) == sorted(["mix.wav", *written])
    for name in written:
        assert name in done.stdout


@pytest.mark.parametrize(
    ("depth", "arguments", "written"),
    [
        ("PCM_U8", [], "PCM_16"),
        ("PCM_16", [], "PCM_16"),
        ("PCM_24", [], "PCM_24"),
        ("FLOAT", [], "FLOAT"),
        ("FLOAT", ["--subtype", "pcm24"], "PCM_24"),
        ("PCM_24", ["--subtype", "pcm16"], "PCM_16"),
        ("PCM_16", ["--subtype", "float"], "FLOAT"),
        ("PCM_24", ["-f", "flac"], "PCM_24"),
        ("FLOAT", ["-f", "flac"], "PCM_24"),
        ("PCM_24", ["-f", "flac", "--subtype", "pcm16"], "PCM_16"),
        ("PCM_16", ["-f", "ogg"], "VORBIS"),
        ("PCM_16", ["-f", "mp3"], "MPEG_LAYER_III"),
    ],
)
def test_depth_and_format(stub: Callable[..., Done], mix: Path, depth: str, arguments: list[str], written: str) -> None:
    soundfile.write(mix, noise(RATE, 1), RATE, depth)
    assert stub("mix.wav", "--pos", "dog", "-o", "out", *arguments).returncode == 0
    for path in (mix.parent / "out").iterdir():
        info = soundfile.info(path)
        assert (info.subtype, info.samplerate, info.channels, info.frames) == (written, RATE, 1, RATE)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-f", "wma"], 2, "wav, flac"),
        (["-f", "flac", "--subtype", "float"], 2, "flac cannot hold it"),
        (["-f", "mp3", "--subtype", "pcm16"], 2, "lossy"),
        (["--subtype", "pcm8"], 2, "pcm16"),
        (["--clip", "hard"], 2, "warn, rescale, error"),
        (["--progress", "much"], 2, "auto, json, none"),
        (["--remove", "--no-residual"], 2, "use one of them"),
        (["--start", "2", "--end", "1"], 2, "--end is 1 s"),
        (["--min-presence", "nan"], 2, "--min-presence"),
        (["--min-presence", "0.1", "--pos", "", "--neg", "rain"], 2, "--pos"),
        (["--filename", "{stem}.{ext}"], 2, "{part}"),
        (["--filename", "../{stem}.{part}.{ext}"], 2, "leads out"),
        (["--query-audio", "none.wav"], 1, "none.wav: no such file"),
        (["--neg-audio", "empty"], 1, "empty: no recordings"),
        (["-o", "taken"], 1, "exists already"),
        (["--manifest", "none.csv"], 2, "either a manifest or recordings"),
        (["--target", "a=dog"], 2, "--target"),
    ],
)
def test_impossible_wishes_are_told_before_a_model_is_loaded(
    unloaded: Callable[..., Done], mix: Path, arguments: list[str], code: int, message: str
) -> None:
    (mix.parent / "empty").mkdir()
    (mix.parent / "taken").mkdir()
    (mix.parent / "taken" / "mix.target.wav").touch()
    before = names(mix.parent)
    done = unloaded("mix.wav", "--pos", "dog", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert names(mix.parent) == before


class TestClip:
    """A square wave's lowest partials alone are louder than the wave."""

    @pytest.fixture
    def separator(self) -> Separator:
        low = torch.zeros(513)
        low[:10] = 1
        return Fixed(low)

    @pytest.fixture
    def loud(self, mix: Path) -> Audio:
        square = np.where(np.arange(32_000) % 200 < 100, 0.999, -0.999)
        soundfile.write(mix, square, 32_000, "PCM_16")
        return read(mix)

    def test_warn(self, stub: Callable[..., Done], mix: Path, loud: Audio) -> None:
        done = stub("mix.wav", "--pos", "dog")
        assert done.returncode == 0
        assert "mix.target.wav: " in done.stderr
        assert "over full scale" in done.stderr

    def test_rescale(self, stub: Callable[..., Done], mix: Path, loud: Audio) -> None:
        done = stub("mix.wav", "--pos", "dog", "--clip", "rescale", "--json")
        told = json.loads(done.stdout)
        assert (done.returncode, done.stderr) == (0, "")
        assert 0.5 < told["gain"] < 1
        target, residual = (read(mix.with_name(f"mix.{part}.wav")) for part in ("target", "residual"))
        assert np.abs(target).max() > 0.999
        np.testing.assert_allclose(target + residual, told["gain"] * loud, rtol=0, atol=2**-15)
        again = stub("mix.wav", "--pos", "dog", "--clip", "rescale", "--overwrite")
        assert f"lowered by {-20 * np.log10(told['gain']):.2f} dB" in again.stdout

    def test_error(self, stub: Callable[..., Done], mix: Path, loud: Audio) -> None:
        done = stub("mix.wav", "--pos", "dog", "--clip", "error")
        assert done.returncode == 1
        assert "--clip rescale" in done.stderr
        assert names(mix.parent) == ["mix.wav"]

    def test_float_holds_it(self, stub: Callable[..., Done], mix: Path, loud: Audio) -> None:
        done = stub("mix.wav", "--pos", "dog", "--clip", "error", "--subtype", "float")
        assert (done.returncode, done.stderr) == (0, "")


def test_tags_are_kept(stub: Callable[..., Done], mix: Path) -> None:
    with soundfile.SoundFile(mix, "w", RATE, 1, "PCM_16") as file:
        file.title, file.artist = "Der Hund", "犬"
        file.write(noise(RATE))
    for form in ("wav", "flac", "ogg"):
        assert stub("mix.wav", "--pos", "dog", "-f", form).returncode == 0
        with soundfile.SoundFile(mix.with_name(f"mix.target.{form}")) as written:
            assert (written.title, written.artist) == ("Der Hund", "犬")
            assert "clapsep" in written.software


def test_pictures(stub: Callable[..., Done], mix: Path) -> None:
    done = stub("mix.wav", "--pos", "dog", "--plot", "--json")
    assert json.loads(done.stdout)["picture"] == "mix.png"
    assert (mix.parent / "mix.png").read_bytes().startswith(b"\x89PNG")


# Folders


@pytest.fixture
def library_of_sounds(tmp_path: Path) -> Path:
    for number, name in enumerate(("a/1.wav", "a/b/2.wav", "3 [live].wav", "犬.flac")):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, noise(6000, 1, seed=number), 8000)
    (tmp_path / "in" / "notes.txt").write_text("not a recording")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "stems"),
    [
        (["-r", "in"], ["3 [live]", "a/1", "a/b/2", "犬"]),
        (["in"], ["3 [live]", "犬"]),
        (["in/**/*.wav"], ["3 [live]", "a/1", "a/b/2"]),
        (["@list.txt"], ["1", "3 [live]"]),
    ],
)
def test_folders_patterns_and_lists(
    stub: Callable[..., Done], library_of_sounds: Path, arguments: list[str], stems: list[str]
) -> None:
    (library_of_sounds / "list.txt").write_text("in/a/1.wav\n# a comment\nin/3 [live].wav\n", encoding="utf-8")
    done = stub(*arguments, "-o", "out", "--pos", "dog", "--json")
    assert done.returncode == 0
    assert {json.loads(line)["status"] for line in done.stdout.splitlines()} == {"done"}
    expected = [f"{stem}.{part}.wav" for stem in stems for part in ("target", "residual")]
    assert names(library_of_sounds / "out") == sorted(expected)


def test_the_model_is_loaded_once_and_what_is_done_is_summed_up(
    clapsep: Clapsep, library_of_sounds: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[object] = []
    monkeypatch.setattr(library, "load_model", lambda *a, **_: [loaded.append(a), model][1])
    arguments = ["extract", "-r", "in", "-o", "out", "--pos", "dog", "--skip-existing"]
    assert clapsep(*arguments, cwd=library_of_sounds).returncode == 0
    assert len(loaded) == 1
    for name in ("犬.target.wav", "a/1.residual.wav"):
        (library_of_sounds / "out" / name).unlink()
    again = clapsep(*arguments, cwd=library_of_sounds)
    assert again.stdout.splitlines()[-1] == "4 recordings: 2 done, 2 done before"
    assert clapsep(*arguments, cwd=library_of_sounds).stdout == "4 recordings: 4 done before\n"
    single = clapsep("extract", "in/犬.flac", "-o", "out", "--pos", "dog", "--skip-existing", cwd=library_of_sounds)
    assert single.stdout == "in/犬.flac: done before\n"


def test_a_manifest_gives_recordings_queries_of_their_own(stub: Callable[..., Done], library_of_sounds: Path) -> None:
    table = library_of_sounds / "jobs.csv"
    table.write_text(
        "file,pos,neg,query_audio\nin/a/1.wav,dog,rain,\nin/a/b/2.wav,,,in/a/1.wav\nin/犬.flac,a;bb,,\n", "utf-8"
    )
    done = stub("--manifest", "jobs.csv", "--neg", "wind", "--json", "-o", "out")
    told = {Path(line["input"]).name: line["queries"]["target"] for line in map(json.loads, done.stdout.splitlines())}
    assert told == {"1.wav": "'dog', not 'rain'", "2.wav": "like 1.wav, not 'wind'", "犬.flac": "'a', 'bb', not 'wind'"}
    assert "out/in/a/b/2.target.wav" in names(library_of_sounds)
    said = stub("--manifest", "jobs.csv", "--neg", "wind", "-o", "again")
    assert "queries of their own" in said.stdout.splitlines()[0]


def test_a_row_that_cannot_be_asked_fails_alone(clapsep: Clapsep, library_of_sounds: Path, tiny_folder: Path) -> None:
    rows = "file,pos,query_audio\nin/a/1.wav,xqzzy,\nin/a/b/2.wav,dog,\nin/犬.flac,,in/bad.wav\n"
    (library_of_sounds / "in" / "bad.wav").write_bytes(b"RIFF")
    (library_of_sounds / "jobs.csv").write_text(rows, "utf-8")
    done = clapsep("extract", "--manifest", "jobs.csv", "--model", tiny_folder, "--json", cwd=library_of_sounds)
    told = {Path(line["input"]).name: line["status"] for line in map(json.loads, done.stdout.splitlines())}
    assert told == {"1.wav": "failed", "2.wav": "done", "犬.flac": "failed"}
    assert done.returncode == 1
    assert "xqzzy" in done.stderr
    assert "bad.wav" in done.stderr


def test_failures_are_told_at_once_and_again_at_the_end(stub: Callable[..., Done], library_of_sounds: Path) -> None:
    (library_of_sounds / "in" / "1 bad.wav").write_bytes(b"RIFF")
    (library_of_sounds / "in" / "2 bad.wav").write_bytes(b"")
    done = stub("-r", "in", "--pos", "dog", "-o", "out")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-3:]
    assert last[0] == "clapsep: 2 of 6 files failed:"
    assert [line.split(":")[0].strip() for line in last[1:]] == [str(Path("in") / f"{n} bad.wav") for n in (1, 2)]
    assert done.stderr.count("1 bad.wav") == 2
    assert done.stdout.splitlines()[-1] == "6 recordings: 4 done, 2 failed"
    assert len(names(library_of_sounds / "out")) == 8


def test_json(clapsep: Clapsep, library_of_sounds: Path, tiny_folder: Path) -> None:
    (library_of_sounds / "in" / "bad.wav").write_bytes(b"RIFF")
    arguments = ["extract", "-r", "in", "--pos", "dog", "--neg", "rain", "--model", tiny_folder, "-o", "out", "--json"]
    done = clapsep(*arguments, "-q", cwd=library_of_sounds)
    told = {Path(line["input"]).name: line for line in map(json.loads, done.stdout.splitlines())}
    assert set(told) == {"1.wav", "2.wav", "3 [live].wav", "犬.flac", "bad.wav"}
    assert told["bad.wav"]["status"] == "failed"
    assert "bad.wav" in told["bad.wav"]["error"]
    good = told["犬.flac"]
    assert good["outputs"] == {part: str(Path("out") / f"犬.{part}.wav") for part in ("target", "residual")}
    assert good["model"] == tiny_folder.name
    assert (good["status"], good["device"], good["revision"]) == ("done", "cpu", "")
    assert good["precision"] in ("float32", "bfloat16")
    assert good["queries"] == {"target": "'dog', not 'rain'"}
    assert good["seconds"] == 6000 / 8000
    assert good["real_time_factor"] == pytest.approx(good["elapsed"] / good["seconds"])
    assert set(good["levels"]) == {"mixture", "target", "residual"}
    level = 10 * np.log10(np.square(read(library_of_sounds / "in" / "犬.flac")).mean())
    assert good["levels"]["mixture"]["rms_db"] == pytest.approx(level, abs=0.01)
    assert set(good["presence"]["target"]) == {"before", "after", "score"}
    assert (good["clipped"], good["gain"], good["picture"]) == ({"target": 0, "residual": 0}, 1.0, None)
    again = clapsep(*arguments, "--skip-existing", cwd=library_of_sounds)
    statuses = sorted(json.loads(line)["status"] for line in again.stdout.splitlines())
    assert statuses == ["failed", *["skipped"] * 4]


def test_presence_is_told_where_it_is_asked_for(clapsep: Clapsep, mix: Path, tiny_folder: Path) -> None:
    common = ["extract", "mix.wav", "--pos", "dog", "--model", tiny_folder, "--overwrite"]
    assert "presence" not in clapsep(*common, cwd=mix.parent).stdout
    assert "presence of target: " in clapsep(*common, "--presence", cwd=mix.parent).stdout
    assert json.loads(clapsep(*common, "--json", "--no-presence", cwd=mix.parent).stdout)["presence"] == {}


def test_min_presence_holds_for_each_of_several_targets(clapsep: Clapsep, tmp_path: Path) -> None:
    """What is not there gets no file, and belongs to the rest: what is written adds up to the recording."""
    shutil.copy(ROOT / "examples" / "mix.flac", tmp_path / "mix.flac")
    common = ["extract", "mix.flac", "--model", "mini", "--min-presence", "0"]
    two = [*common, "--target", "dog=dog barking", "--target", "violin=violin"]
    done = clapsep(*two, "--json", cwd=tmp_path)
    told = json.loads(done.stdout)
    assert (done.returncode, told["status"], told["absent"]) == (0, "done", ["violin"])
    assert told["presence"]["violin"]["score"] < 0 < told["presence"]["dog"]["score"]
    assert sorted(told["outputs"]) == ["dog", "residual"]
    assert sorted(told["levels"]) == ["dog", "mixture", "residual"]
    assert names(tmp_path) == ["mix.dog.wav", "mix.flac", "mix.residual.wav"]
    parts = [read(tmp_path / f"mix.{part}.wav") for part in ("dog", "residual")]
    np.testing.assert_array_equal(sum(parts), read(tmp_path / "mix.flac"))

    said = clapsep(*two, "--overwrite", cwd=tmp_path).stdout
    assert re.search(r"presence of violin: -0\.\d\d, probably not there \(.*\); not written", said)
    assert re.search(r"presence of dog: 0\.\d\d \(likeness [^;]*\)$", said, re.MULTILINE)
    # All of it is left where nothing was found, and only what was found is removed.
    removed = clapsep(*two, "--remove", "-o", "removed", cwd=tmp_path)
    assert removed.returncode == 0
    np.testing.assert_array_equal(read(tmp_path / "removed" / "mix.residual.wav"), parts[1])
    neither = ["--target", "violin=violin", "--target", "trumpet=trumpet", "-o", "neither", "--json"]
    told = json.loads(clapsep(*common, *neither, cwd=tmp_path).stdout)
    assert (told["status"], told["outputs"], told["absent"]) == ("absent", {}, ["violin", "trumpet"])
    assert not (tmp_path / "neither").exists()


def test_a_recording_without_some_of_the_targets_is_skipped_too(clapsep: Clapsep, tmp_path: Path) -> None:
    shutil.copy(ROOT / "examples" / "mix.flac", tmp_path / "mix.flac")
    targets = ["--target", "dog=dog barking", "--target", "violin=violin", "--end", "2"]
    line = ["extract", "mix.flac", "--model", "mini", "--min-presence", "0", "--skip-existing", "--json", *targets]

    def status() -> tuple[str, list[str]]:
        told = json.loads(clapsep(*line, cwd=tmp_path).stdout)
        return told["status"], sorted(told["outputs"])

    assert status() == ("done", ["dog", "residual"])
    assert status() == ("skipped", ["dog", "residual"])
    (marker,) = (tmp_path / "_clapsep").iterdir()
    for damaged in (b"", b'{"absent', b"[]", b"\xff"):
        marker.write_bytes(damaged)
        assert status() == ("done", ["dog", "residual"])
    assert status() == ("skipped", ["dog", "residual"])
    (tmp_path / "mix.dog.wav").unlink()
    assert status() == ("done", ["dog", "residual"])


def test_below_min_presence_nothing_is_written(clapsep: Clapsep, mix: Path, tiny_folder: Path) -> None:
    common = ["extract", "mix.wav", "--pos", "dog", "--model", tiny_folder, "--json", "--min-presence"]
    told = json.loads(clapsep(*common, "9", "-o", "out", cwd=mix.parent).stdout)
    assert (told["status"], told["outputs"]) == ("absent", {})
    score = told["presence"]["target"]["score"]
    assert names(mix.parent) == ["mix.wav"]
    assert not (mix.parent / "out").exists()
    said = clapsep(*(a for a in common if a != "--json"), "9", cwd=mix.parent)
    assert said.returncode == 0
    assert "below --min-presence" in said.stdout
    assert json.loads(clapsep(*common, score, cwd=mix.parent).stdout)["status"] == "done"
    soundfile.write(mix, np.zeros(9000), RATE)
    assert json.loads(clapsep(*common, "-9", "--overwrite", cwd=mix.parent).stdout)["status"] == "absent"


def test_recordings_without_the_target_are_skipped_too(
    stub: Callable[..., Done], library_of_sounds: Path, separator: Moody
) -> None:
    common = ["-r", "in", "--pos", "dog", "--min-presence", "9", "--json", "--skip-existing"]
    for where in (["-o", "out"], []):
        first = stub(*common, *where)
        assert [json.loads(line)["status"] for line in first.stdout.splitlines()] == ["absent"] * 4
        worked = len(separator.batches)
        again = stub(*common, *where)
        told = [json.loads(line) for line in again.stdout.splitlines()]
        assert [(one["status"], one["outputs"]) for one in told] == [("skipped", {})] * 4
        assert len(separator.batches) == worked
    assert len(list((library_of_sounds / "out" / "_clapsep").rglob("*.json"))) == 4
    (library_of_sounds / "in" / "犬.flac").touch()
    changed = [json.loads(line)["status"] for line in stub(*common, "-o", "out").stdout.splitlines()]
    assert sorted(changed) == ["absent", *["skipped"] * 3]
    other = stub(*common, "-o", "out", "--min-presence", "-9").stdout.splitlines()
    assert [json.loads(line)["status"] for line in other] == ["done"] * 4, "markers are of another setting"


def test_progress_for_programs(stub: Callable[..., Done], library_of_sounds: Path) -> None:
    (library_of_sounds / "in" / "bad.wav").write_bytes(b"RIFF")
    done = stub("-r", "in", "--pos", "dog", "-o", "out", "--progress", "json")
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert Counter(event["event"] for event in events) == {"progress": 4, "done": 4, "failed": 1}
    assert {event["total"] for event in events if event["event"] == "progress"} == {0.75}
    assert [event["finished"] for event in events if "finished" in event] == [1, 2, 3, 4, 5]
    quiet = stub("-r", "in", "--pos", "dog", "-o", "again", "--progress", "json", "-q")
    assert all("bad.wav" in line or "failed" in line for line in quiet.stderr.splitlines())
    assert quiet.stdout == ""


def test_a_long_header_is_cut_and_odd_names_cannot_harm_the_terminal(stub: Callable[..., Done], tmp_path: Path) -> None:
    odd = os.fsdecode(b"a\x1b[31m\xff.wav")
    (tmp_path / odd).write_bytes(wav(noise(500, 1)))
    targets = [word for n in range(20) for word in ("--target", f"target-{n}={'x' * 30}{n}")]
    done = stub(odd, *targets)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()[0]) < 250
    assert "…" in done.stdout.splitlines()[0]
    assert "\x1b" not in done.stdout
    assert r"a\x1b[31m\udcff.wav: " in done.stdout
    assert json.loads(stub(odd, "--pos", "dog", "-o", "out", "--json").stdout)["input"] == odd
    assert json.loads(stub(odd, "--pos", "dog", "-o", "out", "--json", "--skip-existing").stdout)["status"] == "skipped"
    (tmp_path / odd).write_bytes(b"RIFF")
    failed = stub(odd, "--pos", "cat", "--overwrite")
    assert r"a\x1b[31m\udcff.wav: " in failed.stderr
    assert "\x1b" not in failed.stderr


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, list[bytes]]]:
    """A terminal's end for a process, and, afterwards, what it showed."""
    ours, theirs = pty.openpty()
    shown: list[bytes] = []
    try:
        yield theirs, shown
        os.close(theirs)
        with contextlib.suppress(OSError):  # which is how a terminal ends
            while block := os.read(ours, 4096):
                shown.append(block)
    finally:
        os.close(ours)


def test_bars_on_a_terminal_take_nothing_from_stdout(library_of_sounds: Path) -> None:
    with terminal() as (end, shown), (library_of_sounds / "out.json").open("wb") as out:
        arguments = ["extract", "-r", "in", "-o", "out", "--pos", "dog", "--json"]
        process = stand_in(*arguments, cwd=library_of_sounds, seconds=0.2, stdout=out, stderr=end)
        assert process.wait(60) == 0
    lines = (library_of_sounds / "out.json").read_text().splitlines()
    assert [json.loads(line)["status"] for line in lines] == ["done"] * 4
    text = b"".join(shown).decode()
    assert "3 [live].wav" in text  # which is not taken for markup
    assert " of 4, " in text
    assert "× real time" in text


# Stopping and going on


@pytest.fixture
def many(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for number in range(24):
        soundfile.write(tmp_path / "in" / f"{number}.wav", noise(9000, 1, seed=number), 8000)
    return tmp_path


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def finished(folder: Path) -> list[str]:
    return [name for name in names(folder) if not name.startswith(".")] if folder.exists() else []


ALL = ["extract", "in", "-o", "out", "--pos", "dog"]


def test_killed_in_the_middle_and_resumed(many: Path, stub: Callable[..., Done]) -> None:
    (many / "in" / "bad.wav").write_bytes(b"RIFF")
    assert stub("in", "-o", "whole", "--pos", "dog").returncode == 1
    with stand_in(*ALL, cwd=many, seconds=0.05) as process:
        until(lambda: len(finished(many / "out")) >= 12)
        process.kill()
    assert any(name.endswith(".partial") for name in names(many / "out"))
    before = {name: (many / "out" / name).stat().st_mtime_ns for name in finished(many / "out")}
    assert 12 <= len(before) < 48
    (many / "out" / ".0.target.wav.1.partial.mine").write_text("of somebody else")
    resumed = stub("in", "-o", "out", "--pos", "dog", "--skip-existing", "--json")
    statuses = [json.loads(line)["status"] for line in resumed.stdout.splitlines()]
    assert resumed.returncode == 1
    assert statuses.count("failed") == 1
    assert statuses.count("skipped") == len({name.split(".")[0] for name in before if "residual" in name})
    (many / "out" / ".0.target.wav.1.partial.mine").unlink()
    assert names(many / "out") == names(many / "whole")
    for name in names(many / "whole"):
        assert (many / "out" / name).read_bytes() == (many / "whole" / name).read_bytes()
    assert sum(before[name] == (many / "out" / name).stat().st_mtime_ns for name in before) >= len(before) - 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_once_it_finishes_the_window_and_leaves_no_debris(many: Path, number: int) -> None:
    with stand_in(*ALL, cwd=many, seconds=0.05) as process:
        until(lambda: len(finished(many / "out")) >= 4)
        process.send_signal(number)
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"stopping after the windows at hand" in errors
    assert b"--skip-existing" in errors
    assert b"Traceback" not in errors
    done = finished(many / "out")
    assert names(many / "out") == done
    assert 4 <= len(done) < 48
    assert len(done) == 2 * len({name.split(".")[0] for name in done})
    assert f"{len(done) // 2} done, ".encode() in out


def test_stopped_twice_it_stops_at_once(many: Path) -> None:
    with stand_in(*ALL, cwd=many, seconds=600) as process:
        until(lambda: len(names(many / "out")) > 0 if (many / "out").exists() else False)
        time.sleep(0.5)  # it is in its first window by now, or about to be
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert b"once more to stop at once" in process.stderr.readline()
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert not (many / "out").exists()


def test_a_pipe_that_brings_nothing_can_be_stopped(many: Path) -> None:
    with stand_in("extract", "-", "-o", "out", "--pos", "dog", cwd=many, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write((many / "in" / "0.wav").read_bytes()[:5000])
        process.stdin.flush()
        until(lambda: (many / "out").exists())
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 130
        process.stdin.close()
    assert not (many / "out").exists()


def test_an_error_of_the_system_while_the_model_works_leaves_no_debris(
    stub: Callable[..., Done], mix: Path, separator: Moody, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(separator, "infer", fail)
    done = stub("mix.wav", "--pos", "dog", "-o", "out")
    assert (done.returncode, done.stderr) == (1, "clapsep: the system: Input/output error\n")
    assert names(mix.parent) == ["mix.wav"]


# Queries


def test_a_span_is_the_query_made_of_that_excerpt(clapsep: Clapsep, mix: Path, tiny_folder: Path) -> None:
    audio = soundfile.read(mix, dtype="int16")[0]
    for name, first, last in (("a", 0.5, 1.25), ("b", 2, 3)):
        soundfile.write(mix.with_name(f"{name}.wav"), audio[round(first * RATE) : round(last * RATE)], RATE)
    common = ["extract", "mix.wav", "--model", tiny_folder, "-o"]
    spans = ["--pos-span", "0.5-1.25", "--pos-span", "0:02-0:03", "--neg-span", "0.5-1.25", "--pos", "dog"]
    shots = ["--query-audio", "a.wav", "--query-audio", "b.wav", "--neg-audio", "a.wav", "--pos", "dog"]
    assert clapsep(*common, "spans", *spans, cwd=mix.parent).returncode == 0
    assert clapsep(*common, "shots", *shots, cwd=mix.parent).returncode == 0
    assert clapsep(*common, "text", "--pos", "dog", cwd=mix.parent).returncode == 0
    spanned, shot, text = (read(mix.parent / folder / "mix.target.wav") for folder in ("spans", "shots", "text"))
    np.testing.assert_array_equal(spanned, shot)
    assert np.abs(spanned - text).max() > 0


def test_a_target_by_a_span_is_that_of_the_excerpt(clapsep: Clapsep, mix: Path, tiny_folder: Path) -> None:
    soundfile.write(mix.with_name("a.wav"), soundfile.read(mix, dtype="int16")[0][RATE // 2 : 2 * RATE], RATE)
    common = ["extract", "mix.wav", "--model", tiny_folder, "--target", "siren=siren", "-o"]
    for folder, query in (("span", "0.5-0:02"), ("shot", "a.wav")):
        done = clapsep(*common, folder, "--target", f"here={query}", cwd=mix.parent)
        assert done.returncode == 0, done.stderr
    for part in ("here", "siren", "residual"):
        spanned, shot = (read(mix.parent / folder / f"mix.{part}.wav") for folder in ("span", "shot"))
        np.testing.assert_array_equal(spanned, shot)
    assert np.abs(read(mix.parent / "span" / "mix.here.wav")).max() > 0


def test_a_span_that_is_not_there(clapsep: Clapsep, mix: Path, tiny_folder: Path) -> None:
    done = clapsep("extract", "mix.wav", "--pos-span", "2-9", "--model", tiny_folder, cwd=mix.parent)
    assert done.returncode == 1
    assert "2-9 s cannot be read" in done.stderr
    assert "ends at 3.00 s" in done.stderr
    assert names(mix.parent) == ["mix.wav"]


def test_spans_of_several_recordings_are_each_its_own(clapsep: Clapsep, mix: Path, tiny_folder: Path) -> None:
    soundfile.write(mix.with_name("two.wav"), noise(2 * RATE, 1, seed=5), RATE, "PCM_16")
    arguments = ["--pos-span", "0-1", "--model", tiny_folder]
    assert clapsep("extract", "mix.wav", "two.wav", *arguments, "-o", "both", cwd=mix.parent).returncode == 0
    assert clapsep("extract", "two.wav", *arguments, "-o", "one", cwd=mix.parent).returncode == 0
    both, one = (read(mix.parent / folder / "two.target.wav") for folder in ("both", "one"))
    np.testing.assert_array_equal(both, one)


def test_shots_of_a_folder_are_averaged(clapsep: Clapsep, mix: Path, tiny_folder: Path) -> None:
    (mix.parent / "shots").mkdir()
    for number in range(3):
        soundfile.write(mix.parent / "shots" / f"{number}.wav", noise(4000, 1, seed=number) * (number + 1), 8000)
    each = [word for number in range(3) for word in ("--query-audio", f"shots/{number}.wav")]
    written = []
    for name, arguments in (("folder", ["--query-audio", "shots"]), ("each", each), ("first", each[:2])):
        done = clapsep("extract", "mix.wav", "--model", tiny_folder, "-o", name, *arguments, cwd=mix.parent)
        assert done.returncode == 0
        written.append(read(mix.parent / name / "mix.target.wav"))
    np.testing.assert_array_equal(written[0], written[1])
    assert np.abs(written[0] - written[2]).max() > 0


def test_words_that_the_model_does_not_know_are_noted(clapsep: Clapsep, mix: Path, tiny_folder: Path) -> None:
    common = ["extract", "mix.wav", "--pos", "dgo barking", "--neg", "rain", "--model", tiny_folder, "--overwrite"]
    done = clapsep(*common, cwd=mix.parent)
    assert done.returncode == 0
    assert "does not know 'dgo' and leaves it out; did you mean 'dog'?" in done.stderr
    assert done.stderr.count("\n") == 1
    assert clapsep(*common, "-q", cwd=mix.parent).stderr == ""


class TestTargets:
    @pytest.fixture
    def separator(self) -> Separator:
        class Modest(Moody):
            """Claims so little that targets have nothing to share."""

            def mask(self, features: Tensor, condition: Tensor) -> Tensor:
                return 0.3 * super().mask(features, condition)

        return Modest()

    def test_several_targets_each_leave_what_the_others_ask_for(self, stub: Callable[..., Done], mix: Path) -> None:
        soundfile.write(mix.with_name("siren.wav"), noise(4000, 1, seed=9), RATE)
        targets = ["--target", "dog=a dog", "--target", "siren=siren.wav", "--neg", "wind"]
        runs = {
            "mutual": targets,
            "alone": [*targets, "--no-mutual"],
            "dog": ["--pos", "a dog", "--neg", "wind", "--neg-audio", "siren.wav"],
            "dog alone": ["--pos", "a dog", "--neg", "wind"],
            "removed": [*targets, "--remove"],
        }
        written = {}
        for folder, arguments in runs.items():
            assert stub("mix.wav", "-o", folder, *arguments).returncode == 0
            written |= {f"{folder}/{name}": read(mix.parent / folder / name) for name in names(mix.parent / folder)}
        np.testing.assert_array_equal(written["mutual/mix.dog.wav"], written["dog/mix.target.wav"])
        np.testing.assert_array_equal(written["alone/mix.dog.wav"], written["dog alone/mix.target.wav"])
        assert np.abs(written["mutual/mix.dog.wav"] - written["alone/mix.dog.wav"]).max() > 1e-3
        assert names(mix.parent / "removed") == ["mix.residual.wav"]
        np.testing.assert_array_equal(written["removed/mix.residual.wav"], written["mutual/mix.residual.wav"])
        for folder in ("mutual", "alone"):
            total = sum(written[f"{folder}/mix.{part}.wav"] for part in ("dog", "siren", "residual"))
            np.testing.assert_array_equal(total, read(mix))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_a_device_that_is_not_there_is_an_error_and_auto_says_what_it_took(
    clapsep: Clapsep, mix: Path, tiny_folder: Path
) -> None:
    common = ["extract", "mix.wav", "--pos", "dog", "--model", tiny_folder]
    done = clapsep(*common, "-d", "cuda", cwd=mix.parent)
    assert done.returncode == 3
    assert "cuda" in done.stderr
    assert " on cpu, " in clapsep(*common, cwd=mix.parent).stdout.splitlines()[0]


@pytest.mark.parametrize("query", ["--pos dog", "--pos-span 0.2-0.6", "--query-audio call.wav --neg rain"])
def test_expand_hears_a_recording_slower_and_keeps_its_rate(
    query: str, tmp_path: Path, tiny_folder: Path, clapsep: Clapsep
) -> None:
    """What comes out is, sample for sample, that of the same samples with a lower rate in their header."""
    told = {}
    for folder, rate, more in (("fast", 384_000, "--expand 10"), ("slow", 38_400, "")):
        (tmp_path / folder).mkdir()
        for seed, name in enumerate(("mix.wav", "call.wav")):
            soundfile.write(tmp_path / folder / name, noise(400_000, 2, seed=seed), rate, "PCM_16")
        asked = query.replace("0.2-0.6", "2-6") if folder == "slow" else query
        line = f"extract mix.wav --model {tiny_folder} -d cpu --json {asked} {more}"
        done = clapsep(*line.split(), cwd=tmp_path / folder)
        assert done.returncode == 0, done.stderr
        told[folder] = json.loads(done.stdout)
    for part in ("target", "residual"):
        fast, rate = soundfile.read(tmp_path / "fast" / f"mix.{part}.wav", dtype="int16")
        slow, _ = soundfile.read(tmp_path / "slow" / f"mix.{part}.wav", dtype="int16")
        assert rate == 384_000
        np.testing.assert_array_equal(fast, slow)
    assert told["fast"]["levels"] == told["slow"]["levels"]
    assert told["fast"]["presence"] == told["slow"]["presence"]


@pytest.mark.parametrize(
    ("expand", "code", "message"),
    [
        ("10", 1, "mix.wav: is at 16000 Hz, so --expand 10 would leave 1600 Hz to hear; use at most --expand 2"),
        ("0.5", 2, "--expand is 0.5: give how many times slower to hear"),
        ("nan", 2, "--expand is nan"),
    ],
)
def test_expand_that_cannot_be_heard(
    stub: Callable[..., Done], mix: Path, expand: str, code: int, message: str
) -> None:
    done = stub(mix, "--pos", "dog", "--expand", expand)
    assert done.returncode == code
    assert message in done.stderr
    assert names(mix.parent) == ["mix.wav"]

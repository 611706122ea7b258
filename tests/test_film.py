"""Films out: the sound track replaced, all else copied; and m4a."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import soundfile
from conftest import Clapsep, Done, Fixed, Stub
from media_files import encode
from numpy.typing import NDArray
from recordings import names, noise

from clapsep_cli.audio.sources import Source
from clapsep_cli.store import library

av = pytest.importorskip("av")
RATE = 48_000


@pytest.fixture
def run(clapsep: Clapsep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """`clapsep extract --pos dog` with a model that halves everything."""
    model = Stub(Fixed(0.5))
    monkeypatch.setattr(library, "load_model", lambda *_, **__: model)
    return lambda *more: clapsep("extract", *more, "--pos", "dog", cwd=tmp_path)


def sound(path: Path, track: int | None = None) -> NDArray[Any]:
    with Source(path, stream=track) as source:
        return np.concatenate(list(source.blocks(1.0)), 1)


def packets(path: Path, kind: str) -> list[tuple[float, bytes]]:
    with av.open(str(path)) as film:
        stream = getattr(film.streams, kind)[0]
        return [(float(p.pts * p.time_base), bytes(p)) for p in film.demux(stream) if p.pts is not None]


def make_film(path: Path, codec: str, channels: int, further: int = 0) -> None:
    """A film with pictures, sound tracks, subtitles and chapters."""
    bare = path.with_name(f"bare{path.suffix}")
    tracks = [noise(channels, 3 * RATE, seed=n) for n in range(1 + further)]
    encode(bare, tracks[0], RATE, codec, {"title": "A film"}, further=tracks[1:], pictures=15)
    with av.open(str(bare)) as film, av.open(str(path), "w") as out:
        out.metadata.update(film.metadata)
        chapter = {"time_base": Fraction(1), "metadata": {"title": "A part"}}
        out.set_chapters([{"id": n, "start": n, "end": n + 1, **chapter} for n in (0, 1)])
        copies = {one.index: out.add_stream_from_template(one) for one in film.streams}
        texts = out.add_stream("ass" if path.suffix == ".mkv" else "mov_text") if path.suffix == ".mkv" else None
        for packet in film.demux():
            if packet.dts is not None:
                packet.stream = copies[packet.stream.index]
                out.mux(packet)
        if texts is not None:
            for number in range(2):
                line = av.Packet(f"{number},0,Default,,0,0,0,,Line {number}".encode())
                line.stream, line.time_base, line.duration = texts, Fraction(1, 1000), 900
                line.pts = line.dts = number * 1000
                out.mux(line)
    bare.unlink()


@pytest.mark.parametrize(("name", "codec", "channels"), [("film.mkv", "flac", 6), ("film.mov", "pcm_s16le", 2)])
def test_a_film_comes_back_with_another_sound_to_the_sample(
    run: Callable[..., Done], tmp_path: Path, name: str, codec: str, channels: int
) -> None:
    film = tmp_path / name
    make_film(film, codec, channels)
    done = run(name, "--remux", "--json")
    assert done.returncode == 0, done.stderr
    suffix = film.suffix
    assert names(tmp_path) == sorted([name, f"film.residual{suffix}", f"film.target{suffix}"])
    before = sound(film)
    parts = [sound(tmp_path / f"film.{part}{suffix}") for part in ("target", "residual")]
    assert parts[0].shape == before.shape == (channels, 3 * RATE)
    np.testing.assert_array_equal(parts[0] + parts[1], before)
    assert 0.2 < np.square(parts[0]).mean() / np.square(before).mean() < 0.3
    for part in ("target", "residual"):
        path = tmp_path / f"film.{part}{suffix}"
        assert packets(path, "video") == packets(film, "video")
        with av.open(str(path)) as copy, av.open(str(film)) as own:
            assert [one["metadata"] for one in copy.chapters()] == [one["metadata"] for one in own.chapters()]
            assert copy.metadata["title"] == "A film"
            assert copy.streams.audio[0].codec_context.name == codec
            assert copy.streams.audio[0].layout.name == {6: "5.1", 2: "stereo"}[channels]
            assert [one.type for one in copy.streams] == [one.type for one in own.streams]
        if suffix == ".mkv":
            assert packets(path, "subtitles") == packets(film, "subtitles")
            assert len(packets(path, "subtitles")) == 2


@pytest.mark.parametrize(("name", "codec"), [("film.mp4", "aac"), ("film.mkv", "ac3")])
def test_a_lossy_track_keeps_its_length_and_place(
    run: Callable[..., Done], tmp_path: Path, name: str, codec: str
) -> None:
    make_film(tmp_path / name, codec, 6)
    done = run(name, "--remux", "--remove")
    assert done.returncode == 0, done.stderr
    before, after = sound(tmp_path / name), sound(tmp_path / f"film.residual{Path(name).suffix}")
    assert after.shape == before.shape
    middle, shifts = slice(20_000, 100_000), range(-3, 4)
    alike = [float(np.dot(before[0, middle], np.roll(after[0], shift)[middle])) for shift in shifts]
    assert shifts[int(np.argmax(alike))] == 0
    assert packets(tmp_path / f"film.residual{Path(name).suffix}", "video") == packets(tmp_path / name, "video")


def test_surround_at_the_sides_stays_surround_in_m4a(run: Callable[..., Done], tmp_path: Path) -> None:
    make_film(tmp_path / "film.mkv", "ac3", 6)
    with av.open(str(tmp_path / "film.mkv")) as film:
        assert film.streams.audio[0].layout.name == "5.1(side)"
    assert run("film.mkv", "-f", "m4a", "--no-residual").returncode == 0
    with av.open(str(tmp_path / "film.target.m4a")) as part:
        assert part.streams.audio[0].layout.name == "5.1"
    before, after = (sound(tmp_path / name)[:, 20_000:100_000] for name in ("film.mkv", "film.target.m4a"))
    for channel in (0, 1, 2, 4, 5):  # the one for low frequencies is cut off
        assert int(np.argmax(np.abs(before @ after[channel]))) == channel


def test_only_the_chosen_track_is_replaced(run: Callable[..., Done], tmp_path: Path) -> None:
    make_film(tmp_path / "film.mkv", "flac", 2, further=1)
    assert run("film.mkv", "--remux", "--stream", "2", "--no-residual").returncode == 0
    target = tmp_path / "film.target.mkv"
    np.testing.assert_array_equal(sound(target, 1), sound(tmp_path / "film.mkv", 1))
    np.testing.assert_allclose(sound(target, 2), sound(tmp_path / "film.mkv", 2) / 2, atol=1e-3)


def test_films_are_recognised_as_done_and_as_outputs(run: Callable[..., Done], tmp_path: Path) -> None:
    for name, codec in (("film.mkv", "flac"), ("clip.mp4", "aac"), ("take.mov", "aac"), ("old.avi", "mp3")):
        make_film(tmp_path / name, codec, 2)
    assert run(".", "--remux", "--skip-existing", "--filename", "{stem}-{part}.{ext}").returncode == 0
    again = run(".", "--remux", "--skip-existing", "--filename", "{stem}-{part}.{ext}")
    assert "4 recordings: 4 done before" in again.stdout, again.stdout + again.stderr
    (tmp_path / "clip-target.mp4").unlink()
    some = run(".", "--remux", "--skip-existing", "--filename", "{stem}-{part}.{ext}")
    assert "1 done, 3 done before" in some.stdout


def test_films_of_a_store_are_written_there(run: Callable[..., Done], tmp_path: Path) -> None:
    make_film(tmp_path / "film.mkv", "flac", 2)
    store = fsspec.filesystem("memory")
    store.put_file(str(tmp_path / "film.mkv"), "/films/film.mkv")
    assert run("film.mkv", "--remux").returncode == 0
    line = ["memory://films/film.mkv", "-o", "memory://films/out", "--remux", "--skip-existing"]
    assert run(*line).returncode == 0
    store.get_file("/films/out/film.target.mkv", str(tmp_path / "copy.mkv"))
    np.testing.assert_array_equal(sound(tmp_path / "copy.mkv"), sound(tmp_path / "film.target.mkv"))
    assert packets(tmp_path / "copy.mkv", "video") == packets(tmp_path / "film.mkv", "video")
    assert "done before" in run(*line).stdout
    store.rm("/films", recursive=True)


def test_what_is_no_film_cannot_be_one(run: Callable[..., Done], tmp_path: Path) -> None:
    soundfile.write(tmp_path / "mix.wav", noise(RATE), RATE)
    refused = run("mix.wav", "--remux")
    assert refused.returncode == 1
    assert "mix.wav: --remux writes mp4, m4v" in refused.stderr
    assert names(tmp_path) == ["mix.wav"]


def test_films_take_a_pyav_that_can_write_them(
    run: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_film(tmp_path / "film.mkv", "flac", 2)
    monkeypatch.setattr(av, "__version__", "17.0.0")
    refused = run("film.mkv", "--remux")
    assert refused.returncode == 1
    assert '--remux: PyAV 17.0.0 is too old for it: pip install "av>=18"' in refused.stderr
    assert names(tmp_path) == ["film.mkv"]


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_m4a_out(run: Callable[..., Done], tmp_path: Path, channels: int) -> None:
    encode(tmp_path / "mix.m4a", noise(channels, 2 * RATE), RATE, "aac", {"title": "A song"})
    done = run("mix.m4a", "-f", "m4a", "--skip-existing", "--json")
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == ["mix.m4a", "mix.residual.m4a", "mix.target.m4a"]
    before, target = sound(tmp_path / "mix.m4a"), sound(tmp_path / "mix.target.m4a")
    assert target.shape == before.shape
    with av.open(str(tmp_path / "mix.target.m4a")) as file, av.open(str(tmp_path / "mix.m4a")) as own:
        assert file.metadata["title"] == "A song"
        assert file.streams.audio[0].layout.name == own.streams.audio[0].layout.name
    again = run("mix.m4a", "-f", "m4a", "--skip-existing", "--json")
    assert json.loads(again.stdout)["status"] == "skipped"


def test_a_full_disk_leaves_nothing(run: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_film(tmp_path / "film.mkv", "flac", 2)

    def full(self: object, audio: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clapsep_cli.audio.film.MediaEncoder.write", full)
    failed = run("film.mkv", "--remux")
    assert failed.returncode == 1
    assert "No space left" in failed.stderr
    assert names(tmp_path) == ["film.mkv"]

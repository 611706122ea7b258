"""What is told of recordings: events, and what a notebook shows."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from recordings import noise32 as noise

from clapsep_cli import ClapsepError, Query, Separation, separate
from clapsep_cli.errors import ClapsepWarning, OutputError
from clapsep_cli.listening import plot
from clapsep_cli.listening.events import Event, EventFinder, Rules, find_events, write_events
from clapsep_cli.store import library
from clapsep_cli.store.checkpoint import Model

Audio = NDArray[np.float32]
RATE = 8000


def scene(seconds: float, *events: tuple[float, float], gain: float = 1.0) -> tuple[Audio, Audio]:
    """A mixture and a stem that sounds in these stretches alone, as loud as the rest."""
    rest, stem = noise(1, round(seconds * RATE)), np.zeros((1, round(seconds * RATE)), np.float32)
    for start, end in events:
        stem[:, round(start * RATE) : round(end * RATE)] = gain * noise(1, round((end - start) * RATE), seed=1)
    return rest + stem, stem


def times(events: list[Event]) -> list[tuple[float, float]]:
    return [(event.start, event.end) for event in events]


def near(expected: list[tuple[float, float]]) -> list[object]:
    return [pytest.approx(pair, abs=0.1) for pair in expected]


@pytest.mark.parametrize("block", [1, 4000, 123_457])
def test_events_are_where_the_stem_sounds_whatever_the_blocks(block: int) -> None:
    placed = [(1.0, 2.0), (9.5, 10.5), (12.0, 34.0), (38.5, 39.0)]
    mixture, stem = scene(39, *placed)
    finder = EventFinder(RATE)
    found: list[Event] = []
    for at in range(0, mixture.shape[1], block) if block > 1 else [slice(None)]:
        part = at if isinstance(at, slice) else slice(at, at + block)
        finder.add(mixture[:, part], stem[:, part])
        found += finder.take(None)
    found += finder.finish(None)
    assert times(found) == near(placed)
    assert [event.level_db for event in found] == [pytest.approx(-20, abs=1)] * 4
    assert found == find_events(mixture, stem, RATE)


def test_short_gaps_join_and_short_blips_go() -> None:
    mixture, stem = scene(8, (1.0, 1.5), (1.6, 2.0), (4.0, 4.01), (6.0, 6.5))
    assert times(find_events(mixture, stem, RATE)) == near([(1.0, 2.0), (6.0, 6.5)])
    assert times(find_events(mixture, stem, RATE, rules=Rules(length=0.7))) == near([(1.0, 2.0)])


def test_a_stem_far_below_the_mixture_is_no_event_and_hysteresis_holds_on() -> None:
    mixture, stem = scene(8, (1.0, 2.0), gain=0.15)
    assert find_events(mixture, stem, RATE) == []
    assert times(find_events(mixture, stem, RATE, rules=Rules(level=-20))) == near([(1.0, 2.0)])
    loud, fading = scene(8, (1.0, 2.0))
    _, tail = scene(8, (2.0, 4.0), gain=0.3)  # −11 dB: below the level at which an event begins
    assert times(find_events(loud + tail, fading + tail, RATE)) == near([(1.0, 4.0)])


def test_what_is_unlike_the_query_is_no_event() -> None:
    mixture, stem = scene(8, (1.0, 1.5), (4.0, 6.0))

    def likeness(mono: Audio, *, moment: bool = False) -> float:
        return 0.6 if len(mono) > RATE else -0.1

    (event,) = find_events(mixture, stem, RATE, likeness)
    assert times([event]) == near([(4.0, 6.0)])
    assert event.presence == pytest.approx(0.6 - 0.01 * 3, abs=0.005)
    assert len(find_events(mixture, stem, RATE, likeness, Rules(presence=-1))) == 2


def test_a_long_recording_is_found_in_bounded_memory() -> None:
    finder, found = EventFinder(RATE), 0
    mixture, stem = scene(10, (2.0, 5.0), (7.0, 7.5))
    for _ in range(60):
        finder.add(mixture, stem)
        found += len(finder.take(lambda mono, *, moment=False: 0.5))
        held = sum(len(chunk.stem) for chunk in finder._chunks) + finder._held
        assert held <= 3 * mixture.shape[1]
    assert found + len(finder.finish(lambda mono, *, moment=False: 0.5)) == 120


def test_silence_and_nothing_have_no_events() -> None:
    silent = np.zeros((2, 3 * RATE), np.float32)
    assert find_events(noise(2, 3 * RATE), silent, RATE) == []
    assert find_events(silent, silent, RATE) == []
    assert EventFinder(RATE).finish(None) == []


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("csv", ["target,start,end,level_db,presence", "dog,1.0,2.5,-20.0,0.31", "a;b,3.0,4.0,-9.5,"]),
        ("audacity", ["1.0000\t2.5000\tdog", "3.0000\t4.0000\ta;b"]),
        (
            "raven",
            [
                "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tHigh Freq (Hz)"
                "\tAnnotation\tLevel (dBFS)\tPresence",
                "1\tSpectrogram 1\t1\t1.0000\t2.5000\t0\t24000\tdog\t-20.0\t0.31",
                "2\tSpectrogram 1\t1\t3.0000\t4.0000\t0\t24000\ta;b\t-9.5\t",
            ],
        ),
    ],
)
def test_formats_of_events(name: str, lines: list[str]) -> None:
    events = {"a;b": [Event(3.0, 4.0, -9.5, None)], "dog": [Event(1.0, 2.5, -20.0, 0.31)]}
    file = io.StringIO(newline="")
    write_events(file, events, name, 48_000)
    assert file.getvalue().splitlines() == lines


@pytest.fixture
def separation(tiny: Model) -> Separation:
    done: list[tuple[float, float]] = []
    result = separate(
        noise(2, 90_000), RATE, {"dog <b>": Query(pos="dog"), "rain": Query(pos="rain")}, tiny,
        progress=lambda *at: done.append(at),
    )  # fmt: skip
    assert done[-1] == (11.25, 11.25)
    assert [at for at, _ in done] == sorted(at for at, _ in done)
    return result


def test_presence_and_events_of_a_separation(separation: Separation) -> None:
    assert list(separation.presence) == list(separation.events) == ["dog <b>", "rain"]
    told = separation.presence["rain"]
    assert told is not None
    assert set(told) == {"before", "after", "score"}
    np.testing.assert_allclose(separation.mixture, noise(2, 90_000), atol=1e-6)
    assert repr(separation) == "<Separation of 11.25 s, 2 × 8000 Hz: dog <b>, rain, residual>"
    found = find_events(separation.mixture, separation.stems["rain"], RATE, rules=Rules(level=-60))
    assert times(found) == near([(0.0, 11.25)])


def test_a_separation_saves_itself_once(separation: Separation, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    paths = separation.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["dog <b>.wav", "rain.wav", "residual.wav"]
    for name, part in {**separation.stems, "residual": separation.residual}.items():
        np.testing.assert_array_equal(soundfile.read(paths[name], dtype="float32")[0].T, part)
    with pytest.raises(OutputError, match="exists already"):
        separation.save(folder)
    assert soundfile.info(separation.save(folder, "flac", "pcm16")["rain"]).subtype == "PCM_16"
    loud = Separation({"target": 3 * noise(4000)}, noise(4000), RATE)
    with pytest.warns(ClapsepWarning, match="over full scale"):
        loud.save(folder / "loud", subtype="pcm16")


def test_a_notebook_gets_players_and_a_spectrogram_and_nothing_from_outside(separation: Separation) -> None:
    pytest.importorskip("matplotlib")
    page = separation._repr_html_()
    assert "dog &lt;b&gt;" in page
    assert "<b>" not in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert [source.partition(",")[0] for source in sources] == [
        *["data:audio/flac;base64"] * 4,
        "data:image/png;base64",
    ]
    assert "http" not in re.sub(r'"data:[^"]*"', "", page)
    audio, rate = soundfile.read(io.BytesIO(base64.b64decode(sources[0].partition(",")[2])))
    assert (rate, audio.shape) == (RATE, (90_000, 2))
    np.testing.assert_allclose(audio.T, separation.mixture, atol=1e-4)


def test_a_notebook_without_matplotlib_says_so(separation: Separation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    page = separation._repr_html_()
    assert page.count("<audio") == 4
    assert "<img" not in page
    assert "clapsep[plot]" in page


def test_what_is_played_is_short_and_at_a_rate_that_browsers_play(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)  # drawing takes long, and has a test of its own
    long = Separation({"target": np.zeros((6, 61 * RATE), np.float32)}, noise(6, 61 * RATE), RATE)
    assert "The first 60 of 61 s" in long._repr_html_()
    ultrasonic = Separation(
        {"target": noise(96_000)}, 4 * np.sin(np.arange(96_000, dtype=np.float32) / 100), 384_000
    )._repr_html_()
    audio, rate = soundfile.read(io.BytesIO(base64.b64decode(ultrasonic.split("base64,")[3].partition('"')[0])))
    assert (rate, audio.shape) == (48_000, (12_000,))
    assert 0.5 < np.abs(audio).max() <= 1


def test_a_model_says_what_it_is(tiny: Model) -> None:
    assert repr(tiny) == f"<Model {tiny.name} on cpu, float32; takes text, audio, negatives>"
    tiny.refine()
    assert "float32, two passes;" in repr(tiny)


def test_falling_back_to_the_bundled_model_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise library.ModelError("no network")

    monkeypatch.setattr(library, "install", fail)
    with pytest.warns(ClapsepWarning, match="using the small bundled model, mini .* no network") as warned:
        assert library.load_model(device="cpu").name == "mini"
    assert warned[0].filename == __file__
    with pytest.raises(ClapsepError):
        library.load_model("mini", "cpu")


def test_expand_in_python(tiny: Model) -> None:
    audio, query = noise(2, 400_000), Query(pos="dog", pos_audio=(noise(9000, seed=2), 96_000), pos_spans=(1.0, 2.0))
    slow_query = Query(pos="dog", pos_audio=(noise(9000, seed=2), 9_600), pos_spans=(10.0, 20.0))
    fast, slow = separate(audio, 96_000, query, tiny, expand=10), separate(audio, 9_600, slow_query, tiny)
    np.testing.assert_allclose(fast.target, slow.target, atol=1e-6)  # blocks are of other lengths
    assert fast.rate == 96_000
    told, expected = fast.presence["target"], slow.presence["target"]
    assert told is not None
    assert told == pytest.approx(expected, abs=2e-3)
    assert times(fast.events["target"]) == [
        (pytest.approx(a / 10, abs=1e-3), pytest.approx(b / 10, abs=1e-3)) for a, b in times(slow.events["target"])
    ]
    with pytest.raises(ClapsepError, match="use at most --expand 12"):
        separate(audio, 96_000, query, tiny, expand=13)

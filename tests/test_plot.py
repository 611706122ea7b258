"""Tests pictures: the numbers drawn, and unusual recordings."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clapsep_cli.audio.samples import Audio
from clapsep_cli.errors import ExtraError, OutputError
from clapsep_cli.listening import plot
from clapsep_cli.listening.plot import BANDS, COLUMNS, Picture, _printable, check_installed

librosa = pytest.importorskip("librosa")
matplotlib = pytest.importorskip("matplotlib")


def noise(channels: int, samples: int) -> Audio:
    return np.random.default_rng(0).standard_normal((channels, samples)).astype(np.float32) * np.float32(0.1)


def parts(mixture: Audio) -> dict[str, Audio]:
    return {"mixture": mixture, "target": mixture * np.float32(0.5), "residual": mixture * np.float32(0.5)}


def test_is_the_mel_spectrogram() -> None:
    mixture = noise(2, 8000)
    picture = Picture(8000)
    picture.add(parts(mixture))
    padded, hann = np.pad(mixture.astype(np.float64), ((0, 0), (256, 256))), np.hanning(513)[:-1]
    frames = [np.abs(np.fft.rfft(padded[:, at : at + 512] * hann)) ** 2 for at in range(0, 8001, 64)]
    expected = librosa.filters.mel(sr=8000, n_fft=512, n_mels=BANDS) @ np.stack(frames, 2).mean(0)
    assert picture.span == 64
    np.testing.assert_allclose(picture.power[0], expected, rtol=1e-3)
    np.testing.assert_allclose(picture.power[1], expected / 4, rtol=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 30_000), max_size=6))
def test_does_not_depend_on_the_blocks(cuts: list[int]) -> None:
    mixture = noise(1, 30_000)
    whole, cut = Picture(8000), Picture(8000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot, "COLUMNS", 32)  # so that they are joined several times
        whole.add(parts(mixture))
        for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 30_000], strict=True):
            cut.add(parts(mixture[:, start:end]))
        assert whole.power.shape == cut.power.shape
        assert whole.span == cut.span > 512
        np.testing.assert_allclose(cut.power, whole.power, rtol=1e-4)


def test_long_recordings_keep_their_events_and_energy() -> None:
    rate, seconds = 8000, 300
    tone = np.sin(2 * np.pi * 1000 * np.arange(rate) / rate).astype(np.float32)[None]
    picture = Picture(rate)
    for second in range(seconds):
        picture.add(parts(tone if second in (60, 240) else tone * 0))
    power = picture.power
    assert picture.seconds == seconds
    assert COLUMNS // 2 <= power.shape[2] <= COLUMNS
    loud = power[0].sum(0)
    times = np.arange(len(loud)) * picture.span / rate
    assert {round(t) for t in times[loud > 0.1 * loud.max()]} == {60, 61, 240, 241}
    short = Picture(rate)
    short.add(parts(tone))
    np.testing.assert_allclose(loud.sum() * picture.span, 2 * short.power[0].sum() * short.span, rtol=0.02)


@pytest.mark.parametrize(
    ("rate", "samples"), [(8000, 1), (11_025, 300), (44_100, 20_000), (96_000, 1), (192_000, 20_000)]
)
def test_every_rate_and_length_is_drawn(tmp_path: Path, rate: int, samples: int) -> None:
    picture = Picture(rate)
    picture.add(parts(noise(2, samples)))
    picture.save(tmp_path / "new" / "a.png", "'dog'")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_no_rate_leaves_a_band_empty() -> None:
    for kilohertz in (8, 11.025, 12, 16, 22.05, 24, 32, 44.1, 48, 88.2, 96, 176.4, 192):
        Picture(round(1000 * kilohertz))  # librosa would warn


TITLES = [
    "",
    "犬が吠えている 🐶\u200d🦺 כלב نباح собака",
    "$x^2$ \\frac{ $ <b> {stem} %s",
    "line\nbreak\ttab\0zero\x1b[31m\ud800\ufffe",
    "⌖ is in no font but STIX",
    "dog " * 500,
    "犬" * 500,
    "x" * 2000,
]


@pytest.mark.parametrize("title", TITLES)
def test_every_title_is_drawn(
    tmp_path: Path, title: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    picture = Picture(8000)
    picture.add({"mixture": noise(1, 800), title[:20] or "target": noise(1, 800) * 0})
    picture.save(tmp_path / "a.png", title)
    assert (capfd.readouterr(), caplog.records) == (("", ""), [])
    lines = _printable(title).splitlines()
    assert len(lines) <= plot.TITLE_LINES
    assert all(len(line) <= plot.TITLE_COLUMNS for line in lines)


def test_silence_is_drawn(tmp_path: Path) -> None:
    picture = Picture(8000)
    picture.add(parts(np.zeros((1, 8000), np.float32)))
    picture.save(tmp_path / "a.png", "'dog'")
    assert not picture.power.any()


def test_the_users_own_settings_do_not_matter(tmp_path: Path) -> None:
    for name, own in (("plain", {}), ("odd", {"text.usetex": True, "font.size": 40, "axes.facecolor": "red"})):
        with matplotlib.rc_context(own):
            picture = Picture(8000)
            picture.add(parts(noise(1, 8000)))
            picture.save(tmp_path / f"{name}.png", "'dog'")
    assert (tmp_path / "odd.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_axes_show_the_recordings_time_and_the_low_frequencies() -> None:
    picture = Picture(16_000, start=60)
    picture.add(parts(noise(1, 48_000)))
    figure = picture._draw("'dog'")
    figure.canvas.draw()
    axis = figure.axes[2]
    labels = [label.get_text() for label in axis.get_xticklabels() if 60 <= label.get_position()[0] <= 63]
    assert axis.get_xlim() == (60, 63)
    assert labels[0] == "1:00"
    assert len(set(labels)) == len(labels)
    low, high, middle = (
        axis.transAxes.inverted().transform(axis.transData.transform((60, hz)))[1] for hz in (50, 8000, 500)
    )
    assert (round(low, 2), round(high, 2)) == (0, 1)
    assert middle > 0.4


def test_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="nothing to draw"):
        Picture(8000).save(tmp_path / "a.png", "'dog'")
    picture = Picture(8000)
    picture.add(parts(noise(1, 800)))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        picture.save(tmp_path / "file" / "a.png", "'dog'")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        picture.save(tmp_path / "folder.png", "'dog'")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]
    check_installed()
    monkeypatch.setitem(sys.modules, "librosa", None)
    with pytest.raises(ExtraError, match=r'needs librosa: pip install "clapsep\[plot\]"'):
        check_installed()

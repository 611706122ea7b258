"""Tests the report: one self-contained file, with figures that match the scores."""

from __future__ import annotations

import base64
import io
import re
import struct
import zlib
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import Clapsep
from hypothesis import given
from hypothesis import strategies as st

from clapsep_cli.errors import UsageError
from clapsep_cli.evaluation.mixtures import Mixture
from clapsep_cli.evaluation.report import (
    FREQUENCIES,
    PUBLISHED,
    PUBLISHED_AUDIOSEP,
    Axis,
    Example,
    check_dataset,
    compressed,
    number,
    render,
    spectrogram,
    violins,
    write_report,
)
from clapsep_cli.evaluation.scores import Run, Score, differences, summary

RNG = np.random.default_rng(0)
ROWS = [Mixture(f"{n}.wav", "a <dog> & co", "rain.wav", "rain", f"label_{n % 3}", "", "a car") for n in range(12)]
SCORES = [
    Score(row, query, gain, gain - 1, gain + 0.25, -3.0 - 5 * (query == "absent"))
    for row, gain in zip(ROWS, RNG.normal(8, 4, 12), strict=True)
    for query in ("both", "positive", "absent")
]
SETTINGS = {"model": "mini<1>", "mixtures": 12, "bss": True, "shots": (), "sides": ("both", "positive")}
SOURCE = {"list": "few.csv", "date": "1 May 2026"}
RUN = Run("few.csv", "mini<1>", SCORES, SETTINGS)
VOID = {"meta", "img", "line", "rect", "polygon", "br"}


@dataclass
class Page(HTMLParser):
    """Checks that elements close as they should; collects texts, images, players and addresses."""

    text: str
    open: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def example(title: str) -> Example:
    audio = RNG.standard_normal((3, 32_000)).astype(np.float32) * 0.2
    return Example(title, SCORES[0], *audio)


def test_the_page_is_whole_and_needs_no_network() -> None:
    page = Page(render([RUN], [example("Best"), example("Worst")], SOURCE))
    assert len(page.sources) == 12
    assert all(source.startswith("data:") for source in page.sources)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", page.text)
    said = " ".join(page.said)
    table = summary(SCORES)
    for query in ("both", "positive"):
        for metric in ("sdri", "si_sdri", "bss_sdri"):
            assert number(table[query][metric], 2) in said
    assert "a <dog> & co" in said, "names are shown, not run"
    assert "mini<1> on few.csv" in said
    for name, figures in PUBLISHED.items():
        assert f"paper, {name}" in said
        assert all(f"{x:.2f}" in said for x in figures if x is not None)
    for name, both in PUBLISHED_AUDIOSEP.items():
        assert f"AudioSep, {name} {both[0]:.2f} {both[1]:.2f}" in " ".join(said.split())


def test_systems_stand_side_by_side_and_one_block_of_published_figures() -> None:
    better = [replace(s, sdri=s.sdri + 1.5, si_sdri=s.si_sdri + (3 if n else -9)) for n, s in enumerate(SCORES)]
    runs = [RUN, Run("few.csv", "other", better, SETTINGS)]
    found = {(d.query, d.metric): d for d in differences(runs)}
    assert found.keys() == {(q, m) for q in ("both", "positive") for m in ("sdri", "si_sdri", "bss_sdri")}
    exact = found["both", "sdri"]
    assert (exact.mean, exact.low, exact.high, exact.worse) == pytest.approx((1.5, 1.5, 1.5, 0))
    wide = found["both", "si_sdri"]
    assert (wide.mean, wide.worse) == pytest.approx((2, 1 / 12))
    assert -0.5 < wide.low < wide.mean < wide.high <= 3
    said = " ".join(" ".join(Page(render(runs, [], SOURCE, "esc-50")).said).split())
    assert "other − mini<1> few.csv both SI-SDRi 12 2.00" in said
    assert "paper, ESC-50" in said
    assert "AudioSep, ESC-50" in said
    assert "AudioCaps" not in said
    with pytest.raises(UsageError, match="nothing is published of it here; there are AudioCaps"):
        check_dataset("mine")


def test_a_run_of_one_kind_of_query_has_a_report() -> None:
    scores = [s for s in SCORES if s.query == "positive"][:1]
    page = Page(render([Run("few.csv", "mini", scores, SETTINGS)], [], SOURCE))
    said = " ".join(page.said)
    assert "Beside the paper" not in said
    assert "What is there" not in said
    assert "By label" in said


def test_a_spectrogram_is_an_image_of_the_sound() -> None:
    """A tone is one bright line at its height, in a well-formed PNG."""
    tone = (0.5 * np.sin(2 * np.pi * 2000 * np.arange(32_000) / 32_000)).astype(np.float32)
    png = base64.b64decode(spectrogram(tone, 1.0).removeprefix("data:image/png;base64,"))
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    at, chunks = 8, {}
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        kind, body, crc = png[at + 4 : at + 8], png[at + 8 : at + 8 + size], png[at + 8 + size : at + 12 + size]
        assert struct.pack(">I", zlib.crc32(kind + body)) == crc
        chunks[kind] = body
        at += 12 + size
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    bright = lines[:, 1 + width // 2].argmax()
    assert 1 - (bright + 0.5) / height == pytest.approx(FREQUENCIES["2k"], abs=0.015)


def test_a_player_plays_the_sound() -> None:
    tone = (0.5 * np.sin(2 * np.pi * 440 * np.arange(32_000) / 32_000)).astype(np.float32)
    data = base64.b64decode(compressed(tone).split("base64,")[1])
    heard, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    assert (rate, heard.shape) == (32_000, tone.shape)
    assert np.abs(heard - tone).max() < 0.05


def test_violins_and_bars_stand_where_their_values_are() -> None:
    gains = {"both": {"up": 9.5, "down_here": -9.5}, "positive": {"up": 0.0}}
    scores = [
        Score(Mixture("", "", "", "", label), query, gain, gain, None, 0.0)
        for query, by_label in gains.items()
        for label, gain in by_label.items()
    ]
    page = " ".join(render([Run("few.csv", "mini", scores, SETTINGS)], [], SOURCE).split())
    medians = [float(x) for x in re.findall(r'class="median" x1="([\d.]+)"', page)]
    assert medians == [pytest.approx(500, abs=0.1)] * 4
    bars = page[page.index("By label") :]
    assert "left:50.00%;width:47.50%" in bars
    assert "left:2.50%;width:47.50%" in bars
    assert "down here <small>1</small>" in bars
    assert bars.count('<b style="left:50.00%">') == 1, "the mark of the one label that has a positive score"


@pytest.mark.parametrize(
    "samples",
    [
        {"a": [7.123456789] * 30, "b": [7.123456789 + n * 1e-9 for n in range(30)]},
        {"a": [float(n) for n in range(400)], "b": [1e6]},  # beyond the axis, which leaves out the extremes
    ],
)
def test_nearly_constant_scores_have_a_violin(samples: dict[str, list[float]]) -> None:
    chart = violins(samples)
    heights = [[float(point.split(",")[1]) for point in violin.outline.split()] for violin in chart.rows]
    assert all(0 <= y <= 60 for row in heights for y in row)
    assert max(heights[0]) == 57.0


@given(st.floats(-1e4, 1e4), st.floats(1e-2, 1e4))
def test_ticks_are_few_and_within(low: float, span: float) -> None:
    found = Axis(low, low + span).ticks()
    assert 1 <= len(found) <= 10
    assert all(low - span / 1e6 <= x <= low + span + span / 1e6 for x in found)


def test_numbers_have_a_true_minus() -> None:
    assert (number(-1.25, 2), number(-0.01), number(3)) == ("−1.25", "0.0", "3.0")


def test_an_existing_report_is_not_lost(clapsep: Clapsep, tmp_path: Path) -> None:
    (tmp_path / "r.html").write_text("mine")
    arguments = ["evaluate", "--mixtures", "none.csv", "--audio", ".", "--report", "r.html"]
    done = clapsep(*arguments, cwd=tmp_path)
    assert (done.returncode, "exists already" in done.stderr) == (1, True)
    assert (tmp_path / "r.html").read_text() == "mine"
    write_report(tmp_path / "new" / "r.html", [RUN], [], SOURCE)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["r.html"]

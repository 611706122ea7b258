"""The report of an evaluation: one HTML file, without network or script, for a screen, a phone or paper.

Figures are plain values: positions on an axis, and images and sounds as data URIs. The template draws them as HTML and
SVG, so that they follow the reader's colours and width. Text is never drawn into an SVG: it stands beside it, and can
be read on a phone, searched and copied.
"""

from __future__ import annotations

import base64
import io
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from clapsep_cli import dsp
from clapsep_cli.audio.samples import Audio
from clapsep_cli.errors import UsageError
from clapsep_cli.evaluation.evaluate import EvaluationOptions, embedder_of, mixer, separator_of
from clapsep_cli.evaluation.mixtures import EvaluationSet
from clapsep_cli.evaluation.scores import ABSENT, METRICS, Run, Score, by_label, differences, presence, summary
from clapsep_cli.files import writing
from clapsep_cli.store.checkpoint import Model

MOST_LABELS = 100  # that are all shown; of more, the best and the worst
TEN_SHOTS = "both text+10 shots"

# Ma et al., arXiv 2402.17455, in dB, both sides named: SDRi of the hybrid and of the text-only variant by words alone,
# and of the hybrid one with ten shots beside the words; SI-SDRi of the text-only variant, which
# paperswithcode.com/paper/clapsep-leveraging-contrastive-pre-trained lists. None: no source at hand.
PUBLISHED: dict[str, tuple[float, float, float | None, float | None]] = {
    "AudioCaps": (10.05, 10.08, None, 9.40),
    "AudioSet": (9.15, 9.29, None, 8.44),
    "MUSIC21": (8.40, 8.32, 9.47, None),
    "ESC-50": (12.81, 13.09, 13.21, None),
    "FSDKaggle2018": (20.01, 20.17, 21.11, None),
}
# Liu et al., arXiv 2308.05037: SDRi and SI-SDR (not its improvement) in dB, asked in words for the target alone, as
# the README of their repository states them for audiosep_base_4M_steps.ckpt.
PUBLISHED_AUDIOSEP = {
    "AudioSet": (7.739, 6.903),
    "VGGSound": (9.144, 9.043),
    "AudioCaps": (8.220, 7.189),
    "Clotho": (6.850, 5.242),
    "MUSIC": (10.508, 9.425),
    "ESC-50": (10.040, 8.810),
}


VIOLIN_POINTS = 160
BANDS = 100  # rows of a spectrogram, on the mel scale; more would leave the lowest without a bin
TOP_HZ = 16_000
COMPRESSION = 0.8  # of what is played, from 0 to 1: an MP3 at some 40 kbit/s
RANGE_DB = 75.0
# Heights of frequencies in a spectrogram, from 0 to 1.
FREQUENCIES = {f"{hz / 1000:g}k": dsp.hz_to_mel(hz) / dsp.hz_to_mel(TOP_HZ) for hz in (500, 1000, 2000, 4000, 8000)}
# From black over violet and orange to pale yellow, of rising lightness.
COLOURS = ((0, 0, 4), (44, 17, 95), (114, 31, 129), (183, 55, 121), (241, 96, 93), (254, 176, 120), (252, 253, 191))


class Axis(NamedTuple):
    """A linear axis from `low` to `high`."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """Return the position of a value on the axis: 0 at its low end, 1 at its high end."""
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Choose four to nine round numbers on the axis."""
        span = self.high - self.low
        step = 10.0 ** math.floor(math.log10(span))
        step *= next((factor for factor in (0.1, 0.2, 0.5, 1.0) if span / step / factor <= 9), 2.0)
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


class Violin(NamedTuple):
    """Distribution of one sample. `outline`: points of its density as an SVG polygon, in a box of 1000 by 60."""

    name: str
    outline: str
    quartiles: tuple[float, float, float]
    mean: float


class Bar(NamedTuple):
    """Mean of a number of mixtures, and a second value as a mark if there is one."""

    name: str
    mixtures: int
    value: float
    mark: float | None


class Chart(NamedTuple):
    """Rows of a chart and the axis they share."""

    axis: Axis
    rows: Sequence[Violin] | Sequence[Bar]


def number(value: float, decimals: int = 1) -> str:
    """Format a number with a true minus sign, and without one before zero."""
    text = f"{value:.{decimals}f}"
    return text.lstrip("-") if not float(text) else text.replace("-", "−")


def violins(samples: Mapping[str, Sequence[float]]) -> Chart:
    """Draw a violin for each sample. The axis leaves out half a percent of all values at either end."""
    low, high = np.percentile(np.concatenate([np.asarray(values) for values in samples.values()]), [0.5, 99.5])
    axis = Axis(float(low) - 1, float(high) + 1)
    at = np.linspace(*axis, VIOLIN_POINTS)
    rows = []
    for name, listed in samples.items():
        values = np.asarray(listed, np.float64)
        half = 27 * _density(values, at)
        x, y = np.tile(np.linspace(0, 1000, VIOLIN_POINTS), (2, 1)), np.stack([30 - half, 30 + half])
        x[1], y[1] = x[1, ::-1], y[1, ::-1]  # back along the lower side
        outline = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.flat, y.flat, strict=True))
        q1, median, q3 = np.percentile(values, [25, 50, 75]).tolist()
        rows.append(Violin(name, outline, (q1, median, q3), float(values.mean())))
    return Chart(axis, rows)


def _density(values: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Density of `values` at evenly spaced points, scaled to a maximum of 1."""
    quartiles = np.percentile(values, [25, 75])
    deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    spread = min(deviation, float(np.diff(quartiles)[0]) / 1.34) or deviation or 1.0
    # Silverman's rule; but no curve so narrow that it falls between two points.
    width = max(0.9 * spread * len(values) ** -0.2, float(at[1] - at[0]))
    density = np.exp(-0.5 * np.square((at[:, None] - values) / width)).sum(1)
    return np.asarray(density / max(density.max(), 1e-30))  # values beyond the axis leave nothing to draw


def bars(rows: Sequence[Bar]) -> Chart:
    """Draw a bar from zero for each row."""
    values = [x for row in rows for x in (row.value, row.mark) if x is not None]
    return Chart(Axis(min(0.0, *values) - 0.5, max(0.0, *values) + 0.5), rows)


def band_powers(audio: Audio) -> NDArray[np.float32]:
    """Compute the power of `audio` (mono at 32 kHz) in mel bands, float32 `[frames / 2, BANDS]`."""
    power = dsp.power(dsp.spectrum(torch.from_numpy(audio)))
    pairs = power[: len(power) // 2 * 2].view(-1, 2, power.shape[1]).mean(1)
    return np.asarray((pairs @ dsp.mel_filters(dsp.RATE_HZ, BANDS, 0, TOP_HZ)).numpy(), np.float32)


def spectrogram(audio: Audio, loudest: float) -> str:
    """Draw a mel spectrogram.

    Args:
        audio: mono at 32 kHz, float32 `[samples]`.
        loudest: the power, from `band_powers`, that is drawn brightest: the same for images to be compared.

    Returns:
        A PNG as a data URI, `BANDS` pixels high.
    """
    level = 1 + 10 * np.log10(np.maximum(band_powers(audio), 1e-20) / max(loudest, 1e-20)) / RANGE_DB
    indices = np.round(255 * level.clip(0, 1)).astype(np.uint8).T[::-1]
    stops, shades = np.linspace(0, 1, len(COLOURS)), np.linspace(0, 1, 256)
    palette = np.stack([np.interp(shades, stops, channel) for channel in zip(*COLOURS, strict=True)], 1)
    return _data_uri("image/png", _png(indices, np.round(palette).astype(np.uint8)))


def _png(indices: NDArray[np.uint8], palette: NDArray[np.uint8]) -> bytes:
    """Encode an image, `[rows, columns]` of indices into a `palette` of RGB values."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = indices.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), indices], 1).tobytes()  # each begins with "no filter"
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits a pixel, by palette
    parts = ((b"IHDR", header), (b"PLTE", palette.tobytes()), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in parts)


def compressed(audio: Audio) -> str:
    """Encode `audio` (mono at 32 kHz, clipped to ±1) as a data URI: MP3, which every browser plays, or else FLAC."""
    kind, mime = ("MP3", "audio/mpeg") if "MP3" in soundfile.available_formats() else ("FLAC", "audio/flac")
    file = io.BytesIO()
    soundfile.write(file, np.clip(audio, -1, 1), dsp.RATE_HZ, format=kind, compression_level=COMPRESSION)
    return _data_uri(mime, file.getvalue())


def _data_uri(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


class Example(NamedTuple):
    """A mixture to listen to: float32 `[samples]` each, mono at 32 kHz."""

    title: str
    score: Score
    mixture: Audio
    estimate: Audio
    reference: Audio


def main_query(scores: Sequence[Score]) -> str:
    """Choose the kind of query to show labels and examples for: "both", or else the first of the run."""
    kinds = list(dict.fromkeys(s.query for s in scores))
    return "both" if "both" in kinds else kinds[0]


@torch.inference_mode()
def examples(model: Model, scores: Sequence[Score], data: EvaluationSet, options: EvaluationOptions) -> list[Example]:
    """Separate the best, the median and the worst mixture by SI-SDRi once more, under the main kind of query.

    Args:
        model: the model that was evaluated.
        scores: its scores.
        data: the mixtures and recordings to query with.
        options: the kinds of query.
    """
    query = main_query(scores)
    ranked = sorted((s for s in scores if s.query == query), key=lambda s: -s.si_sdri)
    chosen = {"Best": ranked[0], "Median": ranked[(len(ranked) - 1) // 2], "Worst": ranked[-1]}
    embedder, mixed = embedder_of(model, options.condition), mixer(data.folder, model)
    found = []
    for title, score in chosen.items():
        mixture, target = mixed(score.mixture)
        condition = embedder.condition(options.queries(score.mixture, data)[query])
        (estimate,) = separator_of(model).estimate(torch.from_numpy(mixture)[None].to(model.device), [condition])
        found.append(Example(title, score, mixture, estimate[0].cpu().numpy(), target))
    return found


def check_dataset(name: str) -> None:
    """Raise `UsageError` for data of which nothing is published here."""
    known = list(dict.fromkeys((*PUBLISHED, *PUBLISHED_AUDIOSEP)))
    if name.lower() not in map(str.lower, known):
        raise UsageError(f"--dataset {name}: nothing is published of it here; there are {', '.join(known)}")


def write_report(
    path: Path,
    runs: Sequence[Run],
    examples: Sequence[Example],
    source: Mapping[str, str],
    dataset: str | None = None,
) -> None:
    """Write the report of an evaluation.

    Args:
        path: the HTML file.
        runs: the run to report, and others to stand beside it.
        examples: mixtures to listen to.
        source: the name of the list, as `list`, and the `date`.
        dataset: show published figures of this data alone.

    Raises:
        OutputError: if the file cannot be written.
    """
    with writing(path) as temporary:
        temporary.write_text(render(runs, examples, source, dataset), encoding="utf-8")


PAGE = Environment(
    loader=PackageLoader("clapsep_cli.evaluation", ""),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGE.filters |= {"number": number, "percent": lambda share, decimals=2: f"{share:.{decimals}%}"}


def render(
    runs: Sequence[Run], examples: Sequence[Example], source: Mapping[str, str], dataset: str | None = None
) -> str:
    """Render the page of `write_report`."""
    scores, settings = runs[0].scores, runs[0].settings
    query, table, found = main_query(scores), summary(scores), presence(scores)
    marks = {label: s["si_sdri"] for label, s in by_label(scores, "positive").items()} if query == "both" else {}
    labels = [
        Bar(label, int(s["mixtures"]), s["si_sdri"], marks.get(label)) for label, s in by_label(scores, query).items()
    ]
    half = MOST_LABELS // 2
    levels = {"there": _values(scores, "positive", "level"), "absent": _values(scores, ABSENT, "level")}
    distributions = {
        metric: {kind: values for kind in table if kind != ABSENT and (values := _values(scores, kind, metric))}
        for metric in METRICS
    }
    return PAGE.get_template("report.html").render(
        settings=settings,
        source=source,
        stated={name: _text(value) for name, value in {**source, **settings}.items()},
        table=table,
        metrics={metric: title for metric, title in METRICS.items() if any(metric in s for s in table.values())},
        absent=ABSENT,
        runs=runs,
        differences=list(differences(runs)),
        all_metrics=METRICS,
        published={name: row for name, row in PUBLISHED.items() if _is(name, dataset)},
        published_audiosep={name: row for name, row in PUBLISHED_AUDIOSEP.items() if _is(name, dataset)},
        ten_shots=TEN_SHOTS,
        distributions={metric: violins(samples) for metric, samples in distributions.items() if samples},
        presence=found,
        levels=violins(levels) if found else None,
        query=query,
        label_count=len(labels),
        labels=bars(labels if len(labels) <= MOST_LABELS else [*labels[:half], *labels[-half:]]),
        examples=examples,
        frequencies=FREQUENCIES,
        band_powers=band_powers,
        spectrogram=spectrogram,
        compressed=compressed,
    )


def _is(name: str, dataset: str | None) -> bool:
    return dataset is None or name.lower() == dataset.lower()


def _values(scores: Sequence[Score], query: str, metric: str) -> list[float]:
    return [value for s in scores if s.query == query and (value := getattr(s, metric)) is not None]


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)

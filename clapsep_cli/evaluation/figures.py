"""Figures of the report as HTML and SVG by hand: they follow the reader's colours and width, and need no network.

Text is never drawn into an SVG: it stands beside, so that it can be read on a phone, searched and copied.
"""

from __future__ import annotations

import base64
import io
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from clapsep_cli import dsp
from clapsep_cli.audio.samples import Audio

VIOLIN_POINTS = 160
BANDS = 100  # rows of a spectrogram, on the mel scale; more would leave the lowest without a bin
TOP_HZ = 16_000
COMPRESSION = 0.8  # of what is played, from 0 to 1: an MP3 at some 40 kbit/s
RANGE_DB = 75.0
TICKS_HZ = (500, 1000, 2000, 4000, 8000)
# From black over violet and orange to pale yellow, of rising lightness.
COLOURS = ((0, 0, 4), (44, 17, 95), (114, 31, 129), (183, 55, 121), (241, 96, 93), (254, 176, 120), (252, 253, 191))


def number(value: float, decimals: int = 1) -> str:
    """With a true minus, and never a minus before zero."""
    text = f"{value:.{decimals}f}"
    return text.lstrip("-") if not float(text) else text.replace("-", "−")


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers in a range."""
    step = 10.0 ** math.floor(math.log10(high - low))
    step *= next((factor for factor in (0.1, 0.2, 0.5, 1.0) if (high - low) / step / factor <= 9), 2.0)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _axis(low: float, high: float) -> str:
    marks = "".join(f'<i style="left:{(x - low) / (high - low):.2%}">{number(x, 0)}</i>' for x in ticks(low, high))
    return f'<div class="row axis"><span></span><div>{marks}</div><span></span></div>'


def _density(values: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Density of `values` at evenly spaced points, scaled to a maximum of 1."""
    quartiles = np.percentile(values, [25, 75])
    spread = min(float(values.std()), float(np.diff(quartiles)[0]) / 1.34) or float(values.std()) or 1.0
    # Silverman's rule; but no curve so narrow that it falls between two points.
    width = max(0.9 * spread * len(values) ** -0.2, float(at[1] - at[0]))
    density = np.exp(-0.5 * np.square((at[:, None] - values) / width)).sum(1)
    return np.asarray(density / max(density.max(), 1e-30))  # values beyond the axis leave nothing to draw


def violins(samples: Mapping[str, Sequence[float]], unit: str = "dB") -> str:
    """A row for each sample: its density, a box from the lower to the upper quartile, its median and mean.

    The axis leaves out half a percent at either end.
    """
    every = np.concatenate([np.asarray(values) for values in samples.values()])
    low, high = (float(x) for x in np.percentile(every, [0.5, 99.5]))
    low, high = low - 1, high + 1
    at = np.linspace(low, high, VIOLIN_POINTS)
    grid = "".join(
        f'<line class="{"zero" if not x else "grid"}" x1="{(x - low) / (high - low) * 1000:.1f}" '
        f'x2="{(x - low) / (high - low) * 1000:.1f}" y1="0" y2="60"/>'
        for x in ticks(low, high)
    )
    rows = []
    for name, listed in samples.items():
        values = np.asarray(listed, np.float64)
        half = 27 * _density(values, at)
        x = (at - low) / (high - low) * 1000
        outline = [*zip(x, 30 - half, strict=True), *zip(x[::-1], (30 + half)[::-1], strict=True)]
        q1, median, q3 = ((q - low) / (high - low) * 1000 for q in np.percentile(values, [25, 50, 75]))
        mean = (float(values.mean()) - low) / (high - low) * 1000
        rows.append(
            f'<div class="row"><span class="name">{escape(name)}</span>'
            f'<svg viewBox="0 0 1000 60" preserveAspectRatio="none" aria-hidden="true">{grid}'
            f'<polygon class="violin" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in outline)}"/>'
            f'<rect class="box" x="{q1:.1f}" width="{q3 - q1:.1f}" y="23" height="14"/>'
            f'<line class="mean" x1="{mean:.1f}" x2="{mean:.1f}" y1="19" y2="41"/>'
            f'<line class="median" x1="{median:.1f}" x2="{median:.1f}" y1="15" y2="45"/></svg>'
            f'<span class="value">{number(float(np.median(values)))}</span></div>'
        )
    return f'<div class="chart violins">{"".join(rows)}{_axis(low, high)}</div><p class="unit">{escape(unit)}</p>'


def bars(rows: Sequence[tuple[str, int, float, float | None]]) -> str:
    """A bar from zero for each row: name, count, value, and a second value as a mark, if there is one."""
    values = [x for *_, value, mark in rows for x in (value, mark) if x is not None]
    low, high = min(0.0, *values) - 0.5, max(0.0, *values) + 0.5
    zero = -low / (high - low)
    lines = []
    for name, count, value, mark in rows:
        at = (value - low) / (high - low)
        left, width = min(at, zero), abs(at - zero)
        second = f'<b style="left:{(mark - low) / (high - low):.2%}"></b>' if mark is not None else ""
        lines.append(
            f'<div class="row"><span class="name">{escape(name.replace("_", " "))} <small>{count}</small></span>'
            f'<div class="bar">'
            f'<u class="{"up" if value >= 0 else "down"}" style="left:{left:.2%};width:{width:.2%}"></u>'
            f'<s style="left:{zero:.2%}"></s>{second}</div><span class="value">{number(value)}</span></div>'
        )
    return f'<div class="chart bars">{"".join(lines)}</div>'


def _png(indices: NDArray[np.uint8], palette: NDArray[np.uint8]) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = indices.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), indices], 1).tobytes()  # each begins with "no filter"
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits a pixel, by palette
    parts = ((b"IHDR", header), (b"PLTE", palette.tobytes()), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in parts)


def spectrogram(audio: Audio, loudest: float) -> str:
    """A mel spectrogram of `audio` (mono at 32 kHz) as an image element; `loudest`: power, from `band_powers`, that is
    drawn brightest, for images that are to be compared."""
    power = band_powers(audio)
    level = 1 + 10 * np.log10(np.maximum(power, 1e-20) / max(loudest, 1e-20)) / RANGE_DB
    indices = np.round(255 * level.clip(0, 1)).astype(np.uint8).T[::-1]
    stops = np.linspace(0, 1, len(COLOURS))
    palette = np.stack([np.interp(np.linspace(0, 1, 256), stops, channel) for channel in zip(*COLOURS, strict=True)], 1)
    data = base64.b64encode(_png(indices, np.round(palette).astype(np.uint8))).decode()
    edges = np.linspace(_mel(0), _mel(TOP_HZ), 2)
    marks = "".join(
        f'<i style="bottom:{(_mel(hz) - edges[0]) / (edges[1] - edges[0]):.1%}">{hz / 1000:g}k</i>' for hz in TICKS_HZ
    )
    return f'<div class="spectrogram"><img alt="spectrogram" src="data:image/png;base64,{data}">{marks}</div>'


def _mel(hz: float) -> float:
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


def band_powers(audio: Audio) -> NDArray[np.float32]:
    """Power in mel bands, float32 `[frames / 2, BANDS]`."""
    power = dsp.power(dsp.spectrum(torch.from_numpy(audio)))
    bands = power[: len(power) // 2 * 2].view(-1, 2, power.shape[1]).mean(1) @ dsp.mel_filters(
        dsp.RATE_HZ, BANDS, 0, TOP_HZ
    )
    return np.asarray(bands.numpy(), np.float32)


def player(audio: Audio) -> str:
    """A player of `audio` (mono at 32 kHz, within ±1): MP3, which every browser plays, or else FLAC."""
    kind, mime = ("MP3", "mpeg") if "MP3" in soundfile.available_formats() else ("FLAC", "flac")
    file = io.BytesIO()
    soundfile.write(file, np.clip(audio, -1, 1), dsp.RATE_HZ, format=kind, compression_level=COMPRESSION)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<audio controls preload="metadata" src="data:audio/{mime};base64,{data}"></audio>'

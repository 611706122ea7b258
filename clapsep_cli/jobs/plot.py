"""Pictures of a separation: log-mel spectrograms of mixture, targets and residual, above each other."""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Mapping
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clapsep_cli.audio.samples import Audio
from clapsep_cli.errors import ExtraError, OutputError
from clapsep_cli.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 2000  # of a picture at most; when they are full, each two become one
BANDS = 128
WINDOW_SECONDS = 0.05  # of the transform, roughly: it has a power of two samples
BATCH = 384  # transforms at a time, of all parts and channels together
RANGE_DB = 80  # below the loudest
TITLE_COLUMNS, TITLE_LINES = 128, 4
MISSING = "□"  # stands for letters that no font here has


def check_installed() -> None:
    """Raise `ExtraError` unless what draws is installed; does not import it, which takes a second."""
    missing = " and ".join(name for name in ("librosa", "matplotlib") if find_spec(name) is None)
    if missing:
        raise ExtraError(f'--plot takes {missing} too: pip install "clapsep[plot]"')


class Picture:
    """Gathers what is drawn of a recording as it passes, at `rate` Hz: of each part, the mean power in 128 mel bands
    (Slaney's), over all channels, in at most 2,000 columns. Memory does not grow with the recording's length.
    """

    def __init__(self, rate: int) -> None:
        import librosa

        self.rate = rate
        self.n_fft = 1 << round(math.log2(max(512.0, rate * WINDOW_SECONDS)))
        self._mel: Audio = librosa.filters.mel(sr=rate, n_fft=self.n_fft, n_mels=BANDS).T
        self._hann = np.hanning(self.n_fft + 1)[:-1].astype(np.float32)
        self.span = self.n_fft // 8  # samples that a column stands for
        self.samples = 0  # that were added
        self.names: list[str] = []
        self._columns: list[Audio] = []  # of [parts, bands]
        self._sum: NDArray[np.float32] | float = 0.0  # of the power of the column's frames, [parts, bins]
        self._frames = 0  # in that sum
        self._waiting = np.zeros((0, 0, 0), np.float32)  # [parts, channels, samples], from where the next frame begins

    def add(self, parts: Mapping[str, Audio]) -> None:
        """Add a block: each part in the order in which they are drawn, float32 `[channels, samples]`."""
        block = np.stack([np.asarray(part, np.float32) for part in parts.values()])
        if not self.names:
            self.names = list(parts)
            self._waiting = np.zeros((*block.shape[:2], self.n_fft // 2), np.float32)
        self.samples += block.shape[2]
        self._push(block)

    @property
    def seconds(self) -> float:
        """How much was added."""
        return self.samples / self.rate

    def _push(self, block: Audio) -> None:
        self._waiting = np.concatenate([self._waiting, block], 2)
        batch = max(1, BATCH // (block.shape[0] * block.shape[1]))
        while (ready := self._waiting.shape[2] - self.n_fft) >= 0:
            # Once a column is longer than that, it holds several frames, half a window apart.
            hop = min(self.span, self.n_fft // 2)
            per_column = self.span // hop
            take = min(batch, ready // hop + 1, per_column * (COLUMNS - len(self._columns)) - self._frames)
            frames = np.lib.stride_tricks.sliding_window_view(self._waiting, self.n_fft, 2)[:, :, : take * hop : hop]
            spectra = np.fft.rfft(frames * self._hann, axis=3)
            self._gather((spectra.real**2 + spectra.imag**2).mean(1), per_column)
            self._waiting = self._waiting[:, :, take * hop :]

    def _gather(self, power: Audio, per_column: int) -> None:
        """Add frames, [parts, frames, bins], to the columns they belong to."""
        while power.shape[1]:
            taken, power = np.split(power, [per_column - self._frames], 1)
            self._sum = self._sum + taken.sum(1)
            self._frames += taken.shape[1]
            if self._frames == per_column:
                self._columns.append(self._banded())
                self._sum, self._frames = 0.0, 0
        if len(self._columns) == COLUMNS:
            self._columns = [
                (a + b) / np.float32(2) for a, b in zip(self._columns[::2], self._columns[1::2], strict=True)
            ]
            self.span *= 2

    def _banded(self) -> Audio:
        return np.asarray(self._sum / np.float32(self._frames) @ self._mel, np.float32)

    @cached_property
    def power(self) -> Audio:
        """What is drawn, float32 `[parts, bands, columns]` of `span` samples each; after this, nothing can be added."""
        if not self.names:
            raise OutputError("nothing was separated, so there is nothing to draw")
        self._push(np.zeros((*self._waiting.shape[:2], self.n_fft // 2), np.float32))
        return np.stack([*self._columns, *([self._banded()] if self._frames else [])], 2)

    def save(self, path: Path, title: str) -> None:
        """Write the picture as a PNG of that `title`, by way of a temporary name. Raises `OutputError`."""
        from matplotlib import style

        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary, style.context("default"):  # whatever the user's own settings are
                self._draw(title).savefig(temporary, format="png", metadata={"Software": "clapsep"})
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error

    def _draw(self, title: str) -> Figure:
        from librosa import mel_frequencies
        from librosa.display import specshow
        from matplotlib.figure import Figure

        level = 10 * np.log10(np.maximum(self.power, 1e-20) / max(float(self.power.max()), 1e-20))
        if not self.power.any():
            level[:] = -RANGE_DB
        edges = np.arange(level.shape[2] + 1) * self.span / self.rate
        # Bands are centred on every second of these frequencies, and meet at those between.
        between = mel_frequencies(2 * BANDS + 3, fmin=0, fmax=self.rate / 2)[1::2]
        text, fonts = _drawable(title)
        height = 1.1 + 1.8 * len(self.names) + 0.18 * len(text.splitlines())
        figure = Figure(figsize=(11, height), dpi=120, layout="constrained")
        axes = figure.subplots(len(self.names), 1, sharex=True, squeeze=False)[:, 0]
        for name, values, axis in zip(self.names, level, axes, strict=True):
            mesh = specshow(
                values, x_coords=edges, y_coords=between, x_axis="time", y_axis="mel", ax=axis, cmap="magma",
                vmin=-RANGE_DB, vmax=0,
            )  # fmt: skip
            label, families = _drawable(name)
            axis.set_title(label, loc="left", fontsize=9.5, fontfamily=families, parse_math=False)
            axis.set(xlabel="", ylabel="Hz", xlim=(0, self.seconds), ylim=(between[0], between[-1]))
            ticks = [hz for hz in (500 * 2**octave for octave in range(9)) if hz < between[-1]]
            axis.set_yticks(ticks, [f"{hz // 1000}k" if hz >= 1000 else str(hz) for hz in ticks])
            axis.minorticks_off()
        unit, times, labels = _ticks(self.seconds)
        axes[-1].set_xticks(times, labels)
        axes[-1].set_xlabel(f"time ({unit})")
        figure.colorbar(mesh, ax=list(axes), label="dB relative to the loudest", aspect=12 * len(self.names), pad=0.012)
        figure.suptitle(text, x=0.012, ha="left", fontsize=11, fontfamily=fonts, parse_math=False)
        return figure


def _ticks(seconds: float) -> tuple[str, list[float], list[str]]:
    """The unit of a time axis, where its ticks are in seconds, and how they are labelled."""
    steps = [10.0**power * step for power in range(-6, 1) for step in (1, 2, 5)] + [10, 15, 30]
    steps += [60 * step for step in (1, 2, 5, 10, 15, 30, 60, 120, 180, 360, 720)]
    step = next((step for step in steps if seconds / step <= 12), math.ceil(seconds / 12 / 86400) * 86400)
    times = [count * step for count in range(math.floor(seconds / step) + 1)]
    if seconds < 60:
        return "s", times, [f"{time:g}" for time in times]
    whole = [round(time) for time in times]
    if seconds < 3600:
        return "m:s", times, [f"{time // 60}:{time % 60:02}" for time in whole]
    return "h:m:s", times, [f"{time // 3600}:{time // 60 % 60:02}:{time % 60:02}" for time in whole]


def _drawable(text: str) -> tuple[str, list[str]]:
    """`text` in lines, and the fonts to draw it with; letters that no font here has are replaced."""
    plain = "".join(c if unicodedata.category(c)[0] != "C" else " " * c.isspace() for c in text)
    fonts, missing = _fonts(frozenset(plain))
    plain = "".join(MISSING if letter in missing else letter for letter in plain)
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in plain)
    columns = max(1, TITLE_COLUMNS * len(plain) // (len(plain) + wide)) if plain else TITLE_COLUMNS
    return "\n".join(textwrap.wrap(plain, columns, max_lines=TITLE_LINES, placeholder=" …")), fonts


@lru_cache(maxsize=256)
def _fonts(letters: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """The families that together have `letters`, and those that none of them has."""
    from matplotlib.font_manager import fontManager, get_font

    families = ["DejaVu Sans"]  # comes with matplotlib
    others = {font.name for font in fontManager.ttflist} - set(families)
    files = {font.name: font.fname for font in fontManager.ttflist if (font.weight, font.style) == (400, "normal")}
    missing = letters - {" "}
    for family in families + sorted(others & set(files)):
        # The one is drawn in colour bitmaps, which matplotlib cannot; the other has a box for everything.
        if not missing or "emoji" in family.lower() or "last resort" in family.lower():
            continue
        try:
            here = missing & set(map(chr, get_font(files[family]).get_charmap()))
        except (RuntimeError, OSError, ValueError):  # not a font that can be drawn with, after all
            continue
        missing -= here
        families += [family] if here and family not in families else []
    return families, missing

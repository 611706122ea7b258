"""Draws log-mel spectrograms of mixture, targets and residual, above each other."""

from __future__ import annotations

import io
import math
import textwrap
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clapsep_cli.audio.samples import Audio
from clapsep_cli.errors import ExtraError, OutputError
from clapsep_cli.files import writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 2000  # of a picture at most; when they are full, each two become one
BANDS = 128
WINDOW_SECONDS = 0.05  # of the transform, roughly: it has a power of two samples
BATCH = 384  # transforms at a time, of all parts and channels together
RANGE_DB = 80  # below the loudest
TITLE_COLUMNS, TITLE_LINES = 128, 4
LOWEST_HZ = 50  # of the frequency axis, which is logarithmic
MARKED = "#3ddc84"

Marks = Mapping[str, Sequence[tuple[float, float]]]  # stretches of each part, from and to in seconds
# For scripts that matplotlib's own font lacks; those that are installed are used.
FURTHER_FONTS = ("Noto Sans CJK JP", "Hiragino Sans", "Yu Gothic", "Microsoft YaHei", "Malgun Gothic", "Noto Sans")


def check_installed() -> None:
    """Raise `ExtraError` if librosa or matplotlib is not installed; does not import them, which takes a second."""
    missing = " and ".join(name for name in ("librosa", "matplotlib") if find_spec(name) is None)
    if missing:
        raise ExtraError(f'--plot needs {missing}: pip install "clapsep[plot]"')


class Picture:
    """The picture of a recording: mean power of each part in 128 mel bands (Slaney's), over all channels.

    It is built block by block, in at most 2,000 columns, so memory does not grow with the recording's length.

    Args:
        rate: in Hz.
        start: of the time axis, in seconds.
    """

    def __init__(self, rate: int, start: float = 0.0) -> None:
        import librosa

        self.rate, self.start = rate, start
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
        """Add a block of each part, in the order in which they are drawn: float32 `[channels, samples]`."""
        block = np.stack([np.asarray(part, np.float32) for part in parts.values()])
        if not self.names:
            self.names = list(parts)
            self._waiting = np.zeros((*block.shape[:2], self.n_fft // 2), np.float32)
        self.samples += block.shape[2]
        self._push(block)

    @property
    def seconds(self) -> float:
        """Duration of the audio that was added."""
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
        """Mean power, float32 `[parts, bands, columns]`, columns of `span` samples. Nothing can be added afterwards."""
        if not self.names:
            raise OutputError("nothing was separated: nothing to draw")
        self._push(np.zeros((*self._waiting.shape[:2], self.n_fft // 2), np.float32))
        return np.stack([*self._columns, *([self._banded()] if self._frames else [])], 2)

    def save(self, path: Path, title: str, marks: Marks = MappingProxyType({})) -> None:
        """Write the picture as a PNG (see `png`), completely or not at all. Raises `OutputError`."""
        with writing(path) as temporary:
            temporary.write_bytes(self.png(title, marks))

    def png(self, title: str, marks: Marks = MappingProxyType({})) -> bytes:
        """Draw the picture as a PNG, with a `title`, and `marks` as bars above the parts they belong to."""
        from matplotlib import style

        drawn = io.BytesIO()
        # "default", whatever the user's own settings are; a letter that no font has is drawn as a box.
        with style.context("default"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
            self._draw(title, marks).savefig(drawn, format="png", metadata={"Software": "clapsep"})
        return drawn.getvalue()

    def _draw(self, title: str, marks: Marks = MappingProxyType({})) -> Figure:
        from librosa import mel_frequencies
        from librosa.display import specshow
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        level = 10 * np.log10(np.maximum(self.power, 1e-20) / max(float(self.power.max()), 1e-20))
        if not self.power.any():
            level[:] = -RANGE_DB
        end = self.start + self.seconds
        unit = "s" if end < 60 else "m" if end < 3600 else "h"
        edges = self.start + np.arange(level.shape[2] + 1) * self.span / self.rate
        # Bands are centred on every second of these frequencies, and meet at those between.
        between = mel_frequencies(2 * BANDS + 3, fmin=0, fmax=self.rate / 2)[1::2]
        text, fonts = _printable(title), _fonts()
        height = 1.1 + 1.8 * len(self.names) + 0.18 * len(text.splitlines())
        figure = Figure(figsize=(11, height), dpi=120, layout="constrained")
        axes = figure.subplots(len(self.names), 1, sharex=True, squeeze=False)[:, 0]
        for name, values, axis in zip(self.names, level, axes, strict=True):
            mesh = specshow(
                values, x_coords=edges, y_coords=between, x_axis=unit, y_axis="log", ax=axis, cmap="magma",
                vmin=-RANGE_DB, vmax=0,
            )  # fmt: skip
            axis.set_title(_printable(name), loc="left", fontsize=9.5, fontfamily=fonts, parse_math=False)
            axis.set(xlim=(self.start, end), ylim=(LOWEST_HZ, between[-1]))
            for begin, stop in marks.get(name, ()):
                axis.axvspan(begin, stop, ymin=0.94, facecolor=MARKED, edgecolor="black", linewidth=0.5)
            axis.label_outer()
            if unit != "s":  # labels are of whole seconds
                axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 1.5, 3, 6, 10]))
        figure.colorbar(mesh, ax=list(axes), label="dB relative to the loudest", aspect=12 * len(self.names), pad=0.012)
        figure.suptitle(text, x=0.012, ha="left", fontsize=11, fontfamily=fonts, parse_math=False)
        return figure


def save_scores(path: Path, names: Sequence[str], edges: Sequence[float], scores: Audio) -> None:
    """Draw scores over time, a row for each name, as a PNG, completely or not at all.

    Args:
        path: of the picture.
        names: of the rows, from the top.
        edges: of the columns, in seconds, one more than there are columns.
        scores: `[names, columns]`, 0 to 1.

    Raises:
        OutputError: it cannot be written.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    with writing(path) as temporary, style.context("default"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure = Figure(figsize=(11, 1.3 + 0.28 * len(names)), dpi=120, layout="constrained")
        axis = figure.subplots()
        mesh = axis.pcolormesh(edges, np.arange(len(names) + 1), scores, cmap="magma", vmin=0, vmax=1)
        axis.set_yticks(np.arange(len(names)) + 0.5, [_printable(name) for name in names], fontfamily=_fonts())
        axis.set(xlabel="s", ylim=(len(names), 0))
        figure.colorbar(mesh, label="score", pad=0.012)
        figure.savefig(temporary, format="png", metadata={"Software": "clapsep"})


def _printable(text: str) -> str:
    """Wrap `text` into a few lines, without characters that cannot be printed."""
    plain = "".join(c if unicodedata.category(c)[0] != "C" else " " * c.isspace() for c in text)
    wide = any(unicodedata.east_asian_width(letter) in "WF" for letter in plain)
    return "\n".join(textwrap.wrap(plain, TITLE_COLUMNS // (1 + wide), max_lines=TITLE_LINES, placeholder=" …"))


def _fonts() -> list[str]:
    """Return the installed fonts for text; each letter is drawn by the first one that has it."""
    from matplotlib.font_manager import fontManager

    return ["DejaVu Sans", *(name for name in FURTHER_FONTS if name in fontManager.get_font_names())]

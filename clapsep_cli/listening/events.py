"""Finds when a target sounds: stretches where it is loud enough in the mixture and similar to its query."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from clapsep_cli.audio.samples import Audio, downmix
from clapsep_cli.files import writing
from clapsep_cli.listening.levels import Likeness

FRAME_SECONDS = 0.025
SMOOTHED_FRAMES = 5  # over which energies are averaged
CHUNK_SECONDS = 10.0  # decided at once, beside the chunk before and the one after
HEARD_SECONDS = 10.0  # of an event, from its start, that its presence is told from
HYSTERESIS_DB = 6.0  # an event ends this far below the level at which it begins
LOUD_DB, SILENT_DB = -20.0, -30.0  # to the loudest frame of three chunks: where an event begins, and where it ends
LEVEL_WEIGHT, LEAST_LEVEL_DB = 0.01, -20.0  # of an event's level relative to the mixture, in its presence
GAP_SECONDS = 0.4  # shorter silences do not end an event
SILENCE = 1e-10  # mean square (−100 dB) that counts as nothing
FORMATS = {"csv": "csv", "audacity": "txt", "raven": "txt"}  # suffix by name

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Rules:
    """What counts as an event.

    Args:
        level: level of the target in dB relative to the mixture at which an event begins.
        presence: least presence of an event; it has no effect where likeness cannot be told.
        length: shortest event, in seconds.
    """

    level: float = -15.0
    presence: float = 0.05
    length: float = 0.15


@dataclass(frozen=True)
class Event:
    """A stretch in which a target sounds.

    Args:
        start, end: in seconds.
        level_db: RMS of the target over all channels, in dB of full scale.
        presence: likeness of the target to the query in its most alike moment, plus 0.01 for each dB relative to the
            mixture; None if unknown.
    """

    start: float
    end: float
    level_db: float
    presence: float | None

    def moved(self, start: float, expand: float = 1.0) -> Event:
        """Return the event of a recording heard `expand` times slower, in a part that begins at `start` seconds."""
        begin, end = (round(start + at / expand, 4) for at in (self.start, self.end))
        return Event(begin, end, self.level_db, self.presence)


@dataclass
class _Candidate:
    """A stretch of frames, `first` to `last` (exclusive), that may be an event."""

    first: int
    last: int
    begins: bool = False  # True if one of its frames is loud enough for an event to begin
    energies: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))  # sums, of mixture and stem
    heard: list[Audio] = field(default_factory=list)  # of the stem, [samples]


@dataclass(frozen=True)
class _Chunk:
    stem: Audio  # [samples], a downmix
    energies: NDArray[np.float64]  # mean squares of mixture and stem, [2, frames]


class EventFinder:
    """Finds the events of a target as a stream. What it holds does not grow with the recording, except for the events.

    Args:
        rate: of the recording in Hz.
        rules: what counts as an event.
    """

    def __init__(self, rate: int, rules: Rules = Rules()) -> None:
        self.rate, self.rules = rate, rules
        self._frame = max(1, round(FRAME_SECONDS * rate))
        self._size = self._frame * round(CHUNK_SECONDS / FRAME_SECONDS)
        self._blocks: list[tuple[Audio, Audio]] = []
        self._held = self._samples = 0
        self._chunks: list[_Chunk] = []  # the one that was decided last, and those that were not
        self._decided = 0  # frames
        self._open: _Candidate | None = None  # reaches the last frame that was decided
        self._last: _Candidate | None = None  # ended; may be joined with the next one
        self._ready: list[_Candidate] = []

    def add(self, mixture: Audio, stem: Audio) -> None:
        """Take in float32 `[channels, samples]` of both."""
        self._samples += mixture.shape[1]
        while mixture.shape[1]:
            room = self._size - self._held
            self._blocks.append((mixture[:, :room], stem[:, :room]))
            self._held += self._blocks[-1][0].shape[1]
            mixture, stem = mixture[:, room:], stem[:, room:]
            if self._held == self._size:
                self._end_chunk()

    def _end_chunk(self) -> None:
        mixture, stem = (np.concatenate(list(blocks), 1) for blocks in zip(*self._blocks, strict=True))
        energies = np.stack([self._energies(mixture), self._energies(stem)])
        self._chunks.append(_Chunk(downmix(stem), energies))
        self._blocks, self._held = [], 0
        if len(self._chunks) == 3 or (len(self._chunks) == 2 and not self._decided):
            self._decide()

    def _energies(self, audio: Audio) -> NDArray[np.float64]:
        squares = np.square(audio, dtype=np.float64).mean(0)
        frames = -(-len(squares) // self._frame)
        padded = np.pad(squares, (0, frames * self._frame - len(squares))).reshape(frames, -1)
        return np.asarray(padded.mean(1), np.float64)

    def _decide(self) -> None:
        """Decide the oldest chunk that is not decided yet."""
        at = 1 if self._decided else 0
        chunk, before = self._chunks[at], self._chunks[0].energies.shape[1] if at else 0
        around = np.concatenate([one.energies for one in self._chunks[: at + 2]], 1)
        smooth = np.stack([np.convolve(row, np.ones(SMOOTHED_FRAMES) / SMOOTHED_FRAMES, "same") for row in around])
        mixture, stem = np.maximum(smooth, SILENCE)
        level, relative = 10 * np.log10(stem / mixture), 10 * np.log10(stem / stem.max())
        frames = slice(before, before + chunk.energies.shape[1])
        begins = (relative > LOUD_DB) & (level >= self.rules.level) & (stem > SILENCE)
        goes_on = (relative > SILENT_DB) & (level >= self.rules.level - HYSTERESIS_DB) & (stem > SILENCE)
        self._follow(chunk, begins[frames], goes_on[frames])
        self._decided += chunk.energies.shape[1]
        self._chunks = self._chunks[at:]

    def _follow(self, chunk: _Chunk, begins: NDArray[np.bool_], goes_on: NDArray[np.bool_]) -> None:
        edges = np.flatnonzero(np.diff(goes_on.astype(np.int8), prepend=0, append=0))
        for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            if first or self._open is None:
                self._end_open()
                self._open = _Candidate(self._decided + first, self._decided + first)
            one, span = self._open, slice(first * self._frame, last * self._frame)
            one.last = self._decided + last
            one.begins |= bool(begins[first:last].any())
            one.energies = one.energies + chunk.energies[:, first:last].sum(1)
            room = max(0, round(HEARD_SECONDS * self.rate) - sum(map(len, one.heard)))
            one.heard.append(chunk.stem[span][:room])
        if not goes_on[-1]:
            self._end_open()

    def _end_open(self) -> None:
        """End the open candidate; join it to the one before if the gap between the two is short."""
        ended, self._open = self._open, None
        if ended is None or not ended.begins:
            return
        last = self._last
        if last is not None and (ended.first - last.last) * self._frame < GAP_SECONDS * self.rate:
            last.last, last.energies = ended.last, last.energies + ended.energies
            if sum(map(len, last.heard)) < HEARD_SECONDS * self.rate:
                last.heard += ended.heard
            return
        self._settle_last()
        self._last = ended

    def _settle_last(self) -> None:
        last, self._last = self._last, None
        if last is not None and (last.last - last.first) * self._frame >= self.rules.length * self.rate:
            self._ready.append(last)

    def take(self, likeness: Likeness | None) -> list[Event]:
        """Return the events that were decided since the last call.

        Args:
            likeness: of a recording to the query; None where the model cannot tell.
        """
        ready, self._ready = self._ready, []
        found = [self._event(one, likeness) for one in ready]
        return [one for one in found if one.presence is None or one.presence >= self.rules.presence]

    def finish(self, likeness: Likeness | None) -> list[Event]:
        """Return the events that are left. Nothing can be added afterwards."""
        if self._held:
            self._end_chunk()
        while self._decided * self._frame < self._samples:
            self._decide()
        self._end_open()
        self._settle_last()
        return self.take(likeness)

    def _event(self, one: _Candidate, likeness: Likeness | None) -> Event:
        mixture, stem = np.maximum(one.energies / (one.last - one.first), SILENCE)
        told = likeness(np.concatenate(one.heard), moment=True) if likeness else None
        if told is not None:
            told = round(told + LEVEL_WEIGHT * max(10 * float(np.log10(stem / mixture)), LEAST_LEVEL_DB), 4)
        end = min(one.last * self._frame, self._samples) / self.rate
        return Event(one.first * self._frame / self.rate, end, round(10 * float(np.log10(stem)), 2), told)


def find_events(
    mixture: Audio, stem: Audio, rate: int, likeness: Likeness | None = None, rules: Rules = Rules()
) -> list[Event]:
    """Find the events of a target in memory.

    Args:
        mixture: float32 `[channels, samples]`.
        stem: the target, likewise.
        rate: in Hz.
        likeness: of a recording at that rate to the query; None where the model cannot tell.
        rules: what counts as an event.
    """
    finder = EventFinder(rate, rules)
    finder.add(mixture, stem)
    return finder.finish(likeness)


def save_events(path: Path, events: Mapping[str, Sequence[Event]], format: str, rate: int) -> None:  # noqa: A002
    """Write a file as `write_events` does, completely or not at all. Raises `OutputError`."""
    with writing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        write_events(file, events, format, rate)


def write_events(file: TextIO, events: Mapping[str, Sequence[Event]], format: str, rate: int) -> None:  # noqa: A002
    """Write the events of all targets, in the order of time.

    Args:
        file: open for writing text, with `newline=""`.
        events: by the name of their target.
        format: "csv" with a header; "audacity", a label track; or "raven", a selection table of Raven.
        rate: of the recording in Hz: Raven's selections reach up to half of it.
    """
    rows = sorted(((name, one) for name, several in events.items() for one in several), key=lambda row: row[1].start)
    if format == "csv":
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("target", "start", "end", "level_db", "presence"))
        writer.writerows((name, e.start, e.end, e.level_db, e.presence) for name, e in rows)
        return
    writer = csv.writer(file, "excel-tab", lineterminator="\n")
    if format == "audacity":
        writer.writerows((f"{e.start:.4f}", f"{e.end:.4f}", name) for name, e in rows)
        return
    place = ("Selection", "View", "Channel", "Begin Time (s)", "End Time (s)", "Low Freq (Hz)", "High Freq (Hz)")
    writer.writerow((*place, "Annotation", "Level (dBFS)", "Presence"))
    writer.writerows(
        (number, "Spectrogram 1", 1, f"{e.start:.4f}", f"{e.end:.4f}", 0, rate // 2, name, e.level_db, e.presence)
        for number, (name, e) in enumerate(rows, 1)
    )

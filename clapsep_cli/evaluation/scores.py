"""Scores of an evaluation: what they add up to, and a file that a run that was killed goes on with."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from clapsep_cli.errors import OutputError
from clapsep_cli.evaluation.mixtures import Mixture

DECIMALS = 4  # of a figure in dB; rounded at once, so that a resumed table is that of a run in one go
METRICS = {"sdri": "SDRi", "si_sdri": "SI-SDRi", "bss_sdri": "BSS-eval SDRi"}  # columns, and their titles
SHOT, ABSENT = "shot", "absent"  # kinds of query that have columns of their own in a list of mixtures


@dataclass(frozen=True)
class Score:
    """Of one mixture and one kind of query, in dB. `level`: of the output relative to the mixture."""

    mixture: Mixture
    query: str
    sdri: float
    si_sdri: float
    bss_sdri: float | None
    level: float


def summary(scores: Iterable[Score]) -> dict[str, dict[str, float]]:
    """By kind of query: how many mixtures; mean, standard deviation and median of each metric; median output level."""
    groups: dict[str, list[Score]] = {}
    for s in scores:
        groups.setdefault(s.query, []).append(s)
    return {query: _figures(chosen) for query, chosen in groups.items()}


def _figures(scores: Sequence[Score]) -> dict[str, float]:
    figures: dict[str, float] = {"mixtures": len(scores)}
    for metric in METRICS:
        values = np.array([value for s in scores if (value := getattr(s, metric)) is not None])
        if len(values):
            figures[metric] = float(values.mean())
            figures[f"{metric}_std"] = float(values.std())
            figures[f"{metric}_median"] = float(np.median(values))
    return figures | {"level_median": float(np.median([s.level for s in scores]))}


def by_label(scores: Iterable[Score], query: str) -> dict[str, dict[str, float]]:
    """The summary of each label (of each caption, where there are no labels) under one kind of query, best first."""
    groups: dict[str, list[Score]] = {}
    for s in scores:
        if s.query == query:
            groups.setdefault(s.mixture.label or s.mixture.positive_caption, []).append(s)
    figures = {label: _figures(chosen) for label, chosen in groups.items()}
    return dict(sorted(figures.items(), key=lambda item: -item[1]["si_sdri"]))


def presence(scores: Iterable[Score]) -> dict[str, float]:
    """How well the output's level tells what is in a mixture from what is not: its medians in dB under a positive and
    under an absent text, and the area under the ROC curve (0.5 is chance). Empty without such scores."""
    levels: dict[str, list[float]] = {"positive": [], ABSENT: []}
    for s in scores:
        if s.query in levels:
            levels[s.query].append(s.level)
    present, absent = (np.sort(values) for values in levels.values())
    if not len(present) or not len(absent):
        return {}
    below = np.searchsorted(absent, present, "left") + np.searchsorted(absent, present, "right")
    return {
        "present_level": float(np.median(present)),
        "absent_level": float(np.median(absent)),
        "roc_area": float(below.mean() / 2 / len(absent)),
    }


COLUMNS = ("row", "source_file", "noise_file", "label", "query", *METRICS, "level")


class ScoreFile:
    """A CSV of scores, one a line, headed by a line with the settings of the run (`# {…}`).

    While it grows it is called `PATH.partial`; `finish` gives it its name. `scores` are those that it holds, by
    mixture; what a run that was killed left of its last mixture is cut off.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, object], rows: Sequence[Mixture], kinds: Sequence[Sequence[str]]
    ) -> None:
        """`kinds`: of query, in their order, for each of `rows`. Raises `OutputError` for a file of another run."""
        self.path, self.partial = path, path.with_name(f"{path.name}.partial")
        stated = json.dumps(settings, ensure_ascii=False)
        self._settings, self._head = json.loads(stated), f"# {stated}\n{','.join(COLUMNS)}\n"
        self._file: TextIO | None = None
        self.scores: list[list[Score]] = []
        finished = path.exists()
        kept = self._read(path if finished else self.partial, rows, kinds)
        if finished and len(self.scores) < len(rows):
            raise OutputError(f"{path}: is damaged; delete it, or use another --out")
        if not finished:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.partial.open("a", newline="", encoding="utf-8")
            self._file.truncate(kept)
            self._file.write("" if kept else self._head)
            self._file.flush()

    def _read(self, path: Path, rows: Sequence[Mixture], kinds: Sequence[Sequence[str]]) -> int:
        """Fill `scores` from a file; returns how many of its bytes are whole."""
        text = path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
        if not text.startswith(self._head):
            if self._head.startswith(text):
                return 0
            raise OutputError(f"{path}: holds scores of {self._difference(text)}; delete it, or use another --out")
        lines = text.removeprefix(self._head).split("\n")[:-1]  # the last has no end: it is empty, or a part of one
        at = 0
        for i, (row, names) in enumerate(zip(rows, kinds, strict=True)):
            own = lines[at : at + len(names)]
            scores = [self._parse(line, i, row, name) for line, name in zip(own, names, strict=False)]
            whole = [s for s in scores if s]
            if len(whole) < len(names):
                break
            self.scores.append(whole)
            at += len(names)
        return len((self._head + "".join(f"{line}\n" for line in lines[:at])).encode())

    def _difference(self, text: str) -> str:
        try:
            found = json.loads(text.split("\n", 1)[0].removeprefix("# "))
            other = [key for key in self._settings if found.get(key) != self._settings[key]]
        except (ValueError, AttributeError):
            return "something else"
        return f"a run with other settings ({', '.join(other)})" if other else "another version"

    @staticmethod
    def _parse(line: str, index: int, row: Mixture, query: str) -> Score | None:
        try:
            cells = dict(zip(COLUMNS, next(csv.reader([line])), strict=True))
            if (cells["row"], cells["query"]) != (str(index + 1), query):
                return None
            bss = float(cells["bss_sdri"]) if cells["bss_sdri"] else None
            return Score(row, query, float(cells["sdri"]), float(cells["si_sdri"]), bss, float(cells["level"]))
        except (ValueError, StopIteration, csv.Error):
            return None

    def append(self, scores: Sequence[Score]) -> None:
        """Add the scores of the next mixture; a process that is killed later does not lose them."""
        assert self._file is not None, "a finished file takes no more scores"
        writer = csv.writer(self._file, lineterminator="\n")
        self.scores.append(list(scores))
        for s in scores:
            bss = "" if s.bss_sdri is None else s.bss_sdri
            named = (" ".join(x.split()) for x in (s.mixture.source_file, s.mixture.noise_file, s.mixture.label))
            writer.writerow([len(self.scores), *named, s.query, s.sdri, s.si_sdri, bss, s.level])
        self._file.flush()

    def finish(self) -> None:
        """Give the file its name."""
        if self._file is not None:
            self._file.close()
            self.partial.replace(self.path)

    def __enter__(self) -> ScoreFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

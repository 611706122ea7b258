"""Scores of an evaluation: their statistics, comparisons of runs, and a CSV from which a stopped run continues."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from clapsep_cli.errors import OutputError
from clapsep_cli.evaluation.mixtures import Mixture

DECIMALS = 4  # of a figure in dB; rounded at once, so that a resumed run gives the same table
METRICS = {"sdri": "SDRi", "si_sdri": "SI-SDRi", "bss_sdri": "BSS-eval SDRi"}  # columns, and their titles
RESAMPLES, INTERVAL = 2000, (2.5, 97.5)  # of the bootstrap, and its percentiles
SHOT, ABSENT = "shot", "absent"  # kinds of query with their own column in a list of mixtures


@dataclass(frozen=True)
class Score:
    """Scores of one mixture under one kind of query, in dB. `level` is that of the output relative to the mixture."""

    mixture: Mixture
    query: str
    sdri: float
    si_sdri: float
    bss_sdri: float | None
    level: float


def summary(scores: Iterable[Score]) -> dict[str, dict[str, float]]:
    """Summarise scores by kind of query: number of `mixtures`, `level_median`, and by metric `METRIC`, the mean, with
    `METRIC_std` (of a sample, ddof 1) and `METRIC_median`, all in dB; `worse`, the share with an SI-SDRi below 0."""
    return {query: _figures(chosen) for query, chosen in _grouped(scores, lambda s: s.query).items()}


def _grouped(scores: Iterable[Score], key: Callable[[Score], str]) -> dict[str, list[Score]]:
    groups: dict[str, list[Score]] = {}
    for s in scores:
        groups.setdefault(key(s), []).append(s)
    return groups


def _figures(scores: Sequence[Score]) -> dict[str, float]:
    figures: dict[str, float] = {"mixtures": len(scores)}
    for metric in METRICS:
        values = np.array([value for s in scores if (value := getattr(s, metric)) is not None])
        if len(values):
            figures[metric] = float(values.mean())
            figures[f"{metric}_std"] = float(values.std(ddof=1)) if len(values) > 1 else 0.0
            figures[f"{metric}_median"] = float(np.median(values))
    worse = float(np.mean([s.si_sdri < 0 for s in scores]))
    return figures | {"worse": worse, "level_median": float(np.median([s.level for s in scores]))}


def by_label(scores: Iterable[Score], query: str) -> dict[str, dict[str, float]]:
    """Summarise the scores of one kind of query by label (by caption if it has none), best SI-SDRi first."""
    groups = _grouped((s for s in scores if s.query == query), lambda s: s.mixture.label or s.mixture.positive_caption)
    figures = {label: _figures(chosen) for label, chosen in groups.items()}
    return dict(sorted(figures.items(), key=lambda item: -item[1]["si_sdri"]))


def presence(scores: Iterable[Score]) -> dict[str, float]:
    """Measure how well the output's level separates present from absent sounds.

    Returns the median levels in dB under a positive and under an absent text, and the area under the ROC curve (chance
    is 0.5); empty without scores of both.
    """
    groups = _grouped(scores, lambda s: s.query)
    present, absent = (np.sort([s.level for s in groups.get(query, ())]) for query in ("positive", ABSENT))
    if not len(present) or not len(absent):
        return {}
    below = np.searchsorted(absent, present, "left") + np.searchsorted(absent, present, "right")
    return {
        "present_level": float(np.median(present)),
        "absent_level": float(np.median(absent)),
        "roc_area": float(below.mean() / 2 / len(absent)),
    }


@dataclass(frozen=True)
class Run:
    """Scores of a system on a list of mixtures, and the `settings` that they depend on."""

    listed: str
    system: str
    scores: Sequence[Score]
    settings: Mapping[str, object]

    @cached_property
    def table(self) -> dict[str, dict[str, float]]:
        """The summary by kind of query."""
        return summary(self.scores)


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences of a metric in dB, system less base, over the mixtures that both were scored on.

    Attributes:
        low: lower end of its 95 % interval, by bootstrap.
        high: upper end.
        worse: share of the mixtures that the system leaves worse than the base does.
    """

    listed: str
    system: str
    base: str
    query: str
    metric: str
    mixtures: int
    mean: float
    low: float
    high: float
    worse: float


def differences(runs: Sequence[Run]) -> Iterator[Difference]:
    """Compare each system with the first one of its list, under each kind of query that both were asked by."""
    for listed in dict.fromkeys(run.listed for run in runs):
        base, *others = (run for run in runs if run.listed == listed)
        for run in others:
            for query in (query for query in run.table if query in base.table and query != ABSENT):
                for metric in METRICS:
                    first, second = _values(base, query, metric), _values(run, query, metric)
                    shared = [second[mixture] - first[mixture] for mixture in second if mixture in first]
                    if shared:
                        paired = np.array(shared)
                        low, high = interval(paired)
                        figures = (float(paired.mean()), low, high, float((paired < 0).mean()))
                        yield Difference(listed, run.system, base.system, query, metric, len(paired), *figures)


def _values(run: Run, query: str, metric: str) -> dict[object, float]:
    return {s.mixture: x for s in run.scores if s.query == query and (x := getattr(s, metric)) is not None}


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Estimate the 95 % interval of the mean of `values` by the percentile bootstrap; the same at every call."""
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, INTERVAL).tolist()
    return low, high


COLUMNS = ("row", "source_file", "noise_file", "label", "query", *METRICS, "level")


class ScoreFile:
    """A CSV with a line for each score, after a line with the settings of the run (`# {…}`).

    It grows as `PATH.partial`, and `finish` renames it. `scores` holds the scores in the file, by mixture. Scores of an
    incomplete mixture, left by a killed run, are removed.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, object], rows: Sequence[Mixture], kinds: Sequence[Sequence[str]]
    ) -> None:
        """Open the file, or begin it.

        Args:
            path: the CSV.
            settings: everything that the scores depend on.
            rows: the mixtures.
            kinds: the kinds of query of each mixture, in order.

        Raises:
            OutputError: the file is of another run, or damaged.
        """
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
        """Fill `scores` from a file. Return the number of its bytes that hold complete mixtures."""
        text = path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
        if not text.startswith(self._head):
            if self._head.startswith(text):
                return 0
            raise OutputError(f"{path}: holds scores of {self._difference(text)}; delete it, or use another --out")
        lines = iter(text.removeprefix(self._head).split("\n")[:-1])  # the last piece is empty or cut
        kept = self._head
        for number, (row, queries) in enumerate(zip(rows, kinds, strict=True), 1):
            own = list(islice(lines, len(queries)))
            try:
                scores = [_parse(line, number, row) for line in own]
            except (ValueError, csv.Error):
                break
            if [s.query for s in scores] != list(queries):
                break
            self.scores.append(scores)
            kept += "".join(f"{line}\n" for line in own)
        return len(kept.encode())

    def _difference(self, text: str) -> str:
        try:
            found = json.loads(text.split("\n", 1)[0].removeprefix("# "))
            other = [key for key in self._settings if found.get(key) != self._settings[key]]
        except (ValueError, AttributeError):
            return "something else"
        return f"a run with other settings ({', '.join(other)})" if other else "another version"

    def append(self, scores: Sequence[Score]) -> None:
        """Write the scores of the next mixture at once: a process that is killed later does not lose them."""
        assert self._file is not None, "a finished file takes no more scores"
        writer = csv.writer(self._file, lineterminator="\n")
        self.scores.append(list(scores))
        for s in scores:
            bss = "" if s.bss_sdri is None else s.bss_sdri
            named = (" ".join(x.split()) for x in (s.mixture.source_file, s.mixture.noise_file, s.mixture.label))
            writer.writerow([len(self.scores), *named, s.query, s.sdri, s.si_sdri, bss, s.level])
        self._file.flush()

    def finish(self) -> None:
        """Close the file and give it its final name."""
        if self._file is not None:
            self._file.close()
            self.partial.replace(self.path)

    def __enter__(self) -> ScoreFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def resumed(
    path: Path,
    settings: Mapping[str, object],
    rows: Sequence[Mixture],
    kinds: Sequence[Sequence[str]],
    scored: Callable[[int], Iterator[list[Score]]],
) -> Iterator[list[Score]]:
    """Score a list, and keep the scores in a CSV.

    Args:
        path: the CSV. Scores of an earlier run with the same settings are read from it.
        settings: everything that the scores depend on.
        rows: the mixtures.
        kinds: the kinds of query of each mixture, in order.
        scored: yields the scores of each mixture, from a given index on.

    Raises:
        OutputError: `path` holds scores of another run.
    """
    with ScoreFile(path, settings, rows, kinds) as file:
        yield from list(file.scores)
        if len(file.scores) < len(rows):
            for scores in scored(len(file.scores)):
                file.append(scores)
                yield scores
        file.finish()


def _parse(line: str, number: int, row: Mixture) -> Score:
    """Read the scores of mixture `number` from a line. Raises `ValueError` and `csv.Error` for any other line."""
    (cells,) = csv.reader([line])
    index, *_, query, sdri, si_sdri, bss_sdri, level = cells
    if index != str(number) or len(cells) != len(COLUMNS):
        raise ValueError
    return Score(row, query, float(sdri), float(si_sdri), float(bss_sdri) if bss_sdri else None, float(level))

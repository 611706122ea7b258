"""Compares runs of an evaluation, mixture by mixture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from clapsep_cli.evaluation.scores import ABSENT, METRICS, Score, summary

RESAMPLES = 2000  # of the bootstrap
INTERVAL = (2.5, 97.5)  # percentiles


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

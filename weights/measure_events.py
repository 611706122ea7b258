"""Measures how well events are found, on scenes of known placement made from a list of mixtures.

    python weights/measure_events.py --list weights/dev-mixtures.csv --audio ../shared/audio
    python weights/measure_events.py --list weights/unseen-mixtures.csv --audio ../shared --limit 60

A scene lasts 30 s: the interferer's clip, repeated, and the target's clip at two places, as loud as the interferer is
while the clip sounds. Its true events are those that the clip alone has: stretches within 30 dB of its loudest, joined
over gaps of 0.4 s. An event is found if both its ends are right within 0.2 s, or a fifth of its length where that is
more. Each table gives F1 by the level at which events begin and the least presence; the defaults of
`clapsep_cli.listening.events` were chosen on the dev list.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from clapsep_cli import Query, load_model, separate
from clapsep_cli.audio.samples import Audio
from clapsep_cli.audio.sources import read_mono
from clapsep_cli.evaluation.mixtures import Mixture, read_mixtures
from clapsep_cli.listening.events import Event, Rules, find_events
from clapsep_cli.separation import Separation

RATE, SCENE_SECONDS, PLACES = 32_000, 30, 2
TOLERANCE_SECONDS, TOLERANCE_SHARE = 0.2, 0.2
LEVELS = (-20.0, -15.0, -10.0)
PRESENCES = (-9.0, 0.0, 0.05, 0.1, 0.15, 0.2)
Stretch = tuple[float, float]


class Scene(NamedTuple):
    mixture: Audio  # [1, samples]
    truth: list[Stretch]


def scene(row: Mixture, folder: Path, rng: np.random.Generator) -> Scene:
    clip, noise = (read_mono(folder / name, RATE)[: 10 * RATE] for name in (row.source_file, row.noise_file))
    mixture = np.resize(np.roll(noise, int(rng.integers(len(noise)))), SCENE_SECONDS * RATE)
    own = [(event.start, event.end) for event in find_events(clip[None], clip[None], RATE)]
    share, truth = SCENE_SECONDS * RATE // PLACES, []
    for place in range(PLACES):
        at = place * share + int(rng.integers(max(1, share - len(clip))))
        stretch = mixture[at : at + len(clip)]
        clip_there = clip[: len(stretch)]
        energies = float(np.square(stretch).sum()), float(np.square(clip_there).sum())
        gain = np.sqrt(energies[0] / energies[1]) if min(energies) > 0 else 1.0
        stretch += np.float32(gain) * clip_there
        truth += [(at / RATE + start, min(at / RATE + end, SCENE_SECONDS)) for start, end in own]
    return Scene(mixture[None], truth)


def hits(found: Sequence[Stretch], truth: Sequence[Stretch], onsets: bool) -> int:
    """Count the largest number of pairs of a found and a true event that agree."""
    if not found or not truth:
        return 0
    allowed = [max(TOLERANCE_SECONDS, TOLERANCE_SHARE * (end - start)) for start, end in truth]
    right = np.array(
        [
            [
                abs(f[0] - t[0]) <= TOLERANCE_SECONDS and (onsets or abs(f[1] - t[1]) <= a)
                for t, a in zip(truth, allowed, strict=True)
            ]
            for f in found
        ]
    )
    return int(right[linear_sum_assignment(right, maximize=True)].sum())


class Tally:
    """Counts of events over scenes."""

    def __init__(self) -> None:
        self.right = self.onsets = self.found = self.true = 0

    def add(self, found: Sequence[Event], truth: Sequence[Stretch]) -> None:
        stretches = [(event.start, event.end) for event in found]
        self.right += hits(stretches, truth, onsets=False)
        self.onsets += hits(stretches, truth, onsets=True)
        self.found, self.true = self.found + len(stretches), self.true + len(truth)

    def f1(self, onsets: bool = False) -> float:
        return 2 * (self.onsets if onsets else self.right) / max(1, self.found + self.true)


def loosely(result: Separation, level: float) -> list[Event]:
    likeness = result.likenesses["target"]
    return find_events(result.mixture, result.target, result.rate, likeness, Rules(level, PRESENCES[0]))


def table(name: str, found: dict[float, list[tuple[list[Event], list[Stretch]]]]) -> None:
    print(f"\nF1 (of onsets alone), {name}: level by presence {PRESENCES}")
    for level, scenes in found.items():
        cells = []
        for presence in PRESENCES:
            tally = Tally()
            for events, truth in scenes:
                tally.add([one for one in events if one.presence is None or one.presence >= presence], truth)
            cells.append(f"{tally.f1():.3f} ({tally.f1(onsets=True):.3f})")
        print(f"  {level:6.1f}", "  ".join(cells))


def false_alarms(absent: list[list[Event]]) -> None:
    """Print how many events a query finds that names nothing in the scene."""
    minutes = len(absent) * SCENE_SECONDS / 60
    for presence in PRESENCES:
        count = sum(one.presence is None or one.presence >= presence for events in absent for one in events)
        print(f"  of an absent sound, presence {presence:5.2f}: {count / max(1e-9, minutes):.2f} events a minute")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", type=Path, required=True)
    parser.add_argument("--audio", type=Path, required=True)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--limit", type=int, default=100, help="scenes, spread over the list")
    given = parser.parse_args()
    model = load_model(given.model, "cpu")
    model.refine(None)
    rows = read_mixtures(given.list)
    rows = rows[:: max(1, len(rows) // given.limit)][: given.limit]
    by_query: dict[str, dict[float, list[tuple[list[Event], list[Stretch]]]]] = {}
    absent: list[list[Event]] = []
    for number, row in enumerate(rows):
        one = scene(row, given.audio, np.random.default_rng(number))
        queries = {
            "positive": Query(pos=row.positive_caption),
            "both": Query(pos=row.positive_caption, neg=row.negative_caption),
        }
        for name, query in queries.items():
            result = separate(one.mixture, RATE, query, model)
            for level, told in by_query.setdefault(name, {level: [] for level in LEVELS}).items():
                told.append((loosely(result, level), one.truth))
        if row.absent_caption:
            absent.append(loosely(separate(one.mixture, RATE, Query(pos=row.absent_caption), model), Rules().level))
    for name, found in by_query.items():
        table(f"{name} query, {len(rows)} scenes", found)
    false_alarms(absent)


if __name__ == "__main__":
    main()

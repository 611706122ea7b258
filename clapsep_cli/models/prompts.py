"""Lists the prompts of the released TUSS models and the combinations they were trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

from clapsep_cli.errors import QueryError

if TYPE_CHECKING:
    import numpy as np

# In the order of the released files; a model's own configuration may name others.
PROMPTS = ("speech", "sfx", "sfxbg", "drums", "bass", "vocals", "other", "musicbg")
STEMS = ("drums", "bass", "vocals", "other")
COUNTS = (2, 3, 4)  # of prompts that name a mixture, all of it

# Complete sets: together they name all that a recording of the kind has in it.
TASKS: dict[str, tuple[str, ...]] = {
    "speech-enhancement": ("speech", "sfxbg"),
    "speech-separation": ("speech", "speech", "sfxbg"),
    "sound-events": ("sfx", "sfx", "sfx"),
    "music": STEMS,
    "cinematic": ("speech", "musicbg", "sfxbg"),
}

# How the prompts of a mixture are drawn: the first by these weights, each next by the row of the one before. A pair
# that has no weight is never mixed.
FIRST = {"speech": 0.2, "sfx": 0.2, "sfxbg": 0.2, "musicbg": 0.2} | dict.fromkeys(STEMS, 0.05)
NEXT: dict[str, dict[str, float]] = {
    "speech": {"speech": 0.4, "sfxbg": 0.2, "musicbg": 0.2, "sfx": 0.1} | dict.fromkeys(STEMS, 0.025),
    "sfx": {"sfx": 0.5, "speech": 0.2, "musicbg": 0.2} | dict.fromkeys(STEMS, 0.025),
    "sfxbg": {"speech": 0.5, "musicbg": 0.4} | dict.fromkeys(STEMS, 0.025),
    "musicbg": {"speech": 0.33, "sfx": 0.33, "sfxbg": 0.33},
}
for _stem in STEMS:
    _others = {other: 0.3 for other in STEMS if other != _stem}
    NEXT[_stem] = _others | {"speech": 0.033, "sfx": 0.033, "sfxbg": 0.033}
NEW = 0.2  # weight of a prompt that the released models do not have, first and after any other


class Odds(NamedTuple):
    """Weights by which the prompts of a mixture are drawn: of the first, and of the next by the one before."""

    first: Mapping[str, float]
    following: Mapping[str, Mapping[str, float]]

    def mixed(self, one: str, other: str) -> bool:
        """Return whether a mixture may have both prompts."""
        return self.following.get(one, {}).get(other, 0) > 0


RELEASED = Odds(FIRST, NEXT)


def odds_of(vocabulary: Sequence[str], never: Iterable[tuple[str, str]] = ()) -> Odds:
    """Return the odds with new prompts, each of which is mixed with all others.

    Args:
        vocabulary: prompts; those that the released models lack are new.
        never: further pairs that are never mixed.
    """
    new = {prompt: NEW for prompt in vocabulary if prompt not in NEXT}
    first = FIRST | new
    banned = {pair for one, other in never for pair in ((one, other), (other, one))}
    rows = {prompt: row | new for prompt, row in NEXT.items()}
    rows |= {prompt: {other: first[other] for other in first if other != prompt} for prompt in new}
    return Odds(
        first,
        {one: {other: row[other] for other in row if (one, other) not in banned} for one, row in rows.items()},
    )


def indices(names: Sequence[str], vocabulary: Sequence[str] = PROMPTS) -> list[int]:
    """Return the number of each prompt in `vocabulary`. Raises `QueryError`, which lists the vocabulary."""
    unknown = [name for name in names if name not in vocabulary]
    if unknown or not names:
        asked = f"no prompt {', '.join(map(repr, unknown))}" if unknown else "no prompt given"
        raise QueryError(f"{asked}; there are: {', '.join(vocabulary)}")
    return [vocabulary.index(name) for name in names]


def untrained(prompts: Sequence[str]) -> list[str]:
    """Return each reason why the released models were not trained on mixtures of `prompts`, beside new ones."""
    counts = Counter(prompt for prompt in prompts if prompt in PROMPTS)
    reasons = []
    if len(prompts) not in COUNTS:
        reasons.append(f"{len(prompts)} prompt{'s' * (len(prompts) != 1)} instead of {COUNTS[0]} to {COUNTS[-1]}")
    mixed = RELEASED.mixed
    reasons += [f"{prompt} more than once" for prompt in counts if counts[prompt] > 1 and not mixed(prompt, prompt)]
    return reasons + [f"{one} with {other}" for one, other in combinations(counts, 2) if not mixed(one, other)]


def draw(rng: np.random.Generator, count: int, supply: Mapping[str, int], odds: Odds = RELEASED) -> list[str]:
    """Draw the prompts of a mixture as the released models' training did.

    Args:
        rng: draws.
        count: number of prompts.
        supply: how many different sources there are for each prompt; they must be `drawable`.
        odds: weights of the prompts.
    """
    while True:  # a draw may end where no further prompt fits
        drawn: list[str] = []
        while len(drawn) < count:
            weights = odds.following[drawn[-1]] if drawn else odds.first
            fitting = {prompt: weights[prompt] for prompt in weights if _fits(prompt, drawn, supply, odds)}
            if not fitting:
                break
            total = sum(fitting.values())
            drawn.append(str(rng.choice(list(fitting), p=[weight / total for weight in fitting.values()])))
        else:
            return drawn


def drawable(count: int, supply: Mapping[str, int], drawn: Sequence[str] = (), odds: Odds = RELEASED) -> bool:
    """Return whether a mixture can have `count` prompts, after those `drawn`."""
    return len(drawn) >= count or any(
        drawable(count, supply, [*drawn, prompt], odds) for prompt in odds.first if _fits(prompt, drawn, supply, odds)
    )


def _fits(prompt: str, drawn: Sequence[str], supply: Mapping[str, int], odds: Odds) -> bool:
    return drawn.count(prompt) < supply.get(prompt, 0) and all(odds.mixed(other, prompt) for other in drawn)

"""What the page asks for: read from its request, as queries, in words, and as the command line that does the same."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clapsep_cli.errors import UsageError
from clapsep_cli.jobs.targets import parse_targets
from clapsep_cli.query import TARGET, Query, Span

Shots = Mapping[str, tuple[str, Path]]  # examples by id: the name each was given, and where it lies

MAX_WORDS = 1000  # letters of a text
MAX_ITEMS = 64  # of a side
# Of the presence score, from which on it is told so.
IN_WORDS = ((0.2, "clearly there"), (0.0, "probably there"), (-0.15, "doubtful"))
ABSENT_IN_WORDS = "probably not in this recording"


@dataclass(frozen=True)
class Side:
    """Texts, ids of examples, and stretches of the mixture in seconds."""

    texts: tuple[str, ...] = ()
    shots: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()

    @staticmethod
    def read(told: Any, shots: Shots) -> Side:
        """Check what a request says of a side. Raises `UsageError`."""
        if not isinstance(told, dict) or not set(told) <= {"texts", "shots", "spans"}:
            raise UsageError("a side of the request is not an object of texts, shots and spans")
        texts, keys, spans = (_listed(told, name) for name in ("texts", "shots", "spans"))
        if any(not isinstance(text, str) or not text.strip() or len(text) > MAX_WORDS for text in texts):
            raise UsageError(f"a text has to have between 1 and {MAX_WORDS} letters")
        if any(key not in shots for key in keys if isinstance(key, str)) or any(not isinstance(k, str) for k in keys):
            raise UsageError("an example is not there any more: add it again")
        return Side(tuple(text.strip() for text in texts), tuple(keys), tuple(map(_span, spans)))

    def describe(self, shots: Shots) -> list[str]:
        """Each item in words."""
        return [
            *self.texts,
            *(f"like {shots[key][0]}" for key in self.shots),
            *(f"like {_seconds(start)}–{_seconds(end)} s" for start, end in self.spans),
        ]


def _listed(told: dict[str, Any], name: str) -> list[Any]:
    items = told.get(name, [])
    if not isinstance(items, list) or len(items) > MAX_ITEMS:
        raise UsageError(f"{name} is not a list of at most {MAX_ITEMS}")
    return items


def _span(told: Any) -> Span:
    numbers = told if isinstance(told, list) else []
    if len(numbers) != 2 or any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        raise UsageError("a stretch is not a pair of numbers")
    start, end = (round(float(number), 3) for number in numbers)
    if not 0 <= start < end < 1e9:
        raise UsageError(f"the stretch {start}–{end} s ends before it begins")
    return start, end


@dataclass(frozen=True)
class Wish:
    """Which model is asked, for which targets by name, and what they are to leave; `refine` as in `Model.refine`."""

    model: str
    refine: bool | None
    targets: Mapping[str, Side]
    leave: Side
    shots: Shots  # as they were when this was asked for

    @staticmethod
    def read(told: Any, shots: Shots) -> Wish:
        """Check a request. Raises `UsageError` for what is none, `QueryError` for names that no target can have."""
        if not isinstance(told, dict) or not isinstance(told.get("model"), str):
            raise UsageError("the request names no model")
        if not isinstance(told.get("refine"), bool | None):
            raise UsageError("refine is neither true, false nor null")
        listed = told.get("targets")
        if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_ITEMS:
            raise UsageError(f"the request has to have between 1 and {MAX_ITEMS} targets")
        if any(not isinstance(one, dict) or not isinstance(one.get("name"), str) for one in listed):
            raise UsageError("a target has no name")
        names = [one["name"] for one in listed]
        if names != [TARGET]:
            names = list(parse_targets(f"{name}=x" for name in names))
        sides = [Side.read({key: one[key] for key in one if key != "name"}, shots) for one in listed]
        if names != [TARGET] and any(len(side.texts) + len(side.shots) + len(side.spans) != 1 for side in sides):
            raise UsageError("a target with a name is one text, one example or one stretch")
        wish = Wish(
            told["model"],
            told.get("refine"),
            dict(zip(names, sides, strict=True)),
            Side.read(told.get("leave", {}), shots),
            dict(shots),
        )
        wish.queries()
        return wish

    @property
    def single(self) -> bool:
        """Whether one target is asked for, which needs no name."""
        return list(self.targets) == [TARGET]

    def queries(self) -> dict[str, Query]:
        """The queries by name. Raises `QueryError` where nothing is asked for."""
        return {
            name: Query(
                pos=side.texts,
                neg=self.leave.texts,
                pos_audio=[self.shots[key][1] for key in side.shots],
                neg_audio=[self.shots[key][1] for key in self.leave.shots],
                pos_spans=side.spans,
                neg_spans=self.leave.spans,
            )
            for name, side in self.targets.items()
        }

    def describe(self) -> str:
        """The wish in words, for the list of attempts."""
        kept = [", ".join(side.describe(self.shots)) for side in self.targets.values()]
        if not self.single:
            kept = [
                name if name == words else f"{name}: {words}" for name, words in zip(self.targets, kept, strict=True)
            ]
        left = ", ".join(self.leave.describe(self.shots))
        return " without ".join(filter(None, ("; ".join(filter(None, kept)) or "everything", left)))


def command_line(wish: Wish, given: str, form: str, device: str, stream: int | None = None) -> str:
    """The command that writes the same files, for a POSIX shell.

    Examples and recordings that were dropped on the page are named as their files are called.
    """
    words = ["clapsep", "extract", _as_argument(given)]
    for name, side in wish.targets.items():
        if wish.single:
            words += _side(wish, side, "--pos", "--query-audio", "--pos-span")
        else:
            (query,) = (*side.texts, *(wish.shots[key][0] for key in side.shots), *map(_stretch, side.spans))
            words += ["--target", f"{name}={query}"]
    words += _side(wish, wish.leave, "--neg", "--neg-audio", "--neg-span")
    words += ["--model", wish.model]
    words += [] if wish.refine is None else ["--refine" if wish.refine else "--no-refine"]
    words += [] if stream is None else ["--stream", str(stream)]
    words += ["--format", form] if form != "wav" else []
    words += ["--device", device] if device != "auto" else []
    return shlex.join(words)


def _side(wish: Wish, side: Side, text: str, shot: str, span: str) -> list[str]:
    pairs = [(text, one) for one in side.texts]
    pairs += [(shot, _as_argument(wish.shots[key][0])) for key in side.shots]
    pairs += [(span, _stretch(one)) for one in side.spans]
    # Only with "=" may a text begin with a hyphen.
    words = [[f"{name}={value}"] if value.startswith("-") else [name, value] for name, value in pairs]
    return [word for pair in words for word in pair]


def _stretch(span: Span) -> str:
    return "-".join(map(_seconds, span))


def _seconds(time: float) -> str:
    return f"{time:.3f}".rstrip("0").rstrip(".")


def _as_argument(name: str) -> str:
    return f"./{name}" if name.startswith(("-", "@")) else name


def presence_in_words(score: float | None) -> str:
    """What a presence score says; it is None where a model cannot tell."""
    if score is None:
        return "not known"
    return next((words for least, words in IN_WORDS if score >= least), ABSENT_IN_WORDS)

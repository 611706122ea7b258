"""Defines queries: texts, recordings and spans of sounds to keep and to leave. Parses times and spans."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from clapsep_cli.errors import QueryError

DEFAULT_ALPHA = 0.5
MAX_TARGETS = 64  # of a run: each takes about 15 MB of memory, and up to two open files
MIXTURE, TARGET, RESIDUAL = "mixture", "target", "residual"  # as a recording and its parts are called

Span = tuple[float, float]  # a stretch of the mixture, from and to, in seconds
_TIME = re.compile(r"(?:(?:(?P<h>[0-9]{1,6}):)?(?P<m>[0-9]{1,6}):)?(?P<s>[0-9]{1,9}(?:\.[0-9]*)?|\.[0-9]+)")


@dataclass(frozen=True)
class Excerpt:
    """The part of a recording from `start` to `end`, in seconds; None for its end.

    `lenient` and `stream` say how it is read, and `expand` how many times slower it is heard.
    """

    path: Path
    start: float
    end: float | None
    lenient: bool = False
    stream: int | None = None
    expand: float = 1.0


# A recording or a folder of them, a part of one, or samples ([samples] or [channels, samples], NumPy or torch) and
# their rate in Hz.
Shot = str | Path | Excerpt | tuple[Any, int]


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_span(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(map(_is_number, value))


def _is_shot(value: object) -> bool:
    samples_and_rate = isinstance(value, tuple) and len(value) == 2 and hasattr(value[0], "shape")
    return samples_and_rate or isinstance(value, str | Path | Excerpt)


_KINDS: tuple[tuple[str, Callable[[object], bool], str], ...] = (
    ("", lambda value: isinstance(value, str), "a text"),
    ("_audio", _is_shot, "a path, or samples and their rate in Hz, (array, 44100)"),
    ("_spans", _is_span, "from and to in seconds, (1.5, 3)"),
)


def _brief(value: object) -> str:
    shape = getattr(value, "shape", None)
    return f"an array of shape {list(shape)}" if shape is not None else textwrap.shorten(repr(value), 60)


def _several(name: str, given: Any, known: Callable[[object], bool], what: str) -> tuple[Any, ...]:
    """Make a tuple of one value or several. Raises `QueryError` for one that `known` refuses; `what` names the type."""
    single = known(given) or not isinstance(given, Iterable) or hasattr(given, "shape")
    several = (given,) if single else tuple(given)
    for one in several:
        if not known(one):
            raise QueryError(f"{name}: is {what}, or a list of them, not {_brief(one)}")
    return several


@dataclass(frozen=True, init=False)
class Query:
    """A query: texts, audio shots and stretches of the mixture itself, for the positive and the negative side.

    Several texts of a side are averaged, and so are several shots, spans included. If a side has both, its embedding is
    `alpha` · audio + (1 − `alpha`) · text (paper, Eq. 3). Give at least one side. A single text, shot or span needs no
    list.

    Raises `QueryError` for an empty text, an `alpha` outside [0, 1], an empty span, no query at all, and for values
    that are neither a text, a shot nor a span.
    """

    pos: tuple[str, ...]
    neg: tuple[str, ...]
    pos_audio: tuple[Shot, ...]
    neg_audio: tuple[Shot, ...]
    alpha: float
    pos_spans: tuple[Span, ...]
    neg_spans: tuple[Span, ...]

    def __init__(
        self,
        pos: Iterable[str] | str = (),
        neg: Iterable[str] | str = (),
        pos_audio: Iterable[Shot] | Shot = (),
        neg_audio: Iterable[Shot] | Shot = (),
        alpha: float = DEFAULT_ALPHA,
        pos_spans: Iterable[Span] | Span = (),
        neg_spans: Iterable[Span] | Span = (),
    ) -> None:
        sides = {"pos": (pos, pos_audio, pos_spans), "neg": (neg, neg_audio, neg_spans)}
        for side, values in sides.items():
            texts, shots, spans = (
                _several(side + kind, value, known, what)
                for value, (kind, known, what) in zip(values, _KINDS, strict=True)
            )
            if any(not text.strip() for text in texts):
                raise QueryError(f'a text of --{side} is empty: name the sound, e.g. --{side} "dog barking"')
            for start, end in spans:
                if not 0 <= start < end:
                    raise QueryError(f"--{side}-span {start:g}-{end:g}: ends before it begins")
            for name, several in ((side, texts), (f"{side}_audio", shots), (f"{side}_spans", spans)):
                object.__setattr__(self, name, several)
        if not _is_number(alpha) or not 0 <= alpha <= 1:
            raise QueryError(f"--alpha is {alpha}: it must lie between 0 (text alone) and 1 (audio alone)")
        object.__setattr__(self, "alpha", alpha)
        if not any(getattr(self, side + kind) for side in sides for kind, _, _ in _KINDS):
            raise QueryError('no query: say what to keep or what to leave, e.g. --pos "dog barking" --neg "rain"')

    def describe(self) -> str:
        """Describe the query in words, for titles and summaries."""
        sides = (("", self.pos, self.pos_audio, self.pos_spans), ("not ", self.neg, self.neg_audio, self.neg_spans))
        parts = []
        for prefix, texts, shots, spans in sides:
            parts += [f"{prefix}{text!r}" for text in texts]
            parts += [f"{prefix}like {_name(shot)}" for shot in shots]
            parts += [f"{prefix}like {start:g}-{end:g} s" for start, end in spans]
        return ", ".join(parts)

    def within(self, excerpt: Callable[[float, float], Shot]) -> Query:
        """Return the query with its spans as audio shots; `excerpt` cuts from start to end in seconds."""
        if not (self.pos_spans or self.neg_spans):
            return self
        positive = (*self.pos_audio, *(excerpt(*span) for span in self.pos_spans))
        negative = (*self.neg_audio, *(excerpt(*span) for span in self.neg_spans))
        return replace(self, pos_audio=positive, neg_audio=negative, pos_spans=(), neg_spans=())

    def slower(self, expand: float) -> Query:
        """Return the query with its recordings heard `expand` times slower."""
        if expand == 1:
            return self
        sides = (self.pos_audio, self.neg_audio)
        positive, negative = (tuple(_slower(shot, expand) for shot in shots) for shots in sides)
        return replace(self, pos_audio=positive, neg_audio=negative)


def _slower(shot: Shot, expand: float) -> Shot:
    if isinstance(shot, tuple):
        return shot[0], round(shot[1] / expand)
    return replace(shot, expand=expand) if isinstance(shot, Excerpt) else Excerpt(Path(shot), 0.0, None, expand=expand)


def _name(shot: Shot) -> str:
    if isinstance(shot, Excerpt):
        end = "end" if shot.end is None else f"{shot.end:g} s"
        return f"{shot.path.name} {shot.start:g}-{end}"
    return "a recording" if isinstance(shot, tuple) else Path(shot).name


def check_targets(targets: object) -> Mapping[str, Query]:
    """Return the targets of a run by name: `targets` itself, or a single query as "target".

    Raises `QueryError` for none, for more than `MAX_TARGETS`, and for values that are no query.
    """
    if isinstance(targets, Query):
        return {TARGET: targets}
    if not isinstance(targets, Mapping) or any(not isinstance(query, Query) for query in targets.values()):
        raise QueryError(f"give a Query, or a dictionary of them by name, not {_brief(targets)}")
    if not targets:
        raise QueryError("no target: give a query, or one for each name")
    if len(targets) > MAX_TARGETS:
        raise QueryError(
            f"{len(targets)} targets: one run separates at most {MAX_TARGETS}; split them over several runs"
        )
    return targets


def check_taken(queries: Iterable[Query], takes: Collection[str], model: str) -> None:
    """Check that a model takes these kinds of queries.

    Args:
        queries: the queries.
        takes: the kinds it takes (see `registry.Traits`).
        model: its name, for messages.

    Raises:
        QueryError: a query is of another kind.
    """
    for query in queries:
        if "audio" not in takes and (query.pos_audio or query.neg_audio or query.pos_spans or query.neg_spans):
            instead = "name a prompt" if "prompts" in takes else "describe the sound in words"
            raise QueryError(f"{model} takes no recordings as queries: {instead} with --pos")
        if query.neg and not {"negatives", "prompts"} & set(takes):
            raise QueryError(
                f"{model} takes no negative queries: describe with --pos what to keep; to remove a sound, describe it "
                "with --pos and use the residual"
            )


def mutual(targets: Mapping[str, Query]) -> dict[str, Query]:
    """Add to the negative side of each target the positive sides of all others."""

    def against(name: str, query: Query) -> Query:
        others = [other for key, other in targets.items() if key != name]
        return replace(
            query,
            neg=(*query.neg, *(text for other in others for text in other.pos)),
            neg_audio=(*query.neg_audio, *(shot for other in others for shot in other.pos_audio)),
            neg_spans=(*query.neg_spans, *(span for other in others for span in other.pos_spans)),
        )

    return {name: against(name, query) for name, query in targets.items()}


def parse_time(text: str) -> float:
    """Return the seconds of a time given as seconds (`83.5`), `m:s` (`1:23.5`) or `h:m:s` (`1:02:03`).

    Raises `QueryError`.
    """
    match = _TIME.fullmatch(text.strip())
    if not match:
        raise QueryError(f"{text!r} is not a time: give seconds (83.5), m:s (1:23.5) or h:m:s (1:02:03)")
    hours, minutes, seconds = match["h"], match["m"], float(match["s"])
    if (minutes is not None and seconds >= 60) or (hours is not None and int(minutes) >= 60):
        raise QueryError(f"{text!r} is not a time: minutes and seconds after a colon must be below 60")
    return int(hours or 0) * 3600.0 + int(minutes or 0) * 60.0 + seconds


def is_span(text: str) -> bool:
    """Return True for two times with a dash between them, which `parse_span` reads unless they are out of order."""
    times = text.replace("–", "-").split("-")
    return len(times) == 2 and all(_TIME.fullmatch(time.strip()) for time in times)


def parse_span(text: str) -> tuple[float, float]:
    """Return start and end in seconds of a stretch such as `3.2-4.5` or `1:02-1:04`. Raises `QueryError`."""
    start, dash, end = text.replace("–", "-").partition("-")
    if not (dash and start.strip() and end.strip()):
        raise QueryError(f"{text!r} is not a stretch: give its start and end, as in 3.2-4.5 or 1:02-1:04")
    span = parse_time(start), parse_time(end)
    if span[1] <= span[0]:
        raise QueryError(f"{text!r} is not a stretch: it has to end after its start")
    return span

"""What a user asks for: texts and recordings of what to keep, and of what to leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clapsep_cli.errors import QueryError

DEFAULT_ALPHA = 0.5
MIXTURE, TARGET, RESIDUAL = "mixture", "target", "residual"  # as a recording and its parts are called

Span = tuple[float, float]  # a stretch of the mixture, from and to, in seconds


@dataclass(frozen=True)
class Excerpt:
    """The part of a recording from `start` to `end`, in seconds; `lenient` and `stream` say how it is read."""

    path: Path
    start: float
    end: float
    lenient: bool = False
    stream: int | None = None


# A recording or a folder of them, a part of one, or samples ([samples] or [channels, samples]) and their rate in Hz.
Shot = str | Path | Excerpt | tuple[NDArray[np.float32], int]


@dataclass(frozen=True)
class Query:
    """Texts, audio shots and stretches of the mixture itself, of the positive and of the negative side.

    Several texts of a side are averaged, and so are several shots, spans included; where a side has both, its embedding
    is `alpha` · audio + (1 − `alpha`) · text (paper, Eq. 3). At least one side must be given.

    Raises `QueryError` for an empty text, an `alpha` outside [0, 1], an empty span, or no query at all.
    """

    pos: Sequence[str] | str = ()
    neg: Sequence[str] | str = ()
    pos_audio: Sequence[Shot] = ()
    neg_audio: Sequence[Shot] = ()
    alpha: float = DEFAULT_ALPHA
    pos_spans: Sequence[Span] = ()
    neg_spans: Sequence[Span] = ()

    def __post_init__(self) -> None:
        for side in ("pos", "neg"):
            texts = getattr(self, side)
            object.__setattr__(self, side, (texts,) if isinstance(texts, str) else tuple(texts))
            if any(not text.strip() for text in getattr(self, side)):
                raise QueryError(f'a text of --{side} is empty: name the sound, e.g. --{side} "dog barking"')
            for kind in ("audio", "spans"):
                object.__setattr__(self, f"{side}_{kind}", tuple(getattr(self, f"{side}_{kind}")))
            for start, end in getattr(self, f"{side}_spans"):
                if not 0 <= start < end:
                    raise QueryError(f"--{side}-span {start:g}-{end:g}: ends before it begins")
        if not 0 <= self.alpha <= 1:
            raise QueryError(f"--alpha is {self.alpha:g}: it must lie between 0 (text alone) and 1 (audio alone)")
        if not any(getattr(self, side + kind) for side in ("pos", "neg") for kind in ("", "_audio", "_spans")):
            raise QueryError('no query: say what to keep or what to leave, e.g. --pos "dog barking" --neg "rain"')

    def describe(self) -> str:
        """The query in words, for titles and summaries."""
        sides = (("", self.pos, self.pos_audio, self.pos_spans), ("not ", self.neg, self.neg_audio, self.neg_spans))
        parts = []
        for prefix, texts, shots, spans in sides:
            parts += [f"{prefix}{text!r}" for text in texts]
            parts += [f"{prefix}like {_name(shot)}" for shot in shots]
            parts += [f"{prefix}like {start:g}-{end:g} s" for start, end in spans]
        return ", ".join(parts)

    def within(self, excerpt: Callable[[float, float], Shot]) -> Query:
        """The query with its spans as audio shots; `excerpt` gives the mixture from one second to another."""
        if not (self.pos_spans or self.neg_spans):
            return self
        positive = (*self.pos_audio, *(excerpt(*span) for span in self.pos_spans))
        negative = (*self.neg_audio, *(excerpt(*span) for span in self.neg_spans))
        return replace(self, pos_audio=positive, neg_audio=negative, pos_spans=(), neg_spans=())


def _name(shot: Shot) -> str:
    if isinstance(shot, Excerpt):
        return f"{shot.path.name} {shot.start:g}-{shot.end:g} s"
    return "a recording" if isinstance(shot, tuple) else Path(shot).name


def mutual(targets: Mapping[str, Query]) -> dict[str, Query]:
    """The targets, where what the others ask for is also on the negative side of each."""

    def against(name: str, query: Query) -> Query:
        others = [other for key, other in targets.items() if key != name]
        return replace(
            query,
            neg=(*query.neg, *(text for other in others for text in other.pos)),
            neg_audio=(*query.neg_audio, *(shot for other in others for shot in other.pos_audio)),
            neg_spans=(*query.neg_spans, *(span for other in others for span in other.pos_spans)),
        )

    return {name: against(name, query) for name, query in targets.items()}

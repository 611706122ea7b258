"""What a user asks for: texts and recordings of what to keep, and of what to leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clapsep_cli.errors import QueryError

DEFAULT_ALPHA = 0.5

# A recording or a folder of them, or samples ([samples] or [channels, samples]) and their rate in Hz.
Shot = str | Path | tuple[NDArray[np.float32], int]


@dataclass(frozen=True)
class Query:
    """Texts and audio shots of the positive and of the negative side.

    Several texts of a side are averaged, and so are several shots; where a side has both, its embedding is
    `alpha` · audio + (1 − `alpha`) · text (paper, Eq. 3). At least one side must be given.

    Raises `QueryError` for an empty text, an `alpha` outside [0, 1], or no query at all.
    """

    pos: Sequence[str] | str = ()
    neg: Sequence[str] | str = ()
    pos_audio: Sequence[Shot] = ()
    neg_audio: Sequence[Shot] = ()
    alpha: float = DEFAULT_ALPHA

    def __post_init__(self) -> None:
        for side in ("pos", "neg"):
            texts = getattr(self, side)
            object.__setattr__(self, side, (texts,) if isinstance(texts, str) else tuple(texts))
            if any(not text.strip() for text in getattr(self, side)):
                raise QueryError(f'a text of --{side} is empty: name the sound, e.g. --{side} "dog barking"')
        if not 0 <= self.alpha <= 1:
            raise QueryError(f"--alpha is {self.alpha:g}: it must lie between 0 (text alone) and 1 (audio alone)")
        if not (self.pos or self.neg or self.pos_audio or self.neg_audio):
            raise QueryError('no query: say what to keep or what to leave, e.g. --pos "dog barking" --neg "rain"')

    def describe(self) -> str:
        """The query in words, for titles and summaries."""
        sides = (("", self.pos, self.pos_audio), ("not ", self.neg, self.neg_audio))
        parts = []
        for prefix, texts, shots in sides:
            parts += [f"{prefix}{text!r}" for text in texts]
            parts += [f"{prefix}like {'a recording' if isinstance(shot, tuple) else Path(shot).name}" for shot in shots]
        return ", ".join(parts)

"""Draws the queries of training: captions and shots of the clips, and the conditions made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from clapsep_cli.data import Clip
from clapsep_cli.errors import ManifestError, QueryError
from clapsep_cli.models.base import TextEncoder, condition
from clapsep_cli.training.loop.sampling import Pool, Sampler
from clapsep_cli.training.loop.settings import Share, settings

AT_ONCE = 64  # texts

# The clip that a query is for, and True if it has a positive side (this clip), a negative side (the other clip).
KINDS = (
    *((wanted, True, True) for wanted in (0, 0, 1, 1)),
    *((wanted, positive, not positive) for positive in (True, False) for wanted in (0, 1)),
)
ABSENT_WITH_NEGATIVE = 0.4  # share of the queries for absent sounds that also have a negative


class DrawnQueries(NamedTuple):
    """Queries of a step's mixtures."""

    conditions: Tensor  # float32 [queries, 2 · dim]
    mixtures: Tensor  # index of the mixture each is for, int64 [queries]
    interferer: Tensor  # True if it is for the second clip, bool [queries]
    present: Tensor  # True if its sound is in the mixture, bool [queries]


@settings
class Mixing:
    """Settings of the queries that are drawn."""

    queries: Annotated[int, Field(ge=1, le=len(KINDS))] = 3  # of a mixture
    noise: NonNegativeFloat = 0.3  # length of the random vector added to an embedding
    text_only: Share = 0.7  # share of the sides that are text alone
    audio_only: Share = 0.18  # … audio alone; the rest mixes both with α ~ U(0, 1) (Eq. 3)
    shots: PositiveInt = 3  # most shots that are averaged
    absent: Share = 0.18  # share of the queries for a sound that is not in the mixture


def embed_all(encoder: TextEncoder, texts: Sequence[str]) -> dict[str, Tensor]:
    """Embed those of `texts` that the encoder understands, on the CPU. Raises `ManifestError` for none."""
    embedded: dict[str, Tensor] = {}
    for start in range(0, len(texts), AT_ONCE):
        few = texts[start : start + AT_ONCE]
        try:
            embedded |= dict(zip(few, encoder.embed(few).cpu(), strict=True))
        except QueryError:
            for text in few:
                with suppress(QueryError):  # clips of other texts are queried by audio alone
                    embedded[text] = encoder.embed([text])[0].cpu()
    if not embedded:
        raise ManifestError("no caption of the manifest has a word that the text encoder knows")
    return embedded


class Texts:
    """Embeddings of every caption of every label: `by_label`, float32 `[captions, dim]` each."""

    def __init__(self, encoder: TextEncoder, clips: Sequence[Clip], paraphrases: Mapping[str, tuple[str, ...]]) -> None:
        captions: dict[str, dict[str, None]] = {}  # by label, in the order of the manifest, each once
        for clip in clips:
            captions.setdefault(clip.label, {}).update(dict.fromkeys(clip.captions))
            captions[clip.label].update(dict.fromkeys(paraphrases.get(clip.label, ())))
        embedded = embed_all(encoder, sorted({text for texts in captions.values() for text in texts}))
        rows = {label: [embedded[text] for text in texts if text in embedded] for label, texts in captions.items()}
        self.by_label = {label: torch.stack(understood) for label, understood in rows.items() if understood}

    def nearest(self) -> dict[str, list[str]]:
        """Sort, for each label with a caption, the others from the most to the least alike in meaning."""
        labels = list(self.by_label)
        means = F.normalize(torch.stack([self.by_label[label].mean(0) for label in labels]), dim=1)
        order = (means @ means.T).argsort(1, descending=True).tolist()
        return {
            label: [labels[at] for at in row if labels[at] != label] for label, row in zip(labels, order, strict=True)
        }


class Queries:
    """Draws the queries of mixtures: by text, audio or both (Eq. 3), with one side or both.

    `views`: some audio embeddings of each clip, `[views, dim]`, by the clip's index in `pool`.
    """

    def __init__(self, pool: Pool, texts: Texts, views: Mapping[int, Tensor], mixing: Mixing) -> None:
        self.pool, self.texts, self.views, self.mixing = pool, texts, views, mixing

    def side(self, clip: int, alpha: float, rng: np.random.Generator) -> Tensor:
        """Make one side of a query for the sound of `clip`: α · audio (of another clip) + (1 − α) · text."""
        label = self.pool.clips[clip].label
        others = [i for i in self.pool.by_label[label] if i != clip and i in self.views]
        captions = self.texts.by_label.get(label)
        if captions is None:
            return self.shots(others or [clip], rng)
        text = self.blurred(captions[rng.integers(len(captions))], rng)
        return alpha * self.shots(others or [clip], rng) + (1 - alpha) * text if alpha else text

    def shots(self, clips: Sequence[int], rng: np.random.Generator) -> Tensor:
        """Average up to `mixing.shots` embeddings of any of `clips`, as for a query of several shots."""
        views = [self.views[int(rng.choice(clips))] for _ in range(rng.integers(self.mixing.shots) + 1)]
        return torch.stack([self.blurred(view[rng.integers(len(view))], rng) for view in views]).mean(0)

    def blurred(self, embedding: Tensor, rng: np.random.Generator) -> Tensor:
        """Add noise to an embedding, so that the separator also learns the neighbourhood of the captions."""
        noise = torch.from_numpy(rng.standard_normal(len(embedding), dtype=np.float32))
        return F.normalize(embedding + noise * (self.mixing.noise / math.sqrt(len(embedding))), dim=0)

    def alpha(self, rng: np.random.Generator) -> float:
        """Draw the weight of audio beside text: 0 for text alone, 1 for audio alone, or any between (Eq. 3)."""
        draw = rng.random() - self.mixing.text_only
        return 0.0 if draw < 0 else 1.0 if draw < self.mixing.audio_only else float(rng.random())

    def draw(
        self, sampler: Sampler, pairs: Sequence[Sequence[int]], generators: Sequence[np.random.Generator]
    ) -> DrawnQueries:
        """Draw `mixing.queries` queries of each mixture, half of them with both sides, as many for either clip.

        Args:
            sampler: draws the clips of sounds that are absent.
            pairs: of each mixture the indices of both clips, the target's first.
            generators: one for each mixture.
        """
        rows: list[tuple[Tensor, int, bool, bool]] = []
        for mixture, (pair, rng) in enumerate(zip(pairs, generators, strict=True)):
            for kind in rng.permutation(len(KINDS))[: self.mixing.queries].tolist():
                wanted, has_positive, has_negative = KINDS[kind]
                alphas = self.alpha(rng), self.alpha(rng)
                positive, negative = pair[wanted], pair[1 - wanted]
                absent = rng.random() < self.mixing.absent
                third = sampler.clip(rng, avoid=[self.pool.clips[i].label for i in pair]) if absent else None
                if third is not None:
                    positive, has_positive, has_negative = third, True, rng.random() < ABSENT_WITH_NEGATIVE
                sides = (
                    self.side(clip, alpha, rng)[None] if asked else None
                    for clip, alpha, asked in ((positive, alphas[0], has_positive), (negative, alphas[1], has_negative))
                )
                rows.append((condition(*sides), mixture, wanted == 1, third is None))
        conditions, *others = zip(*rows, strict=True)
        return DrawnQueries(torch.cat(conditions), *(torch.tensor(column) for column in others))

"""What training asks for: captions and shots of the clips, and the conditions drawn from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np
import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from clapsep_cli.data import Clip
from clapsep_cli.errors import ManifestError, QueryError
from clapsep_cli.models.base import TextEncoder, condition
from clapsep_cli.training.loop.sampling import Pool, Sampler
from clapsep_cli.training.loop.settings import Share, settings

AT_ONCE = 64  # texts


@settings
class Mixing:
    """How the conditions of examples are drawn."""

    noise: NonNegativeFloat = 0.25  # length of the random vector added to an embedding
    text_only: Share = 0.4  # share of the examples whose queries are text alone
    audio_only: Share = 0.25  # … audio alone; the rest mixes both with α ~ U(0, 1) (Eq. 3)
    shots: PositiveInt = 1  # at most so many shots are averaged
    absent: Share = 0.03  # share of the examples whose positive query is for something not there


def embed_all(encoder: TextEncoder, texts: Sequence[str]) -> dict[str, Tensor]:
    """Embeddings of those of `texts` that the encoder understands, on the CPU. Raises `ManifestError` for none."""
    embedded: dict[str, Tensor] = {}
    for start in range(0, len(texts), AT_ONCE):
        few = texts[start : start + AT_ONCE]
        try:
            embedded |= dict(zip(few, encoder.embed(few).cpu(), strict=True))
        except QueryError:
            for text in few:
                with suppress(QueryError):  # the others' clips are asked for by audio alone
                    embedded[text] = encoder.embed([text])[0].cpu()
    if not embedded:
        raise ManifestError("no caption of the manifest has a word that the text encoder knows")
    return embedded


class Texts:
    """Embeddings of every caption of every label."""

    def __init__(self, encoder: TextEncoder, clips: Sequence[Clip], paraphrases: Mapping[str, tuple[str, ...]]) -> None:
        captions: dict[str, dict[str, None]] = {}  # by label, in the order of the manifest, each once
        for clip in clips:
            captions.setdefault(clip.label, {}).update(dict.fromkeys(clip.captions))
            captions[clip.label].update(dict.fromkeys(paraphrases.get(clip.label, ())))
        embedded = embed_all(encoder, sorted({text for texts in captions.values() for text in texts}))
        self.encoder = encoder
        self.table = torch.stack(list(embedded.values()))  # [captions, dim]
        self.by_label: dict[str, Tensor] = {}  # embeddings of a label's captions
        self.targets: dict[str, Tensor] = {}  # weights over `table`, of sum 1: which captions are right for a label
        index = {text: row for row, text in enumerate(embedded)}
        for label, texts in captions.items():
            rows = [index[text] for text in texts if text in index]
            if rows:
                self.by_label[label] = self.table[rows]
            self.targets[label] = torch.zeros(len(index)).index_fill_(0, torch.tensor(rows, dtype=torch.long), 1.0)
            self.targets[label] /= max(1, len(rows))

    def nearest(self) -> dict[str, list[str]]:
        """For each label with a caption, the others from the most to the least alike in meaning."""
        labels = list(self.by_label)
        means = F.normalize(torch.stack([self.by_label[label].mean(0) for label in labels]), dim=1)
        order = (means @ means.T).argsort(1, descending=True).tolist()
        return {
            label: [labels[at] for at in row if labels[at] != label] for label, row in zip(labels, order, strict=True)
        }


class Queries:
    """Draws the condition of each example: text, audio or both (Eq. 3), on one side or on both.

    `views`: some audio embeddings of each clip, `[views, dim]`, by the clip's index in `pool`.
    """

    def __init__(self, pool: Pool, texts: Texts, views: Mapping[int, Tensor], mixing: Mixing) -> None:
        self.pool, self.texts, self.views, self.mixing = pool, texts, views, mixing

    def side(self, clip: int, alpha: float, rng: np.random.Generator) -> Tensor:
        """An embedding that asks for the sound of `clip`: α · audio + (1 − α) · text; the audio is another clip's."""
        label = self.pool.clips[clip].label
        others = [i for i in self.pool.by_label[label] if i != clip and i in self.views]
        captions = self.texts.by_label.get(label)
        if captions is None:
            return self.shots(others or [clip], rng)
        text = self.blurred(captions[rng.integers(len(captions))], rng)
        return alpha * self.shots(others or [clip], rng) + (1 - alpha) * text if alpha else text

    def shots(self, clips: Sequence[int], rng: np.random.Generator) -> Tensor:
        """The mean of up to `mixing.shots` embeddings of any of `clips`, as several shots are joined in use."""
        views = [self.views[int(rng.choice(clips))] for _ in range(rng.integers(self.mixing.shots) + 1)]
        return torch.stack([self.blurred(view[rng.integers(len(view))], rng) for view in views]).mean(0)

    def blurred(self, embedding: Tensor, rng: np.random.Generator) -> Tensor:
        """Moved a little, so that the separator also understands what lies beside the captions and shots it met."""
        noise = torch.from_numpy(rng.standard_normal(len(embedding), dtype=np.float32))
        return F.normalize(embedding + noise * (self.mixing.noise / math.sqrt(len(embedding))), dim=0)

    def alpha(self, rng: np.random.Generator) -> float:
        """The weight of audio beside text, drawn: 0 for text alone, 1 for audio alone, or any between (Eq. 3)."""
        draw = rng.random() - self.mixing.text_only
        return 0.0 if draw < 0 else 1.0 if draw < self.mixing.audio_only else float(rng.random())

    def draw(
        self, sampler: Sampler, pairs: Sequence[Sequence[int]], generators: Sequence[np.random.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Conditions `[batch, 2 · dim]`, and whether what the positive asks for is in the mixture `[batch]`.

        `pairs`: of each example the clips of the target and of the interferer; and a generator for each.
        """
        rows, present = [], []
        for (target, interferer), rng in zip(pairs, generators, strict=True):
            alpha, valence = self.alpha(rng), rng.random()
            absent = rng.random() < self.mixing.absent
            third = (
                sampler.clip(rng, avoid=[self.pool.clips[i].label for i in (target, interferer)]) if absent else None
            )
            absent, target = (False, target) if third is None else (True, third)
            # 25 % of the examples have the positive alone, 25 % the negative alone, 50 % both.
            positive = self.side(target, alpha, rng)[None] if absent or valence >= 0.25 else None
            negative = self.side(interferer, alpha, rng)[None] if valence < 0.25 or valence >= 0.5 else None
            rows.append(condition(positive, negative))
            present.append(not absent)
        return torch.cat(rows), torch.tensor(present)

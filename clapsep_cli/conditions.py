"""What training asks for: captions and shots of the clips, and the conditions drawn from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clapsep_cli.data import Clip, Pool, Sampler
from clapsep_cli.errors import ManifestError, QueryError
from clapsep_cli.models.base import TextEncoder, condition


@dataclass(frozen=True)
class Mixing:
    """How the conditions of examples are drawn."""

    noise: float = 0.25  # length of the random vector added to an embedding
    text_only: float = 0.4  # share of the examples whose queries are text alone
    audio_only: float = 0.25  # … audio alone; the rest mixes both with α ~ U(0, 1) (Eq. 3)
    absent: float = 0.03  # share of the examples whose positive query is for something not there


class Texts:
    """Embeddings of every caption of every label."""

    def __init__(self, encoder: TextEncoder, clips: Sequence[Clip], paraphrases: Mapping[str, tuple[str, ...]]) -> None:
        captions: dict[str, dict[str, None]] = {}  # by label, in the order of the manifest, each once
        for clip in clips:
            captions.setdefault(clip.label, {}).update(dict.fromkeys(clip.captions))
            captions[clip.label].update(dict.fromkeys(paraphrases.get(clip.label, ())))
        embedded = {}
        for text in sorted({text for texts in captions.values() for text in texts}):
            try:
                embedded[text] = encoder.embed([text])[0]
            except QueryError:  # a name that the encoder has no word for; its clips are asked for by audio alone
                continue
        if not embedded:
            raise ManifestError("no caption of the manifest has a word that the text encoder knows")
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
        audio = self.views[int(rng.choice(others)) if others else clip]
        audio = audio[rng.integers(len(audio))]
        captions = self.texts.by_label.get(label)
        if captions is None or alpha == 1:
            return self.blurred(audio, rng)
        text = self.blurred(captions[rng.integers(len(captions))], rng)
        return alpha * self.blurred(audio, rng) + (1 - alpha) * text if alpha else text

    def blurred(self, embedding: Tensor, rng: np.random.Generator) -> Tensor:
        """Moved a little, so that the separator also understands what lies beside the captions and shots it met."""
        noise = torch.from_numpy(rng.standard_normal(len(embedding), dtype=np.float32))
        return F.normalize(embedding + noise * (self.mixing.noise / math.sqrt(len(embedding))), dim=0)

    def alpha(self, rng: np.random.Generator) -> float:
        draw = rng.random() - self.mixing.text_only
        return 0.0 if draw < 0 else 1.0 if draw < self.mixing.audio_only else float(rng.random())

    def draw(
        self, sampler: Sampler, indices: Sequence[Sequence[int]], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Conditions `[batch, 2 · dim]`, and whether what the positive asks for is in the mixture `[batch]`."""
        rows, present = [], []
        for target, interferer in indices:
            alpha, valence = self.alpha(rng), rng.random()
            absent = rng.random() < self.mixing.absent
            if absent:
                target = sampler.clip(rng, avoid=[self.pool.clips[i].label for i in (target, interferer)])
            # 25 % of the examples have the positive alone, 25 % the negative alone, 50 % both.
            positive = self.side(target, alpha, rng)[None] if absent or valence >= 0.25 else None
            negative = self.side(interferer, alpha, rng)[None] if valence < 0.25 or valence >= 0.5 else None
            rows.append(condition(positive, negative))
            present.append(not absent)
        return torch.cat(rows), torch.tensor(present)

"""Embeds the queries of a mini model: texts by their words, recordings by what the trunk hears in them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep_cli import dsp
from clapsep_cli.errors import QueryError
from clapsep_cli.models import base, trunk
from clapsep_cli.models.mini import Keys, MiniConfig, lay_out

NEAR, NEAR_WORDS = 0.66, 200  # how alike a word is spelt that may have been meant, 0 to 1; how many are compared
STRETCH_SECONDS = 5  # that the audio encoder hears at once
SHORTEST_SECONDS = 1  # shorter recordings are padded with silence
STRETCHES_AT_ONCE = 4  # memory does not grow with a recording's length

# Words that say nothing of a sound; they count where a text has no others.
FUNCTION_WORDS = "a an the this that some of in on at by with from to into and or is are was being"
EMPTY_WORDS = frozenset(f"{FUNCTION_WORDS} sound sounds recording recordings".split())
CARRIERS = frozenset(("noise", "noises", "audio", "clip", "sample"))  # are empty before "of": "the noise of rain"


def essential(words: Sequence[str]) -> list[str]:
    """Return the words that say what sounds: "rain" of "the sound of rain"; all words where none does."""
    followed = zip(words, [*words[1:], ""], strict=True)
    kept = [word for word, after in followed if word not in EMPTY_WORDS and not (word in CARRIERS and after == "of")]
    return kept or list(words)


class MiniText(base.TextEncoder):
    """Embeds a text by the mean vector of its `essential` words, mapped into the space of queries.

    Words outside the table are ignored.
    """

    def __init__(self, config: MiniConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.register_buffer("table", torch.zeros(config.words, config.word_dim, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(config.words, dtype=torch.float16))
        self.table: Tensor
        self.scale: Tensor
        self.map = nn.Linear(config.word_dim, config.dim)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed each text; raises `QueryError` for one without a known word."""
        with torch.no_grad():
            mapped: Tensor = self.map(torch.stack([self.word_vector(text) for text in texts]))
        return F.normalize(mapped, dim=1)

    def word_vector(self, text: str) -> Tensor:
        """Return the mean vector of a text's essential words, float32 `[word_dim]`, length 1. Raises `QueryError`."""
        words = self._words(text)
        ids = self._known(essential(words)) or self._known(words)
        if not ids:
            meant = " ".join(f"did you mean {near!r}?" for near in self.unknown(text).values() if near)
            advice = meant or "describe the sound in plain English"
            raise QueryError(f"the model 'mini' knows no word of the query {text!r}: {advice}")
        vectors = self.table[ids].float() * self.scale[ids, None].float()
        return F.normalize(vectors.mean(0), dim=0)

    def _words(self, text: str) -> list[str]:
        """Split a text into words, in the tokenizer's spelling."""
        normal = self.tokenizer.normalizer.normalize_str(text)
        return [word for word, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(normal)]

    def _known(self, words: Sequence[str]) -> list[int]:
        ids = map(self.tokenizer.token_to_id, words)
        return [i for i in ids if i is not None and i < len(self.table)]

    def unknown(self, text: str) -> dict[str, str | None]:
        """Return the words of a text that are not in the table and so ignored, each with the nearest that is.

        Single letters are left out.
        """
        spelt = re.findall(r"[^\W\d_]+", text)
        return {word: self._nearest(word.lower()) for word in spelt if self._is_unknown(word)}

    def _is_unknown(self, word: str) -> bool:
        pieces = self._words(word)
        whole = "".join(pieces) == word.lower() and len(self._known(pieces)) == len(pieces)
        return not whole and not (len(word) == 1 and word.isascii())

    def _nearest(self, word: str) -> str | None:
        """Return the known word nearest in spelling; of equals the same first letter, then the most frequent."""
        ends = {other for other in self._vocabulary if other[0] == word[0] or other[-1] == word[-1]}
        close = [other for other in ends if abs(len(other) - len(word)) <= 2]

        def alike(other: str) -> tuple[bool, float, bool, int]:
            pairs = ((word, other), (sorted(word), sorted(other)))
            ratio = sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
            return sorted(word) == sorted(other), ratio, word[0] == other[0], -self._vocabulary[other]

        return max(difflib.get_close_matches(word, close, NEAR_WORDS, NEAR), key=alike, default=None)

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        """Return the known words with their numbers, which are small for frequent ones."""
        return {word: number for word, number in self.tokenizer.get_vocab().items() if number < len(self.table)}


class MiniAudio(base.AudioEncoder):
    """Embeds recordings by the mean of what the trunk hears."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        self.rate = dsp.RATE_HZ
        self.trunk = trunk.Trunk()
        self.keys = Keys(config)
        self.register_load_state_dict_post_hook(lay_out)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def embed(self, audio: Tensor) -> Tensor:
        return self.keys.project(self.hear(audio)[None])[0]

    @torch.no_grad()
    def moments(self, audio: Tensor) -> Tensor:
        """Embed each place: all frames of 160 ms, in all rows of the trunk's map."""
        kept = max(1, round(len(audio) / dsp.HOP / trunk.STRIDES[-2]))  # frames of a stretch that are not padding
        keys = [self.keys(maps)[..., :kept, :] for maps, _ in self._maps(audio)]
        return torch.cat([each.permute(0, 2, 3, 1).flatten(0, 2) for each in keys])

    @torch.no_grad()
    def hear(self, audio: Tensor) -> Tensor:
        """Return what a recording sounds like on average, over as few stretches as cover it.

        Args:
            audio: float32 `[samples]`, any length ≥ 1.

        Returns:
            float32 `[1536]`, see `trunk.pooled`.
        """
        return torch.cat([trunk.pooled(*each) for each in self._maps(audio)]).mean(0)

    def _maps(self, audio: Tensor) -> Iterator[tuple[list[Tensor], int]]:
        """Yield the trunk's maps of as few stretches as cover a recording, some at a time, and frames in a stretch."""
        audio = F.pad(audio, (0, max(0, SHORTEST_SECONDS * self.rate - len(audio))))
        length = min(STRETCH_SECONDS * self.rate, len(audio))
        count = -(-len(audio) // length)
        starts = [round(number * (len(audio) - length) / max(count - 1, 1)) for number in range(count)]
        for at in range(0, count, STRETCHES_AT_ONCE):
            few = torch.stack([audio[start : start + length] for start in starts[at : at + STRETCHES_AT_ONCE]])
            yield self.trunk(self.trunk.hear(few)), length // dsp.HOP

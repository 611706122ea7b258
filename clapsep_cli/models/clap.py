"""Embeds queries by the two towers of LAION-CLAP: RoBERTa for texts, HTSAT for recordings.

Frozen in CLAPSep (arXiv 2402.17455, III): neither tower carries LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep_cli.dsp import RATE_HZ
from clapsep_cli.models import htsat
from clapsep_cli.models.base import AudioEncoder, TextEncoder
from clapsep_cli.models.clapsep import CLAPSepConfig, TextSize, TransformerLayer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PADDING_ID = 1
INT16_STEPS = 32_767
WINDOWS_AT_ONCE = 4  # of a long recording; bounds the memory


class ClapTextEncoder(TextEncoder):
    """RoBERTa with its pooler, and CLAP's projection.

    `tokenizer` is RoBERTa's; its padding and truncation are set here. Without one there is only `embed_ids`. Raises
    `ValueError` where its vocabulary is not the one that the network was made for.
    """

    def __init__(self, config: TextSize, tokenizer: Tokenizer | None) -> None:
        super().__init__()
        if tokenizer is not None:
            if tokenizer.get_vocab_size() != config.vocabulary:
                raise ValueError(f"a tokenizer of {tokenizer.get_vocab_size()} tokens instead of {config.vocabulary}")
            # Padding to the longest text, not to the limit, changes nothing but the time: padding is never attended to.
            tokenizer.enable_padding(pad_id=PADDING_ID, pad_token="<pad>")
            tokenizer.enable_truncation(config.text_tokens)
        self.tokenizer = tokenizer
        width = config.text_width
        self.word_embeddings = _embedding(config.vocabulary, width)
        self.position_embeddings = _embedding(config.text_positions, width)
        self.token_type_embeddings = _embedding(1, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            TransformerLayer(width, config.text_heads, config.text_feed_forward, F.gelu)
            for _ in range(config.text_layers)
        )
        self.pooler = nn.Linear(width, width)
        self.projection = _projection(width, config.dim)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embed each text, cut to the config's `text_tokens`: float32 `[len(texts), dim]`, rows of length 1.

        Raises `ValueError` where there are no texts, or no tokenizer.
        """
        if not texts or self.tokenizer is None:
            raise ValueError("to embed texts takes a tokenizer and at least one text")
        encodings = self.tokenizer.encode_batch(list(texts))
        device = self.pooler.weight.device
        ids = torch.tensor([encoding.ids for encoding in encodings], device=device)
        mask = torch.tensor([encoding.attention_mask for encoding in encodings], device=device)
        return self.embed_ids(ids, mask)

    def embed_ids(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embed token ids (int64 `[batch, tokens]`); `mask`, of the same shape, is 0 for padding, else 1."""
        positions = mask.cumsum(dim=1) * mask + PADDING_ID
        x = self.word_embeddings(ids) + self.token_type_embeddings.weight + self.position_embeddings(positions)
        x = self.norm(x)
        attended = mask.bool()[:, None, None]
        for layer in self.layers:
            x = layer(x, attended)
        return F.normalize(self.projection(self.pooler(x[:, 0]).tanh()), dim=-1)


class ClapAudioEncoder(AudioEncoder):
    """HTSAT, averaged over all positions, and CLAP's projection.

    CLAP hears windows of 10 s. A shorter recording is repeated as often as it fits whole, and silence follows. CLAP
    takes a random window of a longer one; here all of it counts: as few evenly spaced windows as cover it, the last
    one flush with its end, are embedded, and the embeddings averaged and scaled to length 1.
    """

    rate = htsat.RATE_HZ

    def __init__(self, config: CLAPSepConfig) -> None:
        super().__init__()
        self.window = config.window * htsat.RATE_HZ // RATE_HZ
        self.htsat = config.build_htsat(stretch=True)
        self.norm = nn.LayerNorm(config.deepest)
        self.projection = _projection(config.deepest, config.dim)

    @torch.no_grad()
    def embed(self, audio: Tensor) -> Tensor:
        """Embed one mono recording, float32 `[samples]` at 48 kHz, peaks within ±1: float32 `[dim]`, of length 1.

        Raises `ValueError` unless `audio` has one axis and at least one sample.
        """
        if audio.dim() != 1 or not len(audio):
            raise ValueError(f"a mono recording is [samples], at least 1, not {list(audio.shape)}")
        # CLAP was trained on 16-bit audio, cut towards zero.
        quantised = (audio.clamp(-1, 1) * INT16_STEPS).trunc() / INT16_STEPS
        windows = self._windows(quantised)
        starts = range(0, len(windows), WINDOWS_AT_ONCE)
        embeddings = torch.cat([self.embed_windows(windows[start : start + WINDOWS_AT_ONCE]) for start in starts])
        return F.normalize(embeddings.mean(dim=0), dim=-1)

    def embed_windows(self, windows: Tensor) -> Tensor:
        """Embed each of `windows`, float32 `[batch, window samples]`, as they are: `[batch, dim]`, rows of length 1."""
        deepest = self.htsat(windows)[-1]
        return F.normalize(self.projection(self.norm(deepest).mean(dim=(1, 2))), dim=-1)

    def _windows(self, audio: Tensor) -> Tensor:
        samples = len(audio)
        if samples <= self.window:
            repeated = audio.repeat(self.window // samples)
            return F.pad(repeated, (0, self.window - len(repeated)))[None]
        count = math.ceil(samples / self.window)
        starts = [i * (samples - self.window) // (count - 1) for i in range(count)]
        return torch.stack([audio[start : start + self.window] for start in starts])


def _projection(width: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, dim), nn.ReLU(), nn.Linear(dim, dim))


def _embedding(count: int, width: int) -> nn.Embedding:
    # Not filled at random, as the weights are always loaded: on the meta device that would import for a second.
    embedding: nn.Embedding = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
        torch.zeros(count, width), freeze=False
    )
    return embedding

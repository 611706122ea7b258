"""Defines the family AudioSep: one description in words for each target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from clapsep_cli.families.base import Family, ModelLike
from clapsep_cli.families.embedding import Embedder
from clapsep_cli.models.audiosep import N_FFT, AudioSep, AudioSepConfig
from clapsep_cli.models.clap import ClapTextEncoder
from clapsep_cli.query import Query
from clapsep_cli.stitch.complex_masks import ComplexMaskStream


class Descriptions(Embedder):
    """Embeds queries of positive texts; those of one query are averaged and scaled to length 1 again."""

    def join(self, positive: Tensor | None, negative: Tensor | None) -> Tensor:
        assert positive is not None, "a query has a positive text"
        assert negative is None, "a query has no negative side"
        return F.normalize(positive)


def descriptions(model: ModelLike[AudioSepConfig], queries: Sequence[Query], kept: Sequence[int]) -> Tensor:
    """Embed the queries at the positions `kept`: float32 `[stems, dim]`, rows of length 1."""
    embedder = Descriptions(model)
    embedder.embed_texts(text for at in kept for text in queries[at].pos)
    return torch.cat([embedder.condition(queries[at]) for at in kept])


def stream(separator: AudioSep, wanted: Tensor, rate: int, channels: int, device: torch.device) -> ComplexMaskStream:
    """Make the stream that masks a recording of `channels` at `rate` Hz."""
    return ComplexMaskStream(separator.window, separator.config.grid, N_FFT, len(wanted), rate, channels, device)


FAMILY = Family(
    config=AudioSepConfig,
    separator=AudioSep,
    text=ClapTextEncoder,
    ask=descriptions,
    stream=stream,
    window_bytes=600_000_000,  # measured: 580 MB for the first, 400 for each more
    embedder=Descriptions,
    mutual=False,
)

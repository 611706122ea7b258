"""Defines the family AudioSep: one description in words for each target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from clapsep_cli.errors import QueryError
from clapsep_cli.families.base import Askable, Family
from clapsep_cli.models.audiosep import N_FFT, AudioSep, AudioSepConfig
from clapsep_cli.models.clap import ClapTextEncoder
from clapsep_cli.query import Query
from clapsep_cli.stitch.complex_masks import ComplexMaskStream


@torch.inference_mode()
def descriptions(model: Askable[AudioSepConfig], queries: Sequence[Query], kept: Sequence[int]) -> Tensor:
    """Embed the positive texts of queries; those of one query are averaged and scaled to length 1 again.

    Args:
        model: an AudioSep.
        queries: the queries, of positive texts only.
        kept: positions of the queries that become stems.

    Returns:
        float32 `[stems, dim]`, rows of length 1.

    Raises:
        QueryError: for a query with recordings, spans or a negative side.
    """
    for query in queries:
        if query.pos_audio or query.neg_audio or query.pos_spans or query.neg_spans:
            raise QueryError(f"{model.name} takes no recordings as queries: describe the sound in words with --pos")
        if query.neg:
            raise QueryError(
                f"{model.name} takes no negative queries: describe with --pos what to keep; to remove a sound, extract "
                "it with --pos and use the residual"
            )
    texts = list(dict.fromkeys(text for at in kept for text in queries[at].pos))
    rows = dict(zip(texts, model.text.embed(texts), strict=True))
    return F.normalize(torch.stack([torch.stack([rows[text] for text in queries[at].pos]).mean(0) for at in kept]))


def stream(separator: AudioSep, wanted: Tensor, rate: int, channels: int, device: torch.device) -> ComplexMaskStream:
    """Make the stream that masks a recording of `channels` at `rate` Hz."""
    return ComplexMaskStream(separator.window, separator.config.grid, N_FFT, len(wanted), rate, channels, device)


FAMILY = Family(
    config=AudioSepConfig,
    separator=AudioSep,
    text=ClapTextEncoder,
    ask=descriptions,
    stream=stream,
    mutual=False,
)

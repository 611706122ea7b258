"""Embeds queries for separators that share an embedding space with a text and an audio encoder."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clapsep_cli.audio.samples import Audio, downmix, from_array, to_rate
from clapsep_cli.audio.sources import read_mono, recordings
from clapsep_cli.errors import AudioError, QueryError
from clapsep_cli.families.base import Askable
from clapsep_cli.models.base import Conditions, MaskSeparator, condition
from clapsep_cli.query import Excerpt, Query, Shot
from clapsep_cli.stitch.masking import MaskedRecording


@torch.inference_mode()
def conditions(model: Askable[object], queries: Sequence[Query], kept: Sequence[int]) -> Conditions:
    """Embed queries and join both sides of each. Every text and every recording is embedded once.

    Args:
        model: a model with a text and an audio encoder.
        queries: the queries.
        kept: positions of the queries that become stems.

    Returns:
        A condition for each query, and `kept`.

    Raises:
        AudioError: for a recording that cannot be read or is silent.
        QueryError: for a text that the model cannot understand, or that is on both sides.
    """
    texts = list(dict.fromkeys(text for query in queries for text in (*query.pos, *query.neg)))
    shots = {_key(shot): shot for query in queries for shot in (*query.pos_audio, *query.neg_audio)}
    words = dict(zip(texts, model.text.embed(texts), strict=True)) if texts else {}
    sounds = {key: [_embed_shot(model, file) for file in _files(shot)] for key, shot in shots.items()}

    def side(texts: Sequence[str], shots: Sequence[Shot], alpha: float) -> Tensor | None:
        return joined([words[text] for text in texts], [row for shot in shots for row in sounds[_key(shot)]], alpha)

    rows = []
    for query in queries:
        if both := set(query.pos) & set(query.neg):
            raise QueryError(f"{both.pop()!r} is asked for and left out at the same time")
        positive, negative = (
            side(query.pos, query.pos_audio, query.alpha),
            side(query.neg, query.neg_audio, query.alpha),
        )
        rows.append(condition(positive, negative))
    return Conditions(torch.cat(rows), tuple(kept))


def stream(
    separator: MaskSeparator, wanted: Conditions, rate: int, channels: int, device: torch.device
) -> MaskedRecording:
    """Make the stream that masks a recording of `channels` at `rate` Hz."""
    return MaskedRecording(separator.window, len(wanted.kept), rate, channels, device)


def _key(shot: Shot) -> Hashable:
    """Identify a shot. Targets that are negative queries of one another hold the very same arrays."""
    return id(shot) if isinstance(shot, tuple) else shot


def unknown_words(model: Askable[object], queries: Sequence[Query]) -> list[str]:
    """Return a line for each word of `queries` that the model does not know and so leaves out.

    Raises `QueryError` for a text of such words alone.
    """
    lines = []
    for text in dict.fromkeys(text for query in queries for text in (*query.pos, *query.neg)):
        model.text.embed([text])
        for word, near in model.text.unknown(text).items():
            meant = f"; did you mean {near!r}?" if near else ""
            lines.append(f"{text!r}: the model {model.name} does not know {word!r} and leaves it out{meant}")
    return lines


def joined(texts: Sequence[Tensor], shots: Sequence[Tensor], alpha: float) -> Tensor | None:
    """Join the embeddings of one side of a query (paper, Eq. 3).

    Args:
        texts: embeddings of its texts, `[dim]` each.
        shots: embeddings of its recordings, likewise.
        alpha: weight of the recordings where there are both, 0 to 1.

    Returns:
        `[1, dim]`; None for a side that is empty.
    """
    # Means of unit vectors, not scaled to length 1 again: so were the released weights trained.
    means = [torch.stack(list(given)).mean(0, keepdim=True) for given in (texts, shots) if given]
    if len(means) < 2:
        return means[0] if means else None
    text, audio = means
    return alpha * audio + (1 - alpha) * text


def _files(shot: Shot) -> Sequence[Shot]:
    return recordings(Path(shot)) if isinstance(shot, str | Path) else [shot]


def _embed_shot(model: Askable[object], shot: Shot) -> Tensor:
    rate = model.audio.rate
    if isinstance(shot, tuple):
        name = "a recording given as a query"
        samples, own = from_array(*shot, name)
        mono = to_rate(downmix(samples), own, rate)
    elif isinstance(shot, Excerpt):
        name = f"{shot.path}, {shot.start:g}-{shot.end:g} s"
        mono = _read_excerpt(shot, rate)
    else:
        name, mono = str(shot), read_mono(Path(shot), rate)
    if not np.any(mono):
        raise AudioError(f"{name}: is silent; a query needs a recording of the sound")
    return _embed(model, mono)


def _read_excerpt(shot: Excerpt, rate: int) -> Audio:
    try:
        return read_mono(shot.path, rate, shot.start, shot.end, shot.lenient, shot.stream)
    except AudioError as error:
        raise AudioError(f"the stretch {shot.start:g}-{shot.end:g} s cannot be read: {error}") from error


def _embed(model: Askable[object], mono: Audio) -> Tensor:
    return model.audio.embed(torch.from_numpy(np.ascontiguousarray(mono)).to(model.device))


@torch.inference_mode()
def likeness(model: Askable[object], wanted: Conditions, stem: int, mono: Audio, rate: int) -> float | None:
    """Compare a recording with the positive query of a stem.

    Args:
        model: a model with an audio encoder.
        wanted: what it was asked for.
        stem: number of the stem.
        mono: the recording, float32 `[samples]`.
        rate: its sample rate in Hz.

    Returns:
        The cosine of the two in the query space; None for silence, and where the query is negative alone.
    """
    positive = wanted.targets[wanted.kept[stem]].chunk(2)[0]
    if not np.any(mono) or not positive.any():
        return None
    heard = _embed(model, to_rate(mono, rate, model.audio.rate))
    return float(torch.nn.functional.cosine_similarity(heard, positive, 0))

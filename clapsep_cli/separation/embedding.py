"""From queries to the conditions of a separator that shares an embedding space with a text and an audio encoder."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clapsep_cli.audio.samples import Audio, downmix, from_array, to_rate
from clapsep_cli.audio.sources import read_mono, recordings
from clapsep_cli.errors import AudioError, QueryError
from clapsep_cli.models.base import Conditions, condition
from clapsep_cli.query import Excerpt, Query, Shot
from clapsep_cli.stitch.masking import MaskedRecording
from clapsep_cli.store.checkpoint import Model


@torch.inference_mode()
def conditions(model: Model, queries: Sequence[Query], kept: Sequence[int]) -> Conditions:
    """What asks `model` for those of `queries` that are `kept`. Each text and each recording is embedded once.

    Raises `AudioError` for a shot that cannot be read or is silent, `QueryError` for a text it cannot understand.
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


def stream(model: Model, wanted: Conditions, rate: int, channels: int) -> MaskedRecording:
    """A recording of `channels` at `rate` Hz, to be masked."""
    return MaskedRecording(model.separator.window, len(wanted.kept), rate, channels, model.device)


def _key(shot: Shot) -> Hashable:
    """What tells a shot from others. Targets that leave one another's sounds hold the very same arrays."""
    return id(shot) if isinstance(shot, tuple) else shot


def doubts(model: Model, queries: Sequence[Query]) -> list[str]:
    """Words of `queries` that the model does not know, and so leaves out: a line for each.

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
    """One side of a query, `[1, dim]`, of the embeddings of its texts and of its shots, `[dim]` each (paper, Eq. 3)."""
    # Means of unit vectors, not scaled to length 1 again: so were the released weights trained.
    means = [torch.stack(list(given)).mean(0, keepdim=True) for given in (texts, shots) if given]
    if len(means) < 2:
        return means[0] if means else None
    text, audio = means
    return alpha * audio + (1 - alpha) * text


def _files(shot: Shot) -> Sequence[Shot]:
    return recordings(Path(shot)) if isinstance(shot, str | Path) else [shot]


def _embed_shot(model: Model, shot: Shot) -> Tensor:
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
        raise AudioError(f"the stretch {shot.start:g}-{shot.end:g} s is not to be had: {error}") from error


def _embed(model: Model, mono: Audio) -> Tensor:
    return model.audio.embed(torch.from_numpy(np.ascontiguousarray(mono)).to(model.device))


@torch.inference_mode()
def likeness(model: Model, wanted: Conditions, stem: int, mono: Audio, rate: int) -> float | None:
    """How alike a recording (float32 `[samples]` at `rate` Hz) is to what a stem's positive query asks for.

    The cosine in the query space; None for silence, and where the query is negative alone.
    """
    positive = wanted.targets[wanted.kept[stem]].chunk(2)[0]
    if not np.any(mono) or not positive.any():
        return None
    heard = _embed(model, to_rate(mono, rate, model.audio.rate))
    return float(torch.nn.functional.cosine_similarity(heard, positive, 0))

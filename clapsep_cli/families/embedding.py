"""Embeds queries for separators that share an embedding space with a text and an audio encoder."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clapsep_cli.audio.samples import Audio, downmix, from_array, to_rate
from clapsep_cli.audio.sources import read_mono, recordings
from clapsep_cli.dsp import HOP, N_FFT
from clapsep_cli.errors import AudioError, QueryError
from clapsep_cli.families.base import ModelLike
from clapsep_cli.models.base import Conditions, MaskSeparator, condition
from clapsep_cli.query import Excerpt, Query, Shot
from clapsep_cli.stitch.complex_masks import ComplexMaskStream
from clapsep_cli.stitch.masking import MaskedRecording
from clapsep_cli.stitch.windows import Stream


class Embedder:
    """Embeds texts and recordings with a model, each once, and makes conditions from them."""

    def __init__(self, model: ModelLike[object], silence: bool = False) -> None:
        """`silence`: accept silent recordings, rather than raise `AudioError`."""
        self.model, self.silence, self.unit = model, silence, True
        self.words: dict[str, Tensor] = {}
        self.sounds: dict[Hashable, list[Tensor]] = {}

    @torch.inference_mode()
    def embed_texts(self, texts: Iterable[str]) -> None:
        """Embed `texts`, many at a time. Raises `QueryError` for one that the model does not understand."""
        new = [text for text in dict.fromkeys(texts) if text not in self.words]
        if new:
            self.words.update(zip(new, self.model.text.embed_many(new), strict=True))

    @torch.inference_mode()
    def condition(self, query: Query) -> Tensor:
        """Make the condition for a query, float32 `[1, 2 · dim]`.

        Raises:
            AudioError: for a recording that cannot be read or is silent.
            QueryError: for a text that the model does not understand.
        """
        self.embed_texts((*query.pos, *query.neg))
        sides = ((query.pos, query.pos_audio), (query.neg, query.neg_audio))
        return self.join(*(self._side(texts, shots, query.alpha) for texts, shots in sides))

    def join(self, positive: Tensor | None, negative: Tensor | None) -> Tensor:
        """Join the embeddings of both sides of a query, `[1, dim]` each, into its condition."""
        return condition(positive, negative, unit=self.unit)

    @torch.inference_mode()
    def positive(self, query: Query) -> Tensor:
        """Embed the positive side of a query, float32 `[1, dim]`. Raises as `condition`."""
        self.embed_texts(query.pos)
        side = self._side(query.pos, query.pos_audio, query.alpha)
        assert side is not None, "the query has a positive side"
        return side

    def _side(self, texts: Sequence[str], shots: Sequence[Shot], alpha: float) -> Tensor | None:
        """Embed one side of a query, `[1, dim]` (paper, Eq. 3)."""
        for shot in shots:
            if _key(shot) not in self.sounds:
                self.sounds[_key(shot)] = [_embed_shot(self.model, file, self.silence) for file in _files(shot)]
        sounds = [embedding for shot in shots for embedding in self.sounds[_key(shot)]]
        # Means of unit vectors, not scaled to length 1 again: the released weights were trained so.
        means = [
            torch.stack(given).mean(0, keepdim=True)
            for given in ([self.words[text] for text in texts], sounds)
            if given
        ]
        if len(means) < 2:
            return means[0] if means else None
        text, audio = means
        return alpha * audio + (1 - alpha) * text


@torch.inference_mode()
def conditions(model: ModelLike[object], queries: Sequence[Query], kept: Sequence[int]) -> Conditions:
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
    for query in queries:
        if both := set(query.pos) & set(query.neg):
            raise QueryError(f"{both.pop()!r} is both a positive and a negative query")
    embedder = Embedder(model)
    embedder.embed_texts(text for query in queries for text in (*query.pos, *query.neg))
    return Conditions(torch.cat([embedder.condition(query) for query in queries]), tuple(kept))


def stream(separator: MaskSeparator, wanted: Conditions, rate: int, channels: int, device: torch.device) -> Stream:
    """Make the stream that masks a recording of `channels` at `rate` Hz."""
    if separator.turns:
        return ComplexMaskStream(separator.window, HOP, N_FFT, len(wanted.kept), rate, channels, device)
    return MaskedRecording(separator.window, len(wanted.kept), rate, channels, device, separator.spread)


def _key(shot: Shot) -> Hashable:
    """Identify a shot. Targets that are negative queries of one another share the same arrays."""
    return id(shot) if isinstance(shot, tuple) else shot


def unknown_words(model: ModelLike[object], queries: Sequence[Query]) -> list[str]:
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


def _files(shot: Shot) -> Sequence[tuple[Any, int] | Excerpt]:
    if isinstance(shot, tuple):
        return [shot]
    part = shot if isinstance(shot, Excerpt) else Excerpt(Path(shot), 0.0, None)
    return [replace(part, path=path) for path in recordings(part.path)]


def _embed_shot(model: ModelLike[object], shot: tuple[Any, int] | Excerpt, silence: bool) -> Tensor:
    rate = model.audio.rate
    if isinstance(shot, tuple):
        name = "a recording given as a query"
        samples, own = from_array(*shot, name)
        mono = to_rate(downmix(samples), own, rate)
    else:
        name = str(shot.path) if shot.end is None else f"{shot.path}, {shot.start:g}-{shot.end:g} s"
        mono = _read_excerpt(shot, rate)
    if not silence and not np.any(mono):
        raise AudioError(f"{name}: is silent; a query needs a recording of the sound")
    return model.audio.embed(_on_device(model, mono))


def _read_excerpt(shot: Excerpt, rate: int) -> Audio:
    try:
        return read_mono(shot.path, rate, shot.start, shot.end, shot.lenient, shot.stream, shot.expand)
    except AudioError as error:
        if shot.end is None:
            raise
        raise AudioError(f"the stretch {shot.start:g}-{shot.end:g} s cannot be read: {error}") from error


def _on_device(model: ModelLike[object], mono: Audio) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(mono)).to(model.device)


@torch.inference_mode()
def likeness(
    model: ModelLike[object], wanted: Conditions, stem: int, rate: int, mono: Audio, moment: bool
) -> float | None:
    """Compare a recording with the positive query of a stem.

    Args:
        model: a model with an audio encoder.
        wanted: its conditions.
        stem: number of the stem.
        rate: sample rate of the recording in Hz.
        mono: the recording, float32 `[samples]`.
        moment: compare the most alike moment, if the encoder embeds moments; else the whole.

    Returns:
        The cosine of the two in the query space; None for silence, and where the query is negative alone.
    """
    positive = wanted.targets[wanted.kept[stem]].chunk(2)[0]
    if not np.any(mono) or not positive.any():
        return None
    audio = _on_device(model, to_rate(mono, rate, model.audio.rate))
    heard = model.audio.moments(audio) if moment else model.audio.embed(audio)[None]
    return float(torch.nn.functional.cosine_similarity(heard, positive[None]).max())

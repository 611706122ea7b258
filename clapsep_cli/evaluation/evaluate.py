"""Evaluation by the paper's protocol (IV-A2): pairs of clips mixed at 0 dB, 10 s at 32 kHz, scored by improvement."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clapsep_cli import dsp
from clapsep_cli.audio.samples import Audio
from clapsep_cli.audio.sources import read_mono
from clapsep_cli.data import fit, mix, read_clip
from clapsep_cli.errors import ExtraError, ManifestError, ModelError
from clapsep_cli.evaluation.mixtures import Mixture, Shots
from clapsep_cli.evaluation.scores import ABSENT, DECIMALS, SHOT, Score, ScoreFile
from clapsep_cli.families.embedding import joined
from clapsep_cli.metrics import bss_sdr, sdr, si_sdr
from clapsep_cli.models.base import MaskSeparator, condition
from clapsep_cli.query import Query
from clapsep_cli.store.checkpoint import Model
from clapsep_cli.version import __version__

LOWEST_DB = -100.0
SIDES = ("both", "positive", "negative")
# Mixtures per pass. On a CPU more at a time are no faster (mini: 0.17, 0.17 and 0.26 s a mixture at 1, 4 and 8).
BATCH = {"cpu": 1}
GPU_BATCH = 16  # not measured
TEXT_BATCH = 32  # texts per pass
DIGITS = 16  # of a hash, to tell runs apart


@dataclass(frozen=True)
class Plan:
    """How each mixture is asked for its target.

    `sides`: which are named, of SIDES. `text`: in words. `shots`: also by so many recordings of a side, alone, and
    with the words (averaged, α = 0.5) where there is `text`. `bss`: also measure by BSS-eval.
    """

    sides: tuple[str, ...] = SIDES
    text: bool = True
    shots: tuple[int, ...] = ()
    bss: bool = True

    def queries(self, row: Mixture, folder: Path, shots: Shots) -> dict[str, Query]:
        """The queries for `row` by kind; those for which there are too few recordings are left out."""
        asked: dict[str, Query] = {}
        for count in (0, *self.shots):
            for words in [True] if not count else [False, True]:
                for side in self.sides if self.text or not words else ():
                    query = self._query(side, words, count, row, folder, shots)
                    if query is not None:
                        asked[kind(side, words, count)] = query
        if row.shot_file and "positive" in self.sides:
            asked[SHOT] = Query(pos_audio=[folder / row.shot_file])
        if row.absent_caption and "positive" in self.sides and self.text:
            asked[ABSENT] = Query(row.absent_caption)
        return asked

    @staticmethod
    def _query(side: str, words: bool, count: int, row: Mixture, folder: Path, shots: Shots) -> Query | None:
        named = {"positive": (row.label, row.positive_caption), "negative": (row.negative_caption,)}
        texts, files = {}, {}
        for name, keys in named.items():
            found = next((shots[key.lower()] for key in keys if key.lower() in shots), ())
            chosen = [folder / file for file in found if file not in (row.source_file, row.noise_file)][:count]
            wanted = side in (name, "both")
            if wanted and len(chosen) < count:
                return None
            texts[name] = [keys[-1]] if wanted and words else []
            files[name] = chosen if wanted else []
        return Query(texts["positive"], texts["negative"], files["positive"], files["negative"])


def kind(side: str, words: bool, count: int) -> str:
    """How a kind of query is called: "both", "both 5 shots", "both text+5 shots"."""
    shots = f"{count} shot{'s' if count > 1 else ''}"
    return side if not count else f"{side} text+{shots}" if words else f"{side} {shots}"


class Conditions:
    """Embeds queries; each text and each recording once."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.known: dict[str | Path, Tensor] = {}

    def know(self, texts: Iterable[str]) -> None:
        """Embed `texts`, many at a time. Raises `QueryError` for one that the model does not understand."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        for at in range(0, len(new), TEXT_BATCH):
            batch = new[at : at + TEXT_BATCH]
            self.known.update(zip(batch, self.model.text.embed(batch), strict=True))

    def __call__(self, query: Query) -> Tensor:
        """The condition that asks for `query`, float32 `[1, 2 · dim]`."""
        sides = ((query.pos, query.pos_audio), (query.neg, query.neg_audio))
        return condition(
            *(self._side(list(texts), [Path(str(s)) for s in shots], query.alpha) for texts, shots in sides)
        )

    def _side(self, texts: Sequence[str], shots: Sequence[Path], alpha: float) -> Tensor | None:
        self.know(texts)
        for file in shots:
            if file not in self.known:
                audio = torch.from_numpy(read_mono(file, self.model.audio.rate)).to(self.model.device)
                self.known[file] = self.model.audio.embed(audio)
        return joined([self.known[text] for text in texts], [self.known[file] for file in shots], alpha)


def masking(model: Model) -> MaskSeparator:
    """The separator of a model that masks under a condition. Raises `ModelError` for another."""
    if not isinstance(model.separator, MaskSeparator):
        raise ModelError(f"{model.name} separates by prompts: this evaluation is for models that take queries")
    return model.separator


def mixer(folder: Path, samples: int) -> Callable[[Mixture], tuple[Audio, Audio]]:
    """A function that makes a mixture: it and its target, float32 `[samples]` each, of clips in `folder`.

    It raises `ManifestError` for a clip that cannot be decoded.
    """

    @lru_cache(maxsize=32)  # a target comes with each of its interferers, one after the other
    def clip(file: str) -> Audio:
        return fit(read_clip(folder / file), samples)

    return lambda row: mix(clip(row.source_file), clip(row.noise_file))


@torch.inference_mode()
def estimates(separator: MaskSeparator, mixtures: Tensor, wanted: Iterable[Tensor]) -> Iterator[Audio]:
    """The targets estimated in `mixtures` (float32 `[batch, samples]`), float32 `[batch, samples]`, under each of the
    conditions `wanted` (`[batch or 1, 2 · dim]`). What the separator hears is encoded once."""
    features, spectrum = separator.encode(mixtures), dsp.spectrum(mixtures)
    for asked in wanted:
        yield dsp.masked(spectrum, separator.mask(features, asked), mixtures.shape[1]).cpu().numpy()


def _gains(estimate: Audio, mixture: Audio, target: Audio) -> tuple[float, float, float]:
    level = 10 * np.log10((np.square(estimate).sum() + 1e-12) / (np.square(mixture).sum() + 1e-12))
    gains = (metric(estimate, target) - metric(mixture, target) for metric in (sdr, si_sdr))
    return *gains, max(float(level), LOWEST_DB)  # type: ignore[return-value]


def score(separator: MaskSeparator, wanted: Tensor, mixture: Audio, target: Audio) -> tuple[float, float, float]:
    """SDRi, SI-SDRi and output level in dB of one window (`[window samples]`) under the condition `wanted`."""
    (estimate,) = estimates(separator, torch.from_numpy(mixture)[None].to(wanted.device), [wanted])
    return _gains(estimate[0], mixture, target)


def _scores(
    row: Mixture, mixture: Audio, target: Audio, found: Mapping[str, Audio], bss: bool, device: str
) -> list[Score]:
    improved: list[float | None] = [None] * len(found)
    if bss:
        *after, before = bss_sdr(np.stack([*found.values(), mixture]), target, device)
        improved = [round(value - before, DECIMALS) for value in after]
    scores = []
    for (query, estimate), bss_sdri in zip(found.items(), improved, strict=True):
        sdri, si_sdri, level = (round(value, DECIMALS) for value in _gains(estimate, mixture, target))
        scores.append(Score(row, query, sdri, si_sdri, bss_sdri, level))
    return scores


@torch.inference_mode()
def evaluate(
    model: Model,
    rows: Sequence[Mixture],
    folder: Path,
    plan: Plan | None = None,
    shots: Shots | None = None,
    start: int = 0,
) -> Iterator[list[Score]]:
    """Yield the scores of each mixture from row `start` on: one for each kind of query that `plan` has for it.

    Files are in `folder`; `shots` are those of `read_shots`. Before the first mixture it raises `QueryError` for a text
    that `model` does not understand, `ManifestError` where there is nothing to ask, and `ExtraError` where BSS-eval
    is asked for and torchmetrics is not installed.
    """
    plan = plan or Plan()
    if plan.bss and find_spec("torchmetrics") is None:
        raise ExtraError("BSS-eval needs torchmetrics: pip install 'clapsep[evaluate]', or leave it out: --no-bss")
    asked = [plan.queries(row, folder, shots or {}) for row in rows]
    anything = next((query for queries in asked for query in queries.values()), None)
    if anything is None:
        raise ManifestError("there is nothing to ask: no text, and for no mixture enough shots")
    conditions, mixed = Conditions(model), mixer(folder, model.separator.window)
    conditions.know(text for queries in asked for query in queries.values() for text in (*query.pos, *query.neg))
    size, device = batch_size(model), str(model.device) if model.device.type != "mps" else "cpu"  # it has no float64
    for first in range(start - start % size, len(rows), size):
        batch = asked[first : first + size]
        pairs = [mixed(row) for row in rows[first : first + size]]
        kinds = list(dict.fromkeys(name for queries in batch for name in queries))
        # A row that lacks a kind of query passes through the network with another, whose estimate is dropped.
        wanted = [torch.cat([conditions(queries.get(name, anything)) for queries in batch]) for name in kinds]
        heard = torch.from_numpy(np.stack([mixture for mixture, _ in pairs])).to(model.device)
        found = dict(zip(kinds, estimates(masking(model), heard, wanted), strict=True))
        for i in range(max(start - first, 0), len(batch)):
            of_row = {name: found[name][i] for name in kinds if name in batch[i]}
            yield _scores(rows[first + i], *pairs[i], of_row, plan.bss, device)


def evaluate_into(
    path: Path, model: Model, rows: Sequence[Mixture], folder: Path, plan: Plan, shots: Shots
) -> Iterator[list[Score]]:
    """As `evaluate`, kept in the CSV `path`: scores that a run with the same settings left there are yielded first, and
    not computed again. Raises `OutputError` where `path` holds others, and whatever `evaluate` raises."""
    kinds = [list(plan.queries(row, folder, shots)) for row in rows]
    with ScoreFile(path, settings(model, rows, folder, plan, shots), rows, kinds) as file:
        yield from list(file.scores)
        if len(file.scores) < len(rows):
            for scores in evaluate(model, rows, folder, plan, shots, len(file.scores)):
                file.append(scores)
                yield scores
        file.finish()


def settings(model: Model, rows: Sequence[Mixture], folder: Path, plan: Plan, shots: Shots) -> dict[str, object]:
    """All that scores depend on: the model, by its separator's weights too, the recordings, what is asked, and how."""
    files = {file for row in rows for file in (row.source_file, row.noise_file, row.shot_file) if file}
    files |= {file for listed in shots.values() for file in listed}
    data = repr((rows, sorted(shots.items()), sorted((file, (folder / file).stat().st_size) for file in files)))
    return {
        "clapsep": __version__,
        "torch": torch.__version__,
        "device": model.device.type,
        "model": model.name,
        "revision": model.revision,
        "weights": hashlib.sha256(model.identity.encode()).hexdigest()[:DIGITS],
        "precision": model.precision,
        "mixtures": len(rows),
        "data": hashlib.sha256(data.encode()).hexdigest()[:DIGITS],
        **asdict(plan),
    }


def batch_size(model: Model) -> int:
    """How many mixtures pass through `model` at a time."""
    return BATCH.get(model.device.type, GPU_BATCH)

"""Evaluates models by the paper's protocol (IV-A2): improvements on pairs of clips, mixed at 0 dB, 10 s at 32 kHz."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clapsep_cli.audio.samples import Audio
from clapsep_cli.audio.sources import Source
from clapsep_cli.data import fit, mix, read_clip
from clapsep_cli.dsp import RATE_HZ
from clapsep_cli.errors import DeviceError, ExtraError, ManifestError, ModelError, UsageError
from clapsep_cli.evaluation.mixtures import EvaluationSet, Mixture
from clapsep_cli.evaluation.scores import ABSENT, DECIMALS, SHOT, Score
from clapsep_cli.families.base import QueryEmbedder
from clapsep_cli.metrics import bss_sdr, sdr, si_sdr
from clapsep_cli.models.base import ConditionedSeparator
from clapsep_cli.query import Excerpt, Query, Shot
from clapsep_cli.store.checkpoint import Model
from clapsep_cli.version import __version__

SECONDS = 10  # of a mixture
LOWEST_DB = -100.0
# Mixtures per pass, halved where memory is short. On a CPU more at a time are no faster (mini: 0.17, 0.17 and 0.26 s a
# mixture at 1, 4 and 8).
BATCH = {"cpu": 1, "cuda": 64}
SIDES = ("both", "positive", "negative")
CONDITIONS = ("unit", "raw")
DIGITS = 16  # of a hash that identifies a run


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation: kinds of query, and metrics.

    Attributes:
        sides: sides of the query that are given, of `SIDES`.
        text: query by captions.
        shots: also query by these numbers of recordings: by them alone and, with `text`, by both, averaged (α = 0.5).
        bss: also compute BSS-eval SDRi.
        listed: also query by the recording in the mixture's row, alone.
        shot_seconds: cut shots to each of these lengths in turn; by default they are used whole.
        condition: "unit" scales the joined condition to length 1, as the released inference does; "raw" does not, as
            the released test step.
    """

    sides: tuple[str, ...] = SIDES
    text: bool = True
    shots: tuple[int, ...] = ()
    bss: bool = True
    listed: bool = True
    shot_seconds: tuple[float, ...] = ()
    condition: str = CONDITIONS[0]

    @staticmethod
    def suited(
        model: Model,
        sides: Sequence[str] | None = None,
        text: bool = True,
        shots: tuple[int, ...] = (),
        bss: bool = True,
        shot_seconds: tuple[float, ...] = (),
        condition: str = CONDITIONS[0],
    ) -> EvaluationOptions:
        """Make the options for a model; by default `sides` are all that it takes.

        Raises `UsageError` for queries that it does not take, `ModelError` where it takes none for a single target.
        """
        embedder_of(model)
        known = SIDES if "negatives" in model.takes else ("positive",)
        if not set(sides or known) <= set(known):
            raise UsageError(f"--queries: {model.name} takes no negative queries: leave it out, or use --queries pos")
        if shots and "audio" not in model.takes:
            raise UsageError(f"--shots: {model.name} takes no recordings as queries: leave it out")
        if condition != CONDITIONS[0] and known != SIDES:
            raise UsageError(f"--condition {condition}: {model.name} joins no two sides: leave it out")
        return EvaluationOptions(
            tuple(sides or known), text, shots, bss, "audio" in model.takes, shot_seconds, condition
        )

    def queries(self, row: Mixture, data: EvaluationSet) -> dict[str, Query]:
        """Make the queries for one mixture, by kind. Kinds for which `data` has too few recordings are skipped."""
        captions = {"positive": (row.label, row.positive_caption), "negative": (row.negative_caption,)}
        files: dict[str, list[Path]] = {}
        for side, names in captions.items():
            listed = next((data.shots[name.lower()] for name in names if name.lower() in data.shots), ())
            mixed = {data.folder / row.source_file, data.folder / row.noise_file}
            files[side] = [path for path in (data.folder / file for file in listed) if path not in mixed]
        found: dict[str, Query] = {}
        for count, seconds in ((0, 0.0), *((n, cut) for n in self.shots for cut in self.shot_seconds or (0.0,))):
            for words in (False, True) if count else (True,):
                for side in self.sides if self.text or not words else ():
                    named = captions if side == "both" else (side,)
                    if all(len(files[name]) >= count for name in named):
                        pos, neg = ([captions[name][-1]] if words and name in named else [] for name in captions)
                        shots = {name: [_first(path, seconds) for path in files[name][:count]] for name in named}
                        pos_audio, neg_audio = (shots.get(name, []) for name in captions)
                        found[kind(side, words, count, seconds)] = Query(pos, neg, pos_audio, neg_audio)
        if self.listed and row.shot_file and "positive" in self.sides:
            found[SHOT] = Query(pos_audio=data.folder / row.shot_file)
        if row.absent_caption and "positive" in self.sides and self.text:
            found[ABSENT] = Query(row.absent_caption)
        return found


@lru_cache(maxsize=4096)
def _first(path: Path, seconds: float) -> Shot:
    """Return the first `seconds` of a shot, or all of a shorter one; 0 for all."""
    if not seconds:
        return path
    with Source(path) as source:
        return Excerpt(path, 0, seconds) if source.frames > seconds * source.rate else path


def kind(side: str, words: bool, count: int, seconds: float = 0) -> str:
    """Return the name of a kind of query: "both", "both 5 shots", "both text+5 shots", "both 1 shot of 2 s"."""
    shots = f"{count} shot{'s' if count > 1 else ''}" + (f" of {seconds:g} s" if seconds else "")
    return side if not count else f"{side} text+{shots}" if words else f"{side} {shots}"


def separator_of(model: Model) -> ConditionedSeparator[Any]:
    """Return the separator of a model that extracts single targets."""
    assert isinstance(model.separator, ConditionedSeparator), "it has an embedder"
    return model.separator


def embedder_of(model: Model, condition: str = CONDITIONS[0]) -> QueryEmbedder:
    """Return the embedder of such a model's queries; it accepts silent shots. Raises `ModelError` for another model.

    `condition`: one of `CONDITIONS`.
    """
    if model.kind.embedder is None:
        raise ModelError(f"{model.name} separates all sounds at once: evaluate is for models that extract one")
    embedder: QueryEmbedder = model.kind.embedder(model, True)
    embedder.unit = condition == "unit"
    return embedder


def mixer(folder: Path, model: Model | None = None) -> Callable[[Mixture], tuple[Audio, Audio]]:
    """Return a function that mixes a row of a list, from clips in `folder`: 10 s, or a window of `model` if shorter.

    It returns the mixture and its target, float32 `[samples]` each at 32 kHz. It raises `ManifestError` for a clip that
    cannot be decoded.
    """

    samples = min(model.separator.window if model else SECONDS * RATE_HZ, SECONDS * RATE_HZ)

    @lru_cache(maxsize=32)  # a target comes with each of its interferers, one after the other
    def clip(file: str) -> Audio:
        return fit(read_clip(folder / file), samples)

    return lambda row: mix(clip(row.source_file), clip(row.noise_file))


def score(
    row: Mixture, mixture: Audio, target: Audio, estimates: Mapping[str, Audio], bss_device: str = ""
) -> list[Score]:
    """Score estimates of the target of a mixture.

    Args:
        row: the mixture's row of the list.
        mixture: float32 `[samples]` at 32 kHz.
        target: as `mixture`.
        estimates: as `mixture`, by kind of query.
        bss_device: where to compute BSS-eval; if empty, it is skipped.
    """
    improved: list[float | None] = [None] * len(estimates)
    if bss_device:
        *after, unmasked = bss_sdr(np.stack([*estimates.values(), mixture]), target, bss_device)
        improved = [round(value - unmasked, DECIMALS) for value in after]
    sdr_before, si_sdr_before = sdr(mixture, target), si_sdr(mixture, target)
    energy = np.square(mixture).sum() + 1e-12
    scores = []
    for (query, estimate), bss_sdri in zip(estimates.items(), improved, strict=True):
        level = max(float(10 * np.log10((np.square(estimate).sum() + 1e-12) / energy)), LOWEST_DB)
        gains = (sdr(estimate, target) - sdr_before, si_sdr(estimate, target) - si_sdr_before)
        sdri, si_sdri, level = (round(value, DECIMALS) for value in (*gains, level))
        scores.append(Score(row, query, sdri, si_sdri, bss_sdri, level))
    return scores


@torch.inference_mode()
def evaluate(
    model: Model, data: EvaluationSet, options: EvaluationOptions | None = None, start: int = 0, batch_size: int = 0
) -> Iterator[list[Score]]:
    """Score a model on a list of mixtures.

    Args:
        model: a model that takes queries.
        data: the mixtures and recordings to query with.
        options: kinds of query; by default texts of all sides that the model takes, together and alone.
        start: index of the first mixture to score.
        batch_size: mixtures in one batch, fewer if memory is short; 0 chooses by the device.

    Yields:
        The scores of each mixture, one for each kind of query.

    Raises:
        QueryError: before the first mixture, for a text that the model does not understand.
        ManifestError: before the first mixture, if there is no query at all; later, for a clip that cannot be read.
        ExtraError: BSS-eval is on, and torchmetrics is not installed.
        ModelError: for a model that separates all sounds at once.
        DeviceError: the device lacks the memory for one mixture.
    """
    options = options or EvaluationOptions.suited(model)
    if options.bss and find_spec("torchmetrics") is None:
        raise ExtraError("BSS-eval needs torchmetrics: pip install 'clapsep[evaluate]', or skip it with --no-bss")
    asked = [options.queries(row, data) for row in data.rows]
    anything = next((query for queries in asked for query in queries.values()), None)
    if anything is None:
        raise ManifestError("there is no query: texts are off, and no mixture has enough shots")
    embedder, mixed = embedder_of(model, options.condition), mixer(data.folder, model)
    embedder.embed_texts(text for queries in asked for query in queries.values() for text in (*query.pos, *query.neg))
    size = batch_size or BATCH.get(model.device.type, 1)
    bss_device = "cpu" if model.device.type == "mps" else str(model.device)  # MPS has no float64
    at = start - start % size  # a resumed run has the same batches as an uninterrupted one
    while at < len(data.rows):
        batch, rows = asked[at : at + size], data.rows[at : at + size]
        pairs = [mixed(row) for row in rows]
        kinds = list(dict.fromkeys(name for queries in batch for name in queries))
        # A row that lacks a kind of query gets another query, and the estimate is dropped.
        wanted = [torch.cat([embedder.condition(queries.get(name, anything)) for queries in batch]) for name in kinds]
        heard = torch.from_numpy(np.stack([mixture for mixture, _ in pairs])).to(model.device)
        try:
            estimated = [estimate.cpu().numpy() for estimate in separator_of(model).estimate(heard, wanted)]
        except torch.cuda.OutOfMemoryError as error:
            if size == 1:
                raise DeviceError(f"{model.device} lacks the memory for a mixture; use -d cpu") from error
            size //= 2
            continue
        found = dict(zip(kinds, estimated, strict=True))
        for i in range(max(start - at, 0), len(batch)):
            estimates = {name: found[name][i] for name in kinds if name in batch[i]}
            yield score(rows[i], *pairs[i], estimates, bss_device if options.bss else "")
        at += len(batch)


def provenance(model: Model, data: EvaluationSet, options: EvaluationOptions) -> dict[str, object]:
    """Return everything that scores depend on: versions, device, model and hash of its weights, recordings, options."""
    return {
        "clapsep": __version__,
        "torch": torch.__version__,
        "device": model.device.type,
        "model": model.name,
        "revision": model.revision,
        "weights": hashlib.sha256(model.identity.encode()).hexdigest()[:DIGITS],
        "precision": model.precision,
        "mixtures": len(data.rows),
        "data": digest_of(data),
        **asdict(options),
    }


def digest_of(data: EvaluationSet) -> str:
    """Hash a list, its shots and the sizes of all recordings."""
    files = {file for row in data.rows for file in row.files}
    files |= {file for listed in data.shots.values() for file in listed}
    sizes = sorted((file, (data.folder / file).stat().st_size) for file in files)
    recordings = repr((data.rows, sorted(data.shots.items()), sizes))
    return hashlib.sha256(recordings.encode()).hexdigest()[:DIGITS]

"""Evaluates models that separate by prompts: SNR and SI-SNR of every part of a mixture, at the data's own rate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from clapsep_cli import metrics, separation
from clapsep_cli.audio.samples import Audio
from clapsep_cli.audio.sources import HEARD_SECONDS, Source
from clapsep_cli.errors import AudioError, ManifestError, ModelError, UsageError
from clapsep_cli.models.prompts import TASKS, indices
from clapsep_cli.models.tuss import Prompted, Tuss
from clapsep_cli.stitch.stems import best_order
from clapsep_cli.store.checkpoint import Model
from clapsep_cli.tables import check_faults, read_table

COLUMNS = ("mixture", "prompt", "reference")
WHOLE = "whole"
LIMIT_DB = 70.0  # of a score, as in the released evaluation
FIGURES = ("snr", "si_snr", "snri", "si_snri")


@dataclass(frozen=True)
class Parts:
    """A mixture, and its parts: a prompt and a recording each."""

    mixture: Path
    prompts: tuple[str, ...]
    references: tuple[Path, ...]

    @property
    def task(self) -> str:
        """The task with exactly these prompts; empty for none."""
        named = Counter(self.prompts)
        return next((name for name, prompts in TASKS.items() if Counter(prompts) == named), "")


@dataclass(frozen=True)
class PartScore:
    """Scores of one part, means over channels, in dB; the last two are improvements over the mixture."""

    parts: Parts
    prompt: str
    snr: float
    si_snr: float
    snri: float
    si_snri: float


@dataclass(frozen=True)
class PromptOptions:
    """Options of separating mixtures by prompts.

    Attributes:
        single: separate one part at a time, without the other prompts.
        segment: length of a segment in seconds; `WHOLE` for the whole recording; None for the model's own.
        shift: seconds from one segment to the next, at least half a segment; None for the model's own.
    """

    single: bool = False
    segment: float | str | None = None
    shift: float | None = None


def is_prompted(path: Path) -> bool:
    """Return True if the columns of a list are those of a list of prompts. Raises `ManifestError`."""
    rows = read_table(path, ())
    return bool(rows) and "prompt" in rows[0][1]


def read_parts(path: Path, folder: Path) -> list[Parts]:
    """Read a CSV with a row for each part: `mixture,prompt,reference`, files relative to `folder`.

    Raises `ManifestError` that lists empty cells and missing files by line.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    faults = []
    for line, row in read_table(path, COLUMNS):
        faults += [f"line {line}: no {name}" for name in COLUMNS if not row[name]]
        files = (row[name] for name in ("mixture", "reference") if row[name])
        faults += [f"line {line}: no file {folder / file}" for file in files if not (folder / file).is_file()]
        found.setdefault(row["mixture"], []).append((row["prompt"], row["reference"]))
    check_faults(path, faults or ([] if found else ["no rows"]))
    return [
        Parts(folder / mixture, tuple(p for p, _ in parts), tuple(folder / file for _, file in parts))
        for mixture, parts in found.items()
    ]


def evaluate_parts(
    model: Model, listed: Sequence[Parts], options: PromptOptions = PromptOptions()
) -> Iterator[list[PartScore]]:
    """Separate each mixture by its prompts and score the parts; equal prompts in the best order.

    Args:
        model: a model of prompts.
        listed: the mixtures.
        options: how they are separated.

    Yields:
        The scores of each mixture. Parts whose reference is silent have none.

    Raises:
        ModelError: for a model that takes no prompts.
        UsageError: for an impossible segment or shift.
        QueryError: before the first mixture, for a prompt that the model does not know.
        ManifestError: for recordings of a mixture that differ in rate, channels or length, or cannot be read.
    """
    if "prompts" not in model.takes:
        raise ModelError(f"{model.name} takes no prompts: a list of prompts is for models such as tuss-medium")
    separator = model.separator
    assert isinstance(separator, Tuss), "it takes prompts"
    numbers = [indices(parts.prompts, separator.config.prompts) for parts in listed]
    _check(options)
    for parts, asked in zip(listed, numbers, strict=True):
        mixture, rate = _read(parts.mixture)
        references = [_read(path) for path in parts.references]
        for path, (reference, other) in zip(parts.references, references, strict=True):
            if (reference.shape, other) != (mixture.shape, rate):
                raise ManifestError(f"{path}: differs from {parts.mixture} in rate, channels or length")
        _cut(separator, options, mixture.shape[1] / rate)
        sets = [[number] for number in asked] if options.single else [asked]
        stems = np.concatenate([_separate(model, mixture, rate, each) for each in sets])
        yield _scores(parts, mixture, [reference for reference, _ in references], stems)


def _check(options: PromptOptions) -> None:
    segment, shift = options.segment, options.shift
    if isinstance(segment, str) and segment != WHOLE:
        raise UsageError(f"--segment {segment}: give seconds, or {WHOLE}")
    if isinstance(segment, float) and not 0 < segment < math.inf:
        raise UsageError(f"--segment {segment:g}: give seconds, or {WHOLE}")
    if shift is not None and not (isinstance(segment, float) and segment / 2 <= shift <= segment):
        raise UsageError(f"--shift {shift:g}: takes --segment in seconds, and lies between half of it and all of it")


def _cut(separator: Tuss, options: PromptOptions, seconds: float) -> None:
    if isinstance(options.segment, str):
        separator.window = max(1, math.ceil((seconds + 1) * separator.rate))  # a shorter recording is not padded
    elif options.segment is not None:
        separator.window = max(2, round(options.segment * separator.rate))
        if options.shift is not None:
            separator.overlap = separator.window - round(options.shift * separator.rate)


def _read(path: Path) -> tuple[Audio, int]:
    """Read all channels of a recording, float32 `[channels, samples]`, and its rate in Hz."""
    try:
        with Source(path) as source:
            return np.concatenate(list(source.blocks(HEARD_SECONDS)), 1).astype(np.float32, copy=False), source.rate
    except AudioError as error:
        raise ManifestError(str(error)) from error


def _separate(model: Model, mixture: Audio, rate: int, numbers: Sequence[int]) -> Audio:
    """Separate a recording by prompts, float32 `[prompts, channels, samples]`."""
    wanted = Prompted(torch.tensor(numbers, device=model.device), tuple(range(len(numbers))))
    parts = separation.stream(model, wanted, [mixture], rate, len(mixture), mixture.shape[1] / rate)
    return np.concatenate([stems for _, stems in parts], 2)


def _scores(parts: Parts, mixture: Audio, references: Sequence[Audio], stems: Audio) -> list[PartScore]:
    ordered = list(range(len(references)))
    for prompt in dict.fromkeys(parts.prompts):
        members = [at for at, other in enumerate(parts.prompts) if other == prompt]
        _, order = best_order([[_mean(metrics.sdr, stems[j], references[i]) for j in members] for i in members])
        for at, place in zip(members, order, strict=True):
            ordered[at] = members[place]
    scores = []
    for at, reference in enumerate(references):
        if reference.any():
            snr, si_snr = (_mean(metric, stems[ordered[at]], reference) for metric in (metrics.sdr, metrics.si_sdr))
            before = (_mean(metric, mixture, reference) for metric in (metrics.sdr, metrics.si_sdr))
            figures = (snr, si_snr, *(after - first for after, first in zip((snr, si_snr), before, strict=True)))
            scores.append(PartScore(parts, parts.prompts[at], *figures))
    return scores


def _mean(metric: Callable[[Audio, Audio], float], estimate: Audio, reference: Audio) -> float:
    """Average a metric over channels in which the reference sounds, each limited to ±70 dB; −70 for none."""
    values = [metric(e, r) for e, r in zip(estimate, reference, strict=True) if r.any()]
    return float(np.clip(values, -LIMIT_DB, LIMIT_DB).mean()) if values else -LIMIT_DB


def by_prompt(scores: Iterable[PartScore]) -> dict[str, dict[str, float]]:
    """Summarise scores by prompt, and by task where prompts make one ("task music"): `parts`, and means in dB."""
    groups: dict[str, list[PartScore]] = {}
    for s in scores:
        groups.setdefault(s.prompt, []).append(s)
        if s.parts.task:
            groups.setdefault(f"task {s.parts.task}", []).append(s)
    ranked = sorted(groups, key=lambda name: name.startswith("task "))
    return {
        name: {
            "parts": len(groups[name]),
            **{figure: float(np.mean([getattr(s, figure) for s in groups[name]])) for figure in FIGURES},
        }
        for name in ranked
    }

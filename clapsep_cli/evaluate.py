"""Evaluation by the paper's protocol (IV-A2): pairs of clips mixed at 0 dB, 10 s at 32 kHz, scored by improvement."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from clapsep_cli import dsp
from clapsep_cli.audio import Audio
from clapsep_cli.checkpoint import Model
from clapsep_cli.data import Clip, fit, mix, read_clip, read_rows
from clapsep_cli.metrics import sdr, si_sdr
from clapsep_cli.models.base import MaskSeparator
from clapsep_cli.pipeline import embed_query
from clapsep_cli.query import Query

LOWEST_DB = -100.0


@dataclass(frozen=True)
class Mixture:
    """A row of a list of mixtures; files are relative to the audio folder. The first four columns are the paper's."""

    source_file: str
    positive_caption: str
    noise_file: str
    negative_caption: str
    label: str = ""
    shot_file: str = ""  # a recording of the same label that is not in the mixture
    absent_caption: str = ""  # something that is not in the mixture


def make_mixtures(clips: Sequence[Clip], root: Path, seed: int, per_label: int) -> list[Mixture]:
    """Let up to `per_label` clips of each label be targets, each with one interferer and one shot.

    The interferer is of another label, drawn evenly, with which the target's shares no caption.
    """
    rng = np.random.default_rng(seed)
    groups: dict[str, list[Clip]] = {}
    for clip in clips:
        groups.setdefault(clip.label, []).append(clip)

    def other(*labels: str) -> Clip:
        taken = {caption for label in labels for clip in groups[label] for caption in clip.captions}
        free = [label for label in groups if label not in labels and not taken & set(groups[label][0].captions)]
        members = groups[free[rng.integers(len(free))]]
        return members[rng.integers(len(members))]

    rows = []
    for label in sorted(groups):
        for index in sorted(rng.permutation(len(groups[label]))[:per_label].tolist()):
            clip = groups[label][index]
            noise = other(label)
            absent = other(label, noise.label)
            shots = [shot for shot in groups[label] if shot is not clip]
            shot = str(shots[rng.integers(len(shots))].path.relative_to(root)) if shots else ""
            files = (str(c.path.relative_to(root)) for c in (clip, noise))
            source, interferer = files
            rows.append(
                Mixture(source, clip.captions[0], interferer, noise.captions[0], label, shot, absent.captions[0])
            )
    return rows


def write_mixtures(path: Path, rows: Sequence[Mixture]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Mixture)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_mixtures(path: Path) -> list[Mixture]:
    """Read a list of mixtures, of which the first four columns are needed. Raises `ManifestError`."""
    names = [f.name for f in fields(Mixture)]
    return [Mixture(**{name: row.get(name, "") for name in names}) for row in read_rows(path, names[:4])]


@dataclass(frozen=True)
class Score:
    """Of one mixture and one kind of query, in dB. `level`: of the output relative to the mixture."""

    mixture: Mixture
    query: str  # "both", "positive", "shot" or "absent"
    sdri: float
    si_sdri: float
    level: float


@torch.inference_mode()
def score(separator: MaskSeparator, wanted: Tensor, mixture: Audio, target: Audio) -> tuple[float, float, float]:
    """SDRi, SI-SDRi and output level in dB of one window (`[window samples]`) under the condition `wanted`."""
    heard = torch.from_numpy(mixture)[None].to(wanted.device)
    mask = separator.mask(separator.encode(heard), wanted)
    estimate = dsp.waveform(dsp.spectrum(heard) * mask, len(mixture))[0].cpu().numpy()
    level = 10 * np.log10((np.square(estimate).sum() + 1e-12) / (np.square(mixture).sum() + 1e-12))
    gains = (metric(estimate, target) - metric(mixture, target) for metric in (sdr, si_sdr))
    return *gains, max(float(level), LOWEST_DB)  # type: ignore[return-value]


def evaluate(
    model: Model, rows: Iterable[Mixture], folder: Path, progress: Callable[[], None] = lambda: None
) -> list[Score]:
    """Score `model` on each mixture with both text queries, the positive alone, one audio shot, and an absent sound."""
    scores = []
    samples = model.separator.window
    for row in rows:
        source, noise = (fit(read_clip(folder / file), samples) for file in (row.source_file, row.noise_file))
        mixture, target = mix(source, noise)
        queries = {
            "both": Query(row.positive_caption, row.negative_caption),
            "positive": Query(row.positive_caption),
        }
        if row.shot_file:
            queries["shot"] = Query(pos_audio=[folder / row.shot_file])
        if row.absent_caption:
            queries["absent"] = Query(row.absent_caption)
        for name, query in queries.items():
            scores.append(
                Score(
                    row, name, *score(cast(MaskSeparator, model.separator), embed_query(model, query), mixture, target)
                )
            )
        progress()
    return scores


def summary(scores: Sequence[Score]) -> dict[str, Mapping[str, float]]:
    """Mean SDRi and SI-SDRi, standard deviation, and median output level by kind of query."""
    table: dict[str, Mapping[str, float]] = {}
    for query in dict.fromkeys(s.query for s in scores):
        chosen = [s for s in scores if s.query == query]
        sdri, si_sdri = np.array([s.sdri for s in chosen]), np.array([s.si_sdri for s in chosen])
        table[query] = {
            "mixtures": len(chosen),
            "sdri": float(sdri.mean()),
            "sdri_std": float(sdri.std()),
            "si_sdri": float(si_sdri.mean()),
            "si_sdri_std": float(si_sdri.std()),
            "level_median": float(np.median([s.level for s in chosen])),
        }
    return table


def by_label(scores: Sequence[Score], query: str) -> list[tuple[str, float, int]]:
    """Mean SI-SDRi of each label under one kind of query, best first: label, dB, mixtures."""
    groups: dict[str, list[float]] = {}
    for s in scores:
        if s.query == query:
            groups.setdefault(s.mixture.label, []).append(s.si_sdri)
    rows = [(label, float(np.mean(values)), len(values)) for label, values in groups.items()]
    return sorted(rows, key=lambda row: -row[1])

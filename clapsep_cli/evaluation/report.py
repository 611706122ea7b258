"""The report of an evaluation: one HTML file, without network or script, for a screen, a phone or paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from clapsep_cli.audio.samples import Audio
from clapsep_cli.errors import OutputError
from clapsep_cli.evaluation.evaluate import EvaluationOptions, embedder_of, mixer, separator_of
from clapsep_cli.evaluation.figures import (
    FREQUENCIES,
    Bar,
    band_powers,
    bars,
    compressed,
    number,
    spectrogram,
    violins,
)
from clapsep_cli.evaluation.mixtures import EvaluationSet
from clapsep_cli.evaluation.scores import ABSENT, METRICS, Score, by_label, presence, summary
from clapsep_cli.files import replacing
from clapsep_cli.store.checkpoint import Model

MOST_LABELS = 100  # that are all shown; of more, the best and the worst
TEN_SHOTS = "both text+10 shots"

# Ma et al., arXiv 2402.17455: SDRi in dB, both sides named. Hybrid and text-only variant by words alone, then the
# hybrid one with ten shots beside the words, where it was measured.
PUBLISHED: dict[str, tuple[float, float, float | None]] = {
    "AudioCaps": (10.05, 10.08, None),
    "AudioSet": (9.15, 9.29, None),
    "MUSIC21": (8.40, 8.32, 9.47),
    "ESC-50": (12.81, 13.09, 13.21),
    "FSDKaggle2018": (20.01, 20.17, 21.11),
}
# Liu et al., arXiv 2308.05037: SDRi and SI-SDR (not its improvement) in dB, asked in words for the target alone, as
# the README of their repository states them for audiosep_base_4M_steps.ckpt.
PUBLISHED_AUDIOSEP = {
    "AudioSet": (7.739, 6.903),
    "VGGSound": (9.144, 9.043),
    "AudioCaps": (8.220, 7.189),
    "Clotho": (6.850, 5.242),
    "MUSIC": (10.508, 9.425),
    "ESC-50": (10.040, 8.810),
}


PAGE = Environment(
    loader=PackageLoader("clapsep_cli.evaluation", ""),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGE.filters |= {"number": number, "percent": lambda share, decimals=2: f"{share:.{decimals}%}"}


class Example(NamedTuple):
    """A mixture to listen to: float32 `[samples]` each, mono at 32 kHz."""

    title: str
    score: Score
    mixture: Audio
    estimate: Audio
    reference: Audio


def main_query(scores: Sequence[Score]) -> str:
    """Choose the kind of query to show labels and examples for: "both", or else the first of the run."""
    kinds = list(dict.fromkeys(s.query for s in scores))
    return "both" if "both" in kinds else kinds[0]


@torch.inference_mode()
def examples(model: Model, scores: Sequence[Score], data: EvaluationSet, options: EvaluationOptions) -> list[Example]:
    """Separate the best, the median and the worst mixture by SI-SDRi once more, under the main kind of query.

    Args:
        model: the model that was evaluated.
        scores: its scores.
        data: the mixtures and recordings to query with.
        options: the kinds of query.
    """
    query = main_query(scores)
    ranked = sorted((s for s in scores if s.query == query), key=lambda s: -s.si_sdri)
    chosen = {"Best": ranked[0], "Median": ranked[(len(ranked) - 1) // 2], "Worst": ranked[-1]}
    embedder, mixed = embedder_of(model), mixer(data.folder, model)
    found = []
    for title, score in chosen.items():
        mixture, target = mixed(score.mixture)
        condition = embedder.condition(options.queries(score.mixture, data)[query])
        (estimate,) = separator_of(model).estimate(torch.from_numpy(mixture)[None].to(model.device), [condition])
        found.append(Example(title, score, mixture, estimate[0].cpu().numpy(), target))
    return found


def write_report(
    path: Path,
    scores: Sequence[Score],
    examples: Sequence[Example],
    settings: Mapping[str, object],
    source: Mapping[str, str],
) -> None:
    """Write the report of an evaluation.

    Args:
        path: the HTML file.
        scores: all scores of the run.
        examples: mixtures to listen to.
        settings: what the scores depend on, from `provenance`.
        source: the name of the list, as `list`, and the `date`.

    Raises:
        OutputError: if the file cannot be written.
    """
    text = render(scores, examples, settings, source)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error


def render(
    scores: Sequence[Score], examples: Sequence[Example], settings: Mapping[str, object], source: Mapping[str, str]
) -> str:
    """Render the page of `write_report`."""
    query, table, found = main_query(scores), summary(scores), presence(scores)
    marks = {label: s["si_sdri"] for label, s in by_label(scores, "positive").items()} if query == "both" else {}
    labels = [
        Bar(label, int(s["mixtures"]), s["si_sdri"], marks.get(label)) for label, s in by_label(scores, query).items()
    ]
    half = MOST_LABELS // 2
    levels = {"there": _values(scores, "positive", "level"), "absent": _values(scores, ABSENT, "level")}
    distributions = {
        metric: {kind: values for kind in table if kind != ABSENT and (values := _values(scores, kind, metric))}
        for metric in METRICS
    }
    return PAGE.get_template("report.html").render(
        settings=settings,
        source=source,
        stated={name: _text(value) for name, value in {**source, **settings}.items()},
        table=table,
        metrics={metric: title for metric, title in METRICS.items() if any(metric in s for s in table.values())},
        absent=ABSENT,
        published=PUBLISHED,
        published_audiosep=PUBLISHED_AUDIOSEP,
        ten_shots=TEN_SHOTS,
        distributions={metric: violins(samples) for metric, samples in distributions.items() if samples},
        presence=found,
        levels=violins(levels) if found else None,
        query=query,
        label_count=len(labels),
        labels=bars(labels if len(labels) <= MOST_LABELS else [*labels[:half], *labels[-half:]]),
        examples=examples,
        frequencies=FREQUENCIES,
        band_powers=band_powers,
        spectrogram=spectrogram,
        compressed=compressed,
    )


def _values(scores: Sequence[Score], query: str, metric: str) -> list[float]:
    return [value for s in scores if s.query == query and (value := getattr(s, metric)) is not None]


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)

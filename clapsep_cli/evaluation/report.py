"""The report of an evaluation: one HTML file, without network or script, for a screen, a phone or paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch

from clapsep_cli.audio.samples import Audio
from clapsep_cli.errors import OutputError
from clapsep_cli.evaluation.evaluate import Conditions, Plan, estimates, masking, mixer
from clapsep_cli.evaluation.figures import band_powers, bars, number, player, spectrogram, violins
from clapsep_cli.evaluation.mixtures import Shots
from clapsep_cli.evaluation.scores import ABSENT, METRICS, Score, by_label, presence, summary
from clapsep_cli.files import replacing
from clapsep_cli.store.checkpoint import Model

TITLES = {"sdri": "SDRi", "si_sdri": "SI-SDRi", "bss_sdri": "BSS-eval SDRi"}
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


@dataclass(frozen=True)
class Example:
    """A mixture to listen to, mono at 32 kHz: what went in, what came out, and what should have."""

    title: str
    score: Score
    mixture: Audio
    estimate: Audio
    target: Audio


def main_query(scores: Sequence[Score]) -> str:
    """The kind of query that labels and examples are shown for: "both", or else the first of the run."""
    kinds = list(dict.fromkeys(s.query for s in scores))
    return "both" if "both" in kinds else kinds[0]


@torch.inference_mode()
def examples(model: Model, scores: Sequence[Score], folder: Path, plan: Plan, shots: Shots) -> list[Example]:
    """The best, the median and the worst mixture by SI-SDRi under the main kind of query, separated once more."""
    query = main_query(scores)
    ranked = sorted((s for s in scores if s.query == query), key=lambda s: -s.si_sdri)
    chosen = {"Best": ranked[0], "Median": ranked[(len(ranked) - 1) // 2], "Worst": ranked[-1]}
    conditions, mixed = Conditions(model), mixer(folder, model.separator.window)
    found = []
    for title, score in chosen.items():
        mixture, target = mixed(score.mixture)
        wanted = conditions(plan.queries(score.mixture, folder, shots)[query])
        (estimate,) = estimates(masking(model), torch.from_numpy(mixture)[None].to(model.device), [wanted])
        found.append(Example(title, score, mixture, estimate[0], target))
    return found


def write_report(
    path: Path,
    scores: Sequence[Score],
    heard: Sequence[Example],
    settings: Mapping[str, object],
    source: Mapping[str, str],
) -> None:
    """Write the report of `scores`. `settings`: those of the run; `source`: more to be stated, as the list's name
    and the date. Raises `OutputError`."""
    text = render(scores, heard, settings, source)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error


def render(
    scores: Sequence[Score], heard: Sequence[Example], settings: Mapping[str, object], source: Mapping[str, str]
) -> str:
    """The whole page."""
    model = escape(str(settings["model"]))
    title = f"{model} on {escape(source['list'])}"
    sections = [_key_figures(scores), _table(scores), _published(scores), _distributions(scores)]
    sections += [_presence(scores), _labels(scores), _listen(heard), _settings({**source, **settings})]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}: clapsep evaluation</title><style>{STYLE}</style></head><body><main>"
        f'<header><p class="over">clapsep evaluation</p><h1>{title}</h1>'
        f"<p>{escape(source['date'])}, {settings['mixtures']} mixtures of two recordings at 0 dB, 10 s at 32 kHz, "
        f"by the protocol of <cite>CLAPSep</cite> (Ma et al., arXiv 2402.17455, IV-A2).</p></header>"
        f"{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, body: str, note: str = "") -> str:
    said = f"<p>{note}</p>" if note else ""
    return f"<section><h2>{title}</h2>{said}{body}</section>" if body else ""


def _key_figures(scores: Sequence[Score]) -> str:
    tiles = []
    for query, s in list(summary(scores).items())[:4]:
        if query != ABSENT:
            error = 1.96 * s["si_sdri_std"] / np.sqrt(s["mixtures"])
            tiles.append(
                f"<div><span>{escape(query)}</span><strong>{number(s['si_sdri'])}<small> dB</small></strong>"
                f"<span>SI-SDRi ± {number(error)}</span></div>"
            )
    return f'<div class="tiles">{"".join(tiles)}</div><p class="fine">Mean, with its 95 % interval.</p>'


def _cell(figures: Mapping[str, float], metric: str) -> str:
    mean, spread, median = (number(figures[f"{metric}{end}"], 2) for end in ("", "_std", "_median"))
    return f"<td><b>{mean}</b> <span>± {spread}</span><small>{median}</small></td>"


def _table(scores: Sequence[Score]) -> str:
    rows = summary(scores)
    shown = [m for m in METRICS if any(m in s for s in rows.values())]
    head = "".join(f"<th>{TITLES[m]}</th>" for m in shown)
    body = []
    for query, s in rows.items():
        cells = "".join(_cell(s, m) if query != ABSENT else "<td>·</td>" for m in shown)
        level = f"<td>{number(s['level_median'])}</td>"
        body.append(f"<tr><th>{escape(query)}</th><td>{s['mixtures']:.0f}</td>{cells}{level}</tr>")
    table = f"<thead><tr><th>query</th><th>n</th>{head}<th>level</th></tr></thead><tbody>{''.join(body)}</tbody>"
    note = (
        "Mean ± standard deviation over n mixtures, and below it the median, in dB. SDRi and SI-SDRi are the paper’s "
        "Eq. 15 and 16; BSS-eval SDRi forgives any filter of 512 taps and is what the paper’s code reports. Half of a "
        "mixture scores an SDRi of 3.0 and an SI-SDRi of 0. Level: of the output relative to the mixture, median."
    )
    if ABSENT in rows:
        note += " “absent” asks for a sound that is not there: nothing improves, but the level should fall."
    if len({s["mixtures"] for s in rows.values()}) > 1:
        note += " Where n differs, recordings for a query were lacking, and means are over different mixtures."
    return _section("Scores by kind of query", f'<div class="scroll"><table class="wide">{table}</table></div>', note)


def _published(scores: Sequence[Score]) -> str:
    rows = summary(scores)
    if "both" not in rows:
        return ""
    head = "<tr><th></th><th>words; hybrid</th><th>words; text-only variant</th><th>words + 10 shots; hybrid</th></tr>"
    body = []
    for metric in ("sdri", "bss_sdri"):
        if metric in rows["both"]:
            ten = number(rows[TEN_SHOTS][metric], 2) if TEN_SHOTS in rows else "·"
            words = f'<td colspan="2"><b>{number(rows["both"][metric], 2)}</b></td>'
            body.append(f'<tr class="own"><th>this run, {TITLES[metric]}</th>{words}<td>{ten}</td></tr>')
    for name, (hybrid, text, shots) in PUBLISHED.items():
        last = f"{shots:.2f}" if shots is not None else "·"
        body.append(f"<tr><th>paper, {name}</th><td>{hybrid:.2f}</td><td>{text:.2f}</td><td>{last}</td></tr>")
    table = (
        f'<div class="scroll"><table class="narrow"><thead>{head}</thead><tbody>{"".join(body)}</tbody></table></div>'
    )
    note = (
        "Mean SDRi in dB, both sides named. Published figures are of Ma et al. (arXiv 2402.17455), whose Eq. 15 is the "
        "plain SDR and whose released test step computes the BSS-eval one. Rows compare only where the recordings are "
        "the same: the difficulty of a list moves the mean by more than models differ."
    )
    return _section("Beside the paper", table, note)


def _samples(scores: Sequence[Score], metric: str, but: str = "") -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for s in scores:
        value = getattr(s, metric)
        if s.query != but and value is not None:
            found.setdefault(s.query, []).append(value)
    return found


def _distributions(scores: Sequence[Score]) -> str:
    charts = [
        f"<figure><figcaption>{TITLES[metric]}</figcaption>{violins(samples)}</figure>"
        for metric in METRICS
        if (samples := _samples(scores, metric, but=ABSENT))
    ]
    note = (
        "Density over mixtures; the box spans the middle half, the long line is the median (its value at the right), "
        "the short one the mean. Compare the paper’s Fig. 4."
    )
    return _section("Distributions", "".join(charts), note)


def _presence(scores: Sequence[Score]) -> str:
    found = presence(scores)
    if not found:
        return ""
    levels = _samples(scores, "level")
    chart = violins({"there": levels["positive"], "absent": levels[ABSENT]}, "dB, output relative to mixture")
    note = (
        f"Asked in words for what is there, the output lies {number(-found['present_level'])} dB below the mixture; "
        f"asked for what is not, {number(-found['absent_level'])} dB (medians). A threshold on the "
        f"level tells the two apart with an area under the ROC curve of {found['roc_area']:.3f} (chance is 0.5)."
    )
    return _section("What is there, and what is not", f"<figure>{chart}</figure>", note)


def _labels(scores: Sequence[Score]) -> str:
    query = main_query(scores)
    table = by_label(scores, query)
    beside = by_label(scores, "positive") if query == "both" else {}
    rows = [
        (label, int(s["mixtures"]), s["si_sdri"], beside[label]["si_sdri"] if label in beside else None)
        for label, s in table.items()
    ]
    note = f"Mean SI-SDRi in dB, {escape(query)}; the small number counts the mixtures."
    if beside:
        note += " The mark is the score by the positive text alone."
    if len(rows) > MOST_LABELS:
        note += f" The best and the worst {MOST_LABELS // 2} of {len(rows)}."
        rows = [*rows[: MOST_LABELS // 2], *rows[-MOST_LABELS // 2 :]]
    return _section("By label", f"<figure>{bars(rows)}</figure>", note)


def _listen(heard: Sequence[Example]) -> str:
    blocks = []
    for example in heard:
        row, score = example.score.mixture, example.score
        loudest = float(band_powers(example.mixture).max())
        parts = {"mixture": example.mixture, "estimate": example.estimate, "reference": example.target}
        figures = "".join(
            f"<figure><figcaption>{name}</figcaption>{spectrogram(audio, loudest)}{player(audio)}</figure>"
            for name, audio in parts.items()
        )
        blocks.append(
            f"<article><h3>{example.title}: {number(score.si_sdri)} dB</h3>"
            f"<p>Wanted “{escape(row.positive_caption)}” <small>({escape(row.source_file)})</small>, from a mixture "
            f"with “{escape(row.negative_caption)}” <small>({escape(row.noise_file)})</small>. "
            f"SDRi {number(score.sdri)} dB; the output lies {number(-score.level)} dB below the mixture.</p>"
            f'<div class="trio">{figures}</div></article>'
        )
    kind = escape(heard[0].score.query) if heard else ""
    note = (
        f"The best, the median and the worst mixture by SI-SDRi, query: {kind}. Mel scale to 16 kHz over 10 s, 75 dB "
        "below the loudest moment of the mixture; the sound is compressed for this page."
    )
    return _section("Listen", "".join(blocks), note)


def _settings(settings: Mapping[str, object]) -> str:
    def shown(value: object) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)

    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(shown(value))}</dd>" for name, value in settings.items() if shown(value)
    )
    note = (
        "Clips are the mean of their channels at 32 kHz, cut or padded with silence to 10 s, mixed at 0 dB over these "
        "10 s and scaled to a peak of 0.9 where it exceeds 1. <em>weights</em> is a hash of the separator’s weights, "
        "<em>data</em> one of the list, the shots and the sizes of all recordings."
    )
    return _section("Settings", f"<dl>{rows}</dl>", note)


STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1b1f24;--soft:#5b6570;--line:#dfe3e8;--card:#f6f7f9;--accent:#2458c5;
--fill:#2458c52e;--down:#c2571a;--mark:#111}
@media(prefers-color-scheme:dark){:root{--page:#14171b;--ink:#e6e9ec;--soft:#9aa4af;--line:#2d343c;--card:#1c2127;
--accent:#7aa5ff;--fill:#7aa5ff3d;--down:#f0985c;--mark:#fff}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:62rem;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:.1rem 0 .5rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:0 0 .4rem}h3{font-size:1rem;margin:1.4rem 0 .2rem}
section{margin-top:2.6rem;padding-top:1.4rem;border-top:1px solid var(--line)}
p{margin:.3rem 0 1rem;max-width:46rem}header p,section>p,.fine,.unit{color:var(--soft)}
.over{margin:0;font-size:.8rem;letter-spacing:.08em;text-transform:uppercase}
small{color:var(--soft);font-size:.8em}
.fine,.unit{font-size:.8rem}.unit{margin:.1rem 0 0;text-align:center;max-width:none}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;margin:1.6rem 0 .4rem}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.8rem 1rem}
.tiles span{display:block;color:var(--soft);font-size:.85rem}
.tiles strong{font-size:1.9rem;line-height:1.25;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
table.narrow{width:auto}table.narrow th:first-child{padding-left:.5rem}
th,td{padding:.4rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child{text-align:left;padding-left:0;font-weight:500}
thead th{color:var(--soft);font-size:.85rem;font-weight:500}
td small{display:block}tr.own{background:var(--card)}td[colspan]{text-align:center}
figure{margin:0 0 1.4rem}figcaption{font-weight:500;margin-bottom:.3rem}
.chart .row{display:grid;grid-template-columns:minmax(5rem,11rem) 1fr 2.8rem;gap:.7rem;align-items:center;
break-inside:avoid}
.name{text-align:right;font-size:.85rem;line-height:1.15;overflow-wrap:anywhere}
.value{font-size:.85rem;text-align:right;font-variant-numeric:tabular-nums}
.violins svg{width:100%;height:3.1rem;display:block;overflow:hidden}
.violins line{vector-effect:non-scaling-stroke}
.grid{stroke:var(--line);stroke-width:1}.zero{stroke:var(--soft);stroke-width:1}
.violin{fill:var(--fill);stroke:var(--accent);stroke-width:1;vector-effect:non-scaling-stroke}
.box{fill:var(--accent);opacity:.55}.median{stroke:var(--mark);stroke-width:2.5}.mean{stroke:var(--page);stroke-width:2}
.axis div{position:relative;height:1.2rem}
.axis i{position:absolute;transform:translateX(-50%);font:.75rem system-ui,sans-serif;color:var(--soft)}
.bars{columns:2 22rem;column-gap:2.2rem}.bars .row{padding:.1rem 0}
.bar{position:relative;height:.95rem}.bar u{position:absolute;top:0;bottom:0;border-radius:2px}
.up{background:var(--accent);opacity:.75}.down{background:var(--down);opacity:.85}
.bar s{position:absolute;top:-.15rem;bottom:-.15rem;width:1px;background:var(--soft)}
.bar b{position:absolute;top:-.1rem;bottom:-.1rem;width:3px;margin-left:-1.5px;background:var(--mark)}
article{break-inside:avoid}.trio{display:grid;grid-template-columns:repeat(auto-fit,minmax(16rem,1fr));gap:1rem}
.trio figure{margin:0;min-width:0}.trio figcaption{font-size:.85rem;color:var(--soft)}
.spectrogram{position:relative;line-height:0}.spectrogram img{width:100%;height:9rem;border-radius:.3rem}
.spectrogram i{position:absolute;left:.35rem;transform:translateY(50%);font:.65rem/1 system-ui,sans-serif;color:#fff;
text-shadow:0 0 3px #000,0 0 3px #000}
audio{width:100%;height:2.4rem;margin-top:.4rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.2rem;margin:0}dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
@media(max-width:34rem){main{padding:1.2rem .9rem 3rem}h1{font-size:1.5rem}.tiles{grid-template-columns:1fr 1fr}
.chart .row{grid-template-columns:5.8rem 1fr 2.5rem;gap:.5rem}th,td{padding:.35rem .3rem;font-size:.85rem}
td span{display:block}thead th{white-space:normal;font-size:.78rem}.wide th{white-space:normal}
table.narrow th,table.narrow td{white-space:normal}}
@media print{:root{--page:#fff;--ink:#000;--soft:#444;--line:#ccc;--card:#f4f4f4;--accent:#2458c5;--fill:#2458c52e;
--down:#c2571a;--mark:#000}body{font-size:10pt}main{max-width:none;padding:0}audio{display:none}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}h2,h3{break-after:avoid}
table,.violins{break-inside:avoid}.trio{grid-template-columns:repeat(3,1fr)}.bars{columns:3}
.bars .row{grid-template-columns:5.5rem 1fr 2.2rem}}
"""

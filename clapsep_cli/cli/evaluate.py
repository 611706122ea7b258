"""The commands that measure a model: lists of mixtures, and scores on them."""

from __future__ import annotations

import sys
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clapsep_cli.cli.terminal import DeviceOption, ModelDirOption, ModelOption, QuietOption, downloads, note, progress

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.table import Table

    from clapsep_cli.evaluation.scores import Score

SCORES = "scores.csv"
PIPE_COLUMNS = 160
SIDES = {"both": "both", "pos": "positive", "neg": "negative"}
TITLES = {"sdri": "SDRi", "si_sdri": "SI-SDRi", "bss_sdri": "BSS-eval SDRi"}

mixtures = typer.Typer(no_args_is_help=True, help="Make lists of mixtures to evaluate on.")


@mixtures.command()
def make(
    source: Annotated[
        Path, typer.Argument(metavar="DIR|MANIFEST", help="A folder with a sub-folder for each label, or a manifest.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The list to write.")] = Path("mixtures.csv"),
    per_clip: Annotated[int, typer.Option("--per-clip", min=1, help="Interferers of each target, one at a time.")] = 5,
    per_label: Annotated[
        int | None, typer.Option("--per-label", min=1, help="Targets of each label, drawn; all by default.")
    ] = None,
    shots: Annotated[
        int, typer.Option("--shots", min=0, help="Clips of each label to keep out of the mixtures, as audio queries.")
    ] = 0,
    split: Annotated[
        str | None, typer.Option("--split", help="Take clips of this split of the manifest alone.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Everything drawn at random follows from it.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing list.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Write a list of mixtures of two clips of different labels, for `clapsep evaluate`.

    With --shots, FILE.shots.csv lists the clips kept for queries.
    """
    from clapsep_cli.errors import OutputError
    from clapsep_cli.evaluation.mixtures import labelled_clips, make_mixtures, set_aside, write_mixtures, write_shots

    shots_out = out.with_suffix(".shots.csv")
    for path in (out, *([shots_out] if shots else [])):
        if path.exists() and not overwrite:
            raise OutputError(f"{path}: exists already; use --overwrite to replace it, or -o for another file")
    clips, root = labelled_clips(source, split)
    targets, kept = set_aside(clips, shots, seed)
    rows = make_mixtures(targets, root, seed, per_label, per_clip, kept if shots else None)
    if shots:
        write_shots(shots_out, kept, clips, root)
    write_mixtures(out, rows)
    if not quiet:
        labels = len({row.label for row in rows})
        typer.echo(f"{out}: {len(rows)} mixtures, targets of {labels} labels, from {len(clips)} clips in {root}")
        if shots:
            typer.echo(f"{shots_out}: {sum(map(len, kept.values()))} shots")


def _sides(text: str) -> tuple[str, ...]:
    short = {name: side for side, name in SIDES.items()}  # tables have the long names: take both
    chosen = {short.get(part.strip(), part.strip()) for part in text.split(",")}
    if not chosen <= set(SIDES):
        raise typer.BadParameter(f"{text!r}: name one or more of {', '.join(SIDES)}, separated by commas")
    return tuple(name for side, name in SIDES.items() if side in chosen)


def _counts(text: str | None) -> tuple[int, ...]:
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"{text!r}: give numbers of recordings, separated by commas: 1,5,10")
    return tuple(sorted({int(part) for part in parts}))


def evaluate(
    listed: Annotated[
        Path,
        typer.Option("--mixtures", metavar="CSV", help="source_file,positive_caption,noise_file,negative_caption[,…]."),
    ],
    audio: Annotated[Path, typer.Option("--audio", metavar="DIR", help="Folder that the list's files are in.")],
    model: ModelOption = None,
    device: DeviceOption = "auto",
    _model_dir: ModelDirOption = None,
    queries: Annotated[str, typer.Option("--queries", help="Which sides to name: pos, neg, both.")] = "both,pos,neg",
    shots: Annotated[
        str | None, typer.Option("--shots", metavar="K,…", help="Also ask by so many recordings of a class: 1,5,10.")
    ] = None,
    shots_csv: Annotated[
        Path | None, typer.Option("--shots-csv", metavar="CSV", help="Those recordings: class,file (one, or a list).")
    ] = None,
    text: Annotated[bool, typer.Option("--text/--no-text", help="Ask in words, alone and with the recordings.")] = True,
    refine: Annotated[
        bool | None, typer.Option("--refine/--no-refine", help="Separate in two passes, as extract does; mini does.")
    ] = None,
    bss: Annotated[bool, typer.Option("--bss/--no-bss", help="Also BSS-eval's SDR, with a filter of 512 taps.")] = True,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Keep scores.csv here as it grows; stopped, a run goes on."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.html", help="Write a report, one file for any browser.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all summaries as one JSON object.")] = False,
    labels: Annotated[bool, typer.Option("--labels", help="Also print the scores of each label.")] = False,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out mixtures of which a recording is not there.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing report.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Measure a model on a list of mixtures: 10 s at 0 dB, SDRi, SI-SDRi and BSS-eval SDRi in dB.

    The lists released with CLAPSep work as they are.
    """
    if bool(shots) != bool(shots_csv):
        raise typer.BadParameter("--shots and --shots-csv go together: how many recordings, and which")
    sides, counts = _sides(queries), _counts(shots)
    from clapsep_cli.errors import OutputError
    from clapsep_cli.evaluation.evaluate import Plan, evaluate_into, settings
    from clapsep_cli.evaluation.evaluate import evaluate as evaluate_rows
    from clapsep_cli.evaluation.mixtures import check_files, read_mixtures, read_shots
    from clapsep_cli.store.library import load_model

    if report and report.exists() and not overwrite:
        raise OutputError(f"{report}: exists already; use --overwrite to replace it")
    every = read_mixtures(listed)
    rows, kept = check_files(every, read_shots(shots_csv) if shots_csv else {}, audio, skip_missing)
    if len(rows) < len(every):
        note(f"{listed}: {len(every) - len(rows)} of {len(every)} mixtures are left out, their recordings are missing")
    with downloads(quiet) as shown:
        loaded = load_model(model, device, "high", say=note, progress=shown)
    if loaded.gains_by_refining if refine is None else refine:
        loaded.refine()
    plan = Plan(sides, text, counts, bss)
    run = evaluate_into(out / SCORES, loaded, rows, audio, plan, kept) if out else None
    scores = _collect(run or evaluate_rows(loaded, rows, audio, plan, kept), len(rows), listed.name, quiet)
    stated = settings(loaded, rows, audio, plan, kept) if report or as_json else {}
    if report:
        from clapsep_cli.evaluation.report import examples, write_report

        source = {"list": listed.name, "date": f"{date.today():%d %B %Y}"}
        write_report(report, scores, examples(loaded, scores, audio, plan, kept), stated, source)
    if as_json:
        _print_json(stated, scores)
    elif not quiet:
        _print_table(scores)
        if labels:
            _print_labels(scores)


def _collect(run: Iterable[Sequence[Score]], total: int, name: str, quiet: bool) -> list[Score]:
    scores: list[Score] = []
    with progress(quiet) as bars:
        task = bars.add_task(name, total=total)
        for of_mixture in run:
            scores += of_mixture
            bars.advance(task)
    return scores


def _print_json(settings: Mapping[str, object], scores: Sequence[Score]) -> None:
    import json

    from clapsep_cli.evaluation.scores import by_label, presence, summary

    table = summary(scores)
    labels = {query: by_label(scores, query) for query in table}
    whole = {"settings": settings, "queries": table, "presence": presence(scores), "labels": labels}
    typer.echo(json.dumps(whole, indent=2, ensure_ascii=False))


def _print_table(scores: Sequence[Score]) -> None:
    from rich.table import Table

    from clapsep_cli.evaluation.scores import presence, summary

    rows = summary(scores)
    measured = [metric for metric in TITLES if any(metric in figures for figures in rows.values())]
    table = Table(box=None, title="mean ± standard deviation (median), dB", title_justify="left", pad_edge=False)
    table.add_column("query")
    for title in ("mixtures", *(TITLES[metric] for metric in measured), "level (median)"):
        table.add_column(title, justify="right")
    for query, s in rows.items():
        cells = [f"{s[m]:.2f} ± {s[f'{m}_std']:5.2f} ({s[f'{m}_median']:6.2f})" for m in measured]
        table.add_row(query, f"{s['mixtures']:.0f}", *cells, f"{s['level_median']:.1f}")
    _show(table)
    if found := presence(scores):
        typer.echo(
            f"level of the output: {found['present_level']:.1f} dB for what is there, {found['absent_level']:.1f} dB "
            f"for what is not (medians); area under the ROC curve {found['roc_area']:.3f}"
        )


def _print_labels(scores: Sequence[Score]) -> None:
    from rich.table import Table

    from clapsep_cli.evaluation.scores import ABSENT, by_label, summary

    for query in summary(scores):
        if query == ABSENT:
            continue
        table = Table(box=None, title=f"\nby label, {query}", title_justify="left", pad_edge=False)
        for title in ("SI-SDRi", "SDRi", "mixtures", "label"):
            table.add_column(title, justify="left" if title == "label" else "right")
        for label, s in by_label(scores, query).items():
            table.add_row(f"{s['si_sdri']:.2f}", f"{s['sdri']:.2f}", f"{s['mixtures']:.0f}", label)
        _show(table)


def _show(table: Table) -> None:
    from rich.console import Console

    # In a file or a pipe nothing is wrapped: a row is a line.
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS).print(table)

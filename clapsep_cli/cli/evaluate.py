"""The commands `mixtures make` and `evaluate`: lists of mixtures, and scores of a model on them."""

from __future__ import annotations

import sys
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clapsep_cli.cli.terminal import (
    DeviceOption,
    ModelDirOption,
    ModelOption,
    QuietOption,
    downloads,
    notes,
    progress_bars,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.table import Table

    from clapsep_cli.evaluation.scores import Score

SCORES = "scores.csv"
PIPE_COLUMNS = 160
SIDES = {"both": "both", "pos": "positive", "neg": "negative"}

mixtures = typer.Typer(no_args_is_help=True, help="Make lists of mixtures to evaluate on.")


@mixtures.command()
def make(
    source: Annotated[
        Path, typer.Argument(metavar="DIR|MANIFEST", help="A folder with a sub-folder for each label, or a manifest.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The list to write.")] = Path("mixtures.csv"),
    per_clip: Annotated[
        int,
        typer.Option("--per-clip", metavar="N", min=1, help="Mixtures of each target, with different interferers."),
    ] = 5,
    per_label: Annotated[
        int | None,
        typer.Option("--per-label", metavar="N", min=1, help="Targets of each label, drawn at random; default: all."),
    ] = None,
    shots: Annotated[
        int,
        typer.Option(
            "--shots", metavar="N", min=0, help="Clips of each label to keep out of the mixtures, for audio queries."
        ),
    ] = 0,
    split: Annotated[
        str | None, typer.Option("--split", metavar="NAME", help="Use only clips of this split of the manifest.")
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option("--prefix", metavar="TEXT", help='Before labels, where there are no captions; "The sound of".'),
    ] = None,
    excluded: Annotated[
        str | None,
        typer.Option("--exclude-labels", metavar="NAME,…", help="Skip clips with any of these labels."),
    ] = None,
    interferers: Annotated[
        int | None,
        typer.Option("--interferers", metavar="N", min=1, help="Draw all interferers from N clips; default: from all."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of all random draws.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing list.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Write a list of mixtures for `clapsep evaluate`: two clips of different labels each.

    With --shots, FILE.shots.csv lists the clips kept for audio queries.
    """
    from clapsep_cli.errors import OutputError
    from clapsep_cli.evaluation.mixtures import (
        PREFIX,
        labelled_clips,
        make_mixtures,
        set_aside,
        write_mixtures,
        write_shots,
    )

    shots_out = out.with_suffix(".shots.csv")
    for path in (out, *([shots_out] if shots else [])):
        if path.exists() and not overwrite:
            raise OutputError(f"{path}: exists already; use --overwrite to replace it, or -o for another file")
    left_out = [label.strip() for label in (excluded or "").split(",") if label.strip()]
    clips, root = labelled_clips(source, split, PREFIX if prefix is None else prefix, left_out)
    targets, kept = set_aside(clips, shots, seed)
    rows = make_mixtures(targets, root, seed, per_label, per_clip, kept if shots else None, interferers)
    if shots:
        write_shots(shots_out, kept, clips, root)
    write_mixtures(out, rows)
    if not quiet:
        labels = len({row.label for row in rows})
        typer.echo(f"{out}: {len(rows)} mixtures, targets of {labels} labels, from {len(clips)} clips in {root}")
        if shots:
            typer.echo(f"{shots_out}: {sum(map(len, kept.values()))} shots")


def _sides(text: str) -> tuple[str, ...]:
    short = {name: side for side, name in SIDES.items()}  # accept the long names of the tables, too
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
        typer.Option(
            "--mixtures", metavar="CSV", help="List of mixtures, by `mixtures make` or as released with CLAPSep."
        ),
    ],
    audio: Annotated[Path, typer.Option("--audio", metavar="DIR", help="Folder of the list's files.")],
    model: ModelOption = None,
    device: DeviceOption = "auto",
    _model_dir: ModelDirOption = None,
    queries: Annotated[
        str | None,
        typer.Option(
            "--queries", metavar="NAME,…", help="Sides of the query: pos, neg, both; default: all that the model takes."
        ),
    ] = None,
    shots: Annotated[
        str | None,
        typer.Option("--shots", metavar="K,…", help="Also query with so many recordings: 1,5,10."),
    ] = None,
    shots_csv: Annotated[
        Path | None,
        typer.Option("--shots-csv", metavar="CSV", help="Recordings for --shots: class,file (one, or a list)."),
    ] = None,
    text: Annotated[bool, typer.Option("--text/--no-text", help="Query with texts, alone and with recordings.")] = True,
    refine: Annotated[
        bool | None, typer.Option("--refine/--no-refine", help="Separate in two passes; by default with mini.")
    ] = None,
    bss: Annotated[bool, typer.Option("--bss/--no-bss", help="Also compute BSS-eval SDR (512-tap filter).")] = True,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Write scores.csv here; a stopped run continues from it."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.html", help="Write a report as one self-contained page.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all summaries as one JSON object.")] = False,
    labels: Annotated[bool, typer.Option("--labels", help="Also print scores by label.")] = False,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Skip mixtures whose recordings are missing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing report.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Score a model on a list of mixtures of 10 s at 0 dB: SDRi, SI-SDRi and BSS-eval SDRi in dB.

    The lists released with CLAPSep work as they are.
    """
    if bool(shots) != bool(shots_csv):
        raise typer.BadParameter("--shots and --shots-csv go together: give the number of recordings, and their list")
    if overwrite and not report:
        raise typer.BadParameter("--overwrite replaces a report: add --report FILE.html")
    if not text and not shots:
        raise typer.BadParameter("--no-text needs audio queries: add --shots and --shots-csv")
    sides, counts = _sides(queries) if queries else None, _counts(shots)
    from clapsep_cli.errors import OutputError
    from clapsep_cli.evaluation.evaluate import EvaluationOptions, evaluate_into, provenance
    from clapsep_cli.evaluation.evaluate import evaluate as evaluate_set
    from clapsep_cli.evaluation.mixtures import EvaluationSet, check_files, read_mixtures, read_shots
    from clapsep_cli.store.library import load_model

    if report and report.exists() and not overwrite:
        raise OutputError(f"{report}: exists already; use --overwrite to replace it")
    every = EvaluationSet(read_mixtures(listed), audio, read_shots(shots_csv) if shots_csv else {})
    data = check_files(every, skip_missing)
    if skipped := len(every.rows) - len(data.rows):
        notes(quiet)(f"{listed}: skipped {skipped} of {len(every.rows)} mixtures, their recordings are missing")
    with downloads(quiet) as shown:
        loaded = load_model(model, device, "high", say=notes(quiet), progress=shown)
    kinds = EvaluationOptions.suited(loaded, sides, text, counts, bss)
    loaded.refine(refine)
    run = evaluate_into(out / SCORES, loaded, data, kinds) if out else evaluate_set(loaded, data, kinds)
    scores = _collect(run, len(data.rows), listed.name, quiet)
    settings = provenance(loaded, data, kinds) if report or as_json else {}
    if report:
        from clapsep_cli.evaluation.report import examples, write_report

        source = {"list": listed.name, "date": f"{date.today():%d %B %Y}"}
        write_report(report, scores, examples(loaded, scores, data, kinds), settings, source)
    if as_json:
        _print_json(settings, scores)
    elif not quiet:
        _print_table(scores)
        if labels:
            _print_labels(scores)


def _collect(run: Iterable[Sequence[Score]], total: int, name: str, quiet: bool) -> list[Score]:
    scores: list[Score] = []
    with progress_bars(quiet) as bars:
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

    from clapsep_cli.evaluation.scores import METRICS, presence, summary

    rows = summary(scores)
    measured = [metric for metric in METRICS if any(metric in figures for figures in rows.values())]
    table = Table(box=None, title="mean ± standard deviation (median), dB", title_justify="left", pad_edge=False)
    table.add_column("query")
    for title in ("mixtures", *(METRICS[metric] for metric in measured), "level (median)"):
        table.add_column(title, justify="right")
    for query, s in rows.items():
        cells = [f"{s[m]:.2f} ± {s[f'{m}_std']:5.2f} ({s[f'{m}_median']:6.2f})" for m in measured]
        table.add_row(query, f"{s['mixtures']:.0f}", *cells, f"{s['level_median']:.1f}")
    _show(table)
    if found := presence(scores):
        typer.echo(
            f"level of the output: {found['present_level']:.1f} dB for sounds that are there, "
            f"{found['absent_level']:.1f} dB for sounds that are not (medians); area under the ROC curve "
            f"{found['roc_area']:.3f}"
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

    # In a file or a pipe, do not wrap: one row is one line.
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS).print(table)

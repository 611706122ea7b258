"""Prints scores of an evaluation: tables, comparisons, JSON."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeVar

import typer

from clapsep_cli.cli.terminal import progress_bars

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.table import Table

    from clapsep_cli.evaluation.prompted import PartScore
    from clapsep_cli.evaluation.scores import Run

PIPE_COLUMNS = 200
S = TypeVar("S")


def collect(run: Iterable[Sequence[S]], total: int, name: str, quiet: bool) -> list[S]:
    """Collect the scores of all mixtures, with a progress bar called `name`."""
    scores: list[S] = []
    with progress_bars(quiet) as bars:
        task = bars.add_task(name, total=total)
        for of_mixture in run:
            scores += of_mixture
            bars.advance(task)
    return scores


def show(runs: Sequence[Run], as_json: bool, labels: bool, quiet: bool) -> None:
    """Print runs as one table, or as JSON, and how they compare."""
    if as_json:
        _print_json(runs)
    elif not quiet:
        _print_table(runs)
        _print_differences(runs)
        for run in runs if labels else ():
            _print_labels(run, len(runs) > 1)


def _print_json(runs: Sequence[Run]) -> None:
    from dataclasses import asdict

    from clapsep_cli.evaluation.scores import by_label, differences, presence

    whole = [
        {
            "settings": run.settings,
            "queries": run.table,
            "presence": presence(run.scores),
            "labels": {query: by_label(run.scores, query) for query in run.table},
        }
        for run in runs
    ]
    if len(runs) == 1:
        _echo(whole[0])
        return
    named = [{"list": run.listed, "system": run.system, **one} for run, one in zip(runs, whole, strict=True)]
    _echo({"runs": named, "differences": [asdict(found) for found in differences(runs)]})


def _echo(value: object) -> None:
    import json

    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _print_table(runs: Sequence[Run]) -> None:
    from rich.table import Table

    from clapsep_cli.evaluation.scores import METRICS, presence

    measured = [metric for metric in METRICS if any(metric in s for run in runs for s in run.table.values())]
    table = Table(box=None, title="mean ± standard deviation (median), dB", title_justify="left", pad_edge=False)
    several = len(runs) > 1
    for title in (*(("list", "system") if several else ()), "query"):
        table.add_column(title)
    for title in ("mixtures", *(METRICS[metric] for metric in measured), "level (median)", *(["worse"] * several)):
        table.add_column(title, justify="right")
    for run in runs:
        for query, s in run.table.items():
            names = (run.listed, run.system, query) if several else (query,)
            cells = [f"{s[m]:.2f} ± {s[f'{m}_std']:5.2f} ({s[f'{m}_median']:6.2f})" if m in s else "" for m in measured]
            worse = [f"{s['worse']:.0%}"] * several
            table.add_row(*names, f"{s['mixtures']:.0f}", *cells, f"{s['level_median']:.1f}", *worse)
    _show(table)
    for run in runs:
        if found := presence(run.scores):
            typer.echo(
                f"{f'{run.listed}, {run.system}: ' if several else ''}"
                f"level of the output: {found['present_level']:.1f} dB for present sounds, "
                f"{found['absent_level']:.1f} dB for absent sounds (medians); area under the ROC curve "
                f"{found['roc_area']:.3f}"
            )


def _print_differences(runs: Sequence[Run]) -> None:
    from rich.table import Table

    from clapsep_cli.evaluation.scores import METRICS, differences

    found = list(differences(runs))
    if not found:
        return
    table = Table(box=None, title="\npaired differences [95 % interval], dB", title_justify="left", pad_edge=False)
    for title in ("list", "systems", "query", "metric", "difference", "mixtures", "worse"):
        table.add_column(title, justify="right" if title in ("difference", "mixtures", "worse") else "left")
    for d in found:
        figures = (f"{d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}]", str(d.mixtures), f"{d.worse:.0%}")
        table.add_row(d.listed, f"{d.system} − {d.base}", d.query, METRICS[d.metric], *figures)
    _show(table)


def show_parts(found: Sequence[tuple[str, str, list[PartScore]]], as_json: bool, quiet: bool) -> None:
    """Print scores of parts by prompt, for each list and model, as a table or as JSON."""
    from rich.table import Table

    from clapsep_cli.evaluation.prompted import FIGURES, by_prompt

    tables = [(listed, model, by_prompt(scores)) for listed, model, scores in found]
    if as_json:
        _echo([{"list": listed, "model": model, "prompts": table} for listed, model, table in tables])
    elif not quiet:
        table = Table(box=None, title="means over parts, dB", title_justify="left", pad_edge=False)
        for title in ("list", "model", "prompt", "parts", "SNR", "SI-SNR", "SNRi", "SI-SNRi"):
            table.add_column(title, justify="left" if title in ("list", "model", "prompt") else "right")
        for listed, model, rows in tables:
            for prompt, s in rows.items():
                table.add_row(listed, model, prompt, f"{s['parts']:.0f}", *(f"{s[figure]:.2f}" for figure in FIGURES))
        _show(table)


def _print_labels(run: Run, named: bool) -> None:
    from rich.table import Table

    from clapsep_cli.evaluation.scores import ABSENT, by_label

    title = f"{run.listed}, {run.system}, " if named else ""
    for query in run.table:
        if query == ABSENT:
            continue
        table = Table(box=None, title=f"\n{title}by label, {query}", title_justify="left", pad_edge=False)
        for title in ("SI-SDRi", "SDRi", "mixtures", "label"):
            table.add_column(title, justify="left" if title == "label" else "right")
        for label, s in by_label(run.scores, query).items():
            table.add_row(f"{s['si_sdri']:.2f}", f"{s['sdri']:.2f}", f"{s['mixtures']:.0f}", label)
        _show(table)


def _show(table: Table) -> None:
    from rich.console import Console

    # In a file or a pipe, do not wrap: one row is one line.
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS).print(table)

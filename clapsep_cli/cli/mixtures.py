"""The commands `mixtures fetch`, `make` and `render`: data sets, lists of mixtures, and their recordings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clapsep_cli.cli.terminal import QuietOption, among, downloads, progress_bars

mixtures = typer.Typer(
    no_args_is_help=True, help="Fetch data sets, make lists of mixtures to evaluate on, and write them as recordings."
)
FETCHED = ("esc50", "fsdkaggle2018", "audiocaps", "musdb18-hq")


@mixtures.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=among(*FETCHED), help=", ".join(FETCHED))],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Where it goes; a folder NAME if not given.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Download a data set of the papers, check and unpack it, and list its clips as RECIPES.md uses them.

    What is in the folder already is used. Data that may not be fetched is named, with what to do.
    """
    from clapsep_cli.evaluation import datasets
    from clapsep_cli.store.download import amount

    folder = out or Path(name)
    terms = datasets.data_set(name).terms
    if not quiet:
        typer.echo(f"{name}: {terms}")
    with downloads(quiet) as shown:
        sums, lists = datasets.fetch(name, folder, shown)
    if not quiet:
        for file, sha256 in sums.items():
            typer.echo(f"{folder / file}: {amount((folder / file).stat().st_size)}, SHA-256 {sha256}")
        for path in lists:
            typer.echo(path)


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


@mixtures.command()
def render(
    listed: Annotated[Path, typer.Argument(metavar="LIST", help="A list of mixtures.")],
    audio: Annotated[Path, typer.Option("--audio", metavar="DIR", help="Folder of the list's files.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the WAVs go.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Write mixture, target and interferer of each row as WAVs, and rendered.csv, for other programs to separate.

    What a program makes of mixture/00001.wav is scored as 00001.wav: clapsep evaluate … --estimates DIR
    """
    from clapsep_cli.errors import OutputError
    from clapsep_cli.evaluation import external
    from clapsep_cli.evaluation.mixtures import EvaluationSet, check_files, read_mixtures

    data = check_files(EvaluationSet(read_mixtures(listed), audio))
    if external.is_rendered(out) and not overwrite:
        raise OutputError(f"{out}: holds rendered mixtures already; use --overwrite to replace them, or -o for another")
    with progress_bars(quiet) as bars:
        task = bars.add_task(listed.name, total=len(data.rows))
        for _ in external.render(data, out):
            bars.advance(task)
    if not quiet:
        typer.echo(f"{out / external.RENDERED}: {len(data.rows)} mixtures")

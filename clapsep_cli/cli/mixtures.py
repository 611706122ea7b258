"""The commands `mixtures fetch`, `make` and `render`: data sets, lists of mixtures, and their recordings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clapsep_cli.cli import options as opt
from clapsep_cli.cli.terminal import downloads, progress_bars

mixtures = typer.Typer(
    no_args_is_help=True, help="Fetch data sets, make lists of mixtures to evaluate on, and write them as recordings."
)
FETCHED = ("esc50", "fsdkaggle2018", "audiocaps", "musdb18-hq")
DRAWN = "Draws"  # heading in --help

Name = Annotated[str, typer.Argument(metavar="NAME", autocompletion=opt.completing(FETCHED), help=", ".join(FETCHED))]
Folder = Annotated[Path | None, opt.option(opt.OUTPUT, "--out -o DIR", "Folder of the data; by default NAME.")]
Source = Annotated[
    Path, typer.Argument(metavar="DIR|MANIFEST", help="A folder with a sub-folder for each label, or a manifest.")
]
Out = Annotated[Path, opt.option(opt.OUTPUT, "--out -o FILE", "The list to write.")]
PerClip = Annotated[
    int, opt.option(DRAWN, "--per-clip N", "Mixtures of each target, with different interferers.", min=1)
]
PerLabel = Annotated[
    int | None, opt.option(DRAWN, "--per-label N", "Targets of each label, drawn at random; by default all.", min=1)
]
Shots = Annotated[
    int, opt.option(DRAWN, "--shots N", "Clips of each label to keep out of the mixtures, for audio queries.", min=0)
]
Interferers = Annotated[
    int | None,
    opt.option(DRAWN, "--interferers N", "Draw all interferers from N clips; by default from all.", min=1),
]
Seed = Annotated[int, opt.option(DRAWN, "--seed N", "Seed of all random draws.")]
Split = Annotated[opt.Text, opt.option(opt.INPUT, "--split NAME", "Use only clips of this split of the manifest.")]
Excluded = Annotated[opt.Text, opt.option(opt.INPUT, "--exclude-labels NAME,…", "Skip clips with any of these labels.")]
Prefix = Annotated[
    opt.Text, opt.option(opt.INPUT, "--prefix TEXT", 'Text before labels without captions; by default "The sound of".')
]
Listed = Annotated[Path, typer.Argument(metavar="LIST", help="A list of mixtures.")]
Audio = Annotated[Path, opt.option(opt.INPUT, "--audio DIR", "Folder of the list's files.")]
Rendered = Annotated[Path, opt.option(opt.OUTPUT, "--out -o DIR", "Folder of the WAVs.")]


@mixtures.command()
def fetch(name: Name, out: Folder = None, quiet: opt.Quiet = False) -> None:
    """Download a data set of the papers, check and unpack it, and list its clips as RECIPES.md uses them.

    Files in the folder are not downloaded again. For data that may not be fetched, the error says what to do.
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
    source: Source,
    out: Out = Path("mixtures.csv"),
    per_clip: PerClip = 5,
    per_label: PerLabel = None,
    shots: Shots = 0,
    split: Split = None,
    prefix: Prefix = None,
    excluded: Excluded = None,
    interferers: Interferers = None,
    seed: Seed = 0,
    overwrite: opt.Overwrite = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write a list of mixtures for `clapsep evaluate`: two clips of different labels each.

    With --shots, FILE.shots.csv lists the clips kept for audio queries.
    """
    from clapsep_cli.evaluation import mixtures as lists

    shots_out = out.with_suffix(".shots.csv")
    for path in (out, *([shots_out] if shots else [])):
        opt.check_free(path, overwrite, ", or -o for another file")
    left_out = [label.strip() for label in (excluded or "").split(",") if label.strip()]
    clips, root = lists.labelled_clips(source, split, lists.PREFIX if prefix is None else prefix, left_out)
    targets, kept = lists.set_aside(clips, shots, seed)
    rows = lists.make_mixtures(targets, root, seed, per_label, per_clip, kept if shots else None, interferers)
    if shots:
        lists.write_shots(shots_out, kept, clips, root)
    lists.write_mixtures(out, rows)
    if not quiet:
        labels = len({row.label for row in rows})
        typer.echo(f"{out}: {len(rows)} mixtures, targets of {labels} labels, from {len(clips)} clips in {root}")
        if shots:
            typer.echo(f"{shots_out}: {sum(map(len, kept.values()))} shots")


@mixtures.command()
def render(
    listed: Listed, audio: Audio, out: Rendered, overwrite: opt.Overwrite = False, quiet: opt.Quiet = False
) -> None:
    """Write mixture, target and interferer of each row as WAVs, and rendered.csv, for other programs to separate.

    A program separates mixture/00001.wav and writes 00001.wav; then: clapsep evaluate … --estimates DIR
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

"""The command line: parses, makes one library call, prints, and sets the exit code."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from clapsep_cli.cli_evaluate import evaluate, mixtures
from clapsep_cli.cli_models import models
from clapsep_cli.errors import ClapsepError
from clapsep_cli.terminal import DeviceOption, ModelDirOption, ModelOption, QuietOption, downloads, note, progress

if TYPE_CHECKING:
    from torch import Tensor

    from clapsep_cli.checkpoint import Model
    from clapsep_cli.pipeline import Extraction
    from clapsep_cli.train import Report

FAILED = 1  # something that was asked for could not be done; usage errors exit with 2
INTERRUPTED = 130

app = typer.Typer(
    name="clapsep",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Extract the sound you describe from a recording.",
    epilog='Example: clapsep extract mix.wav --pos "dog barking" --neg "rain"',
)

app.command()(evaluate)
app.add_typer(mixtures, name="mixtures")
app.add_typer(models, name="models")


def run() -> NoReturn:
    """`main`, as a process of its own: ends without the half second that an interpreter takes to put torch away."""
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else FAILED
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads on, or there is no room
        code = code or FAILED
    # Outputs are closed and named by now; what is left is memory, which the system takes back faster.
    os._exit(code)


def main() -> NoReturn:
    """Run the command; a user's mistake ends with one line on stderr, never with a traceback."""
    try:
        app(standalone_mode=True)
    except ClapsepError as error:
        note(str(error))
        raise SystemExit(FAILED) from None
    except OSError as error:  # what no part of the library expected: a folder that cannot be written, say
        note(f"{error.filename or 'the system'}: {error.strerror or error}")
        raise SystemExit(FAILED) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    raise SystemExit(0)


def _version(wanted: bool) -> None:
    if wanted:
        from clapsep_cli import __version__

        typer.echo(f"clapsep {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def _load(model: str | None, device: str, quiet: bool) -> Model:
    """Load a model, showing a download if it takes one."""
    from clapsep_cli.library import load_model

    with downloads(quiet) as shown:
        return load_model(model, device, note, shown)


@app.command()
def extract(
    mixtures: Annotated[list[Path], typer.Argument(metavar="MIX...", help="Recordings to extract from.")],
    pos: Annotated[
        list[str] | None, typer.Option("--pos", help="What to keep, in words; several are averaged.")
    ] = None,
    neg: Annotated[
        list[str] | None, typer.Option("--neg", help="What to leave, in words; several are averaged.")
    ] = None,
    query_audio: Annotated[
        list[Path] | None,
        typer.Option("--query-audio", metavar="FILE|DIR", help="Recordings that sound like what to keep."),
    ] = None,
    neg_audio: Annotated[
        list[Path] | None,
        typer.Option("--neg-audio", metavar="FILE|DIR", help="Recordings that sound like what to leave."),
    ] = None,
    alpha: Annotated[
        float, typer.Option("--alpha", metavar="X", help="Weight of audio beside text of the same side, 0 to 1.")
    ] = 0.5,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Where to write; beside each input if not given.")
    ] = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    _model_dir: ModelDirOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Write what matches the query to MIX.target.wav and the rest to MIX.residual.wav.

    Give at least one query, of either side, as text or as audio.
    """
    from clapsep_cli.query import Query

    query = Query(pos or (), neg or (), query_audio or (), neg_audio or (), alpha)
    from clapsep_cli.pipeline import check_outputs, embed_query

    check_outputs(mixtures, out, overwrite)
    loaded = _load(model, device, quiet)
    wanted = embed_query(loaded, query)
    if not quiet:
        revision = f" ({loaded.revision})" if loaded.revision else ""
        typer.echo(f"{loaded.name}{revision} on {loaded.device}, float32: {query.describe()}")
    failures = 0
    for mixture in mixtures:
        failures += not _extract_one(mixture, wanted, loaded, out, overwrite, quiet)
    if failures:
        if len(mixtures) > 1:
            typer.echo(f"clapsep: {failures} of {len(mixtures)} files failed", err=True)
        raise typer.Exit(FAILED)


def _extract_one(mixture: Path, wanted: Tensor, model: Model, out: Path | None, overwrite: bool, quiet: bool) -> bool:
    """Extract from one file; whether it worked. One bad file must not stop the rest."""
    from clapsep_cli.pipeline import extract as extract_file

    try:
        with progress(quiet) as bars:
            task = bars.add_task(mixture.name, total=None)

            def show(done: float, total: float) -> None:
                bars.update(task, completed=done, total=total)

            done = extract_file(mixture, wanted, model, out, overwrite, show)
    except ClapsepError as error:
        note(str(error))
        return False
    if not quiet:
        _print_extraction(done)
    return True


def _print_extraction(done: Extraction) -> None:
    speed = done.seconds / done.elapsed
    typer.echo(f"{done.mixture}: {done.seconds:.2f} s in {done.elapsed:.2f} s ({speed:.0f} times real time)")
    for part, path in (("target", done.target), ("residual", done.residual)):
        typer.echo(f"  {part:8}  {path}")
        if done.clipped[part]:
            typer.echo(f"clapsep: {path}: {done.clipped[part]} samples were over full scale and are clipped", err=True)


@app.command()
def train(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST.csv", help="Clips: file,label[,captions,split].")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the model and the run's state go.")],
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="DIR", help="Text encoder to train into; the bundled one by default."),
    ] = None,
    paraphrases: Annotated[
        Path | None, typer.Option("--paraphrases", metavar="CSV", help="Further captions by label: label,captions.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Steps of the separator, 32 examples each.")
    ] = None,
    audio_steps: Annotated[
        int | None, typer.Option("--audio-steps", min=1, help="Steps of the audio encoder, 48 examples each.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Everything drawn at random follows from it.")] = 0,
    quiet: QuietOption = False,
) -> None:
    """Train a small model like the bundled one. Stopped, it goes on where it was when called again."""
    from dataclasses import replace

    from clapsep_cli.registry import BUNDLED, weights_folder
    from clapsep_cli.train import TrainConfig
    from clapsep_cli.train import train as train_model

    config = TrainConfig(seed=seed)
    if steps:
        config = replace(config, separator=replace(config.separator, steps=steps))
    if audio_steps:
        config = replace(config, audio=replace(config.audio, steps=audio_steps))
    encoder = text or weights_folder() / BUNDLED
    train_model(manifest, out, encoder, paraphrases, config, _ignore if quiet else _print_report)
    if not quiet:
        typer.echo(f'done: clapsep extract --model {out} MIX --pos "…"')


def _print_report(report: Report) -> None:
    figures = "  ".join(f"{name} {value:.3f}" for name, value in report.figures.items())
    typer.echo(f"{report.stage} {report.step}/{report.steps}  {figures}")


def _ignore(report: Report) -> None:
    pass

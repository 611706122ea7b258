"""`clapsep hear`: lists what likely sounds in a recording, over time."""

from __future__ import annotations

import json as json_
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clapsep_cli.cli import options as opt
from clapsep_cli.cli.run import FAILED, find, load, stoppable
from clapsep_cli.cli.terminal import DeviceOption, ModelDirOption, ModelOption, QuietOption, echo, note, notes
from clapsep_cli.errors import ClapsepError, OutputError, StoppedError, UsageError
from clapsep_cli.query import parse_time
from clapsep_cli.startup import set_threads

if TYPE_CHECKING:
    from clapsep_cli.jobs.inputs import Input
    from clapsep_cli.jobs.stores import Stage
    from clapsep_cli.listening.hearing import Heard, Listener

PANEL = "Sounds"  # of --help
SHOWN_STRETCHES = 6


def hear(
    inputs: opt.Inputs = None,
    vocabulary: Annotated[
        Path | None,
        typer.Option(
            "--vocabulary", metavar="FILE", rich_help_panel=PANEL, help="Sounds to listen for, in words, one a line."
        ),
    ] = None,
    top: Annotated[
        int, typer.Option("--top", metavar="N", min=1, max=1000, rich_help_panel=PANEL, help="List this many at most.")
    ] = 10,
    min_score: Annotated[
        float,
        typer.Option("--min-score", metavar="X", min=0, max=1, rich_help_panel=PANEL, help="List no sound below this."),
    ] = 0.2,
    recursive: opt.Recursive = False,
    start: opt.Start = None,
    end: opt.End = None,
    lenient: opt.Lenient = False,
    stream: opt.Stream = None,
    expand: opt.Expand = 1.0,
    plot: Annotated[
        bool,
        typer.Option(
            "--plot", rich_help_panel=opt.OUTPUT, help="Also write the scores as a picture, {stem}.sounds.png."
        ),
    ] = False,
    overwrite: opt.Overwrite = False,
    model: ModelOption = None,
    adapter: opt.Adapter = None,
    device: DeviceOption = "auto",
    _model_dir: ModelDirOption = None,
    threads: opt.Threads = None,
    json: opt.Json = False,
    quiet: QuietOption = False,
) -> None:
    """List what likely sounds in recordings and when, and propose what to extract.

    Scores are 0 to 1: of sounds to which mini gives 0.7, about seven of ten are there.
    """
    from clapsep_cli.audio.samples import slowed
    from clapsep_cli.audio.sources import Source
    from clapsep_cli.jobs.loading import Loading
    from clapsep_cli.listening.hearing import Listener, vocabulary_of

    part = parse_time(start) if start else 0.0, parse_time(end) if end else None
    if overwrite and not plot:
        raise UsageError("--overwrite is about the picture: use it with --plot")
    failures = 0
    with opt.staging(None) as stage, stoppable(quiet, "stopping after the window at hand") as stop:

        def check() -> None:
            if stop.is_set():
                raise StoppedError("stopped")

        found = find(inputs or [], recursive, None, stage)
        pictures = _pictures(found, overwrite, stage) if plot else {}
        set_threads(threads)
        loaded = load(Loading(model, adapter, device, "high"), stage, quiet)
        listener = Listener(loaded, vocabulary_of(loaded, vocabulary))
        for item in found:
            check()
            try:
                if item.fault:
                    raise item.fault
                with Source(stage.fetch(item.path, keep=False), *part, lenient, stream) as source:
                    rate = slowed(source.rate, expand, source.name)
                    heard = listener.hear(source.blocks(5.0), rate, expand, part[0], check)
                for line in source.notes:
                    notes(quiet)(line)
            except StoppedError:
                raise
            except ClapsepError as error:
                failures += 1
                note(str(error))
                if json:
                    echo_json({"input": str(item.path), "status": "failed", "error": str(error)})
                continue
            finally:
                stage.drop(item.path)
            _show(item, listener, heard, top, min_score, loaded.name, json, quiet, pictures.get(item.path))
    if failures:
        raise typer.Exit(FAILED)


def _pictures(found: Sequence[Input], overwrite: bool, stage: Stage) -> dict[Path, Path]:
    """Return the path of the picture of each recording. Raises `UsageError`, `OutputError` where it cannot be there."""
    from clapsep_cli.audio.sources import STDIN
    from clapsep_cli.listening.plot import check_installed

    check_installed()
    pictures = {item.path: item.path.with_suffix(".sounds.png") for item in found}
    for path, picture in pictures.items():
        if path == STDIN or stage.holds(path):
            name = "- (standard input)" if path == STDIN else stage.shown(str(path))
            raise UsageError(f"--plot writes a picture beside the recording: use it without {name}")
        if picture.exists() and not overwrite:
            raise OutputError(f"{picture}: exists already; use --overwrite to replace it")
    return pictures


def echo_json(facts: dict[str, Any]) -> None:
    """Print an object as a line of JSON."""
    import sys

    echo(json_.dumps(facts), sys.stdout)


def _show(
    item: Input,
    listener: Listener,
    heard: Heard,
    top: int,
    least: float,
    model: str,
    as_json: bool,
    quiet: bool,
    picture: Path | None,
) -> None:
    import sys

    from clapsep_cli.listening.plot import save_scores

    best = heard.best(top, least)
    pos, neg = listener.propose(best)
    if picture is not None:
        shown = [sound for sound, _ in best]
        step = heard.window / 2
        edges = [at - step / 2 + heard.window / 2 for at in (*heard.starts, heard.starts[-1] + step)]
        save_scores(picture, shown, edges, heard.scores[:, [heard.sounds.index(sound) for sound in shown]].T)
    if as_json:
        sounds = [
            {"sound": name, "score": score, "stretches": heard.stretches(name, max(least, score / 2))}
            for name, score in best
        ]
        facts = {"input": str(item.path), "status": "done", "model": model, "seconds": heard.seconds}
        echo_json({**facts, "sounds": sounds, "pos": pos, "neg": neg, "picture": picture and str(picture)})
        return
    if quiet:
        return
    lines = [f"{'standard input' if str(item.path) == '-' else item.path}: {heard.seconds:.2f} s"]
    width = max(len(name) for name, _ in best)
    for name, score in best:
        stretches = heard.stretches(name, max(least, score / 2))
        told = ", ".join(f"{a:g}-{b:g}" for a, b in stretches[:SHOWN_STRETCHES])
        times = f"  {told}{' …' if len(stretches) > SHOWN_STRETCHES else ''} s" if stretches else "  hardly"
        lines.append(f"  {score:.2f}  {name:{width}}{times}")
    words = " ".join([f"--pos {shlex.quote(pos)}", *(f"--neg {shlex.quote(one)}" for one in neg)])
    lines.append(f"  try: clapsep extract {shlex.quote(str(item.path))} {words}")
    for line in [*lines, *([f"  picture  {picture}"] if picture else [])]:
        echo(line, sys.stdout)

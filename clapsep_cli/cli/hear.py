"""`clapsep hear`: lists what likely sounds in a recording, over time."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clapsep_cli.cli import options as opt
from clapsep_cli.cli.run import FAILED, find_recordings, load, stoppable
from clapsep_cli.cli.terminal import echo, note, notes
from clapsep_cli.errors import ClapsepError, StoppedError, UsageError
from clapsep_cli.query import parse_time
from clapsep_cli.startup import set_threads

if TYPE_CHECKING:
    from clapsep_cli.jobs.inputs import Input
    from clapsep_cli.jobs.stores import Stage
    from clapsep_cli.listening.hearing import Heard, Listener

PANEL = "Sounds"  # heading in --help
SHOWN_STRETCHES = 6
BLOCK_SECONDS = 5.0  # of audio read at a time

Vocabulary = Annotated[
    Path | None, opt.option(PANEL, "--vocabulary FILE", "File of sounds to listen for, in words, one per line.")
]
Top = Annotated[int, opt.option(PANEL, "--top N", "Number of sounds to list at most.", min=1, max=1000)]
MinScore = Annotated[
    float, opt.option(PANEL, "--min-score X", "List only sounds with this score or more.", min=0, max=1)
]
Plot = Annotated[bool, opt.option(opt.OUTPUT, "--plot", "Also write the scores as a picture, {stem}.sounds.png.")]


def hear(
    inputs: opt.Inputs = None,
    vocabulary: Vocabulary = None,
    top: Top = 10,
    min_score: MinScore = 0.2,
    recursive: opt.Recursive = False,
    start: opt.Start = None,
    end: opt.End = None,
    lenient: opt.Lenient = False,
    stream: opt.Stream = None,
    expand: opt.Expand = 1.0,
    plot: Plot = False,
    overwrite: opt.Overwrite = False,
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    device: opt.Device = "auto",
    _model_dir: opt.ModelDir = None,
    threads: opt.Threads = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """List what likely sounds in recordings and when, and propose what to extract.

    Scores are 0 to 1: of sounds to which mini gives 0.7, about seven of ten are there.
    """
    given = locals()
    from clapsep_cli.jobs.job import Loading
    from clapsep_cli.listening.hearing import Listener, vocabulary_of

    part = parse_time(start) if start else 0.0, parse_time(end) if end else None
    if overwrite and not plot:
        raise UsageError("--overwrite is about the picture: use it with --plot")
    failures = 0
    with opt.staging(None) as stage, stoppable(quiet, "stopping after the window at hand") as stop:

        def check() -> None:
            if stop.is_set():
                raise StoppedError("stopped")

        found = find_recordings(inputs or [], recursive, None, stage)
        pictures = _pictures(found, overwrite, stage) if plot else {}
        set_threads(threads)
        loaded = load(Loading(model, adapter, device, "high"), stage, quiet)
        listener = Listener(loaded, vocabulary_of(loaded, vocabulary))
        for item in found:
            check()
            row: dict[str, Any] = {"input": str(item.path)}
            try:
                heard = _listen(item, part, given, listener, stage, check)
            except StoppedError:
                raise
            except ClapsepError as error:
                failures += 1
                note(str(error))
                row |= {"status": "failed", "error": str(error)}
            else:
                best = heard.best(top, min_score)
                picture = pictures.get(item.path)
                if picture is not None:
                    _draw(picture, heard, [sound for sound, _ in best])
                row |= _facts(heard, best, listener, min_score, picture)
            finally:
                stage.drop(item.path)
            if as_json:
                echo(json.dumps(row), sys.stdout)
            elif row["status"] == "done" and not quiet:
                _print(row)
    if failures:
        raise typer.Exit(FAILED)


def _listen(
    item: Input,
    part: tuple[float, float | None],
    given: Mapping[str, Any],
    listener: Listener,
    stage: Stage,
    check: Callable[[], None],
) -> Heard:
    """Score the sounds of a recording.

    Args:
        item: the recording.
        part: where to begin and end, in seconds; None for the recording's end.
        given: the arguments of the command.
        listener: scores the sounds.
        stage: mirrors the stores of URLs.
        check: raises where the user wants to stop.

    Raises:
        AudioError: the recording cannot be read.
    """
    from clapsep_cli.audio.samples import slowed
    from clapsep_cli.audio.sources import Source

    if item.fault:
        raise item.fault
    with Source(stage.fetch(item.path, keep=False), *part, given["lenient"], given["stream"]) as source:
        rate = slowed(source.rate, given["expand"], source.name)
        heard = listener.hear(source.blocks(BLOCK_SECONDS), rate, given["expand"], part[0], check)
    for line in source.notes:
        notes(given["quiet"])(line)
    return heard


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
        opt.check_free(picture, overwrite)
    return pictures


def _draw(picture: Path, heard: Heard, sounds: list[str]) -> None:
    """Draw the score of each window over its middle half, where no other window is as near."""
    from clapsep_cli.listening.plot import save_scores

    after = heard.starts[-1] + heard.window / 2  # start of the next window, if there were one
    edges = [start + heard.window / 4 for start in (*heard.starts, after)]
    save_scores(picture, sounds, edges, heard.scores[:, [heard.sounds.index(sound) for sound in sounds]].T)


def _facts(
    heard: Heard, best: Sequence[tuple[str, float]], listener: Listener, least: float, picture: Path | None
) -> dict[str, Any]:
    """Return the sounds of a recording for `--json`."""
    pos, neg = listener.propose(best)
    sounds = [
        {"sound": name, "score": score, "stretches": heard.stretches(name, max(least, score / 2))}
        for name, score in best
    ]
    facts = {"status": "done", "model": listener.model.name, "seconds": heard.seconds, "sounds": sounds}
    return {**facts, "pos": pos, "neg": neg, "picture": picture and str(picture)}


def _print(row: Mapping[str, Any]) -> None:
    """Print the sounds of a recording, and a command to extract one."""
    lines = [f"{'standard input' if row['input'] == '-' else row['input']}: {row['seconds']:.2f} s"]
    width = max(len(one["sound"]) for one in row["sounds"])
    for one in row["sounds"]:
        told = ", ".join(f"{a:g}-{b:g}" for a, b in one["stretches"][:SHOWN_STRETCHES])
        more = " …" if len(one["stretches"]) > SHOWN_STRETCHES else ""
        times = f"{told}{more} s" if told else "hardly"
        lines.append(f"  {one['score']:.2f}  {one['sound']:{width}}  {times}")
    words = " ".join([f"--pos {shlex.quote(row['pos'])}", *(f"--neg {shlex.quote(neg)}" for neg in row["neg"])])
    lines.append(f"  try: clapsep extract {shlex.quote(row['input'])} {words}")
    if row["picture"]:
        lines.append(f"  picture  {row['picture']}")
    for line in lines:
        echo(line, sys.stdout)

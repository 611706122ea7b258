"""`clapsep extract`: from what the user types to one library call, and from what comes of it to lines."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import log10
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clapsep_cli.cli_options import Common, takes
from clapsep_cli.errors import ClapsepError, OutputError, QueryError
from clapsep_cli.startup import set_threads
from clapsep_cli.terminal import Reporter, downloads, note

if TYPE_CHECKING:
    from clapsep_cli.checkpoint import Model
    from clapsep_cli.inputs import Input
    from clapsep_cli.planning import Destination
    from clapsep_cli.query import Query
    from clapsep_cli.tasks import Extraction, Options

    Asked = list[tuple[Input, Mapping[str, Query]]]

FAILED = 1
QUERY = "Queries"  # panel of --help


def _query(name: str, **settings: Any) -> Any:
    return typer.Option(name, rich_help_panel=QUERY, **settings)


@takes(Common)
def extract(
    common: Common,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="MIX...", help="Recordings, folders, patterns, @list.txt; or - for a WAV from stdin."),
    ] = None,
    pos: Annotated[
        list[str] | None, _query("--pos", metavar="TEXT", help="What to keep, in words; several are averaged.")
    ] = None,
    neg: Annotated[
        list[str] | None, _query("--neg", metavar="TEXT", help="What to leave, in words; several are averaged.")
    ] = None,
    query_audio: Annotated[
        list[Path] | None,
        _query("--query-audio", metavar="FILE|DIR", help="Recordings that sound like what to keep."),
    ] = None,
    neg_audio: Annotated[
        list[Path] | None, _query("--neg-audio", metavar="FILE|DIR", help="Recordings that sound like what to leave.")
    ] = None,
    pos_span: Annotated[
        list[str] | None,
        _query("--pos-span", metavar="FROM-TO", help="A stretch of the recording that sounds like what to keep."),
    ] = None,
    neg_span: Annotated[
        list[str] | None,
        _query("--neg-span", metavar="FROM-TO", help="A stretch of the recording that sounds like what to leave."),
    ] = None,
    alpha: Annotated[
        float, _query("--alpha", metavar="X", help="Weight of audio beside text of the same side, 0 to 1.")
    ] = 0.5,
    target: Annotated[
        list[str] | None,
        _query("--target", metavar="NAME=QUERY", help="One of several targets: a text, or a recording like it."),
    ] = None,
    mutual: Annotated[
        bool, _query("--mutual/--no-mutual", help="Let each target leave what the other targets ask for.")
    ] = True,
    manifest: Annotated[
        Path | None,
        _query("--manifest", metavar="CSV", help="Recordings with queries: file,pos,neg,query_audio,neg_audio."),
    ] = None,
    presence: Annotated[
        bool | None, _query("--presence/--no-presence", help="Tell how alike the target is to the query; with --json.")
    ] = None,
    min_presence: Annotated[
        float | None,
        _query("--min-presence", metavar="X", help="Write nothing where the presence is below; 0 is a good start."),
    ] = None,
    residual: Annotated[bool, typer.Option("--residual/--no-residual", help="Also write what is left.")] = True,
    remove: Annotated[bool, typer.Option("--remove", help="Write what is left alone, without the target.")] = False,
) -> None:
    """Write what matches the query to MIX.target.wav and the rest to MIX.residual.wav.

    Give at least one query, of either side, as text or as audio.
    """
    from clapsep_cli.planning import Destination
    from clapsep_cli.query import Query
    from clapsep_cli.targets import parse_targets
    from clapsep_cli.times import parse_span

    sides: dict[str, Any] = {
        "pos": pos or (),
        "neg": neg or (),
        "pos_audio": query_audio or (),
        "neg_audio": neg_audio or (),
        "alpha": alpha,
        "pos_spans": [parse_span(span) for span in pos_span or ()],
        "neg_spans": [parse_span(span) for span in neg_span or ()],
    }
    if target:
        if pos or query_audio or pos_span or manifest:
            raise QueryError("--target says itself what to keep: use it without --pos, --query-audio and --manifest")
        named = parse_targets(target)
        left = {side: sides[side] for side in ("neg", "neg_audio", "neg_spans")}
        queries = {
            name: Query(pos_audio=[wish], **left) if isinstance(wish, Path) else Query(pos=wish, **left)
            for name, wish in named.items()
        }
    else:
        queries = {}
    asked = _asked(inputs or [], manifest, queries, sides, common)
    destination = Destination(residual=residual, remove=remove)
    carry_out(asked, common, destination, mutual, {"presence": presence, "min_presence": min_presence})


def _asked(
    inputs: Sequence[str], manifest: Path | None, targets: Mapping[str, Query], sides: dict[str, Any], common: Common
) -> Asked:
    """Each recording with its targets: those given, or one with the query of the manifest's row and the options."""
    from clapsep_cli.jobs import read_jobs
    from clapsep_cli.query import Query

    if manifest is None:
        wanted = targets or {"target": Query(**sides)}
        return [(item, wanted) for item in find(inputs, common)]
    if inputs:
        raise QueryError(f"{manifest} names the recordings: give either a manifest or recordings")
    asked: Asked = []
    for row in read_jobs(manifest):
        own = {"pos": row.pos, "neg": row.neg, "pos_audio": row.query_audio, "neg_audio": row.neg_audio}
        try:
            query = Query(**{**sides, **{side: value for side, value in own.items() if value}})
        except QueryError as error:
            raise QueryError(f"{manifest}, line {row.line}: {error}") from error
        asked.append((row.input, {"target": query}))
    return asked


def find(inputs: Sequence[str], common: Common) -> list[Input]:
    """The recordings that the arguments name."""
    from clapsep_cli.inputs import expand
    from clapsep_cli.writers import read_software

    if not inputs:
        raise QueryError("no recordings: name files, folders, patterns or @list.txt")
    folder = None if common.out is None or str(common.out) == "-" else common.out
    return expand(
        inputs, common.recursive, folder, lambda path: read_software(path).startswith("clapsep "), _say(common)
    )


def _say(common: Common) -> Any:
    return (lambda line: None) if common.quiet else note


def carry_out(asked: Asked, common: Common, destination: Destination, mutual: bool, measured: dict[str, Any]) -> None:
    """Separate what is `asked` for, print what came of it, and raise `typer.Exit` if anything failed.

    Where it is `mutual`, each of several targets leaves what the others ask for.
    """
    from dataclasses import replace

    from clapsep_cli.batch import run
    from clapsep_cli.outputs import TEMPLATE
    from clapsep_cli.planning import plan
    from clapsep_cli.tasks import Failure

    set_threads(common.threads)
    destination = replace(destination, folder=common.out, template=common.filename or TEMPLATE, picture=common.plot)
    options, piped = _options(common, measured), str(common.out) == "-"
    if piped and (common.json or len(asked) > 1):
        raise OutputError("-o - writes one recording's target to stdout: use it for one recording, without --json")
    model = _load(common)
    if mutual:
        apart = {id(targets): model.apart(targets) for _, targets in asked}  # one for all that share theirs
        asked = [(item, apart[id(targets)]) for item, targets in asked]
    for doubt in model.doubts(list(asked[0][1].values())):
        _say(common)(doubt)
    todo = plan(asked, model, options, destination, common.skip_existing)
    lines = _Lines(common, model, piped)
    lines.begin(asked[0][1], len(todo.jobs))
    for path in todo.done:
        lines.skipped(path)
    for failure in todo.blocked:
        lines.failed(failure.mixture, failure.error)
    failures = len(todo.blocked)
    with stoppable() as stop, Reporter(common.progress, common.quiet, len(todo.jobs)) as reporter:
        for outcome in run(todo.jobs, model, options, reporter.update, stop):
            reporter.finish(outcome.mixture)
            failures += isinstance(outcome, Failure)
            lines.failed(outcome.mixture, outcome.error) if isinstance(outcome, Failure) else lines.done(outcome)
    if failures:
        if len(asked) > 1:
            note(f"{failures} of {len(asked)} files failed")
        raise typer.Exit(FAILED)


def _options(common: Common, measured: dict[str, Any]) -> Options:
    from typing import get_args

    from clapsep_cli.tasks import Options
    from clapsep_cli.times import parse_time
    from clapsep_cli.writers import Clip

    if common.clip not in get_args(Clip):
        raise OutputError(f"there is no --clip {common.clip!r}; there are {', '.join(get_args(Clip))}")
    presence = measured.pop("presence", None)
    return Options(
        start=parse_time(common.start) if common.start else 0.0,
        end=parse_time(common.end) if common.end else None,
        format=common.format,
        subtype=common.subtype,
        clip=common.clip,  # type: ignore[arg-type]
        overwrite=common.overwrite,
        presence=common.json if presence is None else presence,
        batch=common.batch_size,
        workers=common.jobs,
        **measured,
    )


def _load(common: Common) -> Model:
    """Load a model, showing a download if it takes one."""
    from clapsep_cli.library import load_model

    with downloads(common.quiet) as shown:
        model = load_model(common.model, common.device, common.precision, say=note, progress=shown)
    if common.adapter:
        from clapsep_cli.adapters import apply

        apply(model, common.adapter)
    return model


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second one interrupts."""
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        note("stopping after the windows at hand; once more to stop at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Lines:
    """What is printed of a run: for people, or as JSON; on stderr if stdout carries audio."""

    def __init__(self, common: Common, model: Model, piped: bool) -> None:
        self.json, self.model = common.json, model
        self.silent = common.quiet and not common.json
        self.stream = sys.stderr if piped else sys.stdout

    def _print(self, line: str) -> None:
        if not self.silent:
            typer.echo(line, file=self.stream)

    def begin(self, targets: Mapping[str, Query], count: int) -> None:
        if self.json or not count:
            return
        revision = f" ({self.model.revision})" if self.model.revision else ""
        single = list(targets) == ["target"]
        asked = "; ".join(q.describe() if single else f"{name}: {q.describe()}" for name, q in targets.items())
        self._print(f"{self.model.name}{revision} on {self.model.device}, {self.model.precision}: {asked}")

    def _object(self, path: Path, **facts: Any) -> None:
        self._print(json.dumps({"input": str(path), **facts}, ensure_ascii=False))

    def skipped(self, path: Path) -> None:
        if self.json:
            self._object(path, skipped=True)
        else:
            self._print(f"{path}: done before")

    def failed(self, path: Path, error: ClapsepError) -> None:
        if self.json:
            self._object(path, error=str(error))
        note(str(error))

    def done(self, done: Extraction) -> None:
        for part, count in done.clipped.items():
            if count:
                note(f"{done.outputs[part]}: {count} samples were over full scale and are clipped; see --clip")
        if self.json:
            facts = done.as_json()
            model = {"model": self.model.name, "revision": self.model.revision, "device": str(self.model.device)}
            self._object(facts.pop("mixture"), **model, precision=self.model.precision, **facts)
            return
        speed = done.seconds / done.elapsed
        self._print(f"{done.mixture}: {done.seconds:.2f} s in {done.elapsed:.2f} s ({speed:.0f} times real time)")
        if done.gain != 1:
            self._print(f"  all parts were lowered by {-20 * log10(done.gain):.2f} dB so that nothing clips")
        for name, score in done.presence.items():
            told = (
                "{score:.2f} (likeness {after:.2f}, of the mixture {before:.2f})".format(**score)
                if score
                else "unknown"
            )
            self._print(f"  presence of {name}: {told}")
        if not done.outputs:
            self._print("  nothing written: below --min-presence")
        for part, path in done.outputs.items():
            self._print(f"  {part:8}  {path}")
        if done.picture:
            self._print(f"  picture   {done.picture}")

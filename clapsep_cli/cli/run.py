"""Runs the jobs of `extract` and `separate`, and prints the results."""

from __future__ import annotations

import json
import signal
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from math import log10
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from clapsep_cli.cli.options import Common
from clapsep_cli.cli.terminal import PROGRESS, Reporter, downloads, echo, note, notes
from clapsep_cli.errors import ClapsepError, StoppedError, UsageError
from clapsep_cli.startup import set_threads

if TYPE_CHECKING:
    from clapsep_cli.jobs.inputs import Input
    from clapsep_cli.jobs.outputs import Destination
    from clapsep_cli.jobs.planning import Requests, Todo
    from clapsep_cli.jobs.tasks import Extraction, Failure, Job, Options
    from clapsep_cli.query import Query
    from clapsep_cli.store.checkpoint import Model

FAILED = 1  # something that was asked for could not be done; usage errors exit with 2
DONE, ABSENT, BEFORE, FAULTY = OUTCOMES = ("done", "without what was asked for", "done before", "failed")
HEADER_LETTERS = 160  # of the queries in the first line


def find(inputs: Sequence[str], common: Common) -> list[Input]:
    """The recordings that the arguments name."""
    from clapsep_cli.audio.writers import read_software
    from clapsep_cli.jobs.inputs import expand

    if not inputs:
        raise UsageError("no recordings: name files, folders, patterns or @list.txt")
    folder = None if common.out is None or _to_stdout(common) else common.out
    return expand(
        inputs, common.recursive, folder, lambda path: read_software(path).startswith("clapsep "), notes(common.quiet)
    )


def _to_stdout(common: Common) -> bool:
    return str(common.out) == "-"


def carry_out(asked: Requests, common: Common, destination: Destination, mutual: bool | None, **measured: Any) -> None:
    """Separate the recordings, print the results, and raise `typer.Exit` if anything failed.

    `mutual`: whether each of several targets leaves what the others ask for; None for yes, by default. `measured` are
    more of the `Options`.
    """
    from clapsep_cli.jobs.outputs import TEMPLATE
    from clapsep_cli.jobs.planning import lay_out, plan

    set_threads(common.threads)
    options = _options(common, measured)
    if _to_stdout(common) and common.json:
        raise UsageError("-o - leaves stdout to the audio: use it without --json")
    destination = replace(destination, folder=common.out, filename=common.filename or TEMPLATE, plot=common.plot)
    jobs = lay_out(asked, options, destination, common.skip_existing)  # before a model is loaded, perhaps downloaded
    model = _load(common)
    if options.presence is None:
        options = replace(options, presence=common.json and model.tells_likeness)
    if mutual is not None and all(model.apart(job.targets) == job.targets for job in jobs):
        raise UsageError(f"--mutual, --no-mutual: {model.name} never makes targets negative queries; leave it out")
    todo = plan(jobs, model, options, common.skip_existing, mutual is not False)
    for doubt in _doubts(model, jobs):
        notes(common.quiet)(doubt)
    lines = _Lines(common, model, len(jobs))
    if todo.jobs:
        lines.begin(jobs)
    _work(todo, model, options, common, lines)


def _work(todo: Todo, model: Model, options: Options, common: Common, lines: _Lines) -> None:
    from clapsep_cli.jobs.batch import run
    from clapsep_cli.jobs.tasks import Failure

    for job in todo.done:
        lines.skipped(job)
    for failure in todo.blocked:
        lines.failed(failure)
    try:
        with (
            stoppable(common.quiet) as stop,
            Reporter(common.progress, common.quiet, len(todo.jobs)) as reporter,
            closing(run(todo.jobs, model, options, reporter.update, stop)) as outcomes,
        ):
            for outcome in outcomes:
                reporter.finish(outcome.mixture, isinstance(outcome, Failure))
                lines.failed(outcome) if isinstance(outcome, Failure) else lines.done(outcome)
    except (StoppedError, KeyboardInterrupt):
        lines.end()
        raise
    lines.end()
    if lines.failures:
        raise typer.Exit(FAILED)


def _options(common: Common, measured: dict[str, Any]) -> Options:
    from typing import get_args

    from clapsep_cli.audio.writers import Clip
    from clapsep_cli.jobs.tasks import Options
    from clapsep_cli.times import parse_time

    for option, value, known in (("clip", common.clip, get_args(Clip)), ("progress", common.progress, PROGRESS)):
        if value not in known:
            raise UsageError(f"there is no --{option} {value!r}; there are {', '.join(known)}")
    return Options(
        start=parse_time(common.start) if common.start is not None else 0.0,
        end=parse_time(common.end) if common.end is not None else None,
        lenient=common.lenient,
        stream=common.stream,
        format=common.format,
        subtype=common.subtype,
        clip=common.clip,  # type: ignore[arg-type]
        overwrite=common.overwrite,
        batch_size=common.batch_size,
        jobs=common.jobs,
        **measured,
    )


def _load(common: Common) -> Model:
    """Load a model, showing a download if it takes one."""
    from clapsep_cli.store.library import load_model

    with downloads(common.quiet) as shown:
        model = load_model(common.model, common.device, common.precision, say=notes(common.quiet), progress=shown)
    if common.adapter:
        from clapsep_cli.store.adapters import apply

        apply(model, common.adapter)
    return model


def _doubts(model: Model, jobs: Sequence[Job]) -> list[str]:
    """Reasons why results may be poor. Raises `QueryError` if all recordings share a query that cannot be used."""
    sets = {id(job.targets): job.targets for job in jobs}.values()
    doubts: dict[str, None] = {}  # a set that keeps its order
    for targets in sets:
        try:
            doubts |= dict.fromkeys(model.doubts(list(targets.values())))
        except ClapsepError:
            if len(sets) == 1:
                raise
    return list(doubts)


def _stops() -> list[signal.Signals]:
    """The signals that stop a run. SIGHUP, which a closed terminal sends, stays ignored under nohup."""
    stops = [signal.SIGINT, signal.SIGTERM]
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        stops.append(signal.SIGHUP)
    return stops


@contextmanager
def stoppable(quiet: bool, said: str = "stopping after the windows at hand") -> Iterator[threading.Event]:
    """An event that the first Ctrl-C, SIGTERM or SIGHUP sets; the second one interrupts."""
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        with suppress(RuntimeError, OSError):  # it came while something else was being printed, or nothing can be
            notes(quiet)(f"{said}; once more to stop at once")

    before = {number: signal.signal(number, ask) for number in _stops()}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _named(path: Path, stream: str) -> str:
    return f"standard {stream}" if str(path) == "-" else str(path)


class _Lines:
    """Prints a run of `count` recordings: for people, or as JSON; on stderr if stdout carries audio."""

    def __init__(self, common: Common, model: Model, count: int) -> None:
        self.json, self.model, self.count = common.json, model, count
        self.silent, self.say = common.quiet and not common.json, notes(common.quiet)
        self.piped = _to_stdout(common)
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []

    def _print(self, line: str) -> None:
        if not self.silent:
            echo(line, sys.stderr if self.piped else sys.stdout)

    def begin(self, jobs: Sequence[Job]) -> None:
        """Print the model, the device and the queries."""
        if self.json:
            return
        revision = f" ({self.model.revision})" if self.model.revision else ""
        sets = {id(job.targets): job.targets for job in jobs}
        asked = _described(jobs[0].targets) if len(sets) == 1 else "queries of their own"
        asked = textwrap.shorten(asked, HEADER_LETTERS, placeholder=" …")
        self._print(f"{self.model.name}{revision} on {self.model.device}, {self.model.precision}: {asked}")

    def _object(self, path: Path, status: str, **facts: Any) -> None:
        model = {"model": self.model.name, "revision": self.model.revision, "device": str(self.model.device)}
        told = {"input": str(path), "status": status, **model, "precision": self.model.precision, **facts}
        self._print(json.dumps(told))  # in ASCII, so that it passes whatever the terminal's encoding is

    def skipped(self, job: Job) -> None:
        self.outcomes[BEFORE] += 1
        if self.json:
            self._object(job.input.path, "skipped", outputs={part: str(path) for part, path in job.outputs.items()})
        elif self.count < 2:  # of many, it is enough to know the number
            self._print(f"{job.input.path}: done before{'' if job.outputs else ', without what was asked for'}")

    def failed(self, failure: Failure) -> None:
        self.outcomes[FAULTY] += 1
        self.failures.append(str(failure.error))
        if self.json:
            self._object(failure.mixture, "failed", error=str(failure.error))
        note(str(failure.error))

    def done(self, done: Extraction) -> None:
        self.outcomes[DONE if done.outputs else ABSENT] += 1
        for line in done.notes:
            self.say(line)
        for part, count in done.clipped.items():
            if count:
                were = "samples were" if count > 1 else "sample was"
                name = _named(done.outputs[part], "output")
                self.say(f"{name}: {count} {were} over full scale and clipped; see --clip")
        if self.json:
            facts = done.as_json()
            self._object(facts.pop("mixture"), "done" if done.outputs else "absent", **facts)
        else:
            self._describe(done)

    def _describe(self, done: Extraction) -> None:
        speed = done.seconds / max(done.elapsed, 1e-6)
        name = _named(done.mixture, "input")
        self._print(f"{name}: {done.seconds:.2f} s in {done.elapsed:.2f} s ({speed:.0f} times real time)")
        if done.gain != 1:
            self._print(f"  all parts were lowered by {-20 * log10(done.gain):.2f} dB so that nothing clips")
        for target, score in done.presence.items():
            left = "; not written" if target in done.absent else ""
            self._print(f"  presence of {target}: {_presence(score)}{left}")
        if not done.outputs:
            self._print("  nothing written: below --min-presence")
        named = {**done.outputs, **({"picture": done.picture} if done.picture else {})}
        width = max(map(len, named), default=0)
        for part, path in named.items():
            self._print(f"  {part:{width}}  {_named(path, 'output')}")

    def end(self) -> None:
        """Print a summary of several recordings, with the reasons of those that failed."""
        if self.count < 2:
            return
        left = self.count - sum(self.outcomes.values())
        told = [f"{self.outcomes[what]} {what}" for what in OUTCOMES if self.outcomes[what]]
        if not self.json:
            self._print(f"{self.count} recordings: {', '.join([*told, *([f'{left} left'] if left else [])])}")
        if self.failures:
            note("\n  ".join([f"{len(self.failures)} of {self.count} files failed:", *self.failures]))


def _presence(score: Mapping[str, float] | None) -> str:
    if score is None:
        return "unknown"
    likely = ", probably not there" if score["score"] < 0 else ""
    return "{score:.2f}{} (likeness {after:.2f}, of the mixture {before:.2f})".format(likely, **score)


def _described(targets: Mapping[str, Query]) -> str:
    single = list(targets) == ["target"]
    return "; ".join(query.describe() if single else f"{name}: {query.describe()}" for name, query in targets.items())

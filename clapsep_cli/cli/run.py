"""Runs the jobs of `extract` and `separate`, and prints the results."""

from __future__ import annotations

import json
import signal
import sys
import textwrap
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from math import log10
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import typer

from clapsep_cli.cli.options import Setup
from clapsep_cli.cli.terminal import Reporter, downloads, echo, note, notes
from clapsep_cli.errors import ClapsepError, ClapsepWarning, StoppedError, UsageError
from clapsep_cli.registry import FAMILIES, MODELS
from clapsep_cli.startup import set_threads

if TYPE_CHECKING:
    from clapsep_cli.jobs.inputs import Input
    from clapsep_cli.jobs.planning import Requests, Todo
    from clapsep_cli.jobs.tasks import Extraction, Failure, Job, Options
    from clapsep_cli.query import Query
    from clapsep_cli.store.checkpoint import Model

FAILED = 1  # exit code if a recording or an output failed; usage errors exit with 2
DONE, ABSENT, BEFORE, FAULTY = OUTCOMES = ("done", "without what was asked for", "done before", "failed")
HEADER_LETTERS = 160  # of the queries in the first line


def find(inputs: Sequence[str], recursive: bool, out: Path | None) -> list[Input]:
    """Find the recordings that the arguments name, but no outputs of earlier runs (see `expand`)."""
    from clapsep_cli.audio.writers import read_software
    from clapsep_cli.jobs.inputs import expand

    if not inputs:
        raise UsageError("no recordings: name files, folders, patterns or @list.txt")
    folder = None if _is_stdout(out) else out
    return expand(inputs, recursive, folder, lambda path: read_software(path).startswith("clapsep "))


def _is_stdout(out: Path | None) -> bool:
    return str(out) == "-"


def carry_out(asked: Requests, options: Options, setup: Setup) -> None:
    """Separate the recordings and print the results.

    Args:
        asked: recordings, each with its targets by name.
        options: how they are read and written.
        setup: the model, the device and the messages.

    Raises:
        typer.Exit: a recording failed.
        ClapsepError: nothing can be done.
    """
    from clapsep_cli.jobs.planning import lay_out, plan
    from clapsep_cli.query import check_taken

    set_threads(setup.threads)
    if _is_stdout(options.out) and setup.json:
        raise UsageError("-o - leaves stdout to the audio: use it without --json")
    jobs = lay_out(asked, options)  # before a model is loaded, perhaps downloaded
    _, *others = sets = _sets(jobs)
    if setup.model in MODELS and not others:
        check_taken(sets[0].values(), FAMILIES[MODELS[setup.model].family].takes, setup.model)
    model = load(setup.model, setup.device, setup.precision, setup.adapter, setup.quiet)
    if options.presence is None:
        options = replace(options, presence=setup.json and model.tells_likeness)
    model.refine(setup.refine)
    todo = plan(jobs, model, options)
    _warn_of_doubts(model, jobs)
    lines = _Lines(setup, model, len(jobs), sys.stderr if _is_stdout(options.out) else sys.stdout)
    if todo.jobs:
        lines.begin(jobs)
    with stoppable(setup.quiet) as stop:
        _work(todo, model, options, setup, lines, stop)
    if lines.failures:
        raise typer.Exit(FAILED)


def keep_on(folder: Path, recursive: bool, targets: Mapping[str, Query], options: Options, setup: Setup) -> NoReturn:
    """Separate recordings as they arrive in a folder, until the user stops it.

    Args:
        folder: to watch.
        recursive: watch the folders below it, too.
        targets: of each recording, by name.
        options: how they are read and written.
        setup: the model, the device and the messages.

    Raises:
        StoppedError: the user stopped it.
        ClapsepError: nothing can be done.
    """
    from clapsep_cli.audio.writers import read_software
    from clapsep_cli.jobs.inputs import Input
    from clapsep_cli.jobs.planning import lay_out, plan
    from clapsep_cli.jobs.tasks import Failure
    from clapsep_cli.jobs.watch import arrivals

    set_threads(setup.threads)
    options = replace(options, skip_existing=True)
    lay_out([(Input(folder / "any.wav", Path("any.wav")), targets)], options)  # before a model is loaded
    model = load(setup.model, setup.device, setup.precision, setup.adapter, setup.quiet)
    if options.presence is None:
        options = replace(options, presence=setup.json and model.tells_likeness)
    model.refine(setup.refine)
    for doubt in model.doubts(list(targets.values())):
        warnings.warn(doubt, ClapsepWarning, stacklevel=2)
    notes(setup.quiet)(f"watching {folder}; Ctrl-C ends it")
    with stoppable(setup.quiet) as stop:
        ours = lru_cache(lambda path, _: read_software(path).startswith("clapsep "))
        known = arrivals(folder, stop, recursive, options.out, lambda path: ours(path, path.stat().st_mtime_ns))
        for items in known:
            lines = _Lines(setup, model, len(items), sys.stdout)
            jobs = []
            for item in items:
                try:
                    jobs += lay_out([(item, targets)], options)
                except ClapsepError as error:
                    lines.failed(Failure(item.path, error))
            _work(plan(jobs, model, options), model, options, setup, lines, stop)
    raise StoppedError("stopped watching; finished recordings are kept, and skipped the next time")


def _work(todo: Todo, model: Model, options: Options, setup: Setup, lines: _Lines, stop: threading.Event) -> None:
    from clapsep_cli.jobs.batch import run
    from clapsep_cli.jobs.tasks import Failure

    for job in todo.done:
        lines.skipped(job)
    for failure in todo.blocked:
        lines.failed(failure)
    try:
        with (
            Reporter(setup.progress, setup.quiet, len(todo.jobs)) as reporter,
            closing(run(todo.jobs, model, options, reporter.update, stop)) as outcomes,
        ):
            for outcome in outcomes:
                reporter.finish(outcome.mixture, isinstance(outcome, Failure))
                lines.failed(outcome) if isinstance(outcome, Failure) else lines.done(outcome)
    except (StoppedError, KeyboardInterrupt):
        lines.end()
        raise
    lines.end()


def load(name: str | None, device: str, precision: str, adapter: Path | None, quiet: bool) -> Model:
    """Load a model with its adapter, and show a download if one is needed."""
    from clapsep_cli.store.library import load_model

    with downloads(quiet) as shown:
        model = load_model(name, device, precision, say=notes(quiet), progress=shown)
    if adapter:
        from clapsep_cli.store.adapters import apply

        apply(model, adapter)
    return model


def _sets(jobs: Sequence[Job]) -> list[Mapping[str, Query]]:
    """Return the different sets of targets."""
    return list({id(job.targets): job.targets for job in jobs}.values())


def _warn_of_doubts(model: Model, jobs: Sequence[Job]) -> None:
    """Warn where results may be poor. Raises `QueryError` if all recordings share a query that cannot be used."""
    sets = _sets(jobs)
    for targets in sets:
        try:
            for doubt in model.doubts(list(targets.values())):
                warnings.warn(doubt, ClapsepWarning, stacklevel=2)
        except ClapsepError:
            if len(sets) == 1:
                raise


def _stops() -> list[signal.Signals]:
    """Return the signals that stop a run. SIGHUP, sent by a closed terminal, stays ignored under nohup."""
    stops = [signal.SIGINT, signal.SIGTERM]
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        stops.append(signal.SIGHUP)
    return stops


@contextmanager
def stoppable(quiet: bool, said: str = "stopping after the windows at hand") -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C, SIGTERM or SIGHUP sets; the second one interrupts."""
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        with suppress(RuntimeError, OSError):  # the signal interrupted another print, or stderr is closed
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
    """Prints the results of `count` recordings on `stream`, as text or as JSON."""

    def __init__(self, setup: Setup, model: Model, count: int, stream: TextIO) -> None:
        self.json, self.model, self.count, self.stream = setup.json, model, count, stream
        self.silent, self.say = setup.quiet and not setup.json, notes(setup.quiet)
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []

    def _print(self, line: str) -> None:
        if not self.silent:
            echo(line, self.stream)

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
        self._print(json.dumps(told))  # in ASCII, for any encoding of the terminal

    def skipped(self, job: Job) -> None:
        self.outcomes[BEFORE] += 1
        if self.json:
            self._object(job.input.path, "skipped", outputs={part: str(path) for part, path in job.outputs.items()})
        elif self.count < 2:  # of several, only the number is printed
            self._print(f"{job.input.path}: done before{'' if job.outputs else ', without what was asked for'}")

    def failed(self, failure: Failure) -> None:
        self.outcomes[FAULTY] += 1
        self.failures.append(str(failure.error))
        if self.json:
            self._object(failure.mixture, "failed", error=str(failure.error))
        note(str(failure.error))

    def done(self, done: Extraction) -> None:
        self.outcomes[DONE if done.found else ABSENT] += 1
        for line in done.notes:
            self.say(line)
        for part, count in done.clipped.items():
            if count:
                were = "samples were" if count > 1 else "sample was"
                name = _named(done.outputs[part], "output")
                self.say(f"{name}: {count} {were} over full scale and clipped; see --clip")
        if self.json:
            facts = done.as_json()
            self._object(facts.pop("mixture"), "done" if done.found else "absent", **facts)
        else:
            self._describe(done)

    def _describe(self, done: Extraction) -> None:
        speed = done.seconds / max(done.elapsed, 1e-6)
        name = _named(done.mixture, "input")
        self._print(
            f"{name}: {done.seconds:.2f} s in {done.elapsed:.2f} s ({speed:.{int(speed < 10)}f} times real time)"
        )
        if done.gain != 1:
            self._print(f"  all parts were lowered by {-20 * log10(done.gain):.2f} dB so that nothing clips")
        for target, score in done.presence.items():
            left = "; not written" if target in done.absent else ""
            self._print(f"  presence of {target}: {_presence(score)}{left}")
        if not done.found:
            self._print("  nothing written: below --min-presence")
        for target, events in done.events.items():
            sounding = sum(event.end - event.start for event in events)
            self._print(f"  {target} sounds {len(events)} times, {sounding:.2f} s in all")
        extras = {"picture": done.picture, "events": done.events_file}
        named = {**done.outputs, **{name: path for name, path in extras.items() if path}}
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

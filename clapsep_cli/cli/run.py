"""Runs the jobs of `extract` and `separate`, and prints the results."""

from __future__ import annotations

import json
import os
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
from clapsep_cli.registry import MODELS
from clapsep_cli.startup import set_threads

if TYPE_CHECKING:
    from clapsep_cli.jobs.inputs import Input
    from clapsep_cli.jobs.job import Cluster, Job, Loading, Options, Outcome
    from clapsep_cli.jobs.planning import Todo
    from clapsep_cli.jobs.requests import Requests
    from clapsep_cli.jobs.stores import Stage
    from clapsep_cli.query import Query
    from clapsep_cli.store.checkpoint import Model

FAILED = 1  # exit code if a recording or an output failed; usage errors exit with 2
STATUSES = {"done": "done", "absent": "without the target", "skipped": "done before", "failed": "failed"}
HEADER_LETTERS = 160  # letters of the queries in the first line, at most


def find_recordings(inputs: Sequence[str], recursive: bool, out: Path | None, stage: Stage) -> list[Input]:
    """Find the recordings that the arguments name, without outputs of earlier runs (see `expand`)."""
    from clapsep_cli.audio.writers import is_output
    from clapsep_cli.jobs.inputs import expand

    if not inputs:
        raise UsageError("no recordings: name files, folders, patterns or @list.txt")
    return expand(inputs, recursive, None if _is_stdout(out) else out, is_output, stage)


def _is_stdout(out: Path | None) -> bool:
    return str(out) == "-"


def run_requests(requests: Requests, options: Options, setup: Setup, stage: Stage) -> None:
    """Separate the recordings and print the results.

    Args:
        requests: recordings, each with its targets by name.
        options: how they are read and written.
        setup: the model, the device and the messages.
        stage: mirrors the stores of URLs.

    Raises:
        typer.Exit: a recording failed.
        ClapsepError: no recording can be separated.
    """
    if _is_stdout(options.out) and setup.json:
        raise UsageError("-o - leaves stdout to the audio: use it without --json")
    _check_scratch(setup, stage)
    set_threads(setup.threads)  # before anything else imports torch
    from clapsep_cli.jobs.planning import lay_out
    from clapsep_cli.query import check_taken

    jobs = lay_out(requests, options, stage)  # before a model is loaded, perhaps downloaded
    lines = _Lines(setup, len(jobs), sys.stderr if _is_stdout(options.out) else sys.stdout)
    if options.shard is not None and not jobs:
        lines.say(f"no recordings in shard {options.shard[0]}/{options.shard[1]} of {len(requests)}")
        return
    _, *others = sets = _different_targets(jobs)
    if (name := setup.loading.model) in MODELS and not others:
        check_taken(sets[0].values(), MODELS[name].takes, name)
    if setup.cluster:
        _run_on_cluster(jobs, options, setup, setup.cluster, stage, lines)
    else:
        _run_here(jobs, options, setup, stage, lines)
    lines.end()
    if lines.failures:
        raise typer.Exit(FAILED)


def _check_scratch(setup: Setup, stage: Stage) -> None:
    if setup.scratch is not None and stage.root is None:
        raise UsageError("--scratch is for copies of the files at URLs, and there is no URL: leave it out")


def watch_folder(
    folder: Path, recursive: bool, targets: Mapping[str, Query], options: Options, setup: Setup, stage: Stage
) -> NoReturn:
    """Separate recordings as they arrive in a folder, until the user stops it.

    Args:
        folder: to watch.
        recursive: watch the folders below it, too.
        targets: of each recording, by name.
        options: how they are read and written.
        setup: the model, the device and the messages.
        stage: mirrors the stores of URLs.

    Raises:
        StoppedError: the user stopped it.
        ClapsepError: no recording can be separated.
    """
    from clapsep_cli.audio.writers import is_output
    from clapsep_cli.jobs.inputs import Input
    from clapsep_cli.jobs.job import Failure, row_of
    from clapsep_cli.jobs.planning import lay_out, plan
    from clapsep_cli.jobs.watch import arrivals

    _check_scratch(setup, stage)
    if setup.cluster:
        raise UsageError("--engine ray needs a fixed list of recordings: use it without --watch")
    set_threads(setup.threads)
    options = replace(options, skip_existing=True)
    lay_out([(Input(folder / "any.wav", Path("any.wav")), targets)], options, stage)  # before a model is loaded
    model, options = _load_model(options, setup, stage)
    _warn_of_doubts(model, [targets])
    notes(setup.quiet)(f"watching {folder}; Ctrl-C ends it")
    with stoppable(setup.quiet) as stop:
        ours = lru_cache(lambda path, _: is_output(path))  # asked once for each version of a file
        for items in arrivals(folder, stop, recursive, options.out, lambda path: ours(path, path.stat().st_mtime_ns)):
            jobs, failed = [], []
            for item in items:
                try:
                    jobs += lay_out([(item, targets)], options, stage)
                except ClapsepError as error:
                    failed.append(Failure(item.path, error))
            lines = _Lines(setup, len(jobs) + len(failed), sys.stdout)
            for failure in failed:
                lines.show(row_of(failure, model))
            _process(plan(jobs, model, options, stage), model, options, setup, stage, lines, stop)
            lines.end()
    raise StoppedError("stopped watching; finished recordings are kept, and skipped the next time")


def load(loading: Loading, stage: Stage, quiet: bool) -> Model:
    """Load a model with its adapter, and show a download if one is needed."""
    with downloads(quiet) as shown:
        return loading.load(stage, notes(quiet), shown)


def _load_model(options: Options, setup: Setup, stage: Stage) -> tuple[Model, Options]:
    """Load the model; return it, and the options with `presence` set for `--json` where the model can measure it."""
    model = load(setup.loading, stage, setup.quiet)
    if options.presence is None:
        options = replace(options, presence=setup.json and model.tells_likeness)
    return model, options


def _run_here(jobs: Sequence[Job], options: Options, setup: Setup, stage: Stage, lines: _Lines) -> None:
    """Plan and run the jobs in this process."""
    from clapsep_cli.jobs.planning import plan

    model, options = _load_model(options, setup, stage)
    todo = plan(jobs, model, options, stage)
    if todo.jobs or not todo.done:  # networks are read only if they are needed
        _warn_of_doubts(model, _different_targets(jobs))
    if todo.jobs:
        lines.begin(_different_targets(jobs), model)
    with stoppable(setup.quiet) as stop:
        _process(todo, model, options, setup, stage, lines, stop)


def _process(
    todo: Todo, model: Model, options: Options, setup: Setup, stage: Stage, lines: _Lines, stop: threading.Event
) -> None:
    """Run the planned jobs, and print all results."""
    from clapsep_cli.jobs.batch import run
    from clapsep_cli.jobs.job import Failure, Skipped, row_of

    known: list[Outcome] = [*map(Skipped, todo.done), *todo.blocked]
    for outcome in known:
        lines.show(row_of(outcome, model))
    with (
        lines.summary_if_stopped(),
        Reporter(setup.progress, setup.quiet, len(todo.jobs)) as reporter,
        closing(run(todo.jobs, model, options, reporter.update, stop, stage)) as outcomes,
    ):
        for outcome in outcomes:
            reporter.finish(outcome.mixture, isinstance(outcome, Failure))
            lines.show(row_of(outcome, model))


def _run_on_cluster(
    jobs: Sequence[Job], options: Options, setup: Setup, cluster: Cluster, stage: Stage, lines: _Lines
) -> None:
    """Plan and run the jobs in the workers of a cluster."""
    from clapsep_cli.jobs.ray_engine import run_on_ray

    if _is_stdout(options.out) or any(str(job.input.path) == "-" for job in jobs):
        raise UsageError("--engine ray reads and writes files: name them, or leave it out")
    if options.presence is None:
        options = replace(options, presence=setup.json)  # where the model can measure it
    with (
        _without_prints() as lines.stream,
        lines.summary_if_stopped(),
        stoppable(setup.quiet) as stop,
        Reporter(setup.progress, setup.quiet, len(jobs)) as reporter,
        closing(run_on_ray(jobs, options, setup.loading, cluster, stage, stop)) as rows,
    ):
        for row in rows:
            reporter.finish(Path(row["input"]), row["status"] == "failed")
            lines.show(row)
        lines.end()


@contextmanager
def _without_prints() -> Iterator[TextIO]:
    """Yield a stream to stdout, and send to stderr all that libraries print on stdout, also from C."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors) as own:
        try:
            os.dup2(2, 1)
            yield own
        finally:
            own.flush()
            os.dup2(own.fileno(), 1)


def _different_targets(jobs: Sequence[Job]) -> list[Mapping[str, Query]]:
    """Return the different sets of targets."""
    return list({id(job.targets): job.targets for job in jobs}.values())


def _warn_of_doubts(model: Model, sets: Sequence[Mapping[str, Query]]) -> None:
    """Warn if results may be poor. Raises `QueryError` if all recordings share a query that cannot be used."""
    for targets in sets:
        try:
            for doubt in model.doubts(list(targets.values())):
                warnings.warn(doubt, ClapsepWarning, stacklevel=2)
        except ClapsepError:
            if len(sets) == 1:
                raise


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

    stops = [signal.SIGINT, signal.SIGTERM]
    # A closed terminal sends SIGHUP; under nohup it stays ignored.
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        stops.append(signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in stops}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _named(path: str, stream: str) -> str:
    return f"standard {stream}" if path == "-" else path


class _Lines:
    """Prints the results of `count` recordings on `stream`, as text or as JSON."""

    def __init__(self, setup: Setup, count: int, stream: TextIO) -> None:
        self.json, self.count, self.stream = setup.json, count, stream
        self.silent, self.say = setup.quiet and not setup.json, notes(setup.quiet)
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []
        self.over = False

    def _print(self, line: str) -> None:
        if not self.silent:
            echo(line, self.stream)

    def begin(self, sets: Sequence[Mapping[str, Query]], model: Model) -> None:
        """Print the model, the device and the queries."""
        if self.json:
            return
        revision = f" ({model.revision})" if model.revision else ""
        asked = _described(sets[0]) if len(sets) == 1 else "queries of their own"
        asked = textwrap.shorten(asked, HEADER_LETTERS, placeholder=" …")
        self._print(f"{model.name}{revision} on {model.device}, {model.precision}: {asked}")

    def show(self, row: Mapping[str, Any]) -> None:
        """Print the result of a recording (see `row_of`)."""
        status = row["status"]
        self.outcomes[status] += 1
        if self.json:
            self._print(json.dumps(row))  # in ASCII, for any encoding of the terminal
        if status == "failed":
            self.failures.append(row["error"])
            note(row["error"])
        elif status == "skipped":
            if not self.json and self.count < 2:  # for several, only their number is printed
                without = "" if row["outputs"] or row.get("events_file") else ", without the target"
                self._print(f"{row['input']}: done before{without}")
        else:
            self._warn(row)
            if not self.json:
                self._describe(row)

    def _warn(self, row: Mapping[str, Any]) -> None:
        for line in row["notes"]:
            self.say(line)
        for part, count in row["clipped"].items():
            if count:
                were = "samples were" if count > 1 else "sample was"
                name = _named(row["outputs"][part], "output")
                self.say(f"{name}: {count} {were} over full scale and clipped; see --clip")

    def _describe(self, row: Mapping[str, Any]) -> None:
        speed = row["seconds"] / max(row["elapsed"], 1e-6)
        name = _named(row["input"], "input")
        times = f"{speed:.{int(speed < 10)}f} times real time"
        self._print(f"{name}: {row['seconds']:.2f} s in {row['elapsed']:.2f} s ({times})")
        if row["gain"] != 1:
            self._print(f"  all parts were lowered by {-20 * log10(row['gain']):.2f} dB so that nothing clips")
        for target, score in row["presence"].items():
            left = "; not written" if target in row["absent"] else ""
            self._print(f"  presence of {target}: {_presence(score)}{left}")
        if row["status"] == "absent":
            self._print("  nothing written: below --min-presence")
        for target, events in row["events"].items():
            sounding = sum(event["end"] - event["start"] for event in events)
            self._print(f"  {target} sounds {len(events)} times, {sounding:.2f} s in all")
        extras = {"picture": row["picture"], "events": row["events_file"]}
        named = {**row["outputs"], **{name: path for name, path in extras.items() if path}}
        width = max(map(len, named), default=0)
        for part, path in named.items():
            self._print(f"  {part:{width}}  {_named(path, 'output')}")

    @contextmanager
    def summary_if_stopped(self) -> Iterator[None]:
        """Print the summary if the user stops the run."""
        try:
            yield
        except (StoppedError, KeyboardInterrupt):
            self.end()
            raise

    def end(self) -> None:
        """Print the summary of several recordings, with the errors; only once."""
        if self.count < 2 or self.over:
            return
        self.over = True
        left = self.count - sum(self.outcomes.values())
        told = [f"{self.outcomes[status]} {words}" for status, words in STATUSES.items() if self.outcomes[status]]
        told += [f"{left} left"] if left else []
        if not self.json:
            self._print(f"{self.count} recordings: {', '.join(told)}")
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

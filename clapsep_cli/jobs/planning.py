"""Makes jobs from requests: chooses output paths, checks options, and finds recordings that are done already."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import get_args

from clapsep_cli.audio.encoding import choose_encoding
from clapsep_cli.audio.film import Film
from clapsep_cli.audio.samples import check_expand
from clapsep_cli.audio.sources import STDIN, recordings
from clapsep_cli.audio.writers import STDOUT, Clipping
from clapsep_cli.errors import AudioError, ClapsepWarning, OutputError, UsageError
from clapsep_cli.files import clear_unfinished, is_there
from clapsep_cli.jobs.batch import run
from clapsep_cli.jobs.exchange import blocking, done_before
from clapsep_cli.jobs.inputs import Input, in_shard
from clapsep_cli.jobs.job import Extraction, Failure, Job, JobProgress, Options
from clapsep_cli.jobs.outputs import MARKS, TEMPLATE, check_outputs, output_paths
from clapsep_cli.jobs.requests import Requests
from clapsep_cli.jobs.resume import signature
from clapsep_cli.jobs.stores import Stage
from clapsep_cli.listening.events import FORMATS as EVENT_FORMATS
from clapsep_cli.listening.plot import check_installed
from clapsep_cli.query import RESIDUAL, Query, check_targets
from clapsep_cli.store.checkpoint import Model

# The options that change what is written; `mutual` changes the queries instead.
DECISIVE = ("start", "end", "stream", "expand", "format", "subtype", "remux", "clip", "consistent", "min_presence")


@dataclass(frozen=True)
class Todo:
    """Jobs to run, jobs already done, and recordings that cannot be processed."""

    jobs: list[Job]
    done: list[Job]
    blocked: list[Failure]


def lay_out(asked: Requests, options: Options = Options(), stage: Stage = Stage()) -> list[Job]:
    """Make a job for each recording of this shard, and check everything that needs no model.

    Args:
        asked: recordings, each with its targets by name; of all shards, so that two outputs with one path are found.
        options: how they are read and written.
        stage: mirrors the stores of recordings and outputs.

    Raises:
        UsageError: options contradict each other or have an unknown value.
        AudioError: a recording of a query does not exist.
        OutputError: two outputs have the same path, or one exists and is neither replaced nor skipped.
    """
    _check(asked, options)
    if options.out == STDOUT:
        _check_stdout(asked, options)
    jobs = [_job(item, targets, options, stage) for item, targets in asked]
    mine = [job for job in jobs if options.shard is None or in_shard(job.input, *options.shard)]
    if options.out != STDOUT:
        own = {job.input for job in mine}
        files = [(job.input, {**job.outputs, **job.extras}) for job in jobs]
        check_outputs(files, options.overwrite, options.skip_existing, stage, own.__contains__)
    return mine


def plan(jobs: Sequence[Job], model: Model, options: Options = Options(), stage: Stage = Stage()) -> Todo:
    """Sort `jobs` into those to run and, with `options.skip_existing`, those already done.

    A recording is done if all its outputs were written for the same targets, model and options.

    Args:
        jobs: from `lay_out`.
        model: the model to run them with.
        options: the same as in `lay_out`.
        stage: the same as in `lay_out`.

    Raises:
        UsageError: an option does not suit this model.
    """
    for option, given in (("--presence", options.presence), ("--min-presence", options.min_presence is not None)):
        if given and not model.tells_likeness:
            raise UsageError(f"{option}: {model.name} cannot measure presence; use another --model")
    # One object for all recordings with the same targets: by its identity `run` finds windows for one batch.
    apart = {id(job.targets): model.apart(job.targets) for job in jobs}
    several = [job.targets for job in jobs if len(job.targets) > 1]
    if options.mutual is not None and several and all(apart[id(targets)] == targets for targets in several):
        raise UsageError(f"--mutual, --no-mutual: {model.name} never makes targets negative queries; leave it out")
    todo = Todo([], [], [])
    for job in jobs:
        if job.input.fault:
            todo.blocked.append(Failure(job.input.path, job.input.fault))
            continue
        job = job if options.mutual is False else replace(job, targets=apart[id(job.targets)])
        job = replace(job, key=_key(job, model, options))
        if options.skip_existing and (done := done_before(job, stage)) is not None:
            todo.done.append(done)
        elif options.overwrite or not options.skip_existing:
            todo.jobs.append(replace(job, overwrite=options.overwrite))
        elif (other := blocking(job, stage)) is not None:
            what = f"{other}: was not written for this query, model and options; --overwrite replaces it"
            todo.blocked.append(Failure(job.input.path, OutputError(what)))
        else:  # existing outputs are its own
            todo.jobs.append(replace(job, overwrite=any(map(is_there, job.outputs.values()))))
    clear_unfinished(path for job in jobs for path in job.outputs.values())
    clear_unfinished(job.marker for job in todo.jobs if job.marker)
    return todo


def _check(asked: Requests, options: Options) -> None:
    """Check what needs no model and no recording. Raises `UsageError`, `AudioError` for a missing query file."""
    if options.clip not in get_args(Clipping):
        raise UsageError(f"there is no --clip {options.clip!r}; there are {', '.join(get_args(Clipping))}")
    if options.plot:
        check_installed()
    if options.end is not None and options.end <= options.start:
        raise UsageError(f"--end is {options.end:g} s: nothing is left after --start, {options.start:g} s")
    check_expand(options.expand)
    if options.min_presence is not None and not isfinite(options.min_presence):
        raise UsageError(f"--min-presence is {options.min_presence}: give a number, 0 for a start")
    if options.presence is False and options.min_presence is not None:
        raise UsageError("--min-presence measures the presence: use it without --no-presence")
    _check_events(options)
    _check_remux(asked, options)
    if options.remove and options.residual is False:
        raise UsageError("--remove writes the residual, and --no-residual leaves it out: use one of them")
    try:
        choose_encoding(options.format, options.subtype, 44_100, 1, 16)  # of any recording, which is not open yet
    except OutputError as error:
        raise UsageError(str(error)) from error
    for item, targets in {id(targets): (item, targets) for item, targets in asked}.values():
        check_targets(targets)
        if unknown := set(options.only) - set(targets):
            raise UsageError(f"only: {min(unknown)} is not one of the targets ({', '.join(targets)})")
        if options.min_presence is not None and not all(q.pos or q.pos_audio or q.pos_spans for q in targets.values()):
            raise UsageError("--min-presence needs a positive query for each target, e.g. --pos")
        if item.path == STDIN and any(query.pos_spans or query.neg_spans for query in targets.values()):
            raise UsageError("a span of the mixture needs a file: standard input can be read only once")
        shots = [shot for query in targets.values() for shot in (*query.pos_audio, *query.neg_audio)]
        for path in (file for shot in shots if isinstance(shot, str | Path) for file in recordings(Path(shot))):
            if not is_there(path):
                raise AudioError(f"{path}: no such file")


def _first(given: Mapping[str, bool]) -> str | None:
    """Return the first option that is given."""
    return next((name for name, one in given.items() if one), None)


def _check_remux(asked: Requests, options: Options) -> None:
    idle = {
        "--format": options.format != "wav",
        "--subtype": options.subtype is not None,
        "--no-audio": options.no_audio,
        "--start": options.start > 0,
        "--end": options.end is not None,
        "-o -": options.out == STDOUT,
        "- (standard input)": any(item.path == STDIN for item, _ in asked),
    }
    if options.remux and (name := _first(idle)):
        raise UsageError(f"--remux writes whole films, of their own format: use it without {name}")


def _check_events(options: Options) -> None:
    if options.events_format not in EVENT_FORMATS:
        raise UsageError(f"there is no --events-format {options.events_format!r}; there are {', '.join(EVENT_FORMATS)}")
    given = {
        "--events-format": options.events_format != "csv",
        "--events-level": options.events_level is not None,
        "--events-presence": options.events_presence is not None,
        "--events-length": options.events_length is not None,
        "--no-audio": options.no_audio,
    }
    if not options.events and (name := _first(given)):
        raise UsageError(f"{name} is about events: use it with --events")
    bounds = (options.events_level, options.events_presence, options.events_length)
    if any(not isfinite(bound) for bound in bounds if bound is not None) or (options.events_length or 0) < 0:
        raise UsageError("--events-level, --events-presence and --events-length are numbers; the last is not below 0")
    idle = {
        "--format": options.format != "wav",
        "--subtype": options.subtype is not None,
        "--clip": options.clip != "warn",
        "--residual": options.residual is True,
        "--remove": options.remove,
        "-o -": options.out == STDOUT,
    }
    if options.no_audio and (name := _first(idle)):
        raise UsageError(f"--no-audio writes no audio, so {name} has no effect: leave it out")


def _check_stdout(asked: Requests, options: Options) -> None:
    if len(asked) > 1:
        raise UsageError(f"-o - writes one recording to standard output, not {len(asked)}; use another -o")
    parts = options.parts(list(asked[0][1]))
    if len(parts) > 1:
        raise UsageError(f"-o - writes one part to standard output, not {', '.join(parts)}; use another -o")
    if options.format != "wav":
        raise UsageError(f"standard output carries WAV alone, not {options.format}; use another -o")
    idle = {
        "--plot": options.plot,
        "--events": options.events,
        "--filename": options.filename is not None,
        "--skip-existing": options.skip_existing,
        "--overwrite": options.overwrite,
    }
    if name := _first(idle):
        raise UsageError(f"-o - makes no files, so {name} has no effect: leave it out, or use another -o")


def _job(item: Input, targets: Mapping[str, Query], options: Options, stage: Stage) -> Job:
    if item.fault:
        return Job(item, targets, {}, [])
    parts = options.parts(list(targets))
    whole = options.consistent or RESIDUAL in parts  # the residual needs all targets
    wanted = options.chosen(list(targets)) if options.no_audio else parts
    kept = [name for name in targets if whole or name in wanted]
    if options.out == STDOUT:
        return Job(item, targets, dict.fromkeys(parts, STDOUT), kept)
    out = Path() if options.out is None and item.path == STDIN else options.out
    filename = options.filename or TEMPLATE
    words = " ".join(
        word for query in targets.values() for word in (*query.pos, *(f"not {text}" for text in query.neg))
    )
    try:
        suffix = Film(item.path).suffix if options.remux else options.format
    except OutputError as error:
        return Job(replace(item, fault=error), targets, {}, [])
    outputs = output_paths(item, parts, out, filename, suffix, words)
    name = "{name}.{ext}" if "{name}" in filename else "{stem}.{ext}"
    picture = output_paths(item, ["plot"], out, name, "png")["plot"] if options.plot else None
    listed = None
    if options.events:
        name = "{name}.{part}.{ext}" if "{name}" in filename else TEMPLATE
        listed = output_paths(item, ["events"], out, name, EVENT_FORMATS[options.events_format])["events"]
    marks = item.path.parent / MARKS if out is None else out / MARKS / item.below.parent
    stage.check_writable(marks)
    marked = options.skip_existing or options.markers or stage.holds(marks)
    folder = marks if marked else None
    return Job(item, targets, outputs, kept, picture=picture, events=listed, marks=folder, marks_all=options.markers)


def _key(job: Job, model: Model, options: Options) -> str:
    """Return the key of this job that its outputs store; "" for standard input, which cannot be recognised again."""
    if job.input.path == STDIN:
        return ""
    decisive = {name: str(getattr(options, name)) for name in DECISIVE}
    if options.events:
        decisive |= {"events": f"{options.rules} {options.events_format} {options.no_audio}"}
    settings = {**decisive, "precision": model.precision}
    return signature(job.input.path, job.targets, model.identity, settings, job.input.stored)


def extract(
    mixture: str | Path,
    query: Query | Mapping[str, Query],
    model: Model,
    out: str | Path | None = None,
    options: Options = Options(),
    progress: JobProgress = lambda job, done, total: None,
) -> Extraction:
    """Separate the file `mixture` into `{stem}.target.wav`, or a file for each name, and `{stem}.residual.wav`.

    Outputs have the rate, channels and length of the recording, and, unless `options` say otherwise, its depth (at
    least 16 bit; float where it is lossy or float). A run that fails leaves nothing behind.

    Args:
        mixture: the recording.
        query: what to extract, or several by name.
        model: from `load_model`.
        out: output folder; by default `options.out`, and without that the folder of the recording.
        options: how recordings are read and written.
        progress: is called with the job, the seconds of it that are done, and their total.

    Returns:
        The paths of the outputs, and the measurements.

    Raises:
        UsageError: options contradict each other, have an unknown value, or do not fit the model.
        AudioError, QueryError, OutputError: the recording, a query or an output cannot be used.
    """
    out = options.out if out is None else out
    for name, value in (("mixture", mixture), *([("out", out)] if out is not None else [])):
        if not isinstance(value, str | Path):
            raise AudioError(f"{name}: must be a path, not {type(value).__name__}; for arrays, use separate")
    if not isinstance(model, Model):
        raise UsageError(f"model: must come from load_model, not {model!r}")
    if options.skip_existing:
        raise UsageError("skip_existing: is for the commands; extract would have no result to return")
    path = Path(mixture)
    options = replace(options, out=None if out is None else Path(out))
    todo = plan(lay_out([(Input(path, Path(path.name)), check_targets(query))], options), model, options)
    (outcome,) = run(todo.jobs, model, options, progress)
    for doubt in model.doubts(list(todo.jobs[0].targets.values())):
        warnings.warn(doubt, ClapsepWarning, stacklevel=2)
    if not isinstance(outcome, Extraction):
        raise outcome.error
    return outcome

"""Makes jobs from requests: which parts of which recordings go where, and which are done already."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import isfinite
from pathlib import Path

from clapsep_cli.audio.encoding import choose_encoding
from clapsep_cli.audio.sources import STDIN, recordings
from clapsep_cli.audio.writers import STDOUT, read_software
from clapsep_cli.errors import AudioError, ClapsepWarning, OutputError, UsageError
from clapsep_cli.files import clear_unfinished, is_there
from clapsep_cli.jobs.batch import run
from clapsep_cli.jobs.inputs import Input
from clapsep_cli.jobs.outputs import MARKS, TEMPLATE, Destination, check_outputs, output_paths
from clapsep_cli.jobs.plot import check_installed
from clapsep_cli.jobs.resume import finished, in_the_way, read_absent, signature
from clapsep_cli.jobs.tasks import Extraction, Failure, Job, JobProgress, Options
from clapsep_cli.query import RESIDUAL, Query, check_targets
from clapsep_cli.store.checkpoint import Model

Requests = Sequence[tuple[Input, Mapping[str, Query]]]  # recordings, each with its targets by name
NOT_IN_THE_RESULT = {"overwrite", "batch_size", "jobs", "presence", "lenient"}  # of the options


@dataclass(frozen=True)
class Todo:
    """`jobs` to run, those `done` by an earlier run, and the recordings that cannot be processed (`blocked`)."""

    jobs: list[Job]
    done: list[Job]
    blocked: list[Failure]


@dataclass
class _Typical:
    """Placeholder used to validate format options before a recording is opened."""

    rate: int = 44_100
    channels: int = 1
    bits: int | None = 16


def lay_out(
    asked: Requests,
    options: Options = Options(),
    destination: Destination = Destination(),
    skip: bool = False,
) -> list[Job]:
    """Make a job for each recording with its targets by name, and check all that needs no model.

    Raises `UsageError` for options that contradict each other, `AudioError` for a query recording that does not exist,
    and `OutputError` where two outputs have the same path or one exists and is neither replaced nor skipped.
    """
    _check(asked, options, destination)
    if destination.folder == STDOUT:
        _check_stdout(asked, options, destination, skip)
    jobs = [_job(item, targets, options, destination, skip) for item, targets in asked]
    if destination.folder != STDOUT:
        check_outputs([(job.input, _files(job)) for job in jobs], options.overwrite, skip)
    return jobs


def plan(
    jobs: Sequence[Job],
    model: Model,
    options: Options = Options(),
    skip: bool = False,
    mutual: bool = False,
) -> Todo:
    """Sort `jobs` into those to run with `model` and those already done; with `skip`, the latter are skipped.

    Done is a recording whose outputs were all written for the same targets, model and options. Where it is `mutual`,
    each of several targets leaves what the others ask for. Raises `UsageError` for what this model cannot do.
    """
    for option, given in (("--presence", options.presence), ("--min-presence", options.min_presence is not None)):
        if given and not model.tells_likeness:
            raise UsageError(f"{option}: {model.name} cannot tell how alike sounds are; use another --model")
    # One object for all recordings that share their targets: by that `run` tells what can be done in one go.
    apart = {id(job.targets): model.apart(job.targets) if mutual else job.targets for job in jobs}
    todo = Todo([], [], [])
    for job in jobs:
        if job.input.fault:
            todo.blocked.append(Failure(job.input.path, job.input.fault))
            continue
        job = replace(job, targets=apart[id(job.targets)])
        job = replace(job, key=_key(job, model, options))
        if skip and (done := _as_done(job)) is not None:
            todo.done.append(done)
        elif options.overwrite or not skip:
            todo.jobs.append(replace(job, overwrite=options.overwrite))
        elif (blocking := _in_the_way(job)) is not None:
            what = f"{blocking}: was not written for this query, model and options; --overwrite replaces it, too"
            todo.blocked.append(Failure(job.input.path, OutputError(what)))
        else:  # what is there of it is its own
            todo.jobs.append(replace(job, overwrite=any(map(is_there, job.outputs.values()))))
    clear_unfinished(path for job in jobs for path in job.outputs.values())
    clear_unfinished(job.marker for job in todo.jobs if job.marker)
    return todo


def _check(asked: Requests, options: Options, destination: Destination) -> None:
    """Raise `UsageError` for options that contradict each other, `AudioError` for query files that do not exist."""
    if destination.plot:
        check_installed()
    if options.end is not None and options.end <= options.start:
        raise UsageError(f"--end is {options.end:g} s: nothing is left after --start, {options.start:g} s")
    if options.min_presence is not None and not isfinite(options.min_presence):
        raise UsageError(f"--min-presence is {options.min_presence}: give a number, 0 for a start")
    if options.presence is False and options.min_presence is not None:
        raise UsageError("--min-presence tells the presence: use it without --no-presence")
    if destination.remove and destination.residual is False:
        raise UsageError("--remove writes the residual, and --no-residual leaves it out: use one of them")
    try:
        choose_encoding(options.format, options.subtype, _Typical())
    except OutputError as error:
        raise UsageError(str(error)) from error
    for item, targets in {id(targets): (item, targets) for item, targets in asked}.values():
        check_targets(targets)
        if options.min_presence is not None and not all(_positive(query) for query in targets.values()):
            raise UsageError("--min-presence needs to know what to look for: give a positive query, e.g. --pos")
        if item.path == STDIN and any(query.pos_spans or query.neg_spans for query in targets.values()):
            raise UsageError("a span of the mixture needs a file: standard input can be read only once")
        for path in (path for query in targets.values() for path in _shots(query)):
            if not is_there(path):
                raise AudioError(f"{path}: no such file")


def _check_stdout(asked: Requests, options: Options, destination: Destination, skip: bool) -> None:
    if len(asked) > 1:
        raise UsageError(f"-o - writes one recording to standard output, not {len(asked)}; use another -o")
    parts = destination.parts(list(asked[0][1]))
    if len(parts) > 1:
        raise UsageError(f"-o - writes one part to standard output, not {', '.join(parts)}; use another -o")
    if options.format != "wav":
        raise UsageError(f"standard output carries WAV alone, not {options.format}; use another -o")
    idle = {
        "--plot": destination.plot,
        "--filename": destination.filename != TEMPLATE,
        "--skip-existing": skip,
        "--overwrite": options.overwrite,
    }
    for option in (option for option, given in idle.items() if given):
        raise UsageError(f"-o - makes no files, so {option} means nothing: leave it out, or use another -o")


def _job(item: Input, targets: Mapping[str, Query], options: Options, destination: Destination, skip: bool) -> Job:
    if item.fault:
        return Job(item, targets, {}, [])
    parts = destination.parts(list(targets))
    whole = options.consistent or RESIDUAL in parts  # it takes all targets to know what they leave
    kept = [name for name in targets if whole or name in parts]
    if destination.folder == STDOUT:
        return Job(item, targets, dict.fromkeys(parts, STDOUT), kept)
    folder = Path() if destination.folder is None and item.path == STDIN else destination.folder
    words = " ".join(
        word for query in targets.values() for word in (*query.pos, *(f"not {text}" for text in query.neg))
    )
    outputs = output_paths(item, parts, folder, destination.filename, options.format, words)
    name = "{name}.{ext}" if "{name}" in destination.filename else "{stem}.{ext}"
    picture = output_paths(item, ["plot"], folder, name, "png")["plot"] if destination.plot else None
    marks = (item.path.parent if folder is None else folder) / MARKS / ("." if folder is None else item.below.parent)
    return Job(item, targets, outputs, kept, picture=picture, marks=marks if skip else None)


def _key(job: Job, model: Model, options: Options) -> str:
    """The key that outputs of this job carry; "" for standard input, which cannot be recognised again."""
    if job.input.path == STDIN:
        return ""
    decisive = {f.name: str(getattr(options, f.name)) for f in fields(options) if f.name not in NOT_IN_THE_RESULT}
    return signature(job.input.path, job.targets, model.identity, {**decisive, "precision": model.precision})


def _as_done(job: Job) -> Job | None:
    """Return `job` with the outputs that an earlier run finished, or None where there is still work to do."""
    if not job.key:
        return None
    absent = read_absent(job.marker) if job.marker else []
    if absent and set(job.kept) <= set(absent):
        return replace(job, outputs={}, picture=None)
    job = replace(job, outputs={part: path for part, path in job.outputs.items() if part not in absent})
    finished_all = finished(job.outputs.values(), job.key, read_software)
    return job if finished_all and (job.picture is None or job.picture.exists()) else None


def _in_the_way(job: Job) -> Path | None:
    """A file in the place of an output that was not written for this."""
    there = [path for path in job.outputs.values() if is_there(path)]
    if not there and job.picture and is_there(job.picture):  # it is made after the outputs
        return job.picture
    return in_the_way(there, job.key, read_software) if job.key else next(iter(there), None)


def _shots(query: Query) -> list[Path]:
    """The recordings of a query."""
    shots = [Path(shot) for shot in (*query.pos_audio, *query.neg_audio) if isinstance(shot, str | Path)]
    return [file for shot in shots for file in recordings(shot)]


def _positive(query: Query) -> bool:
    return bool(query.pos or query.pos_audio or query.pos_spans)


def _files(job: Job) -> dict[str, Path]:
    return {**job.outputs, **({"picture": job.picture} if job.picture else {})}


def extract(
    mixture: str | Path,
    query: Query | Mapping[str, Query],
    model: Model,
    folder: str | Path | None = None,
    options: Options = Options(),
    progress: JobProgress = lambda job, done, total: None,
    mutual: bool = True,
) -> Extraction:
    """Separate the file `mixture` into `{stem}.target.wav`, or a file for each name, and `{stem}.residual.wav`.

    Outputs have the input's rate, channels and length, and, unless `options` say otherwise, its depth (at least 16 bit;
    float where the input is lossy or float). A run that fails leaves nothing behind.

    Args:
        mixture: the recording.
        query: what to extract, or several by name.
        model: from `load_model`.
        folder: where outputs go; beside the recording if not given.
        options: how recordings are read and written.
        progress: is told of the job, how many seconds of it are done, and how many it has.
        mutual: whether each of several targets leaves what the others ask for.

    Raises:
        AudioError, QueryError, OutputError: where the recording, a query or an output cannot be used.
    """
    for name, value in (("mixture", mixture), *([("folder", folder)] if folder is not None else [])):
        if not isinstance(value, str | Path):
            raise AudioError(f"{name}: is the path of a file, not {type(value).__name__}; for arrays, use separate")
    if not isinstance(model, Model):
        raise UsageError(f"model: is what load_model returns, not {model!r}")
    path = Path(mixture)
    requests: Requests = [(Input(path, Path(path.name)), check_targets(query))]
    destination = Destination(None if folder is None else Path(folder))
    todo = plan(lay_out(requests, options, destination), model, options, mutual=mutual)
    (outcome,) = run(todo.jobs, model, options, progress)
    for doubt in model.doubts(list(todo.jobs[0].targets.values())):
        warnings.warn(doubt, ClapsepWarning, stacklevel=2)
    if isinstance(outcome, Failure):
        raise outcome.error
    return outcome

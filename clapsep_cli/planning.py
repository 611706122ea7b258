"""From what a user asks for to jobs: which parts of which recordings go where, and what is done already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from clapsep_cli.batch import run
from clapsep_cli.checkpoint import Model
from clapsep_cli.errors import OutputError, QueryError
from clapsep_cli.inputs import Input
from clapsep_cli.outputs import TEMPLATE, check_outputs, output_paths
from clapsep_cli.pipeline import RESIDUAL, TARGET
from clapsep_cli.query import Query
from clapsep_cli.resume import finished, in_the_way, signature
from clapsep_cli.sources import STDIN
from clapsep_cli.tasks import Extraction, Failure, Job, Options, Progress
from clapsep_cli.writers import STDOUT, read_software

NOT_IN_THE_RESULT = {"overwrite", "batch", "workers", "presence"}  # of the options


@dataclass(frozen=True)
class Destination:
    """Where outputs go, and which parts of a recording become one.

    `folder`: None for beside each recording, `-` for stdout. `template` of `output_paths`. `only` names the targets
    that are written, of all that are asked for; `residual` adds what they leave of the mixture, and with `remove` only
    that is written. `picture` adds a picture of each recording.
    """

    folder: Path | None = None
    template: str = TEMPLATE
    only: Sequence[str] = ()
    residual: bool = True
    remove: bool = False
    picture: bool = False

    def parts(self, targets: Sequence[str]) -> list[str]:
        """The parts that are written of a recording. Raises `OutputError` for several to stdout."""
        if self.remove:
            return [RESIDUAL]
        chosen = [name for name in targets if not self.only or name in self.only]
        if self.folder == STDOUT:
            if len(chosen) > 1:
                raise OutputError(f"standard output takes one part, not {', '.join(chosen)}; use --only, or another -o")
            return chosen
        return [*chosen, *([RESIDUAL] if self.residual else [])]


@dataclass(frozen=True)
class Plan:
    """`jobs` to be done, the recordings `done` before, and those that must not be: other outputs are in their place."""

    jobs: list[Job]
    done: list[Path]
    blocked: list[Failure]


def plan(
    asked: Sequence[tuple[Input, Mapping[str, Query]]],
    model: Model,
    options: Options = Options(),
    destination: Destination = Destination(),
    skip: bool = False,
) -> Plan:
    """Plan the recordings `asked` for, each with its targets by name; `skip` those that are done.

    Done is a recording whose outputs were all written for the same targets, model and options. Raises `OutputError`
    where outputs would meet each other or something that must not be replaced, `QueryError` where a wish cannot be met.
    """
    jobs = [_job(item, targets, model, options, destination) for item, targets in asked]
    check_outputs([(job.input, _files(job)) for job in jobs if destination.folder != STDOUT], options.overwrite, skip)
    done = [skip and bool(job.key) and _is_done(job) for job in jobs]
    plan = Plan([], [job.input.path for job, is_done in zip(jobs, done, strict=True) if is_done], [])
    for job in (job for job, is_done in zip(jobs, done, strict=True) if not is_done):
        blocking = None if options.overwrite else in_the_way(job.outputs.values(), job.key, read_software)
        if skip and blocking:
            what = f"{blocking}: was not written for this query, model and options; --overwrite replaces it, too"
            plan.blocked.append(Failure(job.input.path, OutputError(what)))
        else:
            plan.jobs.append(job)
    return plan


def _job(item: Input, targets: Mapping[str, Query], model: Model, options: Options, destination: Destination) -> Job:
    parts = destination.parts(list(targets))
    whole = options.consistent or RESIDUAL in parts  # it takes all targets to know what they leave
    kept = [name for name in targets if whole or name in parts]
    if options.min_presence is not None and not any(_positive(query) for query in targets.values()):
        raise QueryError("--min-presence needs to know what to look for: give a positive query, e.g. --pos")
    if options.min_presence is not None and not model.tells_likeness:
        raise QueryError(f"--min-presence: {model.name} cannot tell how alike sounds are; use another --model")
    words = " ".join(
        word for query in targets.values() for word in (*query.pos, *(f"not {text}" for text in query.neg))
    )
    folder, key = destination.folder, ""
    if item.path != STDIN:
        decisive = {f.name: str(getattr(options, f.name)) for f in fields(options) if f.name not in NOT_IN_THE_RESULT}
        key = signature(item.path, targets, model.identity, {**decisive, "precision": model.precision})
    if folder == STDOUT:
        return Job(item, targets, dict.fromkeys(parts, STDOUT), kept, key)
    folder = Path() if folder is None and item.path == STDIN else folder
    outputs = output_paths(item, parts, folder, destination.template, options.format, words)
    picture = output_paths(item, ["plot"], folder, "{stem}.{ext}", "png")["plot"] if destination.picture else None
    return Job(item, targets, outputs, kept, key, picture)


def _is_done(job: Job) -> bool:
    return finished(job.outputs.values(), job.key, read_software) and (job.picture is None or job.picture.exists())


def _positive(query: Query) -> bool:
    return bool(query.pos or query.pos_audio or query.pos_spans)


def _files(job: Job) -> dict[str, Path]:
    return {**job.outputs, **({"picture": job.picture} if job.picture else {})}


def extract(
    mixture: Path,
    query: Query | Mapping[str, Query],
    model: Model,
    folder: Path | None = None,
    options: Options = Options(),
    progress: Progress = lambda job, done, total: None,
) -> Extraction:
    """Separate the file `mixture` into `{stem}.target.wav`, or a file for each name, and `{stem}.residual.wav`.

    They go to `folder`, or beside it. Outputs have the input's rate, channels and length, and, unless `options` say
    otherwise, its depth (at least 16 bit; float where the input is lossy or float). A run that fails leaves nothing
    behind. Raises `AudioError`, `QueryError` and `OutputError`.
    """
    targets = {TARGET: query} if isinstance(query, Query) else query
    item = Input(mixture, Path(mixture.name))
    (job,) = plan([(item, targets)], model, options, Destination(folder)).jobs
    (outcome,) = run([job], model, options, progress)
    if isinstance(outcome, Failure):
        raise outcome.error
    return outcome

"""`clapsep extract`: separates a recording into the target and the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from clapsep_cli.cli import options as opt
from clapsep_cli.cli.run import find_recordings, run_requests, watch_folder
from clapsep_cli.errors import UsageError

if TYPE_CHECKING:
    from clapsep_cli.jobs.job import Options
    from clapsep_cli.jobs.requests import Requests
    from clapsep_cli.jobs.stores import Stage
    from clapsep_cli.query import Query, Span

Pos = Annotated[opt.Texts, opt.option(opt.QUERY, "--pos TEXT", "The sound to keep, in words; repeat to average.")]
Neg = Annotated[opt.Texts, opt.option(opt.QUERY, "--neg TEXT", "The sound to leave out, in words; repeat to average.")]
QueryAudio = Annotated[
    opt.Texts, opt.option(opt.QUERY, "--query-audio FILE|DIR", "Recordings that sound like the sound to keep.")
]
NegAudio = Annotated[
    opt.Texts, opt.option(opt.QUERY, "--neg-audio FILE|DIR", "Recordings that sound like the sound to leave out.")
]
PosSpan = Annotated[
    opt.Texts, opt.option(opt.QUERY, "--pos-span FROM-TO", "A part of the recording that has the sound to keep.")
]
NegSpan = Annotated[
    opt.Texts, opt.option(opt.QUERY, "--neg-span FROM-TO", "A part of the recording that has the sound to leave out.")
]
Alpha = Annotated[
    opt.Number, opt.option(opt.QUERY, "--alpha X", "Weight of audio beside text of the same side, 0 to 1 (0.5).")
]
Targets = Annotated[
    opt.Texts,
    opt.option(
        opt.QUERY, "--target NAME=QUERY", "One of several targets: a text, a recording, or a part of MIX, FROM-TO."
    ),
]
Mutual = Annotated[
    bool | None,
    opt.option(opt.QUERY, "--mutual/--no-mutual", "Use the other targets as negative queries for each target."),
]
Manifest = Annotated[
    opt.Text,
    opt.option(opt.QUERY, "--manifest CSV", "Recordings with queries: file, pos, neg, query_audio, neg_audio."),
]
Presence = Annotated[
    bool | None,
    opt.option(
        opt.QUERY, "--presence/--no-presence", "Print how likely the target is present; the default with --json."
    ),
]
MinPresence = Annotated[
    opt.Number, opt.option(opt.QUERY, "--min-presence X", "Write nothing if the presence is below this; try 0.")
]
Residual = Annotated[bool | None, opt.option(opt.OUTPUT, "--residual/--no-residual", "Also write the rest.")]
Remove = Annotated[bool, opt.option(opt.OUTPUT, "--remove", "Write only the rest, without the target.")]
Watch = Annotated[
    Path | None, opt.option(opt.INPUT, "--watch DIR", "Process recordings as they arrive in this folder, until Ctrl-C.")
]


def extract(
    inputs: opt.Inputs = None,
    pos: Pos = None,
    neg: Neg = None,
    query_audio: QueryAudio = None,
    neg_audio: NegAudio = None,
    pos_span: PosSpan = None,
    neg_span: NegSpan = None,
    alpha: Alpha = None,
    target: Targets = None,
    mutual: Mutual = None,
    manifest: Manifest = None,
    presence: Presence = None,
    min_presence: MinPresence = None,
    residual: Residual = None,
    remove: Remove = False,
    watch: Watch = None,
    recursive: opt.Recursive = False,
    start: opt.Start = None,
    end: opt.End = None,
    lenient: opt.Lenient = False,
    stream: opt.Stream = None,
    expand: opt.Expand = 1.0,
    out: opt.Out = None,
    filename: opt.Filename = None,
    format: opt.Format = "wav",  # noqa: A002
    subtype: opt.Subtype = None,
    remux: opt.Remux = False,
    clip: opt.Clip = "warn",
    plot: opt.Plot = False,
    events: opt.Events = False,
    events_format: opt.EventsFormat = "csv",
    events_level: opt.EventsLevel = None,
    events_presence: opt.EventsPresence = None,
    events_length: opt.EventsLength = None,
    no_audio: opt.NoAudio = False,
    overwrite: opt.Overwrite = False,
    skip_existing: opt.SkipExisting = False,
    shard: opt.Shard = None,
    scratch: opt.Scratch = None,
    engine: opt.Engine = "local",
    address: opt.Address = None,
    workers: opt.Workers = None,
    gpus_per_worker: opt.GpusPerWorker = None,
    insecure: opt.Insecure = False,
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    device: opt.Device = "auto",
    precision: opt.Precision = "auto",
    refine: opt.Refine = False,
    _model_dir: opt.ModelDir = None,
    threads: opt.Threads = None,
    batch_size: opt.BatchSize = 0,
    jobs: opt.Jobs = 2,
    json: opt.Json = False,
    progress: opt.Progress = "auto",
    quiet: opt.Quiet = False,
) -> None:
    """Write what matches the query to MIX.target.wav and the rest to MIX.residual.wav.

    Give at least one query, of either side, as text or as audio.
    """
    given = locals()  # all options by name
    from clapsep_cli.query import DEFAULT_ALPHA, parse_span

    _check(given)
    sides: dict[str, Any] = {
        "pos": pos or (),
        "neg": neg or (),
        "alpha": DEFAULT_ALPHA if alpha is None else alpha,
        "pos_spans": [parse_span(span) for span in pos_span or ()],
        "neg_spans": [parse_span(span) for span in neg_span or ()],
    }
    setup = opt.setup_of(given)
    with opt.staging(scratch) as stage:
        options = opt.options_of(given, stage)
        for side, shots in (("pos_audio", query_audio), ("neg_audio", neg_audio)):
            sides[side] = [stage.fetch(stage.path(str(shot))) for shot in shots or ()]
        requests = _requests(given, sides, options, stage)
        if alpha is not None and not any(_has_both(targets, mutual is not False) for _, targets in requests):
            raise UsageError("--alpha weighs audio against text of the same side, and no side has both: leave it out")
        if watch:
            watch_folder(watch, recursive, requests[0][1], options, setup, stage)
        run_requests(requests, options, setup, stage)


def _check(given: Mapping[str, Any]) -> None:
    """Raise `UsageError` for options that contradict each other."""
    target, manifest, inputs = given["target"], given["manifest"], given["inputs"]
    if target and (given["pos"] or given["query_audio"] or given["pos_span"] or manifest):
        raise UsageError(
            "--target names the sound to keep: use it without --pos, --query-audio, --pos-span, --manifest"
        )
    if manifest and (inputs or given["recursive"]):
        extra = "recordings" if inputs else "--recursive"
        raise UsageError(f"{manifest} names the recordings: give either a manifest or {extra}")
    if given["watch"] and (inputs or manifest or given["out"] == "-"):
        extra = "recordings" if inputs else "--manifest" if manifest else "-o -"
        raise UsageError(f"--watch names the folder of the recordings, and writes files: use it without {extra}")
    if given["mutual"] is not None and len(target or ()) < 2:
        raise UsageError("--mutual and --no-mutual are about several targets: give --target twice or more")


def _requests(given: Mapping[str, Any], sides: dict[str, Any], options: Options, stage: Stage) -> Requests:
    """Return the recordings with their queries, by the arguments of the command and the two sides of a query."""
    from clapsep_cli.jobs.inputs import Input
    from clapsep_cli.jobs.requests import read_requests
    from clapsep_cli.query import TARGET, Query

    if given["manifest"]:
        return read_requests(stage.path(given["manifest"]), sides, stage)
    targets = _targets(given["target"], sides, stage) if given["target"] else {TARGET: Query(**sides)}
    if given["watch"]:  # a placeholder for the recordings to come
        return [(Input(given["watch"] / "any.wav", Path("any.wav")), targets)]
    return [(item, targets) for item in find_recordings(given["inputs"] or [], given["recursive"], options.out, stage)]


def _targets(arguments: Sequence[str], sides: dict[str, Any], stage: Stage) -> Mapping[str, Query]:
    """Return the queries of several targets by name, which share the negative side of `sides`."""
    from clapsep_cli.jobs.requests import parse_targets
    from clapsep_cli.query import Query

    shared = {side: sides[side] for side in ("neg", "neg_audio", "neg_spans", "alpha")}

    def query(sound: str | Path | Span) -> Query:
        if isinstance(sound, Path):
            return Query(pos_audio=[sound], **shared)
        return Query(pos=sound, **shared) if isinstance(sound, str) else Query(pos_spans=[sound], **shared)

    return {name: query(sound) for name, sound in parse_targets(arguments, stage).items()}


def _has_both(targets: Mapping[str, Query], are_mutual: bool) -> bool:
    """True if a side of a target has text and audio, so that their weight matters."""
    from clapsep_cli.query import mutual

    return any(
        getattr(query, side) and (getattr(query, f"{side}_audio") or getattr(query, f"{side}_spans"))
        for query in (mutual(targets) if are_mutual else targets).values()
        for side in ("pos", "neg")
    )

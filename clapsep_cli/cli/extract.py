"""`clapsep extract`: separates a recording into the target and the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clapsep_cli.cli.options import (
    MODEL,
    OUTPUT,
    AdapterOption,
    BatchSizeOption,
    ClipOption,
    EndOption,
    FilenameOption,
    FormatOption,
    InputsArgument,
    JobsOption,
    JsonOption,
    LenientOption,
    OutOption,
    OverwriteOption,
    PlotOption,
    PrecisionOption,
    ProgressOption,
    RecursiveOption,
    SkipExistingOption,
    StartOption,
    StreamOption,
    SubtypeOption,
    ThreadsOption,
    options_of,
    setup_of,
)
from clapsep_cli.cli.run import carry_out, find
from clapsep_cli.cli.terminal import DeviceOption, ModelDirOption, ModelOption, QuietOption
from clapsep_cli.errors import QueryError, UsageError

if TYPE_CHECKING:
    from clapsep_cli.jobs.inputs import Input
    from clapsep_cli.jobs.planning import Requests
    from clapsep_cli.query import Query

QUERY = "Queries"  # panel of --help


def _query(name: str, **settings: Any) -> Any:
    return typer.Option(name, rich_help_panel=QUERY, **settings)


def extract(
    inputs: InputsArgument = None,
    pos: Annotated[
        list[str] | None, _query("--pos", metavar="TEXT", help="The sound to keep, in words; several are averaged.")
    ] = None,
    neg: Annotated[
        list[str] | None,
        _query("--neg", metavar="TEXT", help="The sound to leave out, in words; several are averaged."),
    ] = None,
    query_audio: Annotated[
        list[Path] | None,
        _query("--query-audio", metavar="FILE|DIR", help="Recordings that sound like the sound to keep."),
    ] = None,
    neg_audio: Annotated[
        list[Path] | None,
        _query("--neg-audio", metavar="FILE|DIR", help="Recordings that sound like the sound to leave out."),
    ] = None,
    pos_span: Annotated[
        list[str] | None,
        _query("--pos-span", metavar="FROM-TO", help="A part of the recording that has the sound to keep."),
    ] = None,
    neg_span: Annotated[
        list[str] | None,
        _query("--neg-span", metavar="FROM-TO", help="A part of the recording that has the sound to leave out."),
    ] = None,
    alpha: Annotated[
        float | None, _query("--alpha", metavar="X", help="Weight of audio beside text of the same side, 0 to 1 (0.5).")
    ] = None,
    target: Annotated[
        list[str] | None,
        _query("--target", metavar="NAME=QUERY", help="One of several targets: a text, or a recording like it."),
    ] = None,
    mutual: Annotated[
        bool | None, _query("--mutual/--no-mutual", help="Use the other targets as negative queries of each.")
    ] = None,
    manifest: Annotated[
        Path | None,
        _query("--manifest", metavar="CSV", help="Recordings with queries: file, pos, neg, query_audio, neg_audio."),
    ] = None,
    presence: Annotated[
        bool | None, _query("--presence/--no-presence", help="Print how likely the target is there; with --json: yes.")
    ] = None,
    min_presence: Annotated[
        float | None,
        _query("--min-presence", metavar="X", help="Write nothing if the presence is below this; try 0."),
    ] = None,
    refine: Annotated[
        bool | None,
        typer.Option(
            "--refine/--no-refine",
            rich_help_panel=MODEL,
            help="Separate in two passes: what the first one leaves tells the second what to leave; mini does.",
        ),
    ] = None,
    residual: Annotated[
        bool | None, typer.Option("--residual/--no-residual", rich_help_panel=OUTPUT, help="Also write the rest.")
    ] = None,
    remove: Annotated[
        bool, typer.Option("--remove", rich_help_panel=OUTPUT, help="Write only the rest, without the target.")
    ] = False,
    recursive: RecursiveOption = False,
    start: StartOption = None,
    end: EndOption = None,
    lenient: LenientOption = False,
    stream: StreamOption = None,
    out: OutOption = None,
    filename: FilenameOption = None,
    format: FormatOption = "wav",  # noqa: A002
    subtype: SubtypeOption = None,
    clip: ClipOption = "warn",
    plot: PlotOption = False,
    overwrite: OverwriteOption = False,
    skip_existing: SkipExistingOption = False,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    _model_dir: ModelDirOption = None,
    threads: ThreadsOption = None,
    batch_size: BatchSizeOption = 0,
    jobs: JobsOption = 2,
    json: JsonOption = False,
    progress: ProgressOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Write what matches the query to MIX.target.wav and the rest to MIX.residual.wav.

    Give at least one query, of either side, as text or as audio.
    """
    given = locals()
    from clapsep_cli.jobs.targets import parse_targets
    from clapsep_cli.query import DEFAULT_ALPHA, Query
    from clapsep_cli.times import parse_span

    sides: dict[str, Any] = {
        "pos": pos or (),
        "neg": neg or (),
        "pos_audio": query_audio or (),
        "neg_audio": neg_audio or (),
        "alpha": DEFAULT_ALPHA if alpha is None else alpha,
        "pos_spans": [parse_span(span) for span in pos_span or ()],
        "neg_spans": [parse_span(span) for span in neg_span or ()],
    }
    if target:
        if pos or query_audio or pos_span or manifest:
            raise UsageError(
                "--target says itself what to keep: use it without --pos, --query-audio, --pos-span and --manifest"
            )
        named = parse_targets(target)
        left = {side: sides[side] for side in ("neg", "neg_audio", "neg_spans", "alpha")}
        queries = {
            name: Query(pos_audio=[wish], **left) if isinstance(wish, Path) else Query(pos=wish, **left)
            for name, wish in named.items()
        }
    else:
        queries = {}
    asked = _requests(inputs or [], recursive, out, manifest, queries, sides)
    if mutual is not None and len(queries) < 2:
        raise UsageError("--mutual and --no-mutual are about several targets: give --target twice or more")
    if alpha is not None and not any(_has_both(targets, mutual is not False) for _, targets in asked):
        raise UsageError("--alpha weighs audio against text of the same side, and no side has both: leave it out")
    carry_out(asked, options_of(given), setup_of(given))


def _has_both(targets: Mapping[str, Query], are_mutual: bool) -> bool:
    """True if a side of a target has text and audio, so that their weight matters."""
    from clapsep_cli.query import mutual

    return any(
        getattr(query, side) and (getattr(query, f"{side}_audio") or getattr(query, f"{side}_spans"))
        for query in (mutual(targets) if are_mutual else targets).values()
        for side in ("pos", "neg")
    )


def _requests(
    inputs: Sequence[str],
    recursive: bool,
    out: Path | None,
    manifest: Path | None,
    targets: Mapping[str, Query],
    sides: dict[str, Any],
) -> Requests:
    """Pair each recording with its targets: those given, or one with the query of the manifest's row and the options.

    Args:
        inputs, recursive, out: arguments of `find`.
        manifest: instead of `inputs`, a CSV of recordings with queries.
        targets: as given by `--target`.
        sides: arguments of the `Query` that the other options give.
    """
    from clapsep_cli.jobs.manifest import read_jobs
    from clapsep_cli.query import TARGET, Query

    if manifest is None:
        wanted = targets or {TARGET: Query(**sides)}
        return [(item, wanted) for item in find(inputs, recursive, out)]
    if inputs or recursive:
        given = "recordings" if inputs else "--recursive"
        raise UsageError(f"{manifest} names the recordings: give either a manifest or {given}")
    asked: list[tuple[Input, Mapping[str, Query]]] = []
    known: dict[Query, Mapping[str, Query]] = {}  # recordings that share their queries are separated together
    for row in read_jobs(manifest):
        own = {"pos": row.pos, "neg": row.neg, "pos_audio": row.query_audio, "neg_audio": row.neg_audio}
        try:
            query = Query(**{**sides, **{side: value for side, value in own.items() if value}})
        except QueryError as error:
            raise QueryError(f"{manifest}, line {row.line}: {error}") from error
        asked.append((row.input, known.setdefault(query, {TARGET: query})))
    return asked

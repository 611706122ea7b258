"""`clapsep extract`: a recording into what is asked for and the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clapsep_cli.cli.options import MODEL, OUTPUT, Common, takes
from clapsep_cli.cli.run import carry_out, find
from clapsep_cli.errors import QueryError, UsageError

if TYPE_CHECKING:
    from clapsep_cli.jobs.inputs import Input
    from clapsep_cli.jobs.planning import Asked
    from clapsep_cli.query import Query

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
        _query("--manifest", metavar="CSV", help="Recordings with queries: file, pos, neg, query_audio, neg_audio."),
    ] = None,
    presence: Annotated[
        bool | None, _query("--presence/--no-presence", help="Tell how alike the target is to the query; with --json.")
    ] = None,
    min_presence: Annotated[
        float | None,
        _query("--min-presence", metavar="X", help="Write nothing where the presence is below; 0 is a good start."),
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
        bool, typer.Option("--residual/--no-residual", rich_help_panel=OUTPUT, help="Also write what is left.")
    ] = True,
    remove: Annotated[
        bool, typer.Option("--remove", rich_help_panel=OUTPUT, help="Write what is left alone, without the target.")
    ] = False,
) -> None:
    """Write what matches the query to MIX.target.wav and the rest to MIX.residual.wav.

    Give at least one query, of either side, as text or as audio.
    """
    from clapsep_cli.jobs.outputs import Destination
    from clapsep_cli.jobs.targets import parse_targets
    from clapsep_cli.query import Query
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
            raise UsageError(
                "--target says itself what to keep: use it without --pos, --query-audio, --pos-span and --manifest"
            )
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
    carry_out(asked, common, destination, mutual, refine, presence=presence, min_presence=min_presence)


def _asked(
    inputs: Sequence[str], manifest: Path | None, targets: Mapping[str, Query], sides: dict[str, Any], common: Common
) -> Asked:
    """Each recording with its targets: those given, or one with the query of the manifest's row and the options."""
    from clapsep_cli.jobs.manifest import read_jobs
    from clapsep_cli.query import TARGET, Query

    if manifest is None:
        wanted = targets or {TARGET: Query(**sides)}
        return [(item, wanted) for item in find(inputs, common)]
    if inputs:
        raise UsageError(f"{manifest} names the recordings: give either a manifest or recordings")
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

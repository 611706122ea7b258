"""`clapsep results`: gathers what runs with URLs, shards and Ray have left beside their outputs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from clapsep_cli.cli import options as opt
from clapsep_cli.cli.terminal import notes
from clapsep_cli.errors import UsageError

FORMATS = ("jsonl", "parquet", "csv")


def results(
    out: Annotated[str, typer.Argument(metavar="OUT", help="The output folder or URL of the runs.")],
    format: Annotated[  # noqa: A002
        str, opt.option(opt.OUTPUT, "--format -f NAME", "jsonl, parquet or csv.", FORMATS, closed=True)
    ] = "jsonl",
    quiet: opt.Quiet = False,
) -> None:
    """Print a row for each recording: its status, levels, presence and files. Redirect it to a file.

    Runs with URLs, --shard or --engine ray keep a marker for each recording; plain local runs keep none.
    """
    from clapsep_cli.jobs.results import rows, write

    if format == "parquet" and sys.stdout.isatty():
        raise UsageError("--format parquet is not for a terminal; redirect it to a file")
    with opt.staging(None) as stage:
        count = write(rows(stage.path(out), stage), format, sys.stdout)
    notes(quiet)(f"{count} recordings")

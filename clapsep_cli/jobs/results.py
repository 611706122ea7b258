"""Reads the markers below an output folder, and writes them as one table: a row for each recording."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from clapsep_cli.errors import AudioError, ExtraError
from clapsep_cli.jobs.outputs import MARKS
from clapsep_cli.jobs.stores import Stage

READERS = 16  # markers read at once
AT_ONCE = 1000
Row = dict[str, Any]


def rows(out: Path, stage: Stage) -> Iterator[Row]:
    """Yield the contents of the markers below `out`, sorted by name; damaged markers are skipped.

    Raises `AudioError` if there are no markers, or one cannot be read.
    """
    found = stage.markers(out / MARKS) if stage.holds(out) else set(out.glob(f"**/{MARKS}/**/*.json"))
    if not found:  # beside each recording
        found = {path for path in stage.markers(out) if MARKS in path.parts} if stage.holds(out) else found
    if not found:
        raise AudioError(f"{out}: no results below it; runs with URLs, --shard or --engine ray keep them in {MARKS}/")
    ordered = sorted(path for path in found if path.suffix == ".json")
    with ThreadPoolExecutor(READERS) as pool:
        for first in range(0, len(ordered), AT_ONCE):
            for text in pool.map(stage.read, ordered[first : first + AT_ONCE]):
                try:
                    row = json.loads(text)
                except ValueError:
                    continue
                if isinstance(row, dict) and "input" in row:
                    yield row


def flat(row: Mapping[str, Any]) -> Row:
    """Flatten a row into columns named by path, such as `levels.target.rms`; lists become JSON."""
    columns: Row = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            columns |= {f"{name}.{below}": one for below, one in flat(value).items()}
        else:
            columns[name] = json.dumps(value) if isinstance(value, list) else value
    return columns


def write(found: Iterator[Row], form: str, stream: TextIO) -> int:
    """Write rows to `stream`: `jsonl` as they are, `csv` and `parquet` flat. Return the number of rows.

    Raises `ExtraError` where the package for Parquet is not installed.
    """
    if form == "jsonl":
        return sum(1 for row in found if stream.write(json.dumps(row) + "\n"))
    table = [flat(row) for row in found]
    columns = list(dict.fromkeys(name for row in table for name in row))
    if form == "csv":
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        return len(table)
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ExtraError("--format parquet needs one more package: pip install pyarrow") from error
    filled = [{name: row.get(name) for name in columns} for row in table]
    parquet.write_table(pyarrow.Table.from_pylist(filled), stream.buffer)
    return len(table)

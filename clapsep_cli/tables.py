"""Reads CSV files as people and Excel write them, with line numbers, and writes plain ones."""

from __future__ import annotations

import codecs
import csv
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from clapsep_cli.errors import ManifestError
from clapsep_cli.files import writing

MAX_FAULTS_SHOWN = 10
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
STDIN = Path("-")

Row = tuple[int, dict[str, str]]  # the line on which it ends, and its cells by column


def read_table(path: Path, needed: Sequence[str]) -> list[Row]:
    """Read the rows of a CSV; values as text without space around them; empty rows are skipped.

    Columns are separated by commas, semicolons or tabs, whichever the first line has most of; text is UTF-8 with or
    without BOM, or UTF-16, as Excel's "Unicode text". `path` may be `-` for standard input.

    Raises `ManifestError` if it cannot be read, lacks one of the columns `needed` (each may be "this or that"), or has
    rows of too many cells.
    """
    try:
        text = decoded(_read_bytes(path))
        mark = max(SEPARATORS, key=text.partition("\n")[0].count)
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=mark)
        columns = [name.strip().lower() for name in reader.fieldnames or ()]
        _check_columns(path, columns, needed)
        reader.fieldnames = columns
        rows = [(reader.line_num, row) for row in reader]
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: is not UTF-8; save it as CSV UTF-8") from error
    except FileNotFoundError as error:
        raise ManifestError(f"{path}: no such file") from error
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ManifestError(f"{path}: cannot be read as a CSV ({reason})") from error
    long = [
        f"line {line}: more cells than columns; put texts with {SEPARATORS[mark]} in quotes"
        for line, row in rows
        if None in row
    ]
    check_faults(path, long)
    cells = [(line, {name: (value or "").strip() for name, value in row.items()}) for line, row in rows]
    return [(line, row) for line, row in cells if any(row.values())]


def decoded(content: bytes) -> str:
    """Decode UTF-8, with or without BOM, or UTF-16 with one. Raises `UnicodeDecodeError`."""
    return content.decode("utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")


def _read_bytes(path: Path) -> bytes:
    if path != STDIN:
        return path.read_bytes()
    if sys.stdin is None:
        raise ManifestError("standard input: is closed")
    return sys.stdin.buffer.read()


def _check_columns(path: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    missing = [name for name in needed if not {*name.split(" or ")} & {*columns}]
    if missing:
        raise ManifestError(f"{path}: no column {', '.join(missing)}; it has: {','.join(columns)}")
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise ManifestError(f"{path}: more than one column {', '.join(map(repr, twice))}")


def check_faults(path: Path, faults: Sequence[str]) -> None:
    """Raise `ManifestError` with the first ten of `faults`, if there are any."""
    if faults:
        more = f"; and {len(faults) - MAX_FAULTS_SHOWN} more" if len(faults) > MAX_FAULTS_SHOWN else ""
        raise ManifestError(f"{path}: {'; '.join(faults[:MAX_FAULTS_SHOWN])}{more}")


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV, completely or not at all, and its folder if there is none. Raises `OutputError`."""
    with writing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)

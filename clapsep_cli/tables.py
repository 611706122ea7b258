"""CSV files as people write them, read with the numbers of their lines."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from clapsep_cli.errors import ManifestError

MAX_FAULTS_SHOWN = 10

Row = tuple[int, dict[str, str]]  # the line on which it ends, and its cells by column


def read_table(path: Path, needed: Sequence[str]) -> list[Row]:
    """The rows of a CSV (UTF-8, with or without BOM), values as text without space around them; empty rows are skipped.

    Raises `ManifestError` if it cannot be read, lacks one of the columns `needed` (each may be "this or that"), or has
    rows of too many cells.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
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
        f"line {line}: more cells than columns; put texts with commas in quotes" for line, row in rows if None in row
    ]
    check_faults(path, long)
    cells = [(line, {name: (value or "").strip() for name, value in row.items()}) for line, row in rows]
    return [(line, row) for line, row in cells if any(row.values())]


def _check_columns(path: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    missing = [name for name in needed if not {*name.split(" or ")} & {*columns}]
    if missing and len(columns) == 1 and any(mark in columns[0] for mark in ";\t"):
        raise ManifestError(f"{path}: its columns are not separated by commas; save it as CSV with commas")
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

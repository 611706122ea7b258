"""Parses requests: several targets (`--target dog="dog barking" --target bell=3.2-4.5`), and manifests."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from clapsep_cli.audio.sources import SUFFIXES
from clapsep_cli.errors import AudioError, ManifestError, QueryError
from clapsep_cli.files import is_there
from clapsep_cli.jobs.inputs import Input, folded
from clapsep_cli.jobs.outputs import safe_name
from clapsep_cli.jobs.stores import Stage, is_url
from clapsep_cli.query import MIXTURE, RESIDUAL, TARGET, Query, Span, is_span, parse_span
from clapsep_cli.tables import check_faults, read_table

Requests = Sequence[tuple[Input, Mapping[str, Query]]]  # recordings, each with its targets by name
TAKEN = (MIXTURE, RESIDUAL)  # names that no target may have
COLUMNS = ("file", "pos", "neg", "query_audio", "neg_audio")  # columns of a manifest


def parse_target(argument: str, stage: Stage = Stage()) -> tuple[str, str | Path | Span]:
    """Return the name and the query of `dog=dog barking`, `siren=siren.wav` or `bell=3.2-4.5`.

    Args:
        argument: its query is a recording if it is a URL, or names a file or folder that exists; a stretch of the
            mixture if it is two times; else text.
        stage: mirrors the stores of URLs.

    Raises:
        QueryError: the name cannot be part of a file name, or the stretch ends before its start.
        AudioError: the recording does not exist.
    """
    name, equals, value = (piece.strip() for piece in argument.partition("="))
    name = unicodedata.normalize("NFC", name)
    if not equals or not value:
        raise QueryError(f'--target {argument!r}: give a name and what it stands for, as in --target dog="dog barking"')
    if safe_name(name) != name:
        raise QueryError(f"--target {argument!r}: the name becomes part of a file's name; use letters, digits and -")
    if folded(name) in TAKEN:
        raise QueryError(f"--target {argument!r}: this name is reserved; choose another one")
    if is_url(value):
        return name, stage.fetch(stage.path(value))
    if is_there(Path(value)):
        return name, Path(value)
    if Path(value).suffix.lower() in SUFFIXES:
        raise AudioError(f"{value}: no such file, so --target {name} has no sound")
    return name, parse_span(value) if is_span(value) else value


def parse_targets(arguments: Iterable[str], stage: Stage = Stage()) -> dict[str, str | Path | Span]:
    """Return the query of each target by name (see `parse_target`). Raises `QueryError` also for equal names."""
    targets: dict[str, str | Path | Span] = {}
    for name, value in (parse_target(argument, stage) for argument in arguments):
        if folded(name) in map(folded, targets):
            raise QueryError(f"--target {name}: two targets have this name; give each its own")
        targets[name] = value
    return targets


def read_requests(path: Path, sides: Mapping[str, Any] = MappingProxyType({}), stage: Stage = Stage()) -> Requests:
    """Read a CSV of recordings with the column `file` and any of `pos`, `neg`, `query_audio`, `neg_audio`.

    Values in a cell are separated by ";". Paths are relative to the CSV, or URLs.

    Args:
        path: of the CSV; `-` for standard input.
        sides: arguments of `Query` for empty cells.
        stage: mirrors the stores of URLs; recordings of queries are fetched.

    Returns:
        The recordings with their queries; equal queries are one object. A missing recording has a `fault`.

    Raises:
        ManifestError: lists all faults by line, also if no recording exists.
        QueryError: a row has no query, or one that contradicts itself.
    """
    rows = read_table(stage.fetch(path), ("file",))
    columns = list(rows[0][1]) if rows else []
    unknown = [name for name in columns if name not in COLUMNS]
    if not rows:
        raise ManifestError(f"{path}: no rows")
    if unknown or len(columns) < 2:
        what = f"unknown column {', '.join(map(repr, unknown))}" if unknown else "no column with a query"
        raise ManifestError(f"{path}: {what}; the columns are {','.join(COLUMNS)}")
    faults: list[str] = []
    read = [(line, *_read_row(path, line, row, faults, stage)) for line, row in rows]
    missing = [str(item.fault).removeprefix(f"{path}: ") for _, item, _ in read if item.fault]
    check_faults(path, faults or (missing if len(missing) == len(read) else []))
    asked: list[tuple[Input, Mapping[str, Query]]] = []
    known: dict[Query, Mapping[str, Query]] = {}  # recordings that share their queries are separated together
    for line, item, own in read:
        try:
            query = Query(**{**sides, **own})
        except QueryError as error:
            raise QueryError(f"{path}, line {line}: {error}") from error
        asked.append((item, known.setdefault(query, {TARGET: query})))
    return asked


def _read_row(
    path: Path, line: int, row: Mapping[str, str], faults: list[str], stage: Stage
) -> tuple[Input, dict[str, Any]]:
    """Return the recording of a row, and the arguments of `Query` that it gives; append its `faults`."""
    folder, fault = path.parent, None

    def values(column: str) -> tuple[str, ...]:
        return tuple(value.strip() for value in row.get(column, "").split(";") if value.strip())

    def shots(column: str) -> tuple[Path, ...]:
        paths = tuple(stage.path(value, folder) for value in values(column))
        faults.extend(f"line {line}: {column}: no such file {path}" for path in paths if not stage.is_there(path))
        return tuple(stage.fetch(path) if stage.is_there(path) else path for path in paths)

    if not row["file"]:
        faults.append(f"line {line}: no file named")
        return Input(folder, Path()), {}
    recording = stage.path(row["file"], folder)
    stored = None
    if not stage.is_there(recording):
        fault = AudioError(f"{path}: line {line}: no such file {recording}")
    elif recording.is_dir() or (stage.holds(recording) and (stored := stage.look(recording)) is None):
        faults.append(f"line {line}: {recording} is a folder")
    below = recording.relative_to(folder) if recording.is_relative_to(folder) else Path(recording.name)
    item = Input(recording, Path(recording.name) if ".." in below.parts else below, fault, stored)
    own = {
        "pos": values("pos"),
        "neg": values("neg"),
        "pos_audio": shots("query_audio"),
        "neg_audio": shots("neg_audio"),
    }
    return item, {side: given for side, given in own.items() if given}

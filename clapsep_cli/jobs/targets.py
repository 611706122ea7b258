"""Parses several targets: `--target dog="dog barking" --target siren=siren.wav --target bell=3.2-4.5`."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path

from clapsep_cli.audio.sources import SUFFIXES
from clapsep_cli.errors import AudioError, QueryError
from clapsep_cli.files import is_there
from clapsep_cli.jobs.inputs import folded
from clapsep_cli.jobs.outputs import safe_name
from clapsep_cli.jobs.stores import Stage, is_url
from clapsep_cli.query import MIXTURE, RESIDUAL, Span, is_span, parse_span

TAKEN = (MIXTURE, RESIDUAL)  # reserved names


def parse_target(argument: str, stage: Stage = Stage()) -> tuple[str, str | Path | Span]:
    """Return the name and the query of `dog=dog barking`, `siren=siren.wav` or `bell=3.2-4.5`.

    The query is audio if it is a URL, or names a file or folder that exists, a stretch of the mixture if it is two
    times, else text. Raises `QueryError` for a name that cannot be part of a file name and for a stretch that ends
    before its start, and `AudioError` for the name of a recording that does not exist.
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

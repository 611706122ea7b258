"""The targets of a run, where it has several: `--target dog="dog barking" --target siren=siren.wav`."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path

from clapsep_cli.audio.sources import SUFFIXES
from clapsep_cli.errors import AudioError, QueryError
from clapsep_cli.files import is_there
from clapsep_cli.jobs.inputs import folded
from clapsep_cli.jobs.outputs import safe_name
from clapsep_cli.query import MIXTURE, RESIDUAL

TAKEN = (MIXTURE, RESIDUAL)  # every run has these; no target can be called so


def parse_target(argument: str) -> tuple[str, str | Path]:
    """The name and the query of `dog=dog barking` or `siren=siren.wav`: audio where the value is a file or folder that
    exists, text otherwise. Raises `QueryError` for a name that cannot be part of a file name, `AudioError` for what is
    named like a recording that is not there.
    """
    name, equals, value = (piece.strip() for piece in argument.partition("="))
    name = unicodedata.normalize("NFC", name)
    if not equals or not value:
        raise QueryError(f'--target {argument!r}: give a name and what it stands for, as in --target dog="dog barking"')
    if safe_name(name) != name:
        raise QueryError(f"--target {argument!r}: the name becomes part of a file's name; use letters, digits and -")
    if folded(name) in TAKEN:
        raise QueryError(f"--target {argument!r}: a target cannot be called {name}; choose another name")
    if is_there(Path(value)):
        return name, Path(value)
    if Path(value).suffix.lower() in SUFFIXES:
        raise AudioError(f"{value}: no such file, so --target {name} has no sound")
    return name, value


def parse_targets(arguments: Iterable[str]) -> dict[str, str | Path]:
    """The targets of a run by name, as `parse_target` reads them. Raises `QueryError` also where two share a name."""
    targets: dict[str, str | Path] = {}
    for name, value in map(parse_target, arguments):
        if folded(name) in map(folded, targets):
            raise QueryError(f"--target {name}: two targets have this name; give each its own")
        targets[name] = value
    return targets

"""Recognises recordings already processed with the same query, model and settings, by their outputs or a marker."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from clapsep_cli.audio.sources import recordings
from clapsep_cli.audio.writers import read_software
from clapsep_cli.errors import AudioError, ClapsepError
from clapsep_cli.files import digest, is_there
from clapsep_cli.jobs.outputs import NAME_BYTES, shortened
from clapsep_cli.jobs.stores import Stored
from clapsep_cli.query import Excerpt, Query, Shot

KEY_DIGITS = 16


def signature(
    recording: Path,
    queries: Mapping[str, Query],
    model: str,
    settings: Mapping[str, str],
    stored: Stored | None = None,
) -> str:
    """Return a key of 16 hex digits: a hash of everything that decides which samples are written for a recording.

    Args:
        recording: its size and time of change count, its name does not.
        queries: the query of each target: texts, weight, spans, and the content of recordings, in any order.
        model: its name and revision.
        settings: options that change the outputs.
        stored: size and time of change of a recording in a store; a file with the same has the same key.

    Raises:
        AudioError: a file does not exist or cannot be read.
    """
    if stored is None:
        _, status = _with_status(recording)
        stored = Stored(status.st_size, status.st_mtime_ns)
    asked = {
        name: [
            sorted(query.pos),
            sorted(query.neg),
            sorted(digest for shot in query.pos_audio for digest in _digests(shot)),
            sorted(digest for shot in query.neg_audio for digest in _digests(shot)),
            query.alpha,
            sorted(query.pos_spans),
            sorted(query.neg_spans),
        ]
        for name, query in queries.items()
    }
    facts = [stored.size, stored.changed, asked, model, dict(settings)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]


def _with_status(path: Path) -> tuple[Path, os.stat_result]:
    try:
        return path, path.stat()
    except FileNotFoundError as error:
        raise AudioError(f"{path}: no such file") from error
    except OSError as error:
        raise AudioError(f"{path}: cannot be read ({error.strerror or error})") from error


def _digests(shot: Shot) -> list[str]:
    if isinstance(shot, tuple):
        samples = np.ascontiguousarray(shot[0], np.float32)
        return [hashlib.sha256(f"{samples.shape}{shot[1]}".encode() + samples.tobytes()).hexdigest()]
    if isinstance(shot, Excerpt):
        return [f"{digest} {shot.start} {shot.end}" for digest in _digests(shot.path)]
    files = recordings(Path(shot))
    return [_digest(file.absolute(), status.st_size, status.st_mtime_ns) for file, status in map(_with_status, files)]


@lru_cache(maxsize=1 << 12)  # a query recording is read once for all inputs, unless its size or time changes
def _digest(file: Path, size: int, changed: int) -> str:
    try:
        return digest(file)
    except OSError as error:
        raise AudioError(f"{file}: cannot be read ({error.strerror or error})") from error


def finished(paths: Iterable[Path], key: str) -> bool:
    """Return True if all `paths` exist with this key in their software tag. Files with final names are complete."""
    return all(is_there(path) and _key_of(path) == key for path in paths)


def first_conflict(paths: Iterable[Path], key: str) -> Path | None:
    """Return the first of `paths` that exists but was not written for `key`; only `--overwrite` replaces it."""
    return next((path for path in paths if is_there(path) and _key_of(path) != key), None)


def marker_path(folder: Path, name: str, key: str) -> Path:
    """Return the path of a recording's marker in `folder`; `key` is that of its outputs (see `signature`)."""
    return folder / f"{shortened(name, NAME_BYTES - KEY_DIGITS - len('..json'))}.{key}.json"


def marked_name(marker: Path) -> str:
    """Return the name of the recording that a marker belongs to, shortened as in the marker."""
    return marker.stem.rpartition(".")[0]


def absent_of(marker: str) -> list[str]:
    """Return the absent targets that a marker's text lists; none if it is empty or damaged."""
    try:
        return list(map(str, json.loads(marker)["absent"]))
    except (ValueError, KeyError, TypeError):
        return []


def _key_of(path: Path) -> str:
    try:
        software = read_software(path)
    except (ClapsepError, OSError):
        return ""
    match = re.search(r"(?<!\S)key=([0-9a-f]+)(?!\w)", software)
    return match[1] if match else ""

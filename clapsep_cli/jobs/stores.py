"""Reads and writes object stores and the web. This module alone imports fsspec.

A URL becomes a path in a staging folder that mirrors all stores: `SCRATCH/s3/lab/a.wav` stands for `s3://lab/a.wav`. So
names, clashes and templates are checked on paths, as for local files. `shown` turns the paths in a message back into
URLs, without user names and query strings. A mirrored path holds a file only while a job uses it.

`Stage` hides the differences between local files and stores:
* a listing tells which recordings exist, with size and time of change (or ETag), from which their key is computed;
* `fetch` downloads a recording to its mirrored path before it is opened, completely or not at all;
* `put` uploads a finished part from its mirrored path; the store returns its ETag;
* a recording is done if the tags of its parts have its key, or, in a store, if its marker exists:
  `_clapsep/<recording>.<key>.json` (see `exchange`).

A recording may be processed twice, which does no harm: parts are uploaded one by one, then the marker, and then all are
compared with the marker; if another worker has replaced a part, all are uploaded again. A killed worker leaves parts
without a marker, which the next run replaces. Local markers are the same files. They are written for absent targets,
which leave no tag, and by runs that share recordings (`--shard`, `--engine`), for `clapsep results`.

`exchange` limits the staged files: four recordings ahead, two uploads, and no more than the disk has room for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from clapsep_cli.errors import AudioError, ClapsepError, ExtraError, OutputError, UsageError
from clapsep_cli.files import claim, is_claimed, is_there, path_in, replacing

SCHEMES = ("s3", "gs", "hf", "https", "memory")
READ_ONLY = ("https",)
EXTRAS = {"s3": "s3", "gs": "gcs", "https": "https"}
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
SECRETS = re.compile(r"(?<=://)[^\s/@]*@|\?[^\s'\"),]*")  # user names and query strings
TIMES = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")  # names by file system
TAGS = ("ETag", "etag", "md5Hash", "xet_hash", "blob_id")
LOCK = ".lock"
LEFT_SECONDS = 60.0  # age at which an unlocked staging folder counts as left by a killed process
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True)
class Stored:
    """A file in a store: its size in bytes, and its time of change in ns, or else its ETag."""

    size: int
    changed: int | str


def is_url(text: str) -> bool:
    """Return True for `s3://…` and the like."""
    return URL.fullmatch(text) is not None


def is_pattern(text: str) -> bool:
    """Return True for text with `*`, `?` or `[…]`."""
    return re.search(r"[*?\[]", text) is not None


class Stage:
    """A staging folder that mirrors stores. The first URL creates it, `close` removes it.

    Args:
        scratch: the folder to make it in; None for the system's.
    """

    def __init__(self, scratch: Path | None = None) -> None:
        self.scratch = scratch
        self.root: Path | None = None
        self._claim: int | None = None
        self._known: dict[Path, Stored] = {}
        self._kept: set[Path] = set()
        self._urls: dict[Path, str] = {}  # those with user names or query strings
        self._markers: dict[Path, set[Path]] = {}
        self._children: dict[Path, set[Path]] = {}

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder."""
        if self.root is not None:
            shutil.rmtree(self.root, ignore_errors=True)
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    def _open(self) -> Path:
        if self.root is None:
            folder = self.scratch or Path(tempfile.gettempdir())
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for other in folder.glob("clapsep-stage-*"):
                    _clear(other)
                self.root = Path(tempfile.mkdtemp(prefix="clapsep-stage-", dir=folder)).resolve()
                with (self.root / LOCK).open("xb") as stream:
                    self._claim = claim(stream)
            except OSError as error:
                raise OutputError(f"{folder}: cannot be used for staging ({error.strerror or error})") from error
        return self.root

    # Names

    def path(self, text: str, folder: Path = Path()) -> Path:
        """Return the path for a URL, a path, or a name relative to `folder`.

        Raises `UsageError` for a scheme that is not known and for credentials in a URL, `AudioError` for a name with
        empty or ".." parts.
        """
        match = URL.fullmatch(text)
        if match is None:
            if not self.holds(folder):
                return path_in(folder, text)
            return self._mirrored(*self._parts(folder), *text.removeprefix("./").split("/"))
        scheme, name = match[1].lower(), match[2]
        if scheme not in SCHEMES:
            raise UsageError(f"{scheme}://: is not known; use a path, or {', '.join(f'{one}://' for one in SCHEMES)}")
        plain = name
        if scheme == "https":
            plain = re.split(r"[?#]", name)[0]
            host, slash, rest = plain.partition("/")
            plain = host.rpartition("@")[2] + slash + rest
        elif "@" in name.partition("/")[0]:
            raise UsageError(f"{scheme}://: leave credentials to the environment, not in the URL")
        path = self._mirrored(scheme, *plain.strip("/").split("/"))
        if plain != name and self._urls.setdefault(path, text) != text:
            raise AudioError(f"{scheme}://{plain}: named twice, with different queries; process them in two runs")
        return path

    def _mirrored(self, *names: str) -> Path:
        if any(name in ("", ".", "..") or "\0" in name for name in names):
            shown = f"{names[0]}://{'/'.join(names[1:])}"
            raise AudioError(f'{shown}: has an empty, "." or ".." part, which no file has; rename it')
        return self._open().joinpath(*names)

    def _parts(self, path: Path) -> tuple[str, ...]:
        assert self.root is not None, "only a URL makes a mirrored path"
        return path.relative_to(self.root).parts

    def holds(self, path: Path) -> bool:
        """Return True if `path` stands for a URL."""
        return self.root is not None and path.is_relative_to(self.root)

    def url(self, path: Path) -> str:
        """Return the URL of a mirrored path, with user name and query string."""
        scheme, *names = self._parts(path)
        return self._urls.get(path) or f"{scheme}://{'/'.join(names)}"

    def shown(self, text: str) -> str:
        """Return `text`, perhaps JSON, with URLs in place of mirrored paths."""
        if self.root is None:
            return text
        for root in dict.fromkeys((str(self.root), json.dumps(str(self.root))[1:-1])):
            for scheme in SCHEMES:
                text = text.replace(f"{root}/{scheme}/", f"{scheme}://")
        return text

    # Listings

    def is_there(self, path: Path) -> bool:
        """Return True if a file or folder exists; a folder of a store is listed only once."""
        if not self.holds(path):
            return is_there(path)
        if path in self._known:
            return True
        try:
            if len(self._parts(path.parent)) < 2 or self._parts(path)[0] == "https":
                self.look(path)
                return True
            if path.parent not in self._children:
                with self._reported(path.parent), self._store(path.parent) as (store, name):
                    store.invalidate_cache()
                    listed = [info["name"].rstrip("/").rpartition("/")[2] for info in store.ls(name, detail=True)]
                    self._children[path.parent] = {path.parent / child for child in listed}
            return path in self._children[path.parent]
        except AudioError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return False
            raise

    def look(self, path: Path) -> Stored | None:
        """Return size and time of a file in a store; None for a folder. Raises `AudioError` if it does not exist."""
        if path not in self._known:
            with self._reported(path), self._store(path) as (store, name):
                store.invalidate_cache()
                info = store.info(name)
                if info["type"] == "directory":
                    return None
                self._known[path] = _stored(info)
        return self._known[path]

    def files(self, folder: Path, recursive: bool = False) -> dict[Path, AudioError | None]:
        """List a folder: its files, with the reason why one cannot be used. Raises `AudioError`."""
        with self._reported(folder), self._store(folder) as (store, name):
            store.invalidate_cache()
            listed = store.find(name, detail=True).values() if recursive else store.ls(name, detail=True)
            return self._noted(folder, name, listed)

    def matches(self, pattern: Path) -> dict[Path, AudioError | None]:
        """List the files that match a pattern, as `files` does."""
        root = pattern
        while is_pattern(str(Path(*self._parts(root)))):
            root = root.parent
        with self._reported(pattern), self._store(pattern) as (store, name):
            store.invalidate_cache()
            return self._noted(root, store._strip_protocol(self.url(root)), store.glob(name, detail=True).values())

    def _noted(self, folder: Path, prefix: str, listed: Iterable[Mapping[str, Any]]) -> dict[Path, AudioError | None]:
        found: dict[Path, AudioError | None] = {}
        for info in listed:
            below = info["name"][len(prefix) :].removeprefix("/")
            if info["type"] != "file" or not below or below.endswith("/"):
                continue
            path = folder / below
            try:
                self._known[self._mirrored(*self._parts(folder), *below.split("/"))] = _stored(info)
                found[path] = None
            except AudioError as error:
                found[path] = error
        return found

    def markers(self, folder: Path) -> set[Path]:
        """List the markers in a folder and below it; later calls return the same list."""
        if folder not in self._markers:
            try:
                self._markers[folder] = set(self.files(folder, recursive=True))
            except AudioError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
                self._markers[folder] = set()
        return self._markers[folder]

    # Transfers

    def fetch(self, path: Path, keep: bool = True) -> Path:
        """Download a file, or the files of a folder, and return its mirrored path; a local path is returned as it is.

        `keep`: `drop` does not remove it, as for recordings of queries. Raises `AudioError`.
        """
        if keep:
            self._kept.add(path)
        if not self.holds(path) or path.is_file():
            return path
        if self.look(path) is None:
            for file, fault in self.files(path).items():
                if fault is None:
                    self.fetch(file, keep)
            return path
        with self._reported(path), self._store(path) as (store, name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                store.get_file(name, str(temporary))
                size, due = temporary.stat().st_size, self._known[path].size
                if due and size != due:
                    raise AudioError(f"{self.shown(str(path))}: received {size} of {due} bytes; try again")
        return path

    def drop(self, path: Path) -> None:
        """Remove a file from its mirrored path."""
        if self.holds(path) and path not in self._kept:
            path.unlink(missing_ok=True)

    def put(self, path: Path) -> None:
        """Copy a file from its mirrored path to the store. Raises `OutputError`."""
        with self._reported(path, "cannot be written", OutputError), self._store(path) as (store, name):
            store.put_file(str(path), name)

    def write(self, path: Path, content: str) -> None:
        """Write a small file, completely or not at all. Raises `OutputError`."""
        with self._reported(path, "cannot be written", OutputError):
            if self.holds(path):
                with self._store(path) as (store, name):
                    store.pipe_file(name, content.encode())
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary:
                    temporary.write_text(content, encoding="utf-8")

    def read(self, path: Path) -> str:
        """Read a small file; "" if it does not exist. Raises `AudioError`."""
        try:
            with self._reported(path):
                if not self.holds(path):
                    return path.read_text(encoding="utf-8", errors="replace")
                with self._store(path) as (store, name):
                    return bytes(store.cat_file(name)).decode(errors="replace")
        except AudioError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return ""
            raise

    def remove(self, path: Path) -> None:
        """Remove a file of a store if it exists. Raises `OutputError`."""
        with (
            self._reported(path, "cannot be removed", OutputError),
            self._store(path) as (store, name),
            suppress(FileNotFoundError),
        ):
            store.rm_file(name)

    def etag(self, path: Path) -> str:
        """Ask the store for the ETag of a file, or what it has instead; "" if the file does not exist."""
        try:
            with self._reported(path), self._store(path) as (store, name):
                store.invalidate_cache()
                return _tag(store.info(name))
        except AudioError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return ""
            raise

    def check_writable(self, path: Path) -> None:
        """Raise `UsageError` if outputs cannot go to `path`."""
        if self.holds(path) and self._parts(path)[0] in READ_ONLY:
            raise UsageError(f"{self.shown(str(path))}: can only be read; write elsewhere with -o")

    @contextmanager
    def _store(self, path: Path) -> Iterator[tuple[Any, str]]:
        """Yield the file system of a mirrored path, and its name there."""
        import fsspec

        url = self.url(path)
        scheme = url.partition(":")[0]
        try:
            store, name = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise ExtraError(f'{scheme}:// needs more packages: pip install "clapsep[{EXTRAS[scheme]}]"') from error
        yield store, name

    @contextmanager
    def _reported(
        self, path: Path, what: str = "cannot be read", kind: type[ClapsepError] = AudioError
    ) -> Iterator[None]:
        """Raise `kind` for any error of the system or of a store's client."""
        shown = self.shown(str(path))
        try:
            yield
        except ClapsepError:
            raise
        except FileNotFoundError as error:
            raise kind(f"{shown}: no such file") from error
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            reason = self.shown(SECRETS.sub("", str(reason).splitlines()[0]))
            raise kind(f"{shown}: {what} ({reason})") from error


def _stored(info: Mapping[str, Any]) -> Stored:
    when = next((info[name] for name in TIMES if isinstance(info.get(name), datetime | float | int)), None)
    if isinstance(when, datetime):
        when = when if when.tzinfo else when.replace(tzinfo=timezone.utc)
        return Stored(info.get("size") or 0, (when - EPOCH) // timedelta(microseconds=1) * 1000)
    if when is not None:  # seconds, which some listings give where asking for one file gives a date
        return Stored(info.get("size") or 0, round(when * 1e6) * 1000)
    return Stored(info.get("size") or 0, _tag(info))


def _tag(info: Mapping[str, Any]) -> str:
    told = next((info[name] for name in (*TAGS, *TIMES) if info.get(name)), "")
    return str(told).strip('"')


def _clear(folder: Path) -> None:
    """Remove a staging folder that a killed process left."""
    with suppress(OSError):
        lock = folder / LOCK
        if time.time() - lock.stat().st_mtime > LEFT_SECONDS and not is_claimed(lock):
            shutil.rmtree(folder)

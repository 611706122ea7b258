"""Fetches recordings from stores, commits results to them, and tells which recordings are already done."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

from clapsep_cli.errors import AudioError, OutputError, TakenError
from clapsep_cli.jobs.job import Extraction, Job
from clapsep_cli.jobs.outputs import MARKS
from clapsep_cli.jobs.resume import absent_of, finished, first_conflict, marked_name
from clapsep_cli.jobs.stores import Stage

AHEAD, UPLOADING = 4, 2  # recordings
BACK_OFF_SECONDS = 2.0
TRIES = 5  # to upload the parts of a recording while other workers upload theirs

Row = Callable[[Extraction], Mapping[str, Any]]


def done_before(job: Job, stage: Stage, fresh: bool = False) -> Job | None:
    """Return `job` with the outputs that an earlier run finished, or None if it is not done.

    `fresh`: ask the store again; by default, one listing serves all recordings.
    """
    if not job.key or job.marker is None:
        return job if job.key and job.outputs and _tagged(job) else None
    if stage.holds(job.marker):
        there = bool(stage.etag(job.marker)) if fresh else job.marker in stage.markers(_marks(job.marker))
        return job if there else None
    marker = stage.read(job.marker)
    if not job.outputs:  # only events are written
        return job if marker and _has_extras(job) else None
    absent = absent_of(marker)
    if absent and set(job.kept) <= set(absent):
        return replace(job, outputs={}, picture=None, events=None)
    job = replace(job, outputs={part: path for part, path in job.outputs.items() if part not in absent})
    return job if _tagged(job) else None


def _tagged(job: Job) -> bool:
    return finished(job.outputs.values(), job.key) and _has_extras(job)


def _has_extras(job: Job) -> bool:
    return all(path.exists() for path in job.extras.values())


def _marks(path: Path) -> Path:
    """Return the topmost folder of markers above `path`. One listing of it finds the markers of all recordings."""
    return next(folder for folder in reversed(path.parents) if folder.name == MARKS)


def blocking(job: Job, stage: Stage) -> Path | None:
    """Return an existing output that was not written for this job; only `--overwrite` replaces it.

    In a store, another marker of this recording names it. Parts without a marker are left from a killed worker.
    """
    if job.marker is not None and stage.holds(job.marker):
        parts = {stage.shown(str(path)): path for path in (*job.outputs.values(), *job.extras.values())}
        taken = (name for other in _others(job, stage) for name in _outputs(stage.read(other)))
        return next((parts[name] for name in taken if name in parts), None)
    there = [path for path in job.outputs.values() if stage.is_there(path)]
    if not there:  # the others are made after the outputs
        return next((path for path in job.extras.values() if stage.is_there(path)), None)
    return first_conflict(there, job.key) if job.key else next(iter(there), None)


def _others(job: Job, stage: Stage) -> list[Path]:
    """Return the markers of this recording with other keys."""
    assert job.marker is not None, "a store has markers"
    named = marked_name(job.marker)
    return [
        path
        for path in stage.markers(_marks(job.marker))
        if path.parent == job.marker.parent and path != job.marker and marked_name(path) == named
    ]


def _outputs(marker: str) -> list[str]:
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        row = json.loads(marker)
        extras = (row[name] for name in ("picture", "events_file") if row.get(name))
        return list(map(str, (*row["outputs"].values(), *extras)))
    return []


class Exchange:
    """Fetches recordings ahead of their turn, and commits their results; for stores in threads.

    Args:
        stage: mirrors the stores.
        row: returns the `--json` object of a result, for its marker.
    """

    def __init__(self, stage: Stage, row: Row) -> None:
        self.stage, self._row = stage, row
        self._coming: dict[int, Future[None]] = {}  # by the id of the job
        self._held: dict[int, tuple[Path, int]] = {}  # recordings, and bytes that may still be written for them
        self._lock = Lock()
        self._fetching = ThreadPoolExecutor(AHEAD, thread_name_prefix="clapsep-fetch")
        self._putting = ThreadPoolExecutor(UPLOADING, thread_name_prefix="clapsep-put")

    def close(self) -> None:
        """Start no further transfers."""
        for pool in (self._fetching, self._putting):
            pool.shutdown(wait=False, cancel_futures=True)

    def ahead(self, waiting: Iterable[Job]) -> None:
        """Start to fetch the next recordings as far as the disk has room; the first one in any case."""
        for job in islice(waiting, AHEAD):
            if id(job) in self._coming or not self._is_staged(job):
                continue
            known = self.stage.look(job.input.path) if self.stage.holds(job.input.path) else None
            need = (known.size if known else 0) * (1 + len(job.outputs))
            with self._lock:
                room = self._room() - sum(held for _, held in self._held.values())
                if need > room and self._held:
                    return
                self._held[id(job)] = job.input.path, need
            self._coming[id(job)] = self._fetching.submit(self._fetch, job, need, room)

    def _is_staged(self, job: Job) -> bool:
        return any(map(self.stage.holds, (job.input.path, *job.outputs.values(), *job.extras.values())))

    def _room(self) -> int:
        return shutil.disk_usage(self.stage.root or Path()).free

    def _fetch(self, job: Job, need: int, room: int) -> None:
        if need > room:
            what = f"takes {need / 1e9:.2g} GB of staging, and {room / 1e9:.2g} GB are free"
            raise AudioError(f"{job.input.path}: {what}; choose another folder with --scratch")
        if job.marker is not None and not job.overwrite and done_before(job, self.stage, fresh=True):
            raise TakenError(f"{job.input.path}: was processed by another worker meanwhile")
        self.stage.fetch(job.input.path, keep=False)

    def is_coming(self, job: Job) -> bool:
        """Return False while the disk has no room for a recording; it waits until another one is done."""
        return id(job) in self._coming or not self._is_staged(job)

    def coming(self, job: Job) -> Future[None] | None:
        """Return the pending fetch of a recording; None for one on this machine."""
        return self._coming.get(id(job))

    def commit(self, job: Job, done: Extraction) -> Future[Extraction]:
        """Upload the parts of a recording, then its marker, and remove its staged files."""
        if self._is_staged(job):
            return self._putting.submit(self._commit, job, done)
        committed: Future[Extraction] = Future()
        if job.marker is not None and job.needs_marker(done.absent):
            self.stage.write(job.marker, json.dumps(self._row(done)) + "\n")
        committed.set_result(done)
        return committed

    def _commit(self, job: Job, done: Extraction) -> Extraction:
        extras = [path for path in (done.picture, done.events_file) if path]
        parts = {**done.outputs, **{self.stage.shown(str(path)): path for path in extras}}
        parts = {name: path for name, path in parts.items() if self.stage.holds(path)}
        row = json.loads(self.stage.shown(json.dumps(self._row(done))))
        try:
            if job.marker is None or not self.stage.holds(job.marker):  # from a store to this machine
                if job.marker is not None and job.needs_marker(done.absent):
                    self.stage.write(job.marker, json.dumps(row) + "\n")
                return done
            if job.overwrite:
                for other in _others(job, self.stage):
                    self.stage.remove(other)
            for attempt in range(TRIES):
                # Another worker may write the same parts. The marker holds the ETags of parts that belong together.
                if (attempt or not job.overwrite) and self._agree(job.marker, parts):
                    return done
                time.sleep(random.uniform(0, BACK_OFF_SECONDS * attempt))
                etags = {}
                for name, path in parts.items():
                    self.stage.put(path)
                    etags[name] = self.stage.etag(path)
                self.stage.write(job.marker, json.dumps({**row, "etags": etags}) + "\n")
            if self._agree(job.marker, parts):
                return done
            raise OutputError(f"{job.input.path}: other workers keep writing its parts; try again")
        finally:
            for path in parts.values():
                path.unlink(missing_ok=True)
            self.release(job)

    def _agree(self, marker: Path, parts: Mapping[str, Path]) -> bool:
        """Return True if the marker exists and its ETags are those of the parts in the store."""
        with suppress(ValueError, KeyError, TypeError):
            etags = json.loads(self.stage.read(marker))["etags"]
            return all(etags[name] == self.stage.etag(path) for name, path in parts.items())
        return False

    def release(self, job: Job) -> None:
        """Remove the staged file of a recording."""
        with self._lock:
            self._held.pop(id(job), None)
            self._coming.pop(id(job), None)
            if job.input.path not in {path for path, _ in self._held.values()}:  # another job reads it, too
                self.stage.drop(job.input.path)

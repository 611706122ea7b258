"""Runs jobs: reads, separates and writes several recordings at a time, so that the model never waits.

Windows of several recordings share a batch. Memory does not grow with the length or number of recordings. A recording
that fails does not stop the others.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any, TypeVar

import numpy as np
import torch

from clapsep_cli.errors import ClapsepError, DeviceError, ModelError, OutputError, StoppedError, TakenError
from clapsep_cli.jobs.exchange import UPLOADING, Exchange, done_before
from clapsep_cli.jobs.job import Extraction, Failure, Job, JobProgress, Options, Outcome, Skipped, row_of
from clapsep_cli.jobs.recording import Recording
from clapsep_cli.jobs.resume import finished
from clapsep_cli.jobs.stores import Stage
from clapsep_cli.query import Excerpt
from clapsep_cli.separation import Workers, windows_in
from clapsep_cli.store.checkpoint import Model

MAX_OPEN = 32  # recordings open at a time
MAX_ASKED = 64  # sets of targets whose embeddings are kept
MAX_FILES = 160  # open at once; systems allow a process 256 or more
SHARE_OF_FREE_MEMORY = 0.5  # of a GPU that a batch of windows may use
LOOK_SECONDS = 0.2  # between checks for a stop while waiting for a file
OTHERS_SECONDS = 2.0  # to wait for another process to rename finished parts

Result = TypeVar("Result")


def run(
    jobs: Iterable[Job],
    model: Model,
    options: Options = Options(),
    progress: JobProgress = lambda job, done, total: None,
    stop: threading.Event | None = None,
    stage: Stage = Stage(),
) -> Generator[Outcome, None, None]:
    """Run `jobs`, and yield the result of each as soon as it is known.

    Args:
        jobs: from `planning.plan`.
        model: separates them.
        options: the same as in `plan`.
        progress: is called with a job, the seconds of it that are done, and their total (0 if unknown).
        stop: once it is set, the current windows and uploads are finished and unfinished outputs removed.
        stage: the same as in `plan`.

    Raises:
        StoppedError: `stop` was set.
        QueryError, AudioError: all recordings share queries that cannot be used.
        ModelError: the model cannot be used.
        DeviceError: the device lacks memory for a single window.
    """
    waiting = deque(jobs)
    with _Opened(model, options, stop or threading.Event(), stage) as opened:
        if waiting and all(job.targets is waiting[0].targets for job in waiting) and not waiting[0].has_spans:
            opened.ask(waiting[0])
        try:
            while waiting or opened.recordings or opened.committing:
                opened.check()
                opened.feed(waiting)
                opened.separate()
                yield from opened.deliver(progress)
        except StoppedError:
            yield from opened.settle(0)
            raise


class _Opened(ExitStack):
    """Holds the open recordings, in the order they were opened, and moves them on."""

    def __init__(self, model: Model, options: Options, stop: threading.Event, stage: Stage) -> None:
        super().__init__()
        self.exchange = Exchange(stage, lambda done: row_of(done, model))
        self.committing: deque[tuple[Job, Future[Extraction]]] = deque()
        self.model, self.options, self.stop = model, options, stop
        self.at_once = options.batch_size  # windows in a batch; 0 until it is chosen by the device
        self.workers: Workers | None = None  # on a CPU
        self.recordings: list[Recording] = []
        self.ended: list[Outcome] = []  # not yielded yet
        self.asked: dict[tuple[int, tuple[str, ...]], tuple[Job, Any]] = {}
        self.io = ThreadPoolExecutor(max(1, options.jobs), thread_name_prefix="clapsep-io")
        self.callback(self._close)

    def _close(self) -> None:
        self.io.shutdown(wait=False, cancel_futures=True)
        self.exchange.close()
        with ExitStack() as stack:  # so that none is left open if one fails to close
            for recording in self.recordings:
                stack.callback(recording.close)

    def check(self) -> None:
        """Raise `StoppedError` if `stop` is set."""
        if self.stop.is_set():
            raise StoppedError("stopped; finished recordings are kept, --skip-existing continues from there")

    def result(self, future: Future[Result]) -> Result:
        """Wait for the result of a thread. The user can stop meanwhile, even if a pipe stalls."""
        while not wait([future], LOOK_SECONDS).done:
            self.check()
        return future.result()

    def ask(self, job: Job) -> Any:
        """Embed the queries of a job. Recordings with the same targets share the result, and so can share a batch."""
        key = id(job.targets), tuple(job.kept)
        if key in self.asked:
            return self.asked[key][1]
        path, lenient, stream = job.input.path, self.options.lenient, self.options.stream
        queries = {
            name: query.within(lambda a, b: Excerpt(path, a, b, lenient, stream)).slower(self.options.expand)
            for name, query in job.targets.items()
        }
        names = list(queries)
        wanted = self.model.ask(list(queries.values()), [names.index(name) for name in job.kept])
        if not job.has_spans:
            self.asked[key] = job, wanted  # with the job, so that the id of its targets stays in use
            if len(self.asked) > MAX_ASKED:
                del self.asked[next(iter(self.asked))]
        return wanted

    def feed(self, waiting: deque[Job]) -> None:
        """Read, the oldest recordings first, until there are windows for a batch or nothing is left to read.

        One more recording than that is open, so that it is read while the model works.
        """
        for recording in list(self.recordings):
            self._read(recording)
        self.exchange.ahead(waiting)
        while waiting and self._has_room(waiting[0]) and (self._lacks_windows() or self.recordings[-1].windows):
            if not self.exchange.is_coming(waiting[0]):
                break
            self._open(waiting.popleft(), alone=not waiting and not self.recordings)
            self.exchange.ahead(waiting)

    def _lacks_windows(self) -> bool:
        windows = sum(len(recording.windows) + len(recording.coming) for recording in self.recordings)
        return windows < (self.workers.count + 1 if self.workers else max(1, self.at_once))

    def _has_room(self, job: Job) -> bool:
        """Return True if another recording may be open; each needs one file to read, and up to two for each part."""
        return len(self.recordings) < max(2, min(MAX_OPEN, MAX_FILES // (1 + 2 * len(job.outputs))))

    def _open(self, job: Job, alone: bool) -> None:
        try:
            if (coming := self.exchange.coming(job)) is not None:
                self.result(coming)
            recording = Recording(job, self.model, self.ask(job), self.options, self.io, self.result, self.check)
        except (ClapsepError, OSError) as error:
            self._fail(job, error)
            return
        self.recordings.append(recording)
        if not self.at_once and self.model.device.type == "cpu":
            if self.workers is None:
                windows = windows_in(self.model, recording.total) if alone else 0
                self.workers = self.enter_context(Workers(self.model, windows))
        elif not self.at_once:
            self.at_once = windows_at_once(self.model, recording.wanted)
        self._read(recording)

    def _read(self, recording: Recording) -> None:
        try:
            while self._lacks_windows() and not recording.ended:
                recording.read()
        except (ClapsepError, OSError) as error:
            self._fail(recording.job, error)
            self._drop(recording)

    def _fail(self, job: Job, error: ClapsepError | OSError) -> None:
        if isinstance(error, (StoppedError, ModelError, DeviceError)):
            raise error  # all other recordings would fail likewise
        self.exchange.release(job)
        if isinstance(error, TakenError) and self._is_done_meanwhile(job):
            self.ended.append(Skipped(job))
            return
        if isinstance(error, OSError):
            error = OutputError(f"{error.filename or job.input.path}: {error.strerror or error}")
        self.ended.append(Failure(job.input.path, error))

    def _is_done_meanwhile(self, job: Job) -> bool:
        """Return True if another process did this job; its first part may be there before the others."""
        until = time.monotonic() + OTHERS_SECONDS
        while not (done := done_before(job, self.exchange.stage, fresh=True)):
            if not any(finished([path], job.key) for path in job.outputs.values()) or time.monotonic() > until:
                break
            time.sleep(LOOK_SECONDS / 10)
        return done is not None

    def separate(self) -> None:
        """Separate windows, until there are results."""
        if self.workers:
            self._hand_out(self.workers)
        else:
            self._separate_batch()

    def _hand_out(self, workers: Workers) -> None:
        """Give all windows to the workers, and accept finished results: at least one, if any is due."""
        for recording in self.recordings:
            while recording.windows:
                window = recording.windows.popleft()
                recording.coming.append(workers.submit(window, recording.wanted, self.check))
        oldest = [recording.coming[0] for recording in self.recordings if recording.coming][:1]
        while oldest and not wait(oldest, LOOK_SECONDS).done:
            self.check()
        for recording in self.recordings:  # the results come in the order of the windows, as on one core
            while recording.coming and recording.coming[0].done():
                result, seconds = recording.coming.popleft().result()
                recording.elapsed += seconds
                recording.passage.accept(result)
            if recording.coming:
                break

    def _separate_batch(self) -> None:
        """Separate one batch of windows with the same queries."""
        batch = [(recording, window) for recording in self.recordings for window in recording.windows]
        if not batch:
            return
        first, shape = batch[0][0], batch[0][1].shape
        batch = [one for one in batch if one[0].wanted is first.wanted and one[1].shape == shape][: self.at_once]
        began = time.perf_counter()
        try:
            results = self.model.infer([window for _, window in batch], first.wanted, self.check)
        except torch.cuda.OutOfMemoryError as error:
            if len(batch) == 1:
                raise DeviceError(f"{self.model.device} lacks the memory for a window; use -d cpu") from error
            self.at_once = len(batch) // 2  # the windows are still there
            return
        share = (time.perf_counter() - began) / len(batch)
        for (recording, _), result in zip(batch, results, strict=True):
            recording.windows.popleft()
            recording.elapsed += share
            recording.passage.accept(result)

    def deliver(self, progress: JobProgress) -> Iterator[Outcome]:
        """Write what is final, and yield the recordings that are done or failed."""
        for recording in list(self.recordings):
            try:
                if recording.deliver():
                    progress(recording.job, recording.seconds, recording.total)
                if recording.windows or recording.coming or not recording.ended:
                    continue
                done = recording.finish()
            except (ClapsepError, OSError) as error:
                self._fail(recording.job, error)
                self._drop(recording)
            else:
                self._drop(recording)
                self.committing.append((recording.job, self.exchange.commit(recording.job, done)))
                yield from self.settle(UPLOADING)
        yield from self.settle(UPLOADING if self.recordings else 0)
        while self.ended:
            yield self.ended.pop(0)

    def settle(self, most: int) -> Iterator[Outcome]:
        """Yield the recordings that are committed; wait until at most so many are being committed."""
        while self.committing and (len(self.committing) > most or self.committing[0][1].done()):
            job, future = self.committing.popleft()
            try:
                yield future.result()
            except (ClapsepError, OSError) as error:
                self._fail(job, error)

    def _drop(self, recording: Recording) -> None:
        self.recordings.remove(recording)
        recording.close()


def windows_at_once(model: Model, wanted: Any) -> int:
    """Choose the number of windows in a batch on a GPU: as many as fit into half of its free memory."""
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    try:
        model.infer([torch.zeros(model.separator.window, device=model.device)], wanted)
    except torch.cuda.OutOfMemoryError:
        return 1
    needed = torch.cuda.max_memory_allocated(model.device) - before
    free, _ = torch.cuda.mem_get_info(model.device)
    return int(np.clip(free * SHARE_OF_FREE_MEMORY // max(1, needed), 1, 64))

"""From files to files: reads, separates and writes recordings, several at once, so that the model never waits.

The windows of several recordings share a batch; what is read ahead and still to be written is bounded, so memory does
not grow with the length of recordings or their number. A recording that fails does not stop the rest.
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
from torch import Tensor

from clapsep_cli.errors import ClapsepError, DeviceError, ModelError, OutputError, StoppedError
from clapsep_cli.jobs.recording import Recording
from clapsep_cli.jobs.tasks import Extraction, Failure, Job, JobProgress, Options
from clapsep_cli.query import Excerpt
from clapsep_cli.store.checkpoint import Model

MAX_OPEN = 32  # recordings
MAX_ASKED = 64  # different sets of targets whose embeddings are held
MAX_FILES = 160  # open at once; systems allow a process 256 or more
SHARE_OF_FREE_MEMORY = 0.5  # of a GPU, that a batch of windows may take
LOOK_SECONDS = 0.2  # how often whoever waits for a file looks whether to stop

Result = TypeVar("Result")


def _quiet(job: Job, done: float, total: float) -> None:
    pass


def run(
    jobs: Iterable[Job],
    model: Model,
    options: Options = Options(),
    progress: JobProgress = _quiet,
    stop: threading.Event | None = None,
) -> Generator[Extraction | Failure, None, None]:
    """Do `jobs`, yielding what became of each as soon as it is known.

    Once `stop` is set, the windows at hand are finished, what is unfinished is taken back, and `StoppedError` raised.
    Raises `QueryError` and `AudioError` at once where all recordings share queries that cannot be used, `ModelError`
    where the model cannot, and `DeviceError` where the device has not the memory for a single window.
    """
    waiting = deque(jobs)
    with _Opened(model, options, stop or threading.Event()) as opened:
        if waiting and all(job.targets is waiting[0].targets for job in waiting) and not waiting[0].has_spans:
            opened.ask(waiting[0])
        while waiting or opened.recordings:
            opened.check()
            opened.feed(waiting)
            opened.separate()
            yield from opened.deliver(progress)


class _Opened(ExitStack):
    """The recordings at work on, in the order they were opened."""

    def __init__(self, model: Model, options: Options, stop: threading.Event) -> None:
        super().__init__()
        self.model, self.options, self.stop = model, options, stop
        self.at_once = options.batch_size  # windows; 0 until the device was asked
        self.recordings: list[Recording] = []
        self.failures: list[Failure] = []  # that nobody was told of yet
        self.asked: dict[tuple[int, tuple[str, ...]], tuple[Job, Any]] = {}
        self.io = ThreadPoolExecutor(max(1, options.jobs), thread_name_prefix="clapsep-io")
        self.callback(self._close)

    def _close(self) -> None:
        self.io.shutdown(wait=False, cancel_futures=True)
        with ExitStack() as stack:  # so that none is left open if one fails to close
            for recording in self.recordings:
                stack.callback(recording.close)

    def check(self) -> None:
        """Raise `StoppedError` if the user asked for that."""
        if self.stop.is_set():
            raise StoppedError("stopped; recordings that were done are kept, --skip-existing goes on from there")

    def result(self, future: Future[Result]) -> Result:
        """What a thread was to do. Whoever stalls, a pipe perhaps, does not keep the user from stopping."""
        while not wait([future], LOOK_SECONDS).done:
            self.check()
        return future.result()

    def ask(self, job: Job) -> Any:
        """What the model is asked for; recordings that share their targets share it, and so can share a batch."""
        key = id(job.targets), tuple(job.kept)
        if key in self.asked:
            return self.asked[key][1]
        path, lenient, stream = job.input.path, self.options.lenient, self.options.stream
        queries = {
            name: query.within(lambda a, b: Excerpt(path, a, b, lenient, stream)) for name, query in job.targets.items()
        }
        names = list(queries)
        wanted = self.model.ask(list(queries.values()), [names.index(name) for name in job.kept])
        if not job.has_spans:
            self.asked[key] = job, wanted  # the job, too: its targets must outlive their id
            if len(self.asked) > MAX_ASKED:
                del self.asked[next(iter(self.asked))]
        return wanted

    def feed(self, waiting: deque[Job]) -> None:
        """Read on, the oldest recordings first, until there are windows for a batch or nothing more to read.

        One recording more than that takes is open, so that it is read while the model works.
        """
        for recording in list(self.recordings):
            self._read(recording)
        while waiting and self._has_room(waiting[0]) and (self._lacks_windows() or self.recordings[-1].windows):
            self._open(waiting.popleft())

    def _lacks_windows(self) -> bool:
        return not self.recordings or sum(len(recording.windows) for recording in self.recordings) < self.at_once

    def _has_room(self, job: Job) -> bool:
        """Whether one more may be open: each takes a file to read, and up to two for each of its parts."""
        return len(self.recordings) < max(2, min(MAX_OPEN, MAX_FILES // (1 + 2 * len(job.outputs))))

    def _open(self, job: Job) -> None:
        try:
            recording = Recording(job, self.model, self.ask(job), self.options, self.io, self.result, self.check)
        except (ClapsepError, OSError) as error:
            self._fail(job, error)
            return
        self.recordings.append(recording)
        if not self.at_once:
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
            raise error  # which would befall all others, too
        if isinstance(error, OSError):
            error = OutputError(f"{error.filename or job.input.path}: {error.strerror or error}")
        self.failures.append(Failure(job.input.path, error))

    def separate(self) -> None:
        """Have windows separated that ask for the same, as many as make a batch."""
        batch = [(recording, window) for recording in self.recordings for window in recording.windows]
        batch = [one for one in batch if _alike(one, batch[0])][: self.at_once]
        if not batch:
            return
        began = time.perf_counter()
        try:
            results = self.model.infer([window for _, window in batch], batch[0][0].wanted, self.check)
        except torch.cuda.OutOfMemoryError as error:
            if len(batch) == 1:
                raise DeviceError(f"{self.model.device} has not the memory for a window; use -d cpu") from error
            self.at_once = len(batch) // 2  # the windows are still there
            return
        share = (time.perf_counter() - began) / len(batch)
        for (recording, _), result in zip(batch, results, strict=True):
            recording.windows.popleft()
            recording.elapsed += share
            recording.passage.accept(result)

    def deliver(self, progress: JobProgress) -> Iterator[Extraction | Failure]:
        """Hand on what is final; yield the recordings that are done, and those that failed."""
        for recording in list(self.recordings):
            try:
                if recording.deliver():
                    progress(recording.job, recording.seconds, recording.total)
                if recording.windows or not recording.ended:
                    continue
                done = recording.finish()
            except (ClapsepError, OSError) as error:
                self._fail(recording.job, error)
                self._drop(recording)
            else:
                self._drop(recording)
                yield done
        while self.failures:
            yield self.failures.pop(0)

    def _drop(self, recording: Recording) -> None:
        self.recordings.remove(recording)
        recording.close()


def _alike(one: tuple[Recording, Tensor], other: tuple[Recording, Tensor]) -> bool:
    """Whether two windows can be separated in one go."""
    return one[0].wanted is other[0].wanted and one[1].shape == other[1].shape


def windows_at_once(model: Model, wanted: Any) -> int:
    """How many windows the device separates best in one go: on a GPU as many as fit into half of its free memory.

    On a CPU one: two would save a twentieth in lower precision, but tie a recording's last bits to its neighbours.
    """
    if model.device.type != "cuda":
        return 1
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    try:
        model.infer([torch.zeros(model.separator.window, device=model.device)], wanted)
    except torch.cuda.OutOfMemoryError:
        return 1
    needed = torch.cuda.max_memory_allocated(model.device) - before
    free, _ = torch.cuda.mem_get_info(model.device)
    return int(np.clip(free * SHARE_OF_FREE_MEMORY // max(1, needed), 1, 64))

"""From files to files: reads, separates and writes recordings, several at once, so that the model never waits.

The windows of several recordings share a batch; what is read ahead and still to be written is bounded, so memory does
not grow with the length of recordings or their number. A recording that fails does not stop the rest.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clapsep_cli import __version__
from clapsep_cli.audio import Audio, on_grid
from clapsep_cli.checkpoint import Model
from clapsep_cli.encoding import choose_encoding
from clapsep_cli.errors import ClapsepError, OutputError, QueryError, StoppedError
from clapsep_cli.levels import Meter, Presence
from clapsep_cli.pipeline import BLOCK_SECONDS, RESIDUAL, Ear, Passage
from clapsep_cli.plot import Picture
from clapsep_cli.query import Excerpt
from clapsep_cli.sources import STDIN, Source
from clapsep_cli.tasks import Extraction, Failure, Job, Options, Progress
from clapsep_cli.writers import Outputs

MAX_OPEN = 32  # recordings
SHARE_OF_FREE_MEMORY = 0.5  # of a GPU, that a batch of windows may take


def _quiet(job: Job, done: float, total: float) -> None:
    pass


def run(
    jobs: Iterable[Job],
    model: Model,
    options: Options = Options(),
    progress: Progress = _quiet,
    stop: threading.Event | None = None,
) -> Iterator[Extraction | Failure]:
    """Do `jobs`, yielding what became of each as soon as it is known.

    Once `stop` is set, the windows at hand are finished, what is unfinished is taken back, and `StoppedError` raised.
    Raises `QueryError` and `AudioError` at once where all recordings share queries that cannot be used.
    """
    waiting, at_once = deque(jobs), options.batch
    with _Opened(model, options) as opened:
        if waiting and all(job.targets is waiting[0].targets for job in waiting) and not waiting[0].has_spans:
            opened.ask(waiting[0])
        while waiting or opened.recordings:
            if stop is not None and stop.is_set():
                raise StoppedError("stopped; recordings that were done are kept, --skip-existing goes on from there")
            # One more than a batch needs is open, so that it is read while the model works.
            while waiting and len(opened.recordings) < min(at_once + 1, MAX_OPEN):
                yield from opened.open(waiting.popleft())
            if not at_once and opened.recordings:
                at_once = windows_at_once(model, opened.recordings[0].wanted)
            yield from opened.feed(at_once)
            opened.separate(at_once)
            yield from opened.deliver(progress)


class _Opened(ExitStack):
    """The recordings at work on, in the order they were opened."""

    def __init__(self, model: Model, options: Options) -> None:
        super().__init__()
        self.model, self.options = model, options
        self.recordings: list[_Recording] = []
        self.asked: tuple[object, Any] = (None, None)
        self.io = ThreadPoolExecutor(max(1, options.workers), thread_name_prefix="clapsep-io")
        self.callback(self._close)

    def _close(self) -> None:
        try:
            self.io.shutdown(wait=True, cancel_futures=True)
        finally:
            for recording in self.recordings:
                recording.close()

    def open(self, job: Job) -> Iterator[Failure]:
        try:
            self.recordings.append(_Recording(job, self.model, self.ask(job), self.options, self.io))
        except (ClapsepError, OSError) as error:
            yield _failure(job, error)

    def ask(self, job: Job) -> Any:
        """What the model is asked for; recordings with the same queries share it, and so can share a batch."""
        queries = {name: query.within(lambda a, b: _excerpt(job, a, b)) for name, query in job.targets.items()}
        key = (queries, job.kept)
        if self.asked[0] != key:
            names = list(queries)
            self.asked = key, self.model.ask(list(queries.values()), [names.index(name) for name in job.kept])
        return self.asked[1]

    def feed(self, at_once: int) -> Iterator[Failure]:
        """Read on until there are windows for a batch, or nothing more to read."""
        ready = 0
        for recording in list(self.recordings):
            try:
                while not recording.windows and not recording.ended:
                    recording.read()
            except (ClapsepError, OSError) as error:
                yield self._fail(recording, error)
            ready += len(recording.windows)
            if ready >= at_once:
                break

    def separate(self, at_once: int) -> None:
        """Have up to `at_once` windows separated that ask for the same."""
        batch: list[tuple[_Recording, Tensor]] = []
        for recording in self.recordings:
            while recording.windows and len(batch) < at_once:
                if batch and not (
                    batch[0][0].wanted is recording.wanted and batch[0][1].shape == recording.windows[0].shape
                ):
                    break
                batch.append((recording, recording.windows.popleft()))
        if batch:
            results = self.model.infer([window for _, window in batch], batch[0][0].wanted)
            for (recording, _), result in zip(batch, results, strict=True):
                recording.passage.accept(result)

    def deliver(self, progress: Progress) -> Iterator[Extraction | Failure]:
        """Hand on what is final; yield the recordings that are done."""
        for recording in list(self.recordings):
            if recording.windows:
                continue
            try:
                recording.deliver()
                progress(recording.job, recording.seconds, recording.total)
                if recording.ended:
                    yield recording.finish()
                    self._drop(recording)
            except (ClapsepError, OSError) as error:
                yield self._fail(recording, error)

    def _fail(self, recording: _Recording, error: ClapsepError | OSError) -> Failure:
        self._drop(recording)
        return _failure(recording.job, error)

    def _drop(self, recording: _Recording) -> None:
        self.recordings.remove(recording)
        recording.close()


def _failure(job: Job, error: ClapsepError | OSError) -> Failure:
    if isinstance(error, OSError):
        error = OutputError(f"{error.filename or job.input.path}: {error.strerror or error}")
    return Failure(job.input.path, error)


def _excerpt(job: Job, start: float, end: float) -> Excerpt:
    if job.input.path == STDIN:
        raise QueryError("a span of the mixture needs a file, not standard input, which can be read only once")
    return Excerpt(job.input.path, start, end)


class _Recording:
    """A recording that is being separated. Reading and writing go on in threads of `io`, a step ahead and behind."""

    def __init__(self, job: Job, model: Model, wanted: Any, options: Options, io: ThreadPoolExecutor) -> None:
        self.began = time.perf_counter()
        self.job, self.model, self.wanted, self.options, self.io = job, model, wanted, options, io
        self.windows: deque[Tensor] = deque()
        self.ended, self.samples = False, 0
        self._stack = ExitStack()
        self._reading: Future[tuple[Audio, Audio, bool]] | None = None
        self._writing: Future[None] | None = None
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise

    def _open(self) -> None:
        source = self._stack.enter_context(Source(self.job.input.path, self.options.start, self.options.end))
        self.rate, self.frames = source.rate, source.frames
        self.encoding = choose_encoding(self.options.format, self.options.subtype, source)
        self._outputs = self._stack.enter_context(
            Outputs(
                self.job.outputs,
                source.rate,
                source.channels,
                self.encoding,
                self.options.clip,
                source.tags,
                f"clapsep {__version__}" + (f" key={self.job.key}" if self.job.key else ""),
                self.options.overwrite,
            )
        )
        self._picture = Picture(source.rate) if self.job.picture else None
        self._meters = {part: Meter() for part in ("mixture", *self.job.outputs)}
        watched = self.model.tells_likeness and (self.options.presence or self.options.min_presence is not None)
        self._presence = {name: Presence(source.rate) for name in self.job.kept} if watched else {}
        self.passage = Passage(self.model, self.wanted, source.rate, source.channels)
        self._ear = Ear(source.rate, self.model.separator.rate, source.channels)
        self._blocks = source.blocks(BLOCK_SECONDS)
        self._nothing = np.zeros((source.channels, 0), np.float32)
        self._reading = self.io.submit(self._next)

    def _next(self) -> tuple[Audio, Audio, bool]:
        block = next(self._blocks, None)
        if block is None:
            return self._nothing, self._ear.hear(self._nothing, True), True
        return block, self._ear.hear(block), False

    @property
    def seconds(self) -> float:
        """How much is separated."""
        return self.samples / self.rate

    @property
    def total(self) -> float:
        """How long the recording is, as far as that is known."""
        return max(self.frames, self.samples) / self.rate

    def read(self) -> None:
        """Take in the next block; it may complete windows."""
        assert self._reading is not None, "a recording that has ended is not read on"
        block, heard, self.ended = self._reading.result()
        self._reading = None if self.ended else self.io.submit(self._next)
        self.windows.extend(self.passage.push(block, heard, self.ended))

    def deliver(self) -> None:
        """Have what is final written."""
        mixture, stems = self.passage.pull()
        if mixture.size:
            self.samples += mixture.shape[1]
            self._wait()
            self._writing = self.io.submit(self._store, mixture, stems)

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _store(self, mixture: Audio, stems: Audio) -> None:
        if self.options.consistent:
            stems = stems + (mixture - stems.sum(0)) / np.float32(len(stems))
        for presence, stem in zip(self._presence.values(), stems, strict=False):
            presence.add(mixture, stem)
        # Rounded before they are subtracted, the stems leave a residual that adds up to the mixture exactly.
        rounded = [on_grid(stem, self.encoding.bits) for stem in stems]
        parts = dict(zip(self.job.kept, rounded, strict=True))
        parts[RESIDUAL] = mixture - np.asarray(sum(rounded), np.float32)
        written = {part: parts[part] for part in self.job.outputs}
        for part, audio in (("mixture", mixture), *written.items()):
            self._meters[part].add(audio)
        if self._picture is not None:
            self._picture.add({"mixture": mixture, **written})
        self._outputs.write(written)

    def finish(self) -> Extraction:
        """Give the outputs their names."""
        self._wait()
        presence = {name: one.read(self._likeness(stem)) for stem, (name, one) in enumerate(self._presence.items())}
        written = self._is_present(presence)
        result = self._outputs.commit() if written else None
        if self._picture is not None and self.job.picture is not None and written:
            self._picture.save(self.job.picture, "; ".join(query.describe() for query in self.job.targets.values()))
        return Extraction(
            mixture=self.job.input.path,
            outputs=dict(self.job.outputs) if written else {},
            seconds=self.seconds,
            elapsed=time.perf_counter() - self.began,
            queries={name: self.job.targets[name].describe() for name in self.job.kept},
            clipped=result.clipped if result else {},
            gain=result.gain if result else 1.0,
            levels={part: meter.read() for part, meter in self._meters.items()},
            presence=presence,
            picture=self.job.picture if written else None,
        )

    def _likeness(self, stem: int) -> Callable[[Audio], float | None]:
        return lambda mono: self.model.likeness(self.wanted, stem, mono, self.rate)

    def _is_present(self, presence: Mapping[str, dict[str, float] | None]) -> bool:
        """Whether any target is there, as far as anybody wants to know."""
        least = self.options.min_presence
        return least is None or any(one is not None and one["score"] >= least for one in presence.values())

    def close(self) -> None:
        """Let go of everything; what was not finished leaves no trace."""
        for pending in (self._reading, self._writing):
            if pending is not None and not pending.cancel():
                pending.exception()
        self._stack.close()


def windows_at_once(model: Model, wanted: Any) -> int:
    """How many windows the device separates best in one go: on a GPU as many as fit into half of its free memory."""
    if model.device.type != "cuda":
        return 1
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    model.infer([torch.zeros(model.separator.window, device=model.device)], wanted)
    needed = torch.cuda.max_memory_allocated(model.device) - before
    free, _ = torch.cuda.mem_get_info(model.device)
    return int(np.clip(free * SHARE_OF_FREE_MEMORY // max(1, needed), 1, 64))

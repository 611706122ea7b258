"""A recording on its way from its file to those of its parts."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from clapsep_cli.audio.encoding import choose_encoding
from clapsep_cli.audio.samples import Audio, on_grid
from clapsep_cli.audio.sources import Source
from clapsep_cli.audio.writers import Outputs, Written
from clapsep_cli.jobs.plot import Picture
from clapsep_cli.jobs.resume import mark_absent
from clapsep_cli.jobs.tasks import Extraction, Job, Options
from clapsep_cli.query import MIXTURE, RESIDUAL
from clapsep_cli.separation.levels import Meter, Presence
from clapsep_cli.separation.pipeline import BLOCK_SECONDS, Ear, Passage
from clapsep_cli.store.checkpoint import Model
from clapsep_cli.version import __version__

WRITING_SECONDS, READING_SECONDS = 5.0, 0.5  # to wait for a block that is under way when all else has ended


class Recording:
    """A recording that is being separated. Reading and writing go on in threads of `io`, a step ahead and behind.

    `result` waits for what such a thread does. `elapsed` is the time that was spent on this recording alone, in s.
    """

    def __init__(
        self,
        job: Job,
        model: Model,
        wanted: Any,
        options: Options,
        io: ThreadPoolExecutor,
        result: Callable[[Future[Any]], Any],
    ) -> None:
        self.job, self.model, self.wanted, self.options, self.io, self.result = job, model, wanted, options, io, result
        self.windows: deque[Tensor] = deque()
        self.ended, self.samples, self.elapsed = False, 0, 0.0
        self._source, self._outputs = ExitStack(), ExitStack()
        self._reading: Future[tuple[Audio, Audio, bool]] | None = None
        self._writing: Future[None] | None = None
        try:
            with self._clocked():
                self._open()
        except BaseException:
            self.close()
            raise

    @contextmanager
    def _clocked(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.elapsed += time.perf_counter() - began

    def _open(self) -> None:
        opening = self.io.submit(Source, self.job.input.path, self.options.start, self.options.end)
        source: Source = self._source.enter_context(self.result(opening))
        self.rate, self.frames = source.rate, source.frames
        self.encoding = choose_encoding(self.options.format, self.options.subtype, source)
        self._writer = self._outputs.enter_context(
            Outputs(
                self.job.outputs,
                source.rate,
                source.channels,
                self.encoding,
                self.options.clip,
                source.tags,
                f"clapsep {__version__}" + (f" key={self.job.key}" if self.job.key else ""),
                self.job.overwrite,
            )
        )
        self._picture = Picture(source.rate, self.options.start) if self.job.picture else None
        self._meters = {part: Meter() for part in (MIXTURE, *self.job.outputs)}
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
        """How long the recording is; 0 if that is not known."""
        return max(self.frames, self.samples) / self.rate if self.frames else 0.0

    def read(self) -> None:
        """Take in the next block; it may complete windows."""
        assert self._reading is not None, "a recording that has ended is not read on"
        with self._clocked():
            block, heard, self.ended = self.result(self._reading)
            self._reading = None if self.ended else self.io.submit(self._next)
            self.windows.extend(self.passage.push(block, heard, self.ended))

    def deliver(self) -> bool:
        """Have what is final written; whether there was any."""
        with self._clocked():
            mixture, stems = self.passage.pull()
            if mixture.size:
                self.samples += mixture.shape[1]
                self._wait()
                self._writing = self.io.submit(self._store, mixture, stems)
        return bool(mixture.size)

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            self.result(writing)

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
        for part, audio in ((MIXTURE, mixture), *written.items()):
            self._meters[part].add(audio)
        if self._picture is not None:
            self._picture.add({MIXTURE: mixture, **written})
        self._writer.write(written)

    def finish(self) -> Extraction:
        """Give the outputs their names."""
        with self._clocked():
            self._wait()
            presence = {name: one.read(self._likeness(stem)) for stem, (name, one) in enumerate(self._presence.items())}
            written = self._is_present(presence)
            if self.job.marker and not written:
                mark_absent(self.job.marker, presence)
            result = self._writer.commit() if written else Written({}, 1.0)
            if self._picture is not None and self.job.picture is not None and written:
                title = "; ".join(query.describe() for query in self.job.targets.values())
                self._picture.save(self.job.picture, title)
        return Extraction(
            mixture=self.job.input.path,
            outputs=dict(self.job.outputs) if written else {},
            seconds=self.seconds,
            elapsed=self.elapsed,
            queries={name: self.job.targets[name].describe() for name in self.job.kept},
            clipped=result.clipped,
            gain=result.gain,
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
        """Let go of everything; what was not finished leaves no trace. Whatever stalls is left to itself."""
        if _is_over(self._writing, WRITING_SECONDS):
            self._outputs.close()
        if _is_over(self._reading, READING_SECONDS):
            self._source.close()


def _is_over(work: Future[Any] | None, seconds: float) -> bool:
    """Whether a thread has done its work, or does so within some seconds."""
    return work is None or work.cancel() or bool(wait([work], seconds).done)

"""Separates one recording, from its file to the files of its parts."""

from __future__ import annotations

import math
import tempfile
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from clapsep_cli.audio.encoding import choose_encoding, encoding_of
from clapsep_cli.audio.film import Film
from clapsep_cli.audio.samples import Audio, Samples, on_grid, slowed
from clapsep_cli.audio.sources import Source
from clapsep_cli.audio.writers import STDOUT, Outputs, Written
from clapsep_cli.jobs.job import Extraction, Job, Options
from clapsep_cli.listening.events import Event, EventFinder, save_events
from clapsep_cli.listening.levels import Likeness, Meter, Presence
from clapsep_cli.listening.plot import Marks, Picture
from clapsep_cli.query import MIXTURE, RESIDUAL
from clapsep_cli.separation import BLOCK_SECONDS, Passage, as_heard
from clapsep_cli.store.checkpoint import Model
from clapsep_cli.version import __version__

VALUES_AT_ONCE = 2**16  # samples rounded, measured and written in one go: they stay in a processor's cache
WRITING_SECONDS, READING_SECONDS = 5.0, 0.5  # to wait for a thread's last block when closing


class Draft:
    """Keeps audio blocks in an unnamed file until it is known which parts to write.

    The file is in `folder`, by default the system's. Blocks are `[..., samples]`, of any float type.
    """

    def __init__(self, folder: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._blocks: list[tuple[tuple[int, ...], np.dtype[Any]]] = []

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, block: Samples) -> None:
        """Append a block."""
        self._file.write(np.ascontiguousarray(block).tobytes())
        self._blocks.append((block.shape, block.dtype))

    def read(self) -> Iterator[Samples]:
        """Yield all blocks."""
        self._file.seek(0)
        for shape, dtype in self._blocks:
            yield np.frombuffer(self._file.read(dtype.itemsize * math.prod(shape)), dtype).reshape(shape)


class Recording:
    """A recording that is being separated. Threads read one block ahead and write one block behind.

    Args:
        job: the recording, its targets and outputs.
        model: separates it.
        wanted: the embedded queries, from `model.ask`.
        options: how it is read and written.
        io: runs the threads.
        result: waits for the result of a thread.
        check: raises `StoppedError` if the user wants to stop.

    `elapsed` is the time in s that was spent on this recording alone.
    """

    def __init__(
        self,
        job: Job,
        model: Model,
        wanted: Any,
        options: Options,
        io: ThreadPoolExecutor,
        result: Callable[[Future[Any]], Any],
        check: Callable[[], None],
    ) -> None:
        self.job, self.model, self.wanted, self.options, self.io = job, model, wanted, options, io
        self.result, self._check = result, check
        self.windows: deque[Tensor] = deque()
        self.coming: deque[Future[tuple[Tensor, float]]] = deque()  # results of windows that workers have
        self.ended, self.samples, self.elapsed = False, 0, 0.0
        self._source, self._outputs = ExitStack(), ExitStack()
        self._reading: Future[tuple[Samples, Audio, bool]] | None = None
        self._writing: Future[None] | None = None
        try:
            with self._clocked():
                self._open()
        except BaseException:
            self.close()
            raise

    @property
    def _decides(self) -> bool:
        """True if presence decides what is written."""
        return self.options.min_presence is not None

    @contextmanager
    def _clocked(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.elapsed += time.perf_counter() - began

    def _open(self) -> None:
        options = self.options
        opening = self.io.submit(
            Source, self.job.input.path, options.start, options.end, options.lenient, options.stream
        )
        source: Source = self._source.enter_context(self.result(opening))
        self._notes = source.notes
        self.rate, self.frames = source.rate, source.frames
        self.heard_rate = slowed(source.rate, options.expand, source.name)
        film = Film(self.job.input.path, options.stream or 1) if options.remux else None
        if film is not None:
            self.encoding = encoding_of(film, source.bits)
        else:
            form = (source.rate, source.channels, source.bits)
            self.encoding = choose_encoding(options.format, options.subtype, *form)
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
                source.speakers,
                film,
            )
        )
        self._blocks, channels = source.blocks(BLOCK_SECONDS), source.channels
        if options.no_audio:  # only the model's input is processed
            self._blocks, channels = as_heard(self._blocks, self.heard_rate, self.model.separator.rate), 1
            self.heard_rate = min(self.heard_rate, self.model.separator.rate)
        self._block_rate = round(self.heard_rate * options.expand)
        self._picture = Picture(self._block_rate, self.options.start) if self.job.picture else None
        self._meters = {part: Meter() for part in (MIXTURE, *self.job.outputs)}
        watched = self.model.tells_likeness and (self.options.presence or self._decides)
        self._presence = {name: Presence(self.heard_rate) for name in self.job.kept} if watched else {}
        sought = self.job.kept if options.events else ()
        self._finders = {name: EventFinder(self.heard_rate, options.rules) for name in sought}
        self._events: dict[str, list[Event]] = {name: [] for name in self._finders}
        # Which of several targets are there is known at the end: until then nothing is written of any part.
        self._draft: Draft | None = None
        if self._decides and len(self.job.kept) > 1:
            folder = next((path.parent for path in self.job.outputs.values() if path != STDOUT), None)
            self._draft = self._outputs.enter_context(Draft(folder))
        self.passage = Passage(self.model, self.wanted, self.heard_rate, channels)
        self._nothing = np.zeros((channels, 0), np.float32)
        self._reading = self.io.submit(self._next)

    def _next(self) -> tuple[Samples, Audio, bool]:
        block = next(self._blocks, None)
        if block is None:
            return self._nothing, self.passage.hear(self._nothing, True), True
        return block, self.passage.hear(block), False

    @property
    def seconds(self) -> float:
        """Duration of the audio separated so far."""
        return self.samples / self._block_rate

    @property
    def total(self) -> float:
        """Duration of the recording; 0 if unknown."""
        return max(self.frames / self.rate, self.seconds) if self.frames else 0.0

    def read(self) -> None:
        """Read the next block, which may complete windows."""
        assert self._reading is not None, "a recording that has ended is not read on"
        with self._clocked():
            block, heard, self.ended = self.result(self._reading)
            self._reading = None if self.ended else self.io.submit(self._next)
            self.windows.extend(self.passage.push(block, heard, self.ended))

    def deliver(self) -> bool:
        """Write the audio that is final. Returns True if there was any."""
        with self._clocked():
            mixture, stems = self.passage.pull()
            if mixture.size:
                self.samples += mixture.shape[1]
                self._wait()
                self._take_events()
                self._writing = self.io.submit(self._store, mixture, stems)
        return bool(mixture.size)

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            self.result(writing)

    def _store(self, mixture: Samples, stems: Samples) -> None:
        heard = mixture.astype(np.float32, copy=False)
        if self.options.consistent:
            stems = stems + (mixture - stems.sum(0)) / len(stems)
        for presence, stem in zip(self._presence.values(), stems, strict=False):
            presence.add(heard, stem.astype(np.float32, copy=False))
        for finder, stem in zip(self._finders.values(), stems, strict=False):
            finder.add(heard, stem.astype(np.float32, copy=False))
        self._meters[MIXTURE].add(heard)
        if self._draft is not None:
            self._draft.write(np.concatenate([mixture[None], stems]))
        else:
            self._write(mixture, stems, ())

    def _write(self, mixture: Samples, stems: Samples, absent: Collection[str]) -> None:
        """Write `stems` and the residual; stems that are `absent` stay in the residual."""
        size = max(1, VALUES_AT_ONCE // len(mixture))
        for at in range(0, mixture.shape[1], size):
            self._write_piece(mixture[:, at : at + size], stems[:, :, at : at + size], absent)

    def _write_piece(self, mixture: Samples, stems: Samples, absent: Collection[str]) -> None:
        # Rounded before they are subtracted, the stems leave a residual that adds up to the mixture exactly.
        bits, named = self.encoding.bits, zip(self.job.kept, stems, strict=True)
        parts = {name: on_grid(stem, bits) for name, stem in named if name not in absent}
        parts[RESIDUAL] = reduce(np.subtract, parts.values(), mixture)
        written = {part: parts[part] for part in self.job.outputs if part not in absent}
        shown = {part: audio.astype(np.float32, copy=False) for part, audio in written.items()}
        for part, audio in shown.items():
            self._meters[part].add(audio)
        if self._picture is not None:
            self._picture.add({MIXTURE: mixture.astype(np.float32, copy=False), **shown})
        if written:
            self._writer.write(written)

    def _take_events(self, last: bool = False) -> None:
        """Collect the events that are final; no thread may be writing."""
        for stem, (name, finder) in enumerate(self._finders.items()):
            likeness = self._likeness(stem) if self.model.tells_likeness else None
            found = finder.finish(likeness) if last else finder.take(likeness)
            self._events[name] += [one.moved(self.options.start, self.options.expand) for one in found]

    def finish(self) -> Extraction:
        """Rename the finished outputs of the targets that are present, and return the result."""
        with self._clocked():
            self._wait()
            presence = {}
            for stem, (name, one) in enumerate(self._presence.items()):
                self._check()
                presence[name] = one.read(self._likeness(stem))
            self._take_events(last=True)
            least = self.options.min_presence
            scores = {name: one["score"] if one else -math.inf for name, one in presence.items()}
            absent = [name for name, score in scores.items() if least is not None and score < least]
            self._events |= {name: [] for name in absent if name in self._events}
            written = len(absent) < len(self.job.kept) or self.options.no_audio
            result = self._commit(absent) if written else Written({}, 1.0)
        outputs = {part: path for part, path in self.job.outputs.items() if written and part not in absent}
        measured = outputs if self._draft is not None else self.job.outputs
        return Extraction(
            mixture=self.job.input.path,
            outputs=outputs,
            seconds=self.seconds,
            elapsed=self.elapsed,
            queries={name: self.job.targets[name].describe() for name in self.job.kept},
            clipped=result.clipped,
            gain=result.gain,
            levels={part: self._meters[part].read() for part in (MIXTURE, *measured)},
            presence=presence,
            absent=absent,
            picture=self.job.picture if written else None,
            events=self._events,
            events_file=self.job.events if written else None,
            notes=list(self._notes),
        )

    def _commit(self, absent: Collection[str]) -> Written:
        if self._draft is not None:
            self.result(self.io.submit(self._write_draft, self._draft, absent))
        for part in absent:
            if part in self.job.outputs:
                self._writer.drop(part)
        result = self._writer.commit()
        if self._picture is not None and self.job.picture is not None:
            title = "; ".join(query.describe() for query in self.job.targets.values())
            self._picture.save(self.job.picture, title, self._marks())
        if self.job.events is not None:
            save_events(self.job.events, self._events, self.options.events_format, self.rate)
        return result

    def _marks(self) -> Marks:
        """Return the events to draw: those of each target, or on the mixture if the target is not drawn."""
        found = {name: [(one.start, one.end) for one in several] for name, several in self._events.items()}
        drawn = self._picture.names if self._picture else []
        hidden = [mark for name, marks in found.items() if name not in drawn for mark in marks]
        return {**found, MIXTURE: hidden}

    def _write_draft(self, draft: Draft, absent: Collection[str]) -> None:
        for block in draft.read():
            self._check()
            self._write(block[0], block[1:], absent)

    def _likeness(self, stem: int) -> Likeness:
        return partial(self.model.likeness, self.wanted, stem, self.heard_rate)

    def close(self) -> None:
        """Close all files, and remove unfinished outputs. Does not wait for threads that stall."""
        if _is_over(self._writing, WRITING_SECONDS):
            self._outputs.close()
        if _is_over(self._reading, READING_SECONDS):
            self._source.close()


def _is_over(work: Future[Any] | None, seconds: float) -> bool:
    """Return True if a thread has ended, or ends within some seconds."""
    return work is None or work.cancel() or bool(wait([work], seconds).done)

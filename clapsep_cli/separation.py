"""Separates one recording in memory: audio → windows → query embedding → separator → joined stems and residual."""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from torch import Tensor

from clapsep_cli import startup
from clapsep_cli.audio.encoding import choose_encoding
from clapsep_cli.audio.samples import Audio, Samples, downmix, from_array, slowed
from clapsep_cli.audio.writers import Outputs
from clapsep_cli.errors import AudioError, ClapsepWarning, UsageError
from clapsep_cli.listening.events import Event, find_events
from clapsep_cli.listening.levels import Likeness, Presence
from clapsep_cli.listening.notebook import show
from clapsep_cli.models.base import go_on
from clapsep_cli.query import MIXTURE, RESIDUAL, Query, Shot, check_targets
from clapsep_cli.stitch.windows import Stream
from clapsep_cli.store.checkpoint import Model
from clapsep_cli.version import __version__

BLOCK_SECONDS = 5.0  # of audio read at a time


Progress = Callable[[float, float], None]  # gets the seconds that are done, and their total


@dataclass(frozen=True, repr=False)
class Separation:
    """Holds stems by name and the residual, which add up to the mixture. A notebook shows players and spectrograms.

    Args:
        stems: float32, of the mixture's shape.
        residual: float32, of the mixture's shape.
        rate: sample rate in Hz.
        queries: description of each stem's query.
        likenesses: by stem, how alike a recording of that rate is to its query; empty where the model cannot tell.
        expand: how many times slower the model heard the recording.
    """

    stems: dict[str, Audio]
    residual: Audio
    rate: int
    queries: Mapping[str, str] = field(default_factory=dict)
    likenesses: Mapping[str, Likeness] = field(default_factory=dict)
    expand: float = 1.0

    @property
    def target(self) -> Audio:
        """The only stem, or the first."""
        return next(iter(self.stems.values()))

    @cached_property
    def mixture(self) -> Audio:
        """The sum of all parts, float32: the mixture, but for rounding."""
        total = self.residual.astype(np.float64)
        for stem in self.stems.values():
            total += stem
        return total.astype(np.float32)

    @cached_property
    def presence(self) -> dict[str, dict[str, float] | None]:
        """Scores of how likely each stem holds its query's sound (see `Presence.read`), measured when first used.

        A `score` below 0 means: probably not there. None where the model cannot tell.
        """
        told = {}
        for name, stem in self.stems.items():
            presence = Presence(round(self.rate / self.expand))
            presence.add(np.atleast_2d(self.mixture), np.atleast_2d(stem))
            likeness = self.likenesses.get(name)
            told[name] = presence.read(likeness) if likeness else None
        return told

    @cached_property
    def events(self) -> dict[str, list[Event]]:
        """Start and end of each sound in each stem, found when first used; `find_events` takes other rules."""
        mixture, rate = np.atleast_2d(self.mixture), round(self.rate / self.expand)
        found = {
            name: find_events(mixture, np.atleast_2d(stem), rate, self.likenesses.get(name))
            for name, stem in self.stems.items()
        }
        return {name: [one.moved(0.0, self.expand) for one in several] for name, several in found.items()}

    def save(
        self,
        folder: str | Path,
        format: str = "wav",  # noqa: A002
        subtype: str | None = None,
        overwrite: bool = False,
    ) -> dict[str, Path]:
        """Write each stem and the residual to `folder`, as `target.wav` and `residual.wav`, all or none.

        Args:
            folder: is made if it does not exist.
            format: "wav", "flac" and the like, as of the command.
            subtype: "pcm16", "pcm24" or "float"; by default float, or 24 bit where the format holds integers alone.
                What is over full scale is then clipped, with a warning.
            overwrite: replace existing files.

        Returns:
            The path of each part.

        Raises:
            OutputError: a file exists or cannot be written, or the format is unknown or cannot hold the samples.
        """
        parts = {name: np.atleast_2d(part) for name, part in {**self.stems, RESIDUAL: self.residual}.items()}
        channels = len(parts[RESIDUAL])
        encoding = choose_encoding(format, subtype, self.rate, channels)
        paths = {name: Path(folder) / f"{name}.{format}" for name in parts}
        software = f"clapsep {__version__}"
        with Outputs(paths, self.rate, channels, encoding, software=software, overwrite=overwrite) as outputs:
            outputs.write(parts)
            written = outputs.commit()
        for name, count in written.clipped.items():
            if count:
                line = f"{paths[name]}: {count} samples were over full scale and clipped; subtype float holds them"
                warnings.warn(line, ClapsepWarning, stacklevel=2)
        return paths

    def __repr__(self) -> str:
        shape = np.atleast_2d(self.residual).shape
        names = ", ".join([*self.stems, RESIDUAL])
        return f"<Separation of {shape[1] / self.rate:.2f} s, {shape[0]} × {self.rate} Hz: {names}>"

    def _repr_html_(self) -> str:
        """Show the parts in a notebook: players and, where the packages of `clapsep[plot]` are, a spectrogram."""
        parts = {MIXTURE: self.mixture, **self.stems, RESIDUAL: self.residual}
        return show({name: np.atleast_2d(part) for name, part in parts.items()}, self.rate, self.queries)


class Passage:
    """A recording on its way through a model: takes in blocks and results of windows, returns windows and stems.

    Its memory does not grow with the recording, and the stems do not depend on the size of the blocks.

    Args:
        model: the model that separates.
        wanted: what to separate, from `model.ask`.
        rate: sample rate of the recording in Hz.
        channels: number of channels of the recording.
    """

    def __init__(self, model: Model, wanted: Any, rate: int, channels: int) -> None:
        self._stream: Stream = model.stream(wanted, rate, channels)
        self._waiting: list[Samples] = [np.zeros((channels, 0), np.float32)]  # mixture whose stems are still to come
        self._rate, heard = rate, model.separator.rate
        self._unmixed = np.zeros((channels, 0), np.float32)  # what is not yet mixed to mono
        # One for each channel: those of soxr for several want samples interleaved, and take a fifth longer.
        self._resamplers = [
            soxr.ResampleStream(rate, heard, 1, "float32", "HQ")
            for _ in range(0 if rate == heard else 1 if self._stream.mono else channels)
        ]

    def hear(self, block: Samples, last: bool = False) -> Audio:
        """Resample the next block to the separator's rate; another thread may do so while this one pushes and pulls.

        Args:
            block: the next stretch of the recording, `[channels, samples]`.
            last: True if the recording ends with it.

        Returns:
            The resampled audio that is ready, float32 `[channels, samples heard]`; one channel where the stream hears
            a downmix.
        """
        block = block.astype(np.float32, copy=False)
        if self._stream.mono and len(block) > 1:
            block = self._mixed(block, last)
        if not self._resamplers:
            return block
        heard = [ear.resample_chunk(row, last=last) for ear, row in zip(self._resamplers, block, strict=True)]
        return np.stack(heard)

    def _mixed(self, block: Audio, last: bool) -> Audio:
        """Mix whole seconds to mono, so that blocks do not matter. Resampling one channel is faster."""
        unmixed = np.concatenate([self._unmixed, block], 1) if self._unmixed.size else block
        length = unmixed.shape[1]
        end = length if last else length - length % self._rate
        self._unmixed = unmixed[:, end:]
        seconds = [downmix(unmixed[:, at : at + self._rate]) for at in range(0, end, self._rate)]
        return np.concatenate([np.zeros(0, np.float32), *seconds])[None]

    def push(self, block: Samples, heard: Audio, last: bool = False) -> list[Tensor]:
        """Take in a block, and what `hear` returned for it; return the windows to be separated, in order."""
        self._waiting.append(block)
        return self._stream.push(block.astype(np.float32, copy=False), heard, last)

    def accept(self, result: Tensor) -> None:
        """Take in the result of the oldest window that still lacks one."""
        self._stream.accept(result)

    @torch.inference_mode()
    def pull(self) -> tuple[Samples, Audio]:
        """Return what became final since the last call.

        Returns:
            The mixture as it came, `[channels, n]`, and its stems, float32 `[stems, channels, n]`.
        """
        stems = self._stream.pull().cpu().numpy()
        if not stems.shape[2]:
            return self._waiting[0][:, :0], stems
        mixture = np.concatenate(self._waiting, 1)
        self._waiting = [mixture[:, stems.shape[2] :]]
        return mixture[:, : stems.shape[2]], stems


def as_heard(blocks: Iterable[Samples], rate: int, heard: int) -> Iterator[Samples]:
    """Yield a recording's blocks as a model hears them: the channels' mean, at `heard` Hz unless `rate` is lower."""
    resampler = soxr.ResampleStream(rate, heard, 1, "float32", "HQ") if rate > heard else None
    for block in blocks:
        mono = downmix(block.astype(np.float32, copy=False))
        yield (mono if resampler is None else resampler.resample_chunk(mono))[None]
    if resampler is not None:
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)[None]


class Workers:
    """Separates windows on all cores of a CPU: several at a time, each on one thread.

    One thread a window keeps all cores busy, and gives the same bits whatever the number of cores. Only where there are
    fewer windows than cores, each has several threads. There are fewer workers where memory is short. On other devices
    there is one worker, which is the calling thread.

    Args:
        model: separates the windows.
        windows: how many there are in all, where that is known; 0 if not, or for many.
    """

    def __init__(self, model: Model, windows: int = 0) -> None:
        self._model, self._cores = model, torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None
        self.count = 1
        if model.device.type == "cpu" and self._cores > 1:
            room = startup.free_bytes() // model.kind.window_bytes
            self.count = max(1, min(self._cores, windows or self._cores, room))
            threads = max(1, self._cores // windows) if windows else 1
            torch.set_num_threads(threads)  # of this thread; each worker sets its own
            self._pool = ThreadPoolExecutor(self.count, "clapsep-window", torch.set_num_threads, (threads,))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._cores)

    def submit(self, window: Tensor, wanted: Any, check: Callable[[], None] = go_on) -> Future[tuple[Tensor, float]]:
        """Start to separate a window.

        Args:
            window: float32 `[samples]`.
            wanted: what to separate, from `model.ask`.
            check: raises where the user wants to stop.

        Returns:
            The result to come, and the time in s that it took.
        """
        _ = self._model.separator  # read here, once
        if self._pool is None:
            done: Future[tuple[Tensor, float]] = Future()
            done.set_result(self._infer(window, wanted, check))
            return done
        return self._pool.submit(self._infer, window, wanted, check)

    def _infer(self, window: Tensor, wanted: Any, check: Callable[[], None]) -> tuple[Tensor, float]:
        began = time.perf_counter()
        return self._model.infer([window], wanted, check)[0], time.perf_counter() - began


def stream(
    model: Model, wanted: Any, blocks: Iterable[Samples], rate: int, channels: int, seconds: float = 0
) -> Iterator[tuple[Samples, Audio]]:
    """Separate a recording that arrives in blocks.

    Args:
        model: the model that separates.
        wanted: what to separate, from `model.ask`.
        blocks: the recording, float32 `[channels, samples]` each.
        rate: sample rate of the recording in Hz.
        channels: number of channels of the recording.
        seconds: its duration; 0 if unknown.

    Yields:
        Pairs of mixture, `[channels, samples]`, and stems, `[stems, channels, samples]`, one after the other.
    """
    passage, coming = Passage(model, wanted, rate, channels), deque[Future[tuple[Tensor, float]]]()
    with Workers(model, windows_in(model, seconds)) as workers:
        for block, last in chain(((block, False) for block in blocks), [(np.zeros((channels, 0), np.float32), True)]):
            coming.extend(
                workers.submit(window, wanted) for window in passage.push(block, passage.hear(block, last), last)
            )
            while coming and (last or len(coming) > workers.count or coming[0].done()):
                passage.accept(coming.popleft().result()[0])
            mixture, stems = passage.pull()
            if mixture.size:
                yield mixture, stems


def windows_in(model: Model, seconds: float) -> int:
    """Return the least number of windows of a recording of `seconds`; 0 if the length is unknown."""
    return math.ceil(seconds * model.separator.rate / model.separator.window)


def separate(
    audio: Any,
    rate: int,
    query: Query | Mapping[str, Query],
    model: Model,
    mutual: bool = True,
    expand: float = 1.0,
    progress: Progress = lambda done, total: None,
) -> Separation:
    """Separate a recording in memory: one target, or one by each name.

    Args:
        audio: `[samples]` or `[channels, samples]`, NumPy or torch, full scale ±1 (integers: that of their width).
        rate: sample rate in Hz, a whole number.
        query: what to extract, or several by name.
        model: from `load_model`.
        mutual: use the other targets as negative queries of each target.
        expand: how many times slower the model hears the audio, and recordings of queries, for sounds above hearing.
        progress: is called with the seconds that are done, and their total.

    Raises:
        AudioError: for an empty recording, another shape, samples that are not finite numbers, and unusable shots.
        QueryError: for a query that the model cannot understand. If only a word is unknown, there is a warning.
    """
    mixture, rate = from_array(audio, rate, "audio")
    if not isinstance(model, Model):
        raise UsageError(f"model: is what load_model returns, not {model!r}")
    shape = mixture.shape if np.ndim(audio) == 2 else mixture.shape[1:]

    @cache  # one object for each span: so it is embedded once
    def excerpt(start: float, end: float) -> Shot:
        stretch = mixture[:, round(start * rate) : round(end * rate)]
        if not stretch.size:
            raise AudioError(f"the audio ends at {mixture.shape[1] / rate:.2f} s: there is no {start:g}-{end:g} s")
        return stretch, rate

    heard_rate = slowed(rate, expand, "audio") if expand != 1 else rate
    targets = check_targets(query)
    asked = model.apart(targets) if mutual else targets
    wanted = model.ask([one.within(excerpt).slower(expand) for one in asked.values()])
    for doubt in model.doubts(list(asked.values())):
        warnings.warn(doubt, ClapsepWarning, stacklevel=2)
    size = max(1, round(BLOCK_SECONDS * rate))
    blocks = (np.ascontiguousarray(mixture[:, at : at + size]) for at in range(0, mixture.shape[1], size))
    found, done = [], 0
    for _, stems in stream(model, wanted, blocks, heard_rate, len(mixture), mixture.shape[1] / heard_rate):
        found.append(stems)
        done += stems.shape[2]
        progress(done / rate, mixture.shape[1] / rate)
    stems = np.concatenate(found, 2)
    residual = (mixture - stems.sum(0)).reshape(shape)
    likenesses = {name: partial(model.likeness, wanted, stem, heard_rate) for stem, name in enumerate(targets)}
    return Separation(
        dict(zip(targets, stems.reshape(len(stems), *shape), strict=True)),
        residual,
        rate,
        {name: one.describe() for name, one in targets.items()},
        likenesses if model.tells_likeness else {},
        expand,
    )

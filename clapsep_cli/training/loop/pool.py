"""Where training takes its audio from: all clips in memory, or decoded from disk as they are needed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from clapsep_cli.audio.samples import Audio, to_rate
from clapsep_cli.data import Corpus, read_clip
from clapsep_cli.dsp import RATE_HZ
from clapsep_cli.errors import ManifestError
from clapsep_cli.store.checkpoint import read_tensors
from clapsep_cli.store.whole import read_notes, save_whole

Store = Literal["auto", "memory", "disk"]
MEMORY_LIMIT_BYTES = 4 * 2**30  # "auto" keeps a corpus of up to this size in memory, as int16: 18 hours
MAX_SECONDS = 30.0  # of a clip that is kept in memory
MARGIN = 64  # samples beyond a stretch that are read, for the resampler to start and end in the signal


class Pool(ABC):
    """The clips of a corpus as mono, and which of them share a label. Safe to read from several threads.

    `rates` are the clips' in Hz: all the same, or each clip's own where no `rate` is given.
    """

    def __init__(self, corpus: Corpus, rate: int | None = RATE_HZ) -> None:
        self.clips = corpus.clips
        self.rates = corpus.rates if rate is None else (rate,) * len(corpus.clips)
        self.by_label: dict[str, list[int]] = defaultdict(list)
        for index, clip in enumerate(corpus.clips):
            self.by_label[clip.label].append(index)

    @abstractmethod
    def samples(self, index: int) -> int:
        """Length of a clip, in samples at its rate."""

    @abstractmethod
    def read(self, index: int, start: int, stop: int) -> Audio:
        """Samples `start` to `stop`, or to the clip's end, float32 `[samples]`. Raises `ManifestError`."""


class MemoryPool(Pool):
    """Clips as int16, the first `seconds` of each. They are decoded once if they are kept in a file, `cache`."""

    def __init__(
        self,
        corpus: Corpus,
        workers: int = 2,
        rate: int | None = RATE_HZ,
        seconds: float = MAX_SECONDS,
        cache: Path | None = None,
    ) -> None:
        super().__init__(corpus, rate)
        of = {"clips": corpus.digest, "rate": str(rate), "seconds": str(seconds)}
        kept = read_kept(cache, of) if cache else None
        if kept is not None:
            self.pcm = kept
            return

        def decode(index: int) -> NDArray[np.int16]:
            whole = read_clip(corpus.clips[index].path, self.rates[index])
            audio = whole[: int(min(seconds * self.rates[index], len(whole)))]
            return np.round(np.clip(audio, -1, 1) * 32767).astype(np.int16)

        with ThreadPoolExecutor(workers) as pool:
            self.pcm = list(pool.map(decode, range(len(corpus.clips))))
        if cache:
            keep(self.pcm, cache, of)

    def samples(self, index: int) -> int:
        return len(self.pcm[index])

    def read(self, index: int, start: int, stop: int) -> Audio:
        return np.asarray(self.pcm[index][start:stop].astype(np.float32) / 32768, np.float32)


def keep(clips: Sequence[NDArray[np.int16]], path: Path, of: Mapping[str, str]) -> None:
    """Write decoded clips to a file from which `read_kept` maps them. `of`: what they were decoded from, and how."""
    ends = np.cumsum([len(clip) for clip in clips])
    tensors = {"pcm": torch.from_numpy(np.concatenate(clips)), "ends": torch.from_numpy(ends)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_whole(tensors, path, of)


def read_kept(path: Path, of: Mapping[str, str]) -> list[NDArray[np.int16]] | None:
    """The clips that `keep` wrote, mapped from the file; None where there are none, or of something else."""
    if not path.exists() or read_notes(path) != dict(of):
        return None
    tensors = read_tensors(path)
    pcm, ends = tensors["pcm"].numpy(), tensors["ends"].tolist()
    return [pcm[start:end] for start, end in zip([0, *ends], ends, strict=False)]


class DiskPool(Pool):
    """Clips of any length and number: a stretch is decoded each time it is asked for, and nothing is kept."""

    def __init__(self, corpus: Corpus, rate: int | None = RATE_HZ) -> None:
        super().__init__(corpus, rate)
        self.seconds = corpus.seconds

    def samples(self, index: int) -> int:
        return max(1, int(round(self.seconds[index] * self.rates[index], 3)))

    def read(self, index: int, start: int, stop: int) -> Audio:
        path, wanted = self.clips[index].path, min(stop, self.samples(index)) - start
        rate_out = self.rates[index]
        try:
            with soundfile.SoundFile(path) as file:
                rate = file.samplerate
                # From where a sample at either rate falls on one at the other, so that nothing is shifted.
                common = math.gcd(rate, rate_out)
                units = max(0, start - MARGIN) // (rate_out // common)
                first, skip = units * (rate // common), start - units * (rate_out // common)
                file.seek(first)
                count = -(-(start + wanted) * rate // rate_out) - first + MARGIN
                audio = file.read(count, dtype="float32", always_2d=True).mean(1)
        except (soundfile.LibsndfileError, OSError) as error:
            raise ManifestError(f"{path}: cannot be decoded ({error})") from error
        stretch = to_rate(audio, rate, rate_out)[skip : skip + wanted]
        return np.pad(stretch, (0, wanted - len(stretch)))


def open_pool(
    corpus: Corpus,
    store: Store = "auto",
    rate: int | None = RATE_HZ,
    seconds: float = MAX_SECONDS,
    cache: Path | None = None,
) -> Pool:
    """The clips of `corpus` from where `store` says; "auto" is memory as long as they fit into 4 GiB.

    In memory, the first `seconds` of each are held, and decoded only once if they are kept in the file `cache`.
    """
    disk = DiskPool(corpus, rate)
    held = sum(min(length, seconds) * rate for length, rate in zip(corpus.seconds, disk.rates, strict=True)) * 2
    fits = held <= MEMORY_LIMIT_BYTES
    return MemoryPool(corpus, 2, rate, seconds, cache) if store == "memory" or (store == "auto" and fits) else disk

"""Lists the sounds in a recording: compares its windows with a vocabulary of sounds in words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from clapsep_cli.audio.samples import Audio, downmix, to_rate
from clapsep_cli.errors import ModelError, QueryError
from clapsep_cli.registry import weights_folder
from clapsep_cli.store.checkpoint import Model
from clapsep_cli.tables import decoded

WINDOW_SECONDS, HOP_SECONDS = 5.0, 2.5
LIKELY = 0.5  # score from which a sound is proposed for the negative side of a query
PROPOSED = 2  # of such sounds
SAME = 0.6  # cosine of two texts from which they name one sound

Scores = NDArray[np.float32]


@dataclass(frozen=True)
class Calibration:
    """Turns a likeness x into a score, the probability that the sound is there: 1 / (1 + e^(−slope · (x − middle)))."""

    slope: float
    middle: float

    def __call__(self, likeness: Scores) -> Scores:
        return np.asarray(1 / (1 + np.exp(-self.slope * (likeness - self.middle))), np.float32)


@dataclass(frozen=True)
class Vocabulary:
    """Sounds in words, and the calibration of their scores."""

    sounds: tuple[str, ...]
    calibration: Calibration


@dataclass(frozen=True)
class Heard:
    """The sounds of a recording.

    Args:
        sounds: the vocabulary, in words.
        starts: of the windows, in seconds.
        seconds: length of the recording.
        window: length of a window in seconds.
        scores: float32 `[windows, sounds]`, 0 to 1.
    """

    sounds: tuple[str, ...]
    starts: tuple[float, ...]
    seconds: float
    window: float
    scores: Scores

    def best(self, count: int, least: float) -> list[tuple[str, float]]:
        """Return the sounds with the highest scores anywhere, at most `count`, at least one, none below `least`."""
        highest = self.scores.max(0)
        order = np.argsort(-highest, kind="stable")[:count]
        return [
            (self.sounds[i], round(float(highest[i]), 4)) for n, i in enumerate(order) if n < 1 or highest[i] >= least
        ]

    def stretches(self, sound: str, least: float) -> list[tuple[float, float]]:
        """Return when a sound has a score of `least` or more, from and to in seconds."""
        found: list[tuple[float, float]] = []
        for start, score in zip(self.starts, self.scores[:, self.sounds.index(sound)], strict=True):
            end = min(start + self.window, self.starts[0] + self.seconds)
            if score < least:
                continue
            if found and start <= found[-1][1]:
                found[-1] = found[-1][0], end
            else:
                found.append((start, end))
        return found


def vocabulary_of(model: Model, path: Path | None = None) -> Vocabulary:
    """Return the vocabulary of a model's family, or the sounds that a file lists, one a line (`#` begins a comment).

    Families without a vocabulary of their own have the names of AudioSet's classes; their scores are not calibrated.

    Raises:
        ModelError: the model cannot compare texts with recordings.
        QueryError: the file cannot be read or lists nothing.
    """
    if not model.tells_likeness or model.kind.text is None:
        raise ModelError(f"{model.name} cannot compare recordings with words; use another --model")
    own = weights_folder() / "sounds" / f"{model.family}.json"
    known = json.loads(own.read_text(encoding="utf-8")) if own.is_file() else {}
    calibration = Calibration(known.get("slope", 10.0), known.get("middle", 0.3))
    if path is None and known:
        return Vocabulary(tuple(known["sounds"]), calibration)
    path = path or own.with_name("audioset.txt")
    try:
        lines = [line.strip() for line in decoded(path.read_bytes()).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise QueryError(f"{path}: this vocabulary cannot be read ({error})") from error
    sounds = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not sounds:
        raise QueryError(f"{path}: lists no sounds; write one a line")
    return Vocabulary(sounds, calibration)


class Listener:
    """Scores the sounds of a vocabulary in recordings. Raises `QueryError` for one that the model does not understand.

    Args:
        model: compares.
        vocabulary: the sounds.
    """

    @torch.inference_mode()
    def __init__(self, model: Model, vocabulary: Vocabulary) -> None:
        self.model, self.vocabulary = model, vocabulary
        self._words = model.text.embed_many(vocabulary.sounds)

    def hear(
        self,
        blocks: Iterable[Audio],
        rate: int,
        expand: float = 1.0,
        start: float = 0.0,
        check: Callable[[], None] = lambda: None,
    ) -> Heard:
        """Score all sounds in windows of 5 s, each 2.5 s after the one before.

        Args:
            blocks: the recording, float32 `[channels, samples]` each.
            rate: in Hz, as it is heard.
            expand: how many times slower that is than the recording.
            start: where the blocks begin in the recording, in seconds.
            check: called for each window; its errors end the work.
        """
        starts: list[float] = []
        scores: list[Scores] = []
        samples = 0
        for window, new in _windows(blocks, round(WINDOW_SECONDS * rate), round(HOP_SECONDS * rate)):
            check()
            samples += new
            starts.append(round(start + len(starts) * HOP_SECONDS / expand, 4))
            scores.append(self.score(window, rate))
        seconds = samples / rate / expand
        return Heard(self.vocabulary.sounds, tuple(starts), seconds, WINDOW_SECONDS / expand, np.stack(scores))

    @torch.inference_mode()
    def likeness(self, window: Audio, rate: int) -> Scores:
        """Return the cosine of float32 `[channels, samples]` and each sound; −1 for silence."""
        mono = to_rate(downmix(window), rate, self.model.audio.rate)
        if not np.any(mono):
            return np.full(len(self.vocabulary.sounds), -1, np.float32)
        heard = self.model.audio.embed(torch.from_numpy(np.ascontiguousarray(mono)).to(self.model.device))
        return np.asarray((self._words @ heard).float().cpu().numpy(), np.float32)

    def propose(self, best: Sequence[tuple[str, float]]) -> tuple[str, list[str]]:
        """Return what to type as `--pos` and as `--neg`, of sounds with their scores, the highest first.

        The negative side names likely sounds that are not nearly the same in words.
        """
        pos, neg = best[0][0], list[str]()
        for sound, score in best[1:]:
            named = self._words[[self.vocabulary.sounds.index(one) for one in (pos, *neg)]]
            near = float((named @ self._words[self.vocabulary.sounds.index(sound)]).max())
            if score >= LIKELY and near < SAME and len(neg) < PROPOSED:
                neg.append(sound)
        return pos, neg

    def score(self, window: Audio, rate: int) -> Scores:
        """Return the calibrated score of each sound in float32 `[channels, samples]`."""
        return self.vocabulary.calibration(self.likeness(window, rate))


def _windows(blocks: Iterable[Audio], size: int, hop: int) -> Iterator[tuple[Audio, int]]:
    """Cut a stream into windows; the last one may be shorter. Yields each with the number of samples it adds."""
    held: Audio | None = None
    counted = 0  # of the samples that are held
    for block in blocks:
        block = block.astype(np.float32, copy=False)
        held = block if held is None else np.concatenate([held, block], 1)
        while held.shape[1] >= size:
            yield held[:, :size], size - counted
            held, counted = held[:, hop:], size - hop
    if held is not None and held.shape[1] > counted:
        yield held, held.shape[1] - counted

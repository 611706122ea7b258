"""What is to be done with a recording, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clapsep_cli.audio.writers import Clipping
from clapsep_cli.errors import ClapsepError
from clapsep_cli.jobs.inputs import Input
from clapsep_cli.jobs.resume import marker_path
from clapsep_cli.query import Query


@dataclass(frozen=True)
class Options:
    """How recordings are read and written. `start` and `end` in seconds; `format` and `subtype` of `choose_encoding`.

    `lenient` takes what there is of a recording that is cut short or damaged. `stream` is the number of the sound track
    to take, from 1; None for the first. `clip` is what happens over full scale (`Outputs`). `consistent` spreads what
    the stems leave of the mixture over them. `presence` measures whether what was asked for is there (None: where
    `min_presence` needs it); a target below `min_presence` is not written, and nothing at all where all are.
    `batch_size` is the number of windows separated at once (0: as many as the device likes), `jobs` that of the
    threads that read and write.
    """

    start: float = 0.0
    end: float | None = None
    lenient: bool = False
    stream: int | None = None
    format: str = "wav"
    subtype: str | None = None
    clip: Clipping = "warn"
    overwrite: bool = False
    consistent: bool = False
    presence: bool | None = None
    min_presence: float | None = None
    batch_size: int = 0
    jobs: int = 2


@dataclass(frozen=True)
class Job:
    """A recording, what is asked of it, and where its parts go.

    `targets` are asked for together; `outputs` names those that are written, and perhaps "residual", and `kept` those
    that have to be computed for it. `key` marks the outputs as made for all this; `picture` is where a picture of the
    parts goes. `overwrite` allows to replace what is there. `marks` is the folder that remembers recordings in which no
    target was found, where they are to be skipped.
    """

    input: Input
    targets: Mapping[str, Query]
    outputs: Mapping[str, Path]
    kept: Sequence[str]
    key: str = ""
    picture: Path | None = None
    overwrite: bool = False
    marks: Path | None = None

    @property
    def marker(self) -> Path | None:
        """The file that says that no target was found in the recording, for the same queries, model and options."""
        return marker_path(self.marks, self.input.below.name, self.key) if self.marks and self.key else None

    @property
    def has_spans(self) -> bool:
        """Whether the recording is part of what is asked."""
        return any(query.pos_spans or query.neg_spans for query in self.targets.values())


@dataclass(frozen=True)
class Extraction:
    """What was made of one recording. `levels` by part, and of the mixture, in dB of full scale; `presence` by target.

    `clipped` counts the samples of each part that its format could not hold; `gain` is what all parts were multiplied
    by so that they fit. `absent` names the targets whose `presence` was too low to write them; they belong to the
    residual. Where all are, `outputs` is empty. `notes` tell of damage that was passed over, and of sound tracks that
    were not taken.
    """

    mixture: Path
    outputs: dict[str, Path]
    seconds: float  # of audio
    elapsed: float  # seconds spent on it; of what it shares with other recordings its share, so that they add up
    queries: dict[str, str]
    clipped: dict[str, int]
    gain: float
    levels: dict[str, dict[str, float | None]]
    presence: dict[str, dict[str, float] | None] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    picture: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def target(self) -> Path:
        """The first of the outputs."""
        return next(iter(self.outputs.values()))

    def as_json(self) -> dict[str, Any]:
        """All of it, in plain types."""
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        plain["outputs"] = {part: str(path) for part, path in self.outputs.items()}
        return {**plain, "real_time_factor": self.elapsed / self.seconds}


@dataclass(frozen=True)
class Failure:
    """A recording that was not separated, and why, in one line."""

    mixture: Path
    error: ClapsepError


JobProgress = Callable[
    [Job, float, float], None
]  # is told how many seconds of a recording are done, and how many it has

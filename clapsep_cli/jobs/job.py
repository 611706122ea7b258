"""Defines the options of a run, the job of one recording, and its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clapsep_cli.audio.writers import STDOUT, Clipping
from clapsep_cli.errors import ClapsepError, TakenError
from clapsep_cli.jobs.inputs import Input
from clapsep_cli.jobs.resume import marker_path
from clapsep_cli.jobs.stores import Stage, is_url
from clapsep_cli.listening.events import Event, Rules
from clapsep_cli.query import RESIDUAL, Query
from clapsep_cli.store import library

if TYPE_CHECKING:
    from clapsep_cli.store.checkpoint import Model


@dataclass(frozen=True)
class Options:
    """Options for reading recordings and writing their parts, named as those of the commands.

    Args:
        start, end: part of the recording, in seconds; `end` None for its end.
        lenient: read damaged or truncated recordings as far as possible.
        stream: number of the sound track, from 1; None for the first.
        expand: how many times slower the model hears recordings, those of queries too, for sounds above hearing.
        out: output folder; None for that of each recording, `-` for standard output.
        filename: template of output names (see `output_paths`); None for `{stem}.{part}.{ext}`.
        format, subtype: of the outputs (see `choose_encoding`).
        remux: write films again, with each part as their sound track.
        clip: how to treat samples over full scale: "warn", "rescale" or "error" (see `Outputs`).
        plot: write a picture of each recording, too.
        overwrite: replace existing outputs.
        skip_existing: skip recordings already processed with the same settings.
        only: names of the targets to write; empty for all.
        residual: write the residual; None for yes, except to standard output.
        remove: write the residual alone.
        consistent: add the residual to the targets in equal shares, so that they add up to the mixture.
        mutual: use the other targets as negative queries of each target; None for yes.
        events: also write when each target sounds.
        events_format: "csv", "audacity" or "raven".
        no_audio: write only the events, from the channels' mean at the model's rate.
        events_level, events_presence, events_length: what counts as an event (see `Rules`); None for the default.
        presence: measure the presence of each target; None: only if `min_presence` needs it.
        min_presence: write no target whose presence is below this.
        markers: write a marker for each recording, also locally, as runs that share recordings do (see `stores`).
        shard: process only the recordings of shard K of N, counted from 0 (see `in_shard`).
        batch_size: windows processed at once; 0 chooses by the device.
        jobs: threads that read and write files.
    """

    start: float = 0.0
    end: float | None = None
    lenient: bool = False
    stream: int | None = None
    expand: float = 1.0
    out: Path | None = None
    filename: str | None = None
    format: str = "wav"
    subtype: str | None = None
    remux: bool = False
    clip: Clipping = "warn"
    plot: bool = False
    overwrite: bool = False
    skip_existing: bool = False
    only: Sequence[str] = ()
    residual: bool | None = None
    remove: bool = False
    consistent: bool = False
    mutual: bool | None = None
    presence: bool | None = None
    min_presence: float | None = None
    events: bool = False
    events_format: str = "csv"
    no_audio: bool = False
    events_level: float | None = None
    events_presence: float | None = None
    events_length: float | None = None
    markers: bool = False
    shard: tuple[int, int] | None = None
    batch_size: int = 0
    jobs: int = 2

    @property
    def rules(self) -> Rules:
        """The rules by which events are found."""
        given = {name: getattr(self, f"events_{name}") for name in ("level", "presence", "length")}
        return replace(Rules(), **{name: value for name, value in given.items() if value is not None})

    def chosen(self, targets: Sequence[str]) -> list[str]:
        """Return those of a recording's `targets` that are written."""
        return [name for name in targets if not self.only or name in self.only]

    def parts(self, targets: Sequence[str]) -> list[str]:
        """Return the parts to write of a recording with these targets."""
        if self.no_audio:
            return []
        if self.remove:
            return [RESIDUAL]
        wanted = self.out != STDOUT if self.residual is None else self.residual
        return [*self.chosen(targets), *([RESIDUAL] if wanted else [])]


@dataclass(frozen=True)
class Loading:
    """Options for the model of a run, named as those of the commands; `model` and `adapter` may be URLs."""

    model: str | None = None
    adapter: str | None = None
    device: str = "auto"
    precision: str = "auto"
    refine: bool = False

    def load(
        self, stage: Stage, say: Callable[[str], None] = library.ignore, progress: Callable[..., None] = library.ignore
    ) -> Model:
        """Load the model with its adapter.

        Args:
            stage: mirrors the stores of URLs.
            say: called with each line for the user.
            progress: called during downloads (see `load_model`).

        Raises:
            ModelError: there is no such model.
        """
        name = str(stage.fetch(stage.path(self.model))) if self.model and is_url(self.model) else self.model
        model = library.load_model(name, self.device, self.precision, say=say, progress=progress)
        if self.adapter:
            from clapsep_cli.store.adapters import apply

            apply(model, stage.fetch(stage.path(self.adapter)))
        model.refine(self.refine)
        return model


@dataclass(frozen=True)
class Cluster:
    """Options for running on Ray, named as those of the commands; `threads` are those of each worker."""

    address: str | None = None
    workers: int | None = None
    gpus_per_worker: float | None = None
    threads: int = 1
    insecure: bool = False
    scratch: Path | None = None


def row_of(outcome: Extraction | Skipped | Failure, model: Model) -> dict[str, Any]:
    """Return the result of a recording in types that JSON has, as `--json` prints it and markers keep it."""
    facts: dict[str, Any]
    if isinstance(outcome, Extraction):
        status, facts = "done" if outcome.found else "absent", outcome.as_json()
        del facts["mixture"]
    elif isinstance(outcome, Skipped):
        outputs = {part: str(path) for part, path in outcome.job.outputs.items()}
        listed = {"events_file": str(outcome.job.events)} if outcome.job.events else {}
        status, facts = "skipped", {"outputs": outputs, **listed}
    else:
        status, facts = "failed", {"error": str(outcome.error)}
    used = {"model": model.name, "revision": model.revision, "device": str(model.device), "precision": model.precision}
    return {"input": str(outcome.mixture), "status": status, **used, **facts}


@dataclass(frozen=True)
class Job:
    """A recording, its targets, and the paths of its parts.

    Args:
        input: the recording.
        targets: the query of each target; all are separated together.
        outputs: path of each part to write: targets, or "residual".
        kept: targets to compute for these outputs.
        key: stored in the outputs to recognise them later (see `resume.signature`).
        picture: path of the picture of the parts.
        events: path of the list of events.
        overwrite: replace existing outputs.
        marks: folder of the markers, where recordings are to be skipped later (see `stores`).
        marks_all: write a marker for each recording, not only where no audio file shows that it is done.
    """

    input: Input
    targets: Mapping[str, Query]
    outputs: Mapping[str, Path]
    kept: Sequence[str]
    key: str = ""
    picture: Path | None = None
    events: Path | None = None
    overwrite: bool = False
    marks: Path | None = None
    marks_all: bool = False

    @property
    def marker(self) -> Path | None:
        """Path of the marker of this recording with these queries, model and options; None for no marker."""
        return marker_path(self.marks, self.input.below.name, self.key) if self.marks and self.key else None

    def needs_marker(self, absent: Sequence[str]) -> bool:
        """Return True if a marker is written: only it can record `absent` targets, and events without audio."""
        return self.marks_all or bool(absent) or not self.outputs

    @property
    def extras(self) -> dict[str, Path]:
        """Paths of the files that are written after the audio, by name."""
        return {name: path for name, path in (("picture", self.picture), ("events", self.events)) if path}

    @property
    def has_spans(self) -> bool:
        """True if a query contains a span of the recording itself."""
        return any(query.pos_spans or query.neg_spans for query in self.targets.values())


@dataclass(frozen=True)
class Extraction:
    """The result of one recording.

    Args:
        mixture: the recording.
        outputs: path of each part written; empty where all targets are absent.
        seconds: duration of the audio.
        elapsed: seconds spent on it; a step shared with other recordings counts in equal parts.
        queries: description of each target's query.
        clipped: number of clipped samples of each part.
        gain: factor applied to all parts so that they do not clip; 1 for none.
        levels: of the mixture and each part, in dB of full scale.
        presence: of each target, where it was measured.
        absent: targets that were not written because their presence is too low; they stay in the residual.
        picture: path of the picture.
        events: of each target, in order of time, if they were searched for.
        events_file: path of their list.
        notes: remarks on ignored damage and on sound tracks that were not read.
    """

    mixture: Path
    outputs: dict[str, Path]
    seconds: float
    elapsed: float
    queries: dict[str, str]
    clipped: dict[str, int]
    gain: float
    levels: dict[str, dict[str, float | None]]
    presence: dict[str, dict[str, float] | None] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    picture: Path | None = None
    events: dict[str, list[Event]] = field(default_factory=dict)
    events_file: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def target(self) -> Path:
        """Path of the first output."""
        return next(iter(self.outputs.values()))

    @property
    def found(self) -> bool:
        """True unless all targets are below `min_presence`."""
        return bool(self.outputs) or (self.events_file is not None and len(self.absent) < len(self.queries))

    def as_json(self) -> dict[str, Any]:
        """Return a dictionary of types that JSON has."""
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        plain["outputs"] = {part: str(path) for part, path in self.outputs.items()}
        return {**plain, "real_time_factor": self.elapsed / self.seconds}


@dataclass(frozen=True)
class Skipped:
    """A recording that is already done, by an earlier run or another process."""

    job: Job

    @property
    def mixture(self) -> Path:
        """Path of the recording."""
        return self.job.input.path

    @property
    def error(self) -> ClapsepError:
        """The error to raise in a run without `skip_existing`."""
        return TakenError(f"{self.mixture}: was processed by another process meanwhile")


@dataclass(frozen=True)
class Failure:
    """A recording that could not be separated, with the error."""

    mixture: Path
    error: ClapsepError


Outcome = Extraction | Skipped | Failure
JobProgress = Callable[[Job, float, float], None]  # called with a job, the seconds done and their total

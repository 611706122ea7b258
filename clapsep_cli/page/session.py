"""Holds the state of the page: the open recording, the extractions made from it, and the folder of their files.

This module alone of the page knows models, queries and jobs. It has one recording at a time, and makes one extraction
at a time, in a thread of its own.
"""

from __future__ import annotations

import secrets
import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from clapsep_cli.audio.encoding import FORMATS
from clapsep_cli.audio.sources import Source
from clapsep_cli.errors import ClapsepError, OutputError, StoppedError, UsageError, forwarded_warnings
from clapsep_cli.jobs.outputs import safe_name
from clapsep_cli.page.overview import Overview, look
from clapsep_cli.page.requests import Request, command_line, presence_in_words
from clapsep_cli.query import RESIDUAL, Query, check_taken
from clapsep_cli.registry import home
from clapsep_cli.store.library import best_installed, choices

if TYPE_CHECKING:
    from clapsep_cli.jobs.job import Extraction
    from clapsep_cli.store.checkpoint import Model

RESERVE_BYTES = 256 << 20  # of the disk that a session leaves free
MAX_SHOTS = 64
NAME_BYTES = 160  # of an upload's name
WAITING, WORKING, DONE, FAILED, STOPPED = "waiting", "working", "done", "failed", "stopped"
SEEN = ("rate", "channels", "frames", "piece", "loudest")  # attributes of an overview for the page
GONE = "the session's folder is gone: stop clapsep ui and start it again"


@dataclass
class Sound:
    """The mixture, or a part of an attempt. `overview` is None until the file was read."""

    id: str
    name: str  # of its part, or the file's
    path: Path
    overview: Overview | None = None

    def as_json(self) -> dict[str, Any]:
        """Return its data for the page."""
        seen = {name: getattr(self.overview, name) for name in SEEN} if self.overview else {}
        return {"id": self.id, "name": self.name, "file": self.path.name, **seen}


@dataclass
class OpenRecording:
    """The recording that is open: a file of the user, or an upload in the session's folder."""

    sound: Sound
    folder: Path
    given: str  # the name by which a command would find it
    tracks: Sequence[str]  # of a film, in words
    track: int | None  # number of the open one, from 1; None if there is only one
    state: str = WORKING
    done: float = 0.0  # share that was read
    error: str = ""
    stop: threading.Event = field(default_factory=threading.Event)

    def as_json(self) -> dict[str, Any]:
        """Return its data for the page."""
        own = {name: getattr(self, name) for name in ("tracks", "track", "state", "done", "error")}
        return {**self.sound.as_json(), **own}


@dataclass
class Attempt:
    """One extraction: its request, progress and results."""

    id: str
    request: Request
    queries: Mapping[str, Query]  # by target
    summary: str
    command: str
    folder: Path
    state: str = WAITING
    done: float = 0.0
    error: str = ""
    refined: bool = False  # in two passes
    elapsed: float = 0.0
    parts: list[Sound] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    presence: dict[str, dict[str, Any]] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)

    def as_json(self) -> dict[str, Any]:
        """Return its data for the page."""
        plain = ("id", "summary", "command", "state", "done", "error", "refined", "notes")
        own = {name: getattr(self, name) for name in plain}
        parts = [{**part.as_json(), "presence": self.presence.get(part.name)} for part in self.parts]
        return {**own, "model": self.request.model, "elapsed": round(self.elapsed, 1), "parts": parts}


class Session:
    """Holds a recording, examples and attempts, and works on them in threads.

    Its files are in a folder of its own, which `close` removes. A session also removes the folders of killed ones.

    Args:
        model: the model that is selected at first; None for the best installed one.
        device: as of `load_model`.
        place: folder in which the session makes its own; by default in `home()`.

    Raises:
        OutputError: `place` cannot be written.
    """

    def __init__(self, model: str | None = None, device: str = "auto", place: Path | None = None) -> None:
        self.device, self.given = device, model or best_installed()
        self.chosen = self.given
        above = place or home() / "page"
        _clear(above)
        self.folder = above / new_id()
        self._lock = FileLock(_lock_of(self.folder))
        try:
            above.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self.folder.mkdir(mode=0o700)
        except OSError as error:
            raise OutputError(f"{above}: cannot be written ({error.strerror or error})") from error
        self.recording: OpenRecording | None = None
        self.shots: dict[str, tuple[str, Path]] = {}  # by id: the name it was given, and where it lies
        self.attempts: dict[str, Attempt] = {}
        self._model: tuple[tuple[str, bool | None], Model] | None = None  # with its name, and `refine`
        self._looking = ThreadPoolExecutor(1, thread_name_prefix="clapsep-look")
        self._working = ThreadPoolExecutor(1, thread_name_prefix="clapsep-work")

    def close(self) -> None:
        """Stop all work, and remove the folder."""
        self._stop_all()
        self._looking.shutdown(cancel_futures=True)
        self._working.shutdown(cancel_futures=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()
        _lock_of(self.folder).unlink(missing_ok=True)

    def _stop_all(self) -> None:
        if self.recording is not None:
            self.recording.stop.set()
        for attempt in self.attempts.values():
            attempt.stop.set()

    def state(self) -> dict[str, Any]:
        """Return everything that the page shows, in types that JSON has."""
        recording = self.recording
        return {
            "recording": recording and recording.as_json(),
            "shots": [{"id": key, "name": name} for key, (name, _) in list(self.shots.items())],
            "attempts": [attempt.as_json() for attempt in list(self.attempts.values())],
            "models": choices(self.given),
            "model": self.chosen,
        }

    def room(self) -> int:
        """Return how many bytes may still be written. Raises `OutputError` if the folder is gone."""
        try:
            return max(0, shutil.disk_usage(self.folder).free - RESERVE_BYTES)
        except OSError as error:
            raise OutputError(GONE) from error

    def upload(self, name: str) -> Path:
        """Make a folder for an upload, and return the path to write it to, with a name that all systems allow."""
        suffix = safe_name(Path(name).suffix, 16) if Path(name).suffix else ""
        folder = self._new_folder()
        return folder / f"{safe_name(Path(name).stem or 'recording', NAME_BYTES)}{'.' + suffix if suffix else ''}"

    def _new_folder(self) -> Path:
        folder = self.folder / new_id()
        try:
            folder.mkdir()
        except OSError as error:
            raise OutputError(GONE if not self.folder.is_dir() else f"{error.strerror or error}") from error
        return folder

    def open(self, path: Path, given: str, track: int | None = None) -> OpenRecording:
        """Open a recording in place of the one before, whose attempts are removed, and read it in the background.

        Args:
            path: of the file.
            given: the name by which a command would find it.
            track: number of the sound track of a film, from 1; None for the first.

        Raises:
            AudioError: it is no recording.
        """
        with Source(path, stream=track) as source:
            tracks = source.tracks
        self._stop_all()
        for key in list(self.attempts):
            self.remove(key)
        before, folder = self.recording, self._new_folder()
        chosen = (track or 1) if len(tracks) > 1 else track
        recording = OpenRecording(Sound(new_id(), path.name, path), folder, given, tracks, chosen)
        self.recording = recording
        if before is not None:
            self._looking.submit(self._forget, before, path)
        self._looking.submit(self._look, recording)
        return recording

    def choose_track(self, track: int) -> None:
        """Open another sound track of the film. Raises `UsageError` if there is none."""
        recording = self.recording
        if recording is None or not 1 <= track <= len(recording.tracks):
            raise UsageError("there is no such sound track")
        self.open(recording.sound.path, recording.given, track)

    def _forget(self, recording: OpenRecording, now: Path) -> None:
        """Remove the files of a recording, and its upload unless that is open `now`."""
        shutil.rmtree(recording.folder, ignore_errors=True)
        if recording.sound.path != now and self.folder in recording.sound.path.parents:
            shutil.rmtree(recording.sound.path.parent, ignore_errors=True)

    def _look(self, recording: OpenRecording) -> None:
        def progress(done: float, total: float) -> None:
            recording.done = _share(done, total)
            if self.room() == 0:
                raise OutputError(f"the disk of {self.folder.parent} is nearly full")

        try:
            sound = recording.sound
            sound.overview = look(sound.path, recording.folder, progress, recording.stop, recording.track)
            recording.state = DONE
        except Exception as error:
            recording.state, recording.error = FAILED, self._reason(error)

    def add_shot(self, path: Path, name: str) -> str:
        """Add an example of what to keep or to leave; return its id. Raises `AudioError`, `UsageError`."""
        if len(self.shots) >= MAX_SHOTS:
            raise UsageError(f"there are {MAX_SHOTS} examples already; remove some first")
        with Source(path):
            pass
        key = new_id()
        self.shots[key] = name, path
        return key

    def remove_shot(self, key: str) -> None:
        """Remove an example."""
        _, path = self.shots.pop(key)
        shutil.rmtree(path.parent, ignore_errors=True)

    def sound(self, key: str) -> Sound:
        """Return the mixture or a part by its id. Raises `KeyError`."""
        sounds = [self.recording.sound] if self.recording else []
        sounds += [part for attempt in self.attempts.values() for part in attempt.parts]
        return {sound.id: sound for sound in sounds}[key]

    def extract(self, text: bytes | str) -> Attempt:
        """Start the extraction that a request in JSON describes. Raises `UsageError`, `QueryError`, `OutputError`."""
        if self.recording is None or self.recording.sound.overview is None:
            raise UsageError("open a recording first")
        if any(attempt.state in (WAITING, WORKING) for attempt in self.attempts.values()):
            raise UsageError("an extraction is under way: wait for it, or cancel it first")
        request = Request.read(text, self.shots)
        here = {model["name"]: model["takes"] for model in choices(self.given) if model["here"]}
        if request.model not in here:
            raise UsageError(f"the model {request.model!r} is not here: clapsep models download {request.model}")
        queries = request.queries(self.shots)
        check_taken(queries.values(), here[request.model], request.model)
        recording, path = self.recording, self.recording.sound.path
        self._check_room(recording, len(request.targets) + 1)
        command = command_line(request, self.shots, recording.given, own_format(path), self.device, recording.track)
        summary = request.describe(self.shots)
        attempt = Attempt(new_id(), request, queries, summary, command, self._new_folder())
        self.attempts[attempt.id] = attempt
        self.chosen = request.model
        self._working.submit(self._work, attempt, recording)
        return attempt

    def _check_room(self, recording: OpenRecording, parts: int) -> None:
        with Source(recording.sound.path, stream=recording.track) as source:  # raises if the file has gone
            needed = source.frames * source.channels * 4 * parts
        if needed > (room := self.room()):
            raise OutputError(
                f"not enough disk room in {self.folder.parent}: this takes {needed / 1e9:.1f} GB, and "
                f"{room / 1e9:.1f} GB can be used; remove earlier attempts, or set CLAPSEP_HOME to another disk"
            )

    def cancel(self, key: str) -> None:
        """Stop an extraction after the current windows. Raises `KeyError`."""
        self.attempts[key].stop.set()

    def remove(self, key: str) -> None:
        """Remove an attempt, and delete its files once no thread writes them. Raises `KeyError`."""
        attempt = self.attempts.pop(key)
        attempt.stop.set()
        self._working.submit(shutil.rmtree, attempt.folder, ignore_errors=True)

    def _work(self, attempt: Attempt, recording: OpenRecording) -> None:
        attempt.state = WORKING
        try:
            with forwarded_warnings(attempt.notes.append):
                done = self._run(attempt, recording)
            self._report(attempt, done)
        except StoppedError:
            attempt.state = STOPPED
        except Exception as error:
            attempt.state, attempt.error = FAILED, self._reason(error)

    def _reason(self, error: Exception) -> str:
        """Return the text of an error for the page. An unexpected error ends the current work, not the page."""
        if not self.folder.is_dir():
            return GONE
        return str(error) if isinstance(error, ClapsepError | OSError) else f"{type(error).__name__}: {error}"

    def _run(self, attempt: Attempt, recording: OpenRecording) -> Extraction:
        from clapsep_cli.jobs.batch import run
        from clapsep_cli.jobs.inputs import Input
        from clapsep_cli.jobs.job import Extraction, Options
        from clapsep_cli.jobs.planning import lay_out, plan

        def progress(job: object, done: float, total: float) -> None:
            attempt.done = _share(done, total)

        model = self._load(attempt.request)
        attempt.refined = model.refined
        path, presence = recording.sound.path, model.tells_likeness
        options = Options(out=attempt.folder, format=own_format(path), stream=recording.track, presence=presence)
        asked = [(Input(path, Path(path.name)), attempt.queries)]
        jobs = lay_out(asked, options)
        attempt.notes += model.doubts(list(jobs[0].targets.values()))
        (outcome,) = run(plan(jobs, model, options).jobs, model, options, progress, attempt.stop)
        if not isinstance(outcome, Extraction):
            raise outcome.error
        return outcome

    def _load(self, request: Request) -> Model:
        from clapsep_cli.store.library import load_model

        wanted = request.model, request.refine
        if self._model is None or self._model[0] != wanted:
            self._model = None  # never hold two in memory
            model = load_model(request.model, self.device)
            model.refine(request.refine)
            self._model = wanted, model
        return self._model[1]

    def _report(self, attempt: Attempt, done: Extraction) -> None:
        """Store the results of an attempt, and read its parts for the page."""
        attempt.elapsed, attempt.done = done.elapsed, 1.0
        attempt.notes += done.notes
        for name, presence in done.presence.items():
            score = presence["score"] if presence else None
            attempt.presence[name] = {"score": score, "words": presence_in_words(score)}
        for name, count in done.clipped.items():
            if count:
                heard = "the rest" if name == RESIDUAL else name
                attempt.notes.append(f"{count} samples of {heard} were over full scale and clipped")
        parts = [Sound(new_id(), part, path) for part, path in done.outputs.items()]
        for part in parts:
            folder = attempt.folder / new_id()
            folder.mkdir()
            part.overview = look(part.path, folder, lambda done, total: None, attempt.stop)
        attempt.parts, attempt.state = parts, DONE


def _share(done: float, total: float) -> float:
    return min(1.0, done / total) if total else 0.0


def new_id() -> str:
    """Return a random id that cannot be guessed."""
    return secrets.token_hex(16)


def own_format(path: Path) -> str:
    """Return the format of the input if outputs can have it, else WAV."""
    suffix = path.suffix.lower().removeprefix(".")
    return suffix if suffix in FORMATS else "wav"


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _clear(above: Path) -> None:
    """Remove the folders of killed sessions, whose locks are free."""
    for folder in list(above.iterdir()) if above.is_dir() else ():
        if not folder.is_dir():
            continue
        try:
            with FileLock(_lock_of(folder), timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        except (Timeout, OSError):
            continue
        _lock_of(folder).unlink(missing_ok=True)

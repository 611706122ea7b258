"""A session of the page: the recording it shows, what was extracted of it, and the folder that holds both.

All that the page knows of models, queries and jobs is here. A session holds one recording at a time, and makes one
extraction at a time, in a thread of its own.
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
from clapsep_cli.errors import ClapsepError, OutputError, StoppedError, UsageError, told_of_warnings
from clapsep_cli.jobs.outputs import safe_name
from clapsep_cli.page.overview import Overview, look
from clapsep_cli.page.wishes import Wish, command_line, presence_in_words
from clapsep_cli.query import RESIDUAL, Query, check_taken
from clapsep_cli.registry import BUNDLED, MODELS, PREFERRED, home

if TYPE_CHECKING:
    from clapsep_cli.jobs.tasks import Extraction
    from clapsep_cli.store.checkpoint import Model

RESERVE_BYTES = 256 << 20  # of the disk, that a session leaves free
MAX_SHOTS = 64
NAME_BYTES = 160  # of an upload's name
WAITING, WORKING, DONE, FAILED, STOPPED = "waiting", "working", "done", "failed", "stopped"
SEEN = ("rate", "channels", "frames", "piece", "loudest")  # of an overview, that the page has to know
GONE = "the session's folder is gone: stop clapsep ui and start it again"


@dataclass
class Sound:
    """Something to see and hear: the mixture, or a part of an attempt. `overview` is None until it was looked at."""

    id: str
    name: str  # of its part, or the file's
    path: Path
    overview: Overview | None = None

    def as_json(self) -> dict[str, Any]:
        """What the page has to know of it."""
        seen = {name: getattr(self.overview, name) for name in SEEN} if self.overview else {}
        return {"id": self.id, "name": self.name, "file": self.path.name, **seen}


@dataclass
class Recording:
    """The recording that is open. `path` as the user gave it, or where an upload lies."""

    sound: Sound
    folder: Path
    given: str  # the name by which a command would find it
    tracks: Sequence[str]  # of a film, in words
    track: int | None  # which of them is open, from 1; None where there is but one
    state: str = WORKING
    done: float = 0.0  # share of it that was read
    error: str = ""
    stop: threading.Event = field(default_factory=threading.Event)

    def as_json(self) -> dict[str, Any]:
        """What the page has to know of it."""
        told = {name: getattr(self, name) for name in ("tracks", "track", "state", "done", "error")}
        return {**self.sound.as_json(), **told}


@dataclass
class Attempt:
    """One extraction: what was asked for, how far it is, and what came of it."""

    id: str
    wish: Wish
    queries: Mapping[str, Query]  # by target
    summary: str
    command: str
    folder: Path
    state: str = WAITING
    done: float = 0.0
    error: str = ""
    refined: bool = False  # whether it took two passes
    elapsed: float = 0.0
    parts: list[Sound] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    presence: dict[str, dict[str, Any]] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)

    def as_json(self) -> dict[str, Any]:
        """What the page has to know of it."""
        plain = ("id", "summary", "command", "state", "done", "error", "refined", "notes")
        told = {name: getattr(self, name) for name in plain}
        parts = [{**part.as_json(), "presence": self.presence.get(part.name)} for part in self.parts]
        return {**told, "model": self.wish.model, "elapsed": round(self.elapsed, 1), "parts": parts}


class Session:
    """What one page works on. `model` is the one to begin with, None for the best that is here; `device` for all.

    Everything lies in a folder of its own, which `close` removes; a session that was killed is cleared by the next.
    """

    def __init__(self, model: str | None = None, device: str = "auto", place: Path | None = None) -> None:
        self.device, self.given = device, model or best_here()
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
        self.recording: Recording | None = None
        self.shots: dict[str, tuple[str, Path]] = {}  # by id: the name it was given, and where it lies
        self.attempts: dict[str, Attempt] = {}
        self._model: tuple[tuple[str, bool | None], Model] | None = None  # as it was asked for
        self._looking = ThreadPoolExecutor(1, thread_name_prefix="clapsep-look")
        self._working = ThreadPoolExecutor(1, thread_name_prefix="clapsep-work")

    def close(self) -> None:
        """Stop what is under way, and remove the folder with all that is in it."""
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
        """All that the page shows, in plain types."""
        recording = self.recording
        return {
            "recording": recording and recording.as_json(),
            "shots": [{"id": key, "name": name} for key, (name, _) in list(self.shots.items())],
            "attempts": [attempt.as_json() for attempt in list(self.attempts.values())],
            "models": models_here(self.given),
            "model": self.chosen,
        }

    def room(self) -> int:
        """How many bytes may still be written. Raises `OutputError` where the folder is gone."""
        try:
            return max(0, shutil.disk_usage(self.folder).free - RESERVE_BYTES)
        except OSError as error:
            raise OutputError(GONE) from error

    def upload(self, name: str) -> Path:
        """Where an upload of that name is to be written, in a folder of its own, under a name that any system takes."""
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

    def open(self, path: Path, given: str, track: int | None = None) -> Recording:
        """Take `path` for the recording to work on, in place of the one that is open, whose attempts are removed.

        It is read in the background, see `Recording.state`. Of a film's sound tracks, `track` is the one to read, from
        1; None for the first. Raises `AudioError` at once where it is no recording.
        """
        with Source(path, stream=track) as source:
            tracks = source.tracks
        self._stop_all()
        for key in list(self.attempts):
            self.remove(key)
        before, folder = self.recording, self._new_folder()
        chosen = (track or 1) if len(tracks) > 1 else track
        recording = Recording(Sound(new_id(), path.name, path), folder, given, tracks, chosen)
        self.recording = recording
        if before is not None:
            self._looking.submit(self._forget, before, path)
        self._looking.submit(self._look, recording)
        return recording

    def choose_track(self, track: int) -> None:
        """Open another sound track of the film that is open. Raises `UsageError` where there is none."""
        recording = self.recording
        if recording is None or not 1 <= track <= len(recording.tracks):
            raise UsageError("there is no such sound track")
        self.open(recording.sound.path, recording.given, track)

    def _forget(self, recording: Recording, now: Path) -> None:
        """Remove what was kept of a recording, and its upload unless that is open `now`."""
        shutil.rmtree(recording.folder, ignore_errors=True)
        if recording.sound.path != now and self.folder in recording.sound.path.parents:
            shutil.rmtree(recording.sound.path.parent, ignore_errors=True)

    def _look(self, recording: Recording) -> None:
        def told(done: float, total: float) -> None:
            recording.done = min(1.0, done / total) if total else 0.0
            if self.room() == 0:
                raise OutputError(f"the disk of {self.folder.parent} is nearly full")

        try:
            recording.sound.overview = look(
                recording.sound.path, recording.folder, told, recording.stop, recording.track
            )
            recording.state = DONE
        except Exception as error:
            recording.state, recording.error = FAILED, self._reason(error)

    def add_shot(self, path: Path, name: str) -> str:
        """Take a recording as an example of what to keep or to leave; its id. Raises `AudioError`, `UsageError`."""
        if len(self.shots) >= MAX_SHOTS:
            raise UsageError(f"there are {MAX_SHOTS} examples already; remove some first")
        with Source(path):
            pass
        key = new_id()
        self.shots[key] = name, path
        return key

    def remove_shot(self, key: str) -> None:
        """Forget an example."""
        _, path = self.shots.pop(key)
        shutil.rmtree(path.parent, ignore_errors=True)

    def sound(self, key: str) -> Sound:
        """The mixture or a part by its id. Raises `KeyError`."""
        sounds = [self.recording.sound] if self.recording else []
        sounds += [part for attempt in self.attempts.values() for part in attempt.parts]
        return {sound.id: sound for sound in sounds}[key]

    def extract(self, told: bytes | str) -> Attempt:
        """Begin what the page asks for, in JSON. Raises `UsageError`, `QueryError`, `OutputError` where it cannot."""
        if self.recording is None or self.recording.sound.overview is None:
            raise UsageError("open a recording first")
        if any(attempt.state in (WAITING, WORKING) for attempt in self.attempts.values()):
            raise UsageError("an extraction is under way: wait for it, or cancel it first")
        wish = Wish.read(told, self.shots)
        here = {model["name"]: model["takes"] for model in models_here(self.given) if model["here"]}
        if wish.model not in here:
            raise UsageError(f"the model {wish.model!r} is not here: clapsep models download {wish.model}")
        queries = wish.queries(self.shots)
        check_taken(queries.values(), here[wish.model], wish.model)
        recording, path = self.recording, self.recording.sound.path
        self._check_room(recording, len(wish.targets) + 1)
        command = command_line(wish, self.shots, recording.given, own_format(path), self.device, recording.track)
        summary = wish.describe(self.shots)
        attempt = Attempt(new_id(), wish, queries, summary, command, self._new_folder())
        self.attempts[attempt.id] = attempt
        self.chosen = wish.model
        self._working.submit(self._work, attempt, recording)
        return attempt

    def _check_room(self, recording: Recording, parts: int) -> None:
        with Source(recording.sound.path, stream=recording.track) as source:  # an error if it is not there any more
            needed = source.frames * source.channels * 4 * parts
        if needed > (room := self.room()):
            raise OutputError(
                f"not enough disk room in {self.folder.parent}: this takes {needed / 1e9:.1f} GB, and "
                f"{room / 1e9:.1f} GB can be used; remove earlier attempts, or set CLAPSEP_HOME to another disk"
            )

    def cancel(self, key: str) -> None:
        """Have an extraction stop after the windows at hand. Raises `KeyError`."""
        self.attempts[key].stop.set()

    def remove(self, key: str) -> None:
        """Forget an attempt, and delete its files once nothing writes them any more. Raises `KeyError`."""
        attempt = self.attempts.pop(key)
        attempt.stop.set()
        self._working.submit(shutil.rmtree, attempt.folder, ignore_errors=True)

    def _work(self, attempt: Attempt, recording: Recording) -> None:
        attempt.state = WORKING
        try:
            with told_of_warnings(attempt.notes.append):
                done = self._run(attempt, recording)
            self._report(attempt, done)
        except StoppedError:
            attempt.state = STOPPED
        except Exception as error:
            attempt.state, attempt.error = FAILED, self._reason(error)

    def _reason(self, error: Exception) -> str:
        """What to tell of an error. One that nobody expected ends what was under way, not the page."""
        if not self.folder.is_dir():
            return GONE
        return str(error) if isinstance(error, ClapsepError | OSError) else f"{type(error).__name__}: {error}"

    def _run(self, attempt: Attempt, recording: Recording) -> Extraction:
        from clapsep_cli.jobs.batch import run
        from clapsep_cli.jobs.inputs import Input
        from clapsep_cli.jobs.planning import lay_out, plan
        from clapsep_cli.jobs.tasks import Extraction, Options

        def told(job: object, done: float, total: float) -> None:
            attempt.done = min(1.0, done / total) if total else 0.0

        model = self._load(attempt.wish)
        attempt.refined = model.refined
        path, presence = recording.sound.path, model.tells_likeness
        options = Options(out=attempt.folder, format=own_format(path), stream=recording.track, presence=presence)
        asked = [(Input(path, Path(path.name)), attempt.queries)]
        jobs = lay_out(asked, options)
        attempt.notes += model.doubts(list(jobs[0].targets.values()))
        (outcome,) = run(plan(jobs, model, options).jobs, model, options, told, attempt.stop)
        if not isinstance(outcome, Extraction):
            raise outcome.error
        return outcome

    def _load(self, wish: Wish) -> Model:
        from clapsep_cli.store.library import load_model

        wanted = wish.model, wish.refine
        if self._model is None or self._model[0] != wanted:
            self._model = None  # so that two never lie in memory
            model = load_model(wish.model, self.device)
            model.refine(wish.refine)
            self._model = wanted, model
        return self._model[1]

    def _report(self, attempt: Attempt, done: Extraction) -> None:
        """Take in what was made, and look at its parts."""
        attempt.elapsed, attempt.done = done.elapsed, 1.0
        attempt.notes += done.notes
        for name, told in done.presence.items():
            score = told["score"] if told else None
            attempt.presence[name] = {"score": score, "words": presence_in_words(score)}
        clipped = {"the rest" if part == RESIDUAL else part: count for part, count in done.clipped.items() if count}
        attempt.notes += [
            f"{count} samples of {name} were over full scale and clipped" for name, count in clipped.items()
        ]
        parts = [Sound(new_id(), part, path) for part, path in done.outputs.items()]
        for part in parts:
            folder = attempt.folder / new_id()
            folder.mkdir()
            part.overview = look(part.path, folder, lambda done, total: None, attempt.stop)
        attempt.parts, attempt.state = parts, DONE


def new_id() -> str:
    """A name that nobody can guess."""
    return secrets.token_hex(16)


def best_here() -> str:
    """The model to begin with: the best that is on this machine. A page downloads nothing."""
    from clapsep_cli.store.library import find, installed

    return PREFERRED if installed(find(PREFERRED)) else BUNDLED


def models_here(given: str) -> list[dict[str, Any]]:
    """All models by name, whether each is here, and what it takes; first the one that was given, if it is a folder."""
    from clapsep_cli.store.library import statuses, taken_by

    known = [{"name": s.entry.name, "here": s.folder is not None, "takes": s.takes} for s in statuses()]
    return known if given in MODELS else [{"name": given, "here": True, "takes": taken_by(given)}, *known]


def own_format(path: Path) -> str:
    """The format of outputs that is the input's own; WAV where there is none like it."""
    suffix = path.suffix.lower().removeprefix(".")
    return suffix if suffix in FORMATS else "wav"


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _clear(above: Path) -> None:
    """Remove the folders of sessions that were killed: nobody holds their lock."""
    for folder in list(above.iterdir()) if above.is_dir() else ():
        if not folder.is_dir():
            continue
        try:
            with FileLock(_lock_of(folder), timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        except (Timeout, OSError):
            continue
        _lock_of(folder).unlink(missing_ok=True)

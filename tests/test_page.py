"""The server of `clapsep ui`, spoken to as a browser would, and as those would whom it must refuse."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection
from importlib import util
from pathlib import Path
from typing import Any

import media_files
import numpy as np
import pytest
import soundfile
import torch
from conftest import Clapsep, Fixed, Stub
from recordings import noise
from torch import Tensor

pytest.importorskip("starlette", reason="the page takes the packages of clapsep[ui]")
pytest.importorskip("uvicorn", reason="the page takes the packages of clapsep[ui]")

from clapsep_cli.errors import ClapsepError, ClapsepWarning, OutputError, QueryError
from clapsep_cli.jobs import batch
from clapsep_cli.page import session as sessions
from clapsep_cli.page.overview import BANDS, look
from clapsep_cli.page.requests import Request, command_line, presence_in_words
from clapsep_cli.page.server import Page
from clapsep_cli.page.session import Session
from clapsep_cli.store import library

ROOT = Path(__file__).parents[1]
RATE = 16_000
Usage = namedtuple("Usage", "total used free")
DOG = {"targets": [{"name": "target", "texts": ["dog"]}], "leave": {"texts": ["rain"]}}


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Running:
    """A server in a thread, and a client that has its cookie."""

    def __init__(self, session: Session) -> None:
        self.session, self.page = session, Page(session)
        self.thread = threading.Thread(target=self.page.run)
        self.thread.start()
        self.key = self.page.address.partition("key=")[2]
        self.cookie = {"Cookie": f"clapsep-{self.page.port}={self.key}"}

    def raw(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """An answer to exactly these headers."""
        connection = HTTPConnection("127.0.0.1", self.page.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """An answer to the page's own request."""
        return self.raw(method, path, body, {**self.cookie, "X-Clapsep": "1", **headers})

    @property
    def state(self) -> Any:
        return self.ask("GET", "/api/state").json

    def until(self, ready: Callable[[Any], bool], seconds: float = 30) -> Any:
        limit = time.monotonic() + seconds
        while not ready(state := self.state):
            assert time.monotonic() < limit, state
            time.sleep(0.02)
        return state

    def opened(self) -> Any:
        return self.until(lambda state: state["recording"]["state"] != "working")["recording"]

    def extract(self, request: dict[str, Any]) -> Answer:
        return self.ask("POST", "/api/attempts", json.dumps({"model": self.session.chosen, **request}))

    def attempt(self) -> Any:
        """The last attempt once it has ended."""
        ended = ("done", "failed", "stopped")
        return self.until(lambda state: state["attempts"][-1]["state"] in ended)["attempts"][-1]

    def stop(self) -> None:
        self.page.server.should_exit = True
        self.thread.join()
        self.page.close()
        self.session.close()


@pytest.fixture
def mix(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "mix.wav"
    path.parent.mkdir()
    soundfile.write(path, noise(3 * RATE, 2), RATE, "PCM_16")
    return path


@pytest.fixture
def running(tiny_folder: Path, tmp_path: Path) -> Iterator[Running]:
    server = Running(Session(str(tiny_folder), "cpu", tmp_path / "page"))
    yield server
    server.stop()


@pytest.fixture
def ready(running: Running, mix: Path) -> Running:
    """A server with a recording open."""
    running.session.open(mix, str(mix))
    assert running.opened()["state"] == "done"
    return running


class Slow(Fixed):
    """Takes a while for each window."""

    def mask(self, features: Tensor, condition: Tensor) -> Tensor:
        time.sleep(0.2)
        return super().mask(features, condition)


@pytest.fixture
def slow(ready: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Running:
    """A server with a minute open, and a model that takes seconds for it."""
    monkeypatch.setattr(library, "load_model", lambda name, device: Stub(Slow(torch.tensor(0.5), 2 * 32_000)))
    long = tmp_path / "in" / "long.wav"
    soundfile.write(long, noise(60 * RATE, 1), RATE, "PCM_16")
    ready.session.open(long, str(long))
    ready.opened()
    return ready


def test_the_key_opens_the_page_and_becomes_a_cookie(running: Running) -> None:
    page = running.raw("GET", f"/?key={running.key}")
    assert page.status == 200
    assert page.headers["set-cookie"] == f"clapsep-{running.page.port}={running.key}; HttpOnly; SameSite=Strict; Path=/"
    again = running.raw("GET", "/", headers=running.cookie)
    assert again.status == 200
    assert "set-cookie" not in again.headers
    policies = [answer.headers["content-security-policy"] for answer in (page, again)]
    nonces = [re.findall(r"'nonce-([\w-]+)'", policy) for policy in policies]
    assert nonces[0] != nonces[1]
    assert nonces[1][0].encode() in again.body
    for policy in policies:
        assert policy.startswith("default-src 'self';")
        assert not re.search(r"unsafe|https?:|\*", policy)
    assert page.headers["x-frame-options"] == "DENY"
    assert page.headers["referrer-policy"] == "no-referrer"


FOREIGN: dict[str, dict[str, str]] = {
    "a name that resolves here": {"Host": "evil.example:{port}"},
    "a name that begins like ours": {"Host": "127.0.0.1.evil.example:{port}"},
    "no host": {"Host": ""},
    "another site": {"Origin": "https://evil.example"},
    "another port": {"Origin": "http://127.0.0.1:1"},
    "a file": {"Origin": "null"},
    "told by the browser": {"Sec-Fetch-Site": "cross-site"},
    "of another port": {"Sec-Fetch-Site": "same-site"},
    "no cookie": {"Cookie": ""},
    "a wrong cookie": {"Cookie": "clapsep-{port}=wrong"},
    "not in ASCII": {"Cookie": "clapsep-{port}=é"},
    "a broken cookie": {"Cookie": 'clapsep-{port}="\\'},
    "another server's cookie": {"Cookie": "clapsep-1={key}"},
}


@pytest.mark.parametrize("case", FOREIGN)
def test_strangers_are_refused(case: str, running: Running) -> None:
    told = {k: v.format(port=running.page.port, key=running.key) for k, v in FOREIGN[case].items()}
    for method, path in (
        ("GET", "/"),
        ("GET", "/static/app.js"),
        ("GET", "/api/state"),
        ("POST", "/api/shots"),
        ("PATCH", "/none"),
    ):
        answer = running.raw(method, path, headers={**running.cookie, "X-Clapsep": "1", **told})
        assert answer.status == 403, path
        assert "set-cookie" not in answer.headers
        assert "content-security-policy" in answer.headers


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/api/recording"), ("POST", "/api/shots"), ("POST", "/api/attempts"), ("DELETE", "/api/attempts/x")],
)
def test_changes_need_a_header_that_no_form_sends(method: str, path: str, running: Running) -> None:
    assert running.raw(method, path, b"{}", running.cookie).status == 403
    assert running.ask(method, path, b"{}").status != 403


@pytest.mark.parametrize("key", ["", "?key=", "?key=wrong", "?key={key}x", "?other={key}"])
def test_nothing_but_the_key_opens_the_page(key: str, running: Running) -> None:
    assert running.raw("GET", f"/{key.format(key=running.key)}").status == 403
    assert running.raw("GET", f"/api/state?key={running.key}").status == 403


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py",
        "/static/..%2fserver.py",
        "/static/%2e%2e/%2e%2e/version.py",
        "/static//etc/passwd",
        "/api/sounds/..%2f..%2fmix/file",
        "/api/sounds/%2fetc%2fpasswd/file",
        "/api/attempts/..",
    ],
)
def test_no_request_names_a_path(path: str, ready: Running) -> None:
    assert ready.ask("GET", path).status in (404, 405)


def test_it_listens_on_this_machine_alone(running: Running) -> None:
    assert running.page.socket.getsockname()[0] == "127.0.0.1"


def test_an_upload_is_kept_under_a_safe_name_until_another_is_opened(running: Running, mix: Path) -> None:
    for name in ("../../../evil.wav", "..%2f..%2fCON.wav", "%2e%2e", "a%00b.wav", ""):
        answer = running.ask("POST", "/api/recording", mix.read_bytes(), **{"X-Name": name})
        assert answer.status == 200, answer.body
        assert running.opened()["state"] == "done"
        recording = running.session.recording
        assert recording is not None
        assert running.session.folder in recording.sound.path.resolve().parents
        kept = {path.name for path in running.session.folder.rglob("*") if path.is_file()}
        assert kept == {recording.sound.path.name, "peaks", "levels"}
    assert not list(running.session.folder.parent.parent.glob("evil*"))


def test_what_is_no_recording_is_told_in_a_line_and_not_kept(running: Running, mix: Path) -> None:
    for body in (b"not audio", b"", mix.read_bytes()[:3000]):
        answer = running.ask("POST", "/api/recording", body, **{"X-Name": "bad.wav"})
        assert answer.status == 400
        assert answer.json["error"].startswith("bad.wav: ")
    assert running.state["recording"] is None
    assert not list(running.session.folder.iterdir())


def test_an_upload_ends_where_the_disk_is_full(running: Running, mix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = sessions.RESERVE_BYTES + 100_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, free))
    announced = running.ask("POST", "/api/recording", mix.read_bytes(), **{"X-Name": "mix.wav"})
    assert announced.status == 413
    assert "disk" in announced.json["error"]
    pieces = (mix.read_bytes()[at : at + 9999] for at in range(0, mix.stat().st_size, 9999))
    unannounced = running.ask("POST", "/api/shots", pieces, **{"X-Name": "mix.wav"})
    assert unannounced.status == 413
    assert not list(running.session.folder.iterdir())


def test_an_upload_that_is_broken_off_leaves_nothing(running: Running) -> None:
    connection = HTTPConnection("127.0.0.1", running.page.port, timeout=30)
    connection.putrequest("POST", "/api/recording")
    for name, value in {**running.cookie, "X-Clapsep": "1", "Content-Length": "5000000"}.items():
        connection.putheader(name, value)
    connection.endheaders(b"x" * 3_000_000)
    limit = time.monotonic() + 20
    while not list(running.session.folder.rglob("recording")):
        assert time.monotonic() < limit
    connection.close()
    while list(running.session.folder.iterdir()):
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_what_is_seen_and_heard_is_the_recording(tmp_path: Path) -> None:
    times = np.arange(5 * RATE) / RATE
    tone = 0.5 * np.sin(2 * np.pi * 1000 * times) * (times >= 2)
    path = tmp_path / "tone.flac"
    soundfile.write(path, np.stack([tone, 0 * tone, tone, 0 * tone], 1), RATE)
    seen = look(path, tmp_path, lambda done, total: None, threading.Event())
    assert (seen.frames, seen.channels, seen.seconds) == (5 * RATE, 2, 5.0)
    heard = seen.samples(2 * RATE + 7, 3000)
    np.testing.assert_allclose(heard[:, 0], tone[2 * RATE + 7 :][:3000], atol=1e-4)
    assert not heard[:, 1].any()
    assert len(seen.samples(5 * RATE - 10, 3000)) == 10
    assert len(seen.samples(99 * RATE, 3000)) == 0
    pairs = np.fromfile(seen.peaks, np.int8).reshape(-1, 2) / 127
    assert len(pairs) == 5 * 200
    assert abs(pairs[:399]).max() == 0
    np.testing.assert_allclose(pairs[401:], [[-0.5, 0.5]] * 599, atol=0.01)
    whole = seen.picture(0, 5, 400)
    assert whole.shape == (5 * 50, BANDS)
    assert whole[:90].max() == 0
    mels = np.linspace(*(2595 * np.log10(1 + hz / 700) for hz in (30, RATE / 2)), BANDS + 2)[1:-1]
    assert abs(700 * (10 ** (mels[whole[150].argmax()] / 2595) - 1) - 1000) < 40
    near = seen.picture(1.9, 2.1, 400)
    assert near.shape == (400, BANDS)
    assert near[:100].max() == 0
    assert near[300:].argmax(1).tolist() == [whole[150].argmax()] * 100
    assert seen.picture(4.9, 5.1, 300).shape == seen.picture(0, 0.001, 300).shape == (300, BANDS)
    few = seen.picture(0, 5, 5)
    assert few.shape == (5, BANDS)
    assert few.argmax() // BANDS >= 2, "the loudest moment is kept"


@pytest.mark.parametrize("seconds", [0.001, 0.0213, 3.97, 4.0, 8.013])
@pytest.mark.parametrize("rate", [8000, 11_025, 44_100])
def test_pictures_and_peaks_are_as_long_as_the_recording(seconds: float, rate: int, tmp_path: Path) -> None:
    path = tmp_path / "any.ogg" if rate == 44_100 else tmp_path / "any.wav"
    soundfile.write(path, noise(max(1, round(seconds * rate)), 1), rate)
    seen = look(path, tmp_path, lambda done, total: None, threading.Event())
    frames = soundfile.info(path).frames
    assert seen.piece == rate // 200
    assert seen.levels.stat().st_size == BANDS * (frames // (4 * seen.piece) + 1)
    assert seen.peaks.stat().st_size == 2 * math.ceil(frames / seen.piece)
    assert len(seen.samples(0, seen.frames + 9)) == seen.frames == frames


def test_ranges_of_a_file(ready: Running, mix: Path) -> None:
    name = ready.state["recording"]["id"]
    whole = ready.ask("GET", f"/api/sounds/{name}/file")
    assert (whole.status, whole.body) == (200, mix.read_bytes())
    assert whole.headers["accept-ranges"] == "bytes"
    assert 'filename="mix.wav"' in whole.headers["content-disposition"]
    part = ready.ask("GET", f"/api/sounds/{name}/file", Range="bytes=100-199")
    assert (part.status, part.body) == (206, mix.read_bytes()[100:200])
    assert ready.ask("GET", f"/api/sounds/{name}/file", Range="bytes=99999999-").status == 416


def test_stretches_of_samples_and_pictures(ready: Running, mix: Path) -> None:
    name = ready.state["recording"]["id"]
    samples = ready.ask("GET", f"/api/sounds/{name}/samples?start=1000&frames=500")
    expected = soundfile.read(mix, dtype="float32")[0][1000:1500]
    np.testing.assert_array_equal(np.frombuffer(samples.body, "<f4").reshape(-1, 2), expected)
    assert len(ready.ask("GET", f"/api/sounds/{name}/picture?from=1&to=2&columns=20").body) == 20 * BANDS
    for ask in ("samples?start=-1", "samples?frames=nan", "picture?from=x", "picture?to=1e999"):
        refused = ready.ask("GET", f"/api/sounds/{name}/{ask}")
        assert refused.status == 400, ask
        assert "number" in refused.json["error"]


def test_what_is_downloaded_is_what_the_command_writes(ready: Running, mix: Path, clapsep: Clapsep) -> None:
    """To the byte, tags included, by the command line that the page shows."""
    assert ready.extract(DOG).status == 200
    attempt = ready.attempt()
    assert attempt["state"] == "done", attempt
    assert [part["name"] for part in attempt["parts"]] == ["target", "residual"]
    assert attempt["summary"] == "dog without rain"
    assert attempt["parts"][0]["presence"]["words"]
    done = clapsep(*shlex.split(attempt["command"])[1:], cwd=mix.parent)
    assert done.returncode == 0, done.stderr
    for part in attempt["parts"]:
        assert part["file"] == f"mix.{part['name']}.wav"
        downloaded = ready.ask("GET", f"/api/sounds/{part['id']}/file").body
        assert downloaded == mix.with_name(part["file"]).read_bytes()


def test_the_model_can_be_changed_and_changed_back(ready: Running, tiny_folder: Path) -> None:
    for model in ("mini", str(tiny_folder)):
        assert ready.extract({**DOG, "model": model}).status == 200
        attempt = ready.attempt()
        assert (attempt["state"], attempt["model"]) == ("done", model)
        assert ready.state["model"] == model
        takes = ["text", "audio", "negatives"]
        assert {"name": str(tiny_folder), "here": True, "takes": takes} in ready.state["models"]


def test_a_model_that_takes_words_alone_says_so(audiosep_folder: Path, mix: Path, tmp_path: Path) -> None:
    server = Running(Session(str(audiosep_folder), "cpu", tmp_path / "page"))
    try:
        server.ask("POST", "/api/recording", mix.read_bytes(), **{"X-Name": "mix.wav"})
        server.opened()
        assert {"name": str(audiosep_folder), "here": True, "takes": ["text"]} in server.state["models"]
        for request, said in (
            (DOG, "takes no negative queries"),
            ({"targets": [{"name": "target", "texts": ["dog"], "spans": [[0, 0.2]]}]}, "takes no recordings"),
        ):
            refused = server.extract(request)
            assert (refused.status, said in refused.json["error"]) == (400, True)
        assert not server.state["attempts"], "nothing was begun"
        assert server.extract({"targets": DOG["targets"]}).status == 200
        attempt = server.attempt()
        assert (attempt["state"], [part["presence"] for part in attempt["parts"]]) == ("done", [None, None])
    finally:
        server.stop()


def test_refining_is_chosen_and_is_what_the_command_does(ready: Running, mix: Path, clapsep: Clapsep) -> None:
    """By default as the command does: in one pass."""
    made = []
    for told in ({}, {"refine": True}, {"refine": False}):
        assert ready.extract({**DOG, "model": "mini", **told}).status == 200
        attempt = ready.attempt()
        assert (attempt["state"], attempt["refined"]) == ("done", told.get("refine", False))
        done = clapsep(*shlex.split(attempt["command"])[1:], "--overwrite", cwd=mix.parent)
        assert done.returncode == 0, done.stderr
        made.append(ready.ask("GET", f"/api/sounds/{attempt['parts'][0]['id']}/file").body)
        assert made[-1] == mix.with_name("mix.target.wav").read_bytes()
    assert made[0] == made[2] != made[1]


def test_what_may_go_wrong_is_noted(ready: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command prints as notes, warnings of the library among them, stands with the attempt."""
    run = batch.run

    def warned(*arguments: Any, **more: Any) -> Any:
        warnings.warn("it may be poor", ClapsepWarning, stacklevel=2)
        return run(*arguments, **more)

    monkeypatch.setattr(batch, "run", warned)
    assert ready.extract({**DOG, "model": "mini", "leave": {"texts": ["xqzwv rain"]}}).status == 200
    attempt = ready.attempt()
    notes = attempt["notes"]
    assert "it may be poor" in notes, attempt["error"]
    assert any("xqzwv" in note for note in notes), notes


def test_a_sound_track_of_a_film_is_chosen(running: Running, tmp_path: Path, clapsep: Clapsep) -> None:
    pytest.importorskip("av")
    film = tmp_path / "in" / "film.mkv"
    film.parent.mkdir()
    tracks = [noise(channels, 2 * RATE, seed=channels) for channels in (1, 2)]
    media_files.encode(film, tracks[0], RATE, "flac", further=tracks[1:])
    running.ask("POST", "/api/recording", film.read_bytes(), **{"X-Name": "film.mkv"})
    first = running.opened()
    assert (first["track"], first["channels"], first["tracks"]) == (1, 1, ["flac mono", "flac stereo"])
    for wrong, status in (("0", 400), ("3", 400), ("-1", 404), ("x", 404), ("1.0", 404)):
        assert running.ask("POST", f"/api/recording/tracks/{wrong}").status == status
    assert running.ask("POST", "/api/recording/tracks/2").status == 200
    second = running.opened()
    assert (second["track"], second["channels"]) == (2, 2)
    samples = np.frombuffer(running.ask("GET", f"/api/sounds/{second['id']}/samples").body, "<f4").reshape(-1, 2)
    np.testing.assert_allclose(samples, tracks[1].T, atol=1e-4)
    running.extract({"targets": [{"name": "target", "spans": [[0.5, 1]]}]})
    attempt = running.attempt()
    assert attempt["notes"] == []
    assert "--stream 2" in attempt["command"]
    done = clapsep(*shlex.split(attempt["command"])[1:], cwd=film.parent)
    assert done.returncode == 0, done.stderr
    for part in attempt["parts"]:
        downloaded = running.ask("GET", f"/api/sounds/{part['id']}/file").body
        expected = soundfile.read(film.with_name(part["file"]), dtype="int16")[0]
        np.testing.assert_array_equal(soundfile.read(io.BytesIO(downloaded), dtype="int16")[0], expected)


def test_several_targets_examples_and_stretches(ready: Running, mix: Path, tmp_path: Path, clapsep: Clapsep) -> None:
    example = tmp_path / "in" / "bark.wav"
    soundfile.write(example, noise(RATE, 1, seed=3), RATE)
    shots = ready.ask("POST", "/api/shots", example.read_bytes(), **{"X-Name": "bark.wav"}).json["shots"]
    assert [shot["name"] for shot in shots] == ["bark.wav"]
    targets = [
        {"name": "dog", "shots": [shots[0]["id"]]},
        {"name": "siren", "texts": ["siren"]},
        {"name": "here", "spans": [[0.5, 1.25]]},
    ]
    assert ready.extract({"targets": targets}).status == 200
    attempt = ready.attempt()
    assert [part["name"] for part in attempt["parts"]] == ["dog", "siren", "here", "residual"]
    assert attempt["summary"] == "dog: like bark.wav; siren; here: like 0.5–1.25 s"
    said = attempt["command"].split(" --model")[0]
    assert said == f"clapsep extract {mix} --target dog=bark.wav --target siren=siren --target here=0.5-1.25"
    done = clapsep(*shlex.split(attempt["command"])[1:], cwd=example.parent)
    assert done.returncode == 0, done.stderr
    for part in attempt["parts"]:
        downloaded = ready.ask("GET", f"/api/sounds/{part['id']}/file").body
        assert downloaded == mix.with_name(part["file"]).read_bytes()
    mixture = np.frombuffer(ready.ask("GET", f"/api/sounds/{ready.state['recording']['id']}/samples").body, "<f4")
    parts = [np.frombuffer(ready.ask("GET", f"/api/sounds/{p['id']}/samples").body, "<f4") for p in attempt["parts"]]
    np.testing.assert_array_equal(sum(parts), mixture)
    assert ready.ask("DELETE", f"/api/shots/{shots[0]['id']}").json["shots"] == []
    assert ready.ask("DELETE", f"/api/shots/{shots[0]['id']}").status == 404
    refused = ready.extract({"targets": targets})
    assert (refused.status, "example" in refused.json["error"]) == (400, True)


def test_a_lossy_recording_gives_parts_of_its_own_format(running: Running, tmp_path: Path) -> None:
    path = tmp_path / "mix.ogg"
    soundfile.write(path, noise(2 * RATE, 1), RATE)
    running.session.open(path, "mix.ogg")
    running.opened()
    running.extract(DOG)
    attempt = running.attempt()
    assert [part["file"] for part in attempt["parts"]] == ["mix.target.ogg", "mix.residual.ogg"]
    assert "--format ogg" in attempt["command"]
    for part in attempt["parts"]:
        assert len(running.ask("GET", f"/api/sounds/{part['id']}/samples").body) == 4 * 2 * RATE
        assert soundfile.SoundFile(running.session.sound(part["id"]).path).format == "OGG"


@pytest.mark.parametrize(
    "asked",
    [
        "no JSON",
        "[" * 100_000,
        [],
        {"model": 1},
        {"targets": []},
        {"targets": [{"texts": ["dog"]}]},
        {"targets": [{"name": "target"}]},
        {"targets": [{"name": "target", "texts": "dog"}]},
        {"targets": [{"name": "target", "texts": [" "]}]},
        {"targets": [{"name": "target", "texts": [1]}]},
        {"targets": [{"name": "target", "texts": ["x" * 9999]}]},
        {"targets": [{"name": "target", "paths": ["/etc/passwd"]}]},
        {"targets": [{"name": "target", "shots": ["/etc/passwd"]}]},
        {"targets": [{"name": "target", "shots": [{}]}]},
        {"targets": [{"name": "target", "spans": [[1]]}]},
        {"targets": [{"name": "target", "spans": [[2, 1]]}]},
        {"targets": [{"name": "target", "spans": [["0", "1"]]}]},
        {"targets": [{"name": "target", "spans": [[0, True]]}]},
        {"targets": [{"name": "target", "spans": [[0, math.inf]]}]},
        {"targets": [{"name": "target", "spans": [[math.nan, 1]]}]},
        {"targets": [{"name": "../evil", "texts": ["dog"]}]},
        {"targets": [{"name": "a", "texts": ["dog", "cat"]}]},
        {**DOG, "refine": "yes"},
        {"targets": [{"name": "residual", "texts": ["dog"]}]},
        {"targets": [{"name": "a", "texts": ["dog"]}, {"name": "A", "texts": ["cat"]}]},
        {**DOG, "leave": 1},
        {**DOG, "model": "none"},
        {**DOG, "model": "/etc"},
    ],
)
def test_what_cannot_be_asked_is_told_in_a_line(asked: Any, ready: Running) -> None:
    told = {"model": ready.session.chosen, **asked} if isinstance(asked, dict) else asked
    refused = ready.ask("POST", "/api/attempts", told if isinstance(told, str) else json.dumps(told))
    assert refused.status == 400
    assert 10 < len(refused.json["error"]) < 200
    assert ready.state["attempts"] == []


def test_a_request_without_end_is_refused(ready: Running) -> None:
    assert ready.ask("POST", "/api/attempts", b" " * 2_000_000).status == 413


def test_one_extraction_at_a_time_and_it_can_be_cancelled(slow: Running) -> None:
    assert slow.extract(DOG).status == 200
    busy = slow.until(lambda state: 0 < state["attempts"][0]["done"] < 1)["attempts"][0]
    refused = slow.extract(DOG)
    assert (refused.status, "under way" in refused.json["error"]) == (400, True)
    assert slow.ask("POST", f"/api/attempts/{busy['id']}/cancel").status == 200
    assert slow.attempt()["state"] == "stopped"
    folder = slow.session.attempts[busy["id"]].folder
    assert not list(folder.iterdir())
    assert slow.ask("DELETE", f"/api/attempts/{busy['id']}").json["attempts"] == []
    slow.session._working.submit(int).result()
    assert not folder.exists()
    assert slow.ask("POST", f"/api/attempts/{busy['id']}/cancel").status == 404


def test_another_recording_ends_what_was_made_of_the_first(slow: Running, mix: Path) -> None:
    slow.extract(DOG)
    slow.until(lambda state: state["attempts"][0]["done"] > 0)
    began = time.monotonic()
    slow.ask("POST", "/api/recording", mix.read_bytes(), **{"X-Name": "other.wav"})
    assert slow.opened()["name"] == "other.wav"
    assert slow.state["attempts"] == []
    slow.session._working.submit(int).result()
    assert time.monotonic() - began < 5
    kept = [path.name for path in slow.session.folder.rglob("*") if path.is_file()]
    assert sorted(kept) == ["levels", "other.wav", "peaks"]


def test_without_disk_room_nothing_is_begun(ready: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, sessions.RESERVE_BYTES + 1000))
    refused = ready.extract(DOG)
    assert refused.status == 507
    assert "disk room" in refused.json["error"]
    assert ready.state["attempts"] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk here that is always full")
@pytest.mark.parametrize("kept", ["peaks", "levels", "listen.wav"])
def test_a_disk_that_gets_full_is_told(kept: str, tmp_path: Path) -> None:
    path = tmp_path / "mix.ogg"
    soundfile.write(path, noise(RATE, 1), RATE)
    (tmp_path / kept).symlink_to("/dev/full")
    with pytest.raises(OutputError, match="cannot be written"):
        look(path, tmp_path, lambda done, total: None, threading.Event())


def test_a_session_that_ends_while_it_works_leaves_nothing(slow: Running) -> None:
    slow.extract(DOG)
    slow.until(lambda state: state["attempts"][0]["done"] > 0)
    began = time.monotonic()
    slow.session.close()
    assert time.monotonic() - began < 5
    assert not list(slow.session.folder.parent.iterdir())


def test_a_session_whose_folder_is_gone_says_so(ready: Running, mix: Path) -> None:
    name = ready.state["recording"]["id"]
    shutil.rmtree(ready.session.folder)
    for answer in (ready.extract(DOG), ready.ask("POST", "/api/shots", mix.read_bytes())):
        assert answer.status == 507
        assert answer.json["error"] == sessions.GONE
    for view in ("peaks", "picture"):
        assert ready.ask("GET", f"/api/sounds/{name}/{view}").status == 404
    assert ready.state["recording"]["state"] == "done"


def test_a_recording_that_is_gone_is_told(ready: Running, mix: Path) -> None:
    name = ready.state["recording"]["id"]
    mix.unlink()
    refused = ready.extract(DOG)
    assert (refused.status, "no such file" in refused.json["error"]) == (400, True)
    assert ready.ask("GET", f"/api/sounds/{name}/file").status == 404
    assert ready.ask("GET", f"/api/sounds/{name}/samples").status == 404


def test_a_fault_of_a_model_ends_the_attempt_and_not_the_page(ready: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of something")

    monkeypatch.setattr(library, "load_model", broken)
    ready.extract(DOG)
    attempt = ready.attempt()
    assert (attempt["state"], attempt["error"]) == ("failed", "RuntimeError: out of something")
    monkeypatch.undo()
    assert ready.extract(DOG).status == 200
    assert ready.attempt()["state"] == "done"


def test_a_damaged_recording_is_told_where_it_is_read(running: Running, tmp_path: Path) -> None:
    path = tmp_path / "nan.wav"
    soundfile.write(path, np.where(np.arange(9 * RATE) == 7 * RATE, np.nan, 0.1), RATE, "FLOAT")
    running.session.open(path, str(path))
    recording = running.opened()
    assert recording["state"] == "failed"
    assert "not a finite number" in recording["error"]
    assert running.extract(DOG).status == 400


SHOTS = {"1": ("a bark.wav", Path("x")), "2": ("-x.wav", Path("y"))}
TARGET = {"name": "target"}
SAME: list[tuple[list[Any], dict[str, Any], str]] = [
    ([TARGET | {"texts": ["dog"]}], {}, "--pos dog"),
    ([TARGET | {"texts": ["it's $HOME"]}], {}, """--pos 'it'"'"'s $HOME'"""),
    ([TARGET | {"texts": ["-x"]}], {"texts": ["--y z"]}, "--pos=-x '--neg=--y z'"),
    ([TARGET], {"spans": [[1, 3601.2349]]}, "--neg-span 1-3601.235"),
    ([TARGET | {"shots": ["1"]}], {"shots": ["2"]}, "--query-audio 'a bark.wav' --neg-audio ./-x.wav"),
    ([{"name": "a", "texts": ["dog"]}, {"name": "b", "shots": ["1"]}], {}, "--target a=dog --target 'b=a bark.wav'"),
    ([{"name": "a", "texts": ["dog"]}, {"name": "b", "spans": [[1.5, 64]]}], {}, "--target a=dog --target b=1.5-64"),
]


@pytest.mark.parametrize(("targets", "leave", "command"), SAME)
def test_the_command_line_says_the_same(targets: Any, leave: Any, command: str) -> None:
    request = Request.read(json.dumps({"model": "mini", "targets": targets, "leave": leave}), SHOTS)
    made = command_line(request, SHOTS, "mix.wav", "wav", "auto")
    assert made == f"clapsep extract mix.wav {command} --model mini"


def test_odd_names_of_recordings_in_the_command_line() -> None:
    request = Request.read(json.dumps({"model": "mini", **DOG}), {})
    for given, shown in (("-", "./-"), ("--x.wav", "./--x.wav"), ("@a.wav", "./@a.wav"), ("a b.flac", "a b.flac")):
        assert shlex.split(command_line(request, {}, given, "flac", "cpu"))[2] == shown
    with pytest.raises(QueryError):
        Request.read(json.dumps({"model": "mini", "targets": [{"name": "target"}]}), {})


def test_presence_in_words() -> None:
    told = [presence_in_words(score) for score in (0.5, 0.1, -0.1, -0.5, None)]
    assert len(set(told)) == 5
    assert told[0] == "clearly there"


def test_what_a_killed_session_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    place = tmp_path / "page"
    code = f"""
import os, sys
from pathlib import Path
from clapsep_cli.page.session import Session
session = Session("mini", "cpu", Path({str(place)!r}))
(session.folder / "large.wav").write_bytes(b"x")
print(session.folder, flush=True)
sys.stdin.read()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    beside = Session("mini", "cpu", place)
    assert (folder / "large.wav").exists(), "another session that runs is left alone"
    process.kill()
    process.communicate()
    Session("mini", "cpu", place).close()
    assert not folder.exists()
    assert beside.folder.exists()
    beside.close()
    assert not list(place.iterdir())


def test_an_hour_within_300_mb_and_nothing_is_left_after_sigterm(tmp_path: Path) -> None:
    """A process of its own, which also shows that opening a recording needs no torch."""
    hour, block = tmp_path / "hour.wav", noise(10 * 8000, 2)
    with soundfile.SoundFile(hour, "w", 8000, 2, "PCM_16") as file:
        for _ in range(360):
            file.write(block)
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "clapsep_cli", "ui", "hour.wav", "--no-browser", "--model", "mini"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CLAPSEP_HOME": str(tmp_path / "home")},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:(\d+)/\?key=(\S+)", process.stdout.readline())
        assert address is not None
        cookie = {"Cookie": f"clapsep-{address[1]}={address[2]}"}

        def ask(path: str) -> bytes:
            with closing(HTTPConnection("127.0.0.1", int(address[1]), timeout=60)) as connection:
                connection.request("GET", path, headers=cookie)
                return connection.getresponse().read()

        limit = time.monotonic() + 120
        while (recording := json.loads(ask("/api/state"))["recording"])["state"] == "working":
            assert time.monotonic() < limit
            time.sleep(0.2)
        assert recording["frames"] == 3600 * 8000
        assert len(ask(f"/api/sounds/{recording['id']}/picture?columns=1500")) == 1500 * BANDS
        assert len(ask(f"/api/sounds/{recording['id']}/samples?start=9999999&frames=65536")) == 65536 * 8
        status = Path(f"/proc/{process.pid}/status")
        if status.exists():
            peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
            assert peak is not None
            assert int(peak[1]) < 300_000
        (folder,) = (path for path in (tmp_path / "home" / "page").iterdir() if path.is_dir())
        assert oct(folder.stat().st_mode)[-3:] == "700"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 130
        assert not list((tmp_path / "home" / "page").iterdir())
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("arguments", "exit_code", "told"),
    [
        (["none.wav"], 1, "none.wav: no such file"),
        (["--model", "none"], 2, "no model 'none'"),
        (["--port", "1"], 2, "port 1 cannot be used"),
        (["--stream", "2"], 2, "--stream chooses a sound track of MIX"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], exit_code: int, told: str, clapsep: Clapsep, home: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = clapsep("ui", *(port if one == "1" else one for one in arguments), "--no-browser", cwd=tmp_path)
    told = told.replace("port 1", f"port {port}")
    assert done.returncode == exit_code
    assert told in done.stderr
    assert not list((home / "page").rglob("*"))


def test_what_is_missing_is_named(clapsep: Clapsep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = util.find_spec
    monkeypatch.setattr("clapsep_cli.cli.ui.find_spec", lambda name: None if name == "uvicorn" else found(name))
    done = clapsep("ui", cwd=tmp_path)
    assert done.returncode == 3
    assert 'needs uvicorn: pip install "clapsep[ui]"' in done.stderr


def test_the_address_is_opened_and_printed(
    clapsep: Clapsep, home: Path, mix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(Page, "run", lambda self: None)
    before = signal.getsignal(signal.SIGTERM)
    done = clapsep("ui", mix.name, cwd=mix.parent)
    assert signal.getsignal(signal.SIGTERM) is before
    assert done.returncode == 0
    assert opened
    assert opened[0] in done.stdout


def test_static_files_name_nothing_outside() -> None:
    """A page that asks nobody else for fonts, scripts or pictures."""
    static = ROOT / "clapsep_cli" / "page" / "static"
    for path in static.iterdir():
        addresses = set(re.findall(r"https?://[\w./-]+", path.read_text()))
        assert addresses <= {"http://www.w3.org/2000/svg"} | {
            a for a in addresses if path.name.startswith("wavesurfer")
        }
    assert (static / "wavesurfer.LICENSE.txt").read_text().startswith("BSD 3-Clause")


def test_errors_are_of_the_one_tree() -> None:
    with pytest.raises(ClapsepError):
        Request.read('{"model": "mini"}', {})

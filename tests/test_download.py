"""Tests downloads from a local server that fails on demand, and by the Hub's real client in processes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import Faults, HubServer
from huggingface_hub import constants

from clapsep_cli.errors import DownloadError
from clapsep_cli.registry import MODELS, HubFile, Remote, WebFile, home
from clapsep_cli.store import download

DATA = random.Random(6).randbytes(200_000)
PATH = "/media/owner/name/0123456/model.pth"
SHA256 = hashlib.sha256(DATA).hexdigest()
WEB = WebFile(url=f"https://files.example{PATH}", size=len(DATA), sha256=SHA256)
HUB = HubFile(
    repo="owner/name",
    repo_type="space",
    revision="0123456789" * 4,
    path="folder/a b.bin",
    size=len(DATA),
    sha256=SHA256,
)
FETCH = """
import json, sys
from clapsep_cli.store import download
from clapsep_cli.registry import HubFile, WebFile
early = {"huggingface_hub", "httpx2", "filelock", "torch", "numpy"} & set(sys.modules)
assert not early, "imports before they are needed"
download.PAUSES_S = (0.0, 0.0, 0.0)
kind, given = json.loads(sys.argv[1])
seen = []
try:
    with download.lock("one"):
        fetched = download.fetch({"HubFile": HubFile, "WebFile": WebFile}[kind](**given), lambda *at: seen.append(at))
except download.DownloadError as error:
    sys.exit(str(error))
print(json.dumps([str(fetched.path), fetched.sha256, fetched.source, seen]))
"""


@pytest.fixture(autouse=True)
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Plays the files' host and the Hub. The home and the Hub's cache are empty."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("HF_")]:
        monkeypatch.delenv(name)
    with HubServer() as server:
        server.add_plain(PATH, DATA)
        server.add_file(HUB.repo, HUB.repo_type, HUB.revision, HUB.path, DATA)
        for name, value in {
            "CLAPSEP_HOME": str(tmp_path / "home"),
            "CLAPSEP_ENDPOINT": server.url,
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "hf"),
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(download, "PAUSES_S", (0.0, 0.0, 0.0))
        yield server
        server.faults.release.set()


def start(remote: Remote, **variables: str) -> subprocess.Popen[str]:
    given = json.dumps([type(remote).__name__, asdict(remote)])
    command, pipe = [sys.executable, "-c", FETCH, given], subprocess.PIPE
    return subprocess.Popen(command, env=os.environ | variables, stdout=pipe, stderr=pipe, text=True)


def elsewhere(remote: Remote = HUB, **variables: str) -> tuple[Path, str, str, list[tuple[int, int]]]:
    """What `fetch` returns in a process of its own: the Hub's client reads its environment when it is imported."""
    process = start(remote, **variables)
    out, err = process.communicate(timeout=120)
    if process.returncode:
        assert err.count("\n") == 1, err
        raise DownloadError(err.strip())
    path, sha256, source, seen = json.loads(out)
    return Path(path), sha256, source, seen


def refused(remote: Remote = WEB, fetch: Callable[[Remote], object] = download.fetch) -> str:
    with pytest.raises(DownloadError) as caught:
        fetch(remote)
    assert "\n" not in str(caught.value)
    assert not download.find(remote)
    return str(caught.value)


def left() -> list[str]:
    return sorted(path.name for path in (home() / "downloads").rglob("*") if path.is_file())


def test_a_file_at_an_address(server: HubServer, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int]] = []
    assert download.to_download(WEB) == len(DATA)
    fetched = download.fetch(WEB, lambda *at: seen.append(at))
    assert (fetched.sha256, fetched.source) == (SHA256, "pinned by clapsep")
    assert fetched.path.read_bytes() == DATA
    assert sorted(seen) == seen
    assert seen[-1] == (len(DATA), len(DATA))
    assert left() == ["SHA256SUMS", "model.pth"]
    assert download.to_download(WEB) == 0
    assert download.fetch(WEB) == fetched
    assert len(server.gets()) == 1
    assert download.clear(WEB) == [fetched.path.parent]
    assert not download.find(WEB)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("redirect", [False, True])
def test_a_file_of_the_hub(server: HubServer, redirect: bool) -> None:
    server.redirect = redirect
    path, sha256, source, seen = elsewhere()
    assert (sha256, source, path.read_bytes()) == (SHA256, "pinned by clapsep", DATA)
    assert left() == ["SHA256SUMS", "a b.bin"]
    assert seen[-1] == [len(DATA), len(DATA)]
    server.stop()
    assert elsewhere(HF_HUB_OFFLINE="1")[0] == path


def test_the_hash_that_the_hub_states_is_believed(server: HubServer) -> None:
    other = replace(HUB, sha256="4c5e" + "0" * 60)
    path, sha256, source, _ = elsewhere(other)
    assert (sha256, source) == (SHA256, "stated by the Hub for the pinned revision")
    server.stop()
    assert elsewhere(other)[:3] == (path, SHA256, download.STATED), "what was accepted stays"


def test_what_lies_in_the_hubs_cache_is_used_and_stays(server: HubServer, tmp_path: Path) -> None:
    """Even if it is not what is pinned: it may be another program's."""
    script = "import json, sys; from huggingface_hub import hf_hub_download; hf_hub_download(**json.loads(sys.argv[1]))"
    given = {"repo_id": HUB.repo, "filename": HUB.path, "repo_type": HUB.repo_type, "revision": HUB.revision}
    subprocess.run([sys.executable, "-c", script, json.dumps(given)], check=True)
    server.stop()
    path, sha256, _, _ = elsewhere()
    assert tmp_path / "hf" in path.parents
    assert sha256 == SHA256
    assert download.clear(HUB) == []
    path.resolve().write_bytes(DATA[:-1] + b"?")
    assert f"delete {path}" in refused(HUB, elsewhere)
    assert path.exists()


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        (Faults(flip=True), "is damaged"),
        (Faults(commit="f" * 40), "is not what was pinned"),
        (Faults(commit=""), "is not what was pinned"),
        (Faults(status=404, error_code="RevisionNotFound"), r"is gone \(404\): look for a newer clapsep"),
        (Faults(status=401, error_code="GatedRepo"), r"is refused \(401\)"),
    ],
)
def test_what_the_hub_must_not_do(server: HubServer, faults: Faults, expected: str) -> None:
    server.faults = faults
    with pytest.raises(DownloadError, match=expected):
        elsewhere()
    assert "SHA256SUMS" not in left()


def test_another_size_is_known_before_the_first_byte(server: HubServer) -> None:
    assert "is not what was pinned" in refused(replace(HUB, size=7), elsewhere)
    assert server.gets() == []


def test_offline() -> None:
    with pytest.raises(DownloadError, match=r"HF_HUB_OFFLINE is set, and folder/a b\.bin of the space"):
        elsewhere(HF_HUB_OFFLINE="1")
    with pytest.raises(DownloadError, match=r"HF_HUB_OFFLINE is set, and model\.pth at files\.example"):
        elsewhere(WEB, HF_HUB_OFFLINE="1")


def test_no_network_names_the_way_out(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.stop()
    monkeypatch.setitem(MODELS, "one", replace(MODELS["tuss-medium"], name="one", remotes=(WEB,)))
    said = refused()
    assert said.startswith("model.pth at files.example could not be downloaded (ConnectError")
    assert said.endswith(
        f"or fetch https://files.example{PATH} elsewhere, carry it here and run: "
        "clapsep models convert one --from model.pth"
    )
    assert "check the network" in refused(HUB, elsewhere)


@pytest.mark.parametrize(
    ("faults", "requests"),
    [
        (Faults(busy=2), 3),
        (Faults(cut_after=100_000, cuts=1), 2),
        (Faults(cut_after=100_000, cuts=1, reset=True), 2),
        (Faults(unsized=True, gzips=True), 1),
    ],
)
def test_what_passes_is_tried_again(server: HubServer, faults: Faults, requests: int) -> None:
    server.faults = faults
    assert download.fetch(WEB).path.read_bytes() == DATA
    assert len(server.gets()) == requests


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        (Faults(flip=True), "is damaged: .*it was deleted, run the command again"),
        (Faults(short_by=10), "the connection ended after 199990 of 200000 bytes"),
        (Faults(cut_after=1000), "could not be downloaded"),
        (Faults(status=404), "is gone"),
        (Faults(status=403), "is refused"),
        (Faults(busy=9), "cannot be served now"),
    ],
)
def test_what_does_not_pass(server: HubServer, faults: Faults, expected: str) -> None:
    server.faults = faults
    with pytest.raises(DownloadError, match=expected):
        download.fetch(WEB)
    assert "SHA256SUMS" not in left()
    server.faults = Faults()
    assert download.fetch(WEB).path.read_bytes() == DATA


def test_a_body_that_does_not_end_is_stopped(server: HubServer) -> None:
    server.faults = Faults(unsized=True)
    assert "longer than the 150000 bytes" in refused(replace(WEB, size=150_000))


def test_no_room(monkeypatch: pytest.MonkeyPatch, server: HubServer) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "set CLAPSEP_HOME to another; model.pth at files.example takes 0.2 MB" in refused()
    assert server.gets() == []


def test_a_home_that_cannot_be_written() -> None:
    home().write_text("in the way")
    assert f"cannot write to {home()}" in refused()
    with pytest.raises(DownloadError, match="cannot write"), download.lock("one"):
        pass


def test_an_interrupted_download_is_not_taken_for_whole(server: HubServer) -> None:
    server.faults = Faults(hold_at=100_000)
    process = start(WEB)
    while not left():
        time.sleep(0.05)
    process.kill()
    process.communicate()
    server.faults.release.set()
    server.faults = Faults()
    assert not download.find(WEB)
    assert download.fetch(WEB).path.read_bytes() == DATA


def test_two_processes_download_once(server: HubServer) -> None:
    both = [start(WEB), start(WEB)]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len(server.gets()) == 1


def test_a_lock_waits_and_says_so() -> None:
    said: list[str] = []
    holder = (
        "import time; from clapsep_cli.store.download import lock\nwith lock('x'): print(flush=True); time.sleep(.5)"
    )
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.readline()
    with download.lock("x", said.append):
        assert said == ["waiting for another clapsep process that installs x"]
    process.communicate()


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"CLAPSEP_HOME": "/somewhere"}, "/somewhere"),
        ("linux", {"XDG_CACHE_HOME": "/cache"}, "/cache/clapsep"),
        ("linux", {}, "~/.cache/clapsep"),
        ("darwin", {}, "~/Library/Caches/clapsep"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/clapsep"),
    ],
)
def test_home(platform: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CLAPSEP_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert home() == Path(expected).expanduser()

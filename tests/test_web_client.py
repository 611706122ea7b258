"""Files at plain addresses, by the real client from a server on the loopback that fails on demand."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from hub_server import Faults, HubServer
from huggingface_hub import constants

from clapsep_cli.errors import DownloadError
from clapsep_cli.registry import MODELS, WebFile
from clapsep_cli.store import hub, transfer, web_client

DATA = random.Random(6).randbytes(200_000)
OTHER = random.Random(7).randbytes(len(DATA))  # of the same size
PATH = "/media/owner/name/0123456/model.pth"
REMOTE = WebFile(url=f"https://files.example{PATH}", size=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())
WHERE = "model.pth at files.example"
FETCH = """
import json, sys
from clapsep_cli.store import hub
from clapsep_cli.registry import WebFile

def progress(done, total):
    print(done, flush=True)

fetched = hub.fetch(WebFile(**json.loads(sys.argv[1])), progress)
print(json.dumps([str(fetched.path), fetched.downloaded]))
"""


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_plain(PATH, DATA)
        yield server
        server.faults.release.set()


@pytest.fixture(autouse=True)
def folder(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the file goes, in an empty home; its host is played by the server."""
    monkeypatch.setenv("CLAPSEP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CLAPSEP_ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transfer, "BACKOFF_S", (0.0, 0.0, 0.0))
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    return tmp_path / "home" / "downloads" / REMOTE.sha256[:12]


def refused(remote: WebFile = REMOTE, call: Callable[[WebFile], object] = hub.fetch) -> str:
    with pytest.raises(DownloadError) as caught:
        call(remote)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def interrupt(server: HubServer, at: int = 100_000) -> None:
    """Leave the first `at` bytes, as a connection that is cut for good does."""
    server.faults = Faults(cut_after=at)
    refused()
    server.faults = Faults()
    server.requests.clear()


def ranges(server: HubServer) -> list[str]:
    return [request.range for request in server.gets()]


def test_downloads_checks_and_records(server: HubServer, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int]] = []
    assert hub.to_download(REMOTE) == len(DATA)
    assert server.gets() == []
    fetched = hub.fetch(REMOTE, lambda done, total: seen.append((done, total)))
    assert fetched == hub.Fetched(folder / "model.pth", len(DATA), REMOTE.sha256, "pinned by clapsep", downloaded=True)
    assert fetched.path.read_bytes() == DATA
    assert names(folder) == {"model.pth"}
    assert {total for _, total in seen} == {len(DATA)}
    assert sorted(seen) == seen
    assert seen[-1][0] == len(DATA)
    (record,) = [json.loads(path.read_text()) for path in (hub.home() / "accepted").iterdir()]
    assert {key: record[key] for key in ("url", "size", "sha256", "source")} == {
        "url": REMOTE.url,
        "size": len(DATA),
        "sha256": REMOTE.sha256,
        "source": "pinned by clapsep",
    }
    server.stop()
    assert hub.to_download(REMOTE) == 0
    assert hub.fetch(REMOTE) == fetched
    assert hub.verify(REMOTE) == fetched
    assert capfd.readouterr() == ("", "")


def test_what_arrived_is_hashed_on_the_way(server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(server)
    monkeypatch.setattr(hub, "digest", lambda _: pytest.fail("read again"))
    assert hub.fetch(REMOTE).path.read_bytes() == DATA


def test_cut_connection_resumes_where_it_broke(server: HubServer, folder: Path) -> None:
    server.faults = Faults(cut_after=100_000, cuts=1)
    seen: list[int] = []
    assert hub.fetch(REMOTE, lambda done, _: seen.append(done)).path.read_bytes() == DATA
    etag = f'"{REMOTE.sha256[:8]}"'
    asked = [(request.range, request.if_range) for request in server.gets()]
    assert asked == [("", ""), ("bytes=100000-", etag)]
    assert sorted(seen) == seen
    assert names(folder) == {"model.pth"}


def test_reset_connection_is_tried_again(server: HubServer) -> None:
    server.faults = Faults(cut_after=100_000, cuts=1, reset=True)
    assert hub.fetch(REMOTE).path.read_bytes() == DATA
    assert len(server.gets()) == 2


def test_the_next_command_goes_on_where_the_last_one_gave_up(server: HubServer, folder: Path) -> None:
    server.faults = Faults(cut_after=100_000)
    message = refused()
    assert message.startswith(f"{WHERE}, asked of {server.url} (CLAPSEP_ENDPOINT), could not be downloaded (")
    assert f"check the network and try again, or fetch {REMOTE.url} elsewhere" in message
    assert "clapsep models convert NAME --from model.pth" in message
    assert ranges(server) == ["", *["bytes=100000-"] * 3]
    assert (folder / "model.pth.partial").read_bytes() == DATA[:100_000]
    assert list(hub.home().glob("accepted/*")) == []
    server.faults = Faults()
    server.requests.clear()
    assert hub.fetch(REMOTE).path.read_bytes() == DATA
    assert ranges(server) == ["bytes=100000-"]


@pytest.mark.parametrize("etag", ["", 'W/"weak"', '"ä"'])
def test_resumes_without_an_etag_that_vouches(server: HubServer, etag: str) -> None:
    server.add_plain(PATH, DATA, etag)
    interrupt(server)
    assert hub.fetch(REMOTE).path.read_bytes() == DATA
    assert [(request.range, request.if_range) for request in server.gets()] == [("bytes=100000-", "")]


def test_server_without_ranges_sends_all_again(server: HubServer, folder: Path) -> None:
    interrupt(server)
    server.faults = Faults(rangeless=True)
    assert hub.fetch(REMOTE).path.read_bytes() == DATA
    assert ranges(server) == ["bytes=100000-"]


def test_answer_with_another_range_than_asked_for(server: HubServer) -> None:
    interrupt(server)
    server.faults = Faults(misplaced=True)
    assert hub.fetch(REMOTE).path.read_bytes() == DATA
    assert ranges(server) == ["bytes=100000-", ""]


def test_more_than_there_is_begins_anew(server: HubServer, folder: Path) -> None:
    interrupt(server)
    (folder / "model.pth.partial").write_bytes(bytes(len(DATA) + 5))
    assert hub.fetch(REMOTE).path.read_bytes() == DATA
    assert ranges(server) == [f"bytes={len(DATA) + 5}-", ""]  # the first one got a 416


def test_file_that_changed_meanwhile_is_never_mixed(server: HubServer, folder: Path) -> None:
    server.add_plain(PATH, OTHER)
    interrupt(server)
    server.add_plain(PATH, DATA)  # repaired
    assert hub.fetch(REMOTE).path.read_bytes() == DATA
    assert ranges(server) == ["bytes=100000-"]


def test_file_that_changed_is_quarantined(server: HubServer, folder: Path) -> None:
    interrupt(server)
    server.add_plain(PATH, OTHER)
    message = refused()
    assert hashlib.sha256(OTHER).hexdigest() in message
    assert names(folder) == set()


def test_all_there_but_the_name_needs_no_network(server: HubServer, folder: Path) -> None:
    """The process was killed between the last byte and the renaming; only what the host has is asked for."""
    interrupt(server)
    (folder / "model.pth.partial").write_bytes(DATA)
    assert hub.fetch(REMOTE).path.read_bytes() == DATA
    assert server.gets() == []


@pytest.mark.parametrize("resumed", [False, True])
def test_flipped_byte_is_quarantined(server: HubServer, folder: Path, resumed: bool) -> None:
    if resumed:
        interrupt(server)
        damaged = bytearray(DATA[:100_000])
        damaged[5] ^= 1
        (folder / "model.pth.partial").write_bytes(damaged)
    else:
        server.faults = Faults(flip=True)
    message = refused()
    (kept,) = (hub.home() / "quarantine").iterdir()
    assert f"SHA-256 {REMOTE.sha256} (pinned by clapsep)" in message
    assert hashlib.sha256(kept.read_bytes()).hexdigest() in message
    assert f"moved to {kept}" in message
    assert names(folder) == set()
    server.faults = Faults()
    assert hub.fetch(REMOTE).path.read_bytes() == DATA


@pytest.mark.parametrize("unsized", [False, True])
def test_truncated_body(server: HubServer, folder: Path, unsized: bool) -> None:
    server.faults = Faults(cut_after=150_000, cuts=1, unsized=unsized)
    assert hub.fetch(REMOTE).path.read_bytes() == DATA
    assert ranges(server) == ["", "bytes=150000-"]


@pytest.mark.parametrize("data", [DATA[:-1000], DATA + b"more", b"version https://git-lfs.github.com/spec/v1\n"])
def test_file_of_another_size_is_not_downloaded(server: HubServer, folder: Path, data: bytes) -> None:
    server.add_plain(PATH, data)
    for call in (hub.to_download, hub.fetch):
        assert f"expected {len(DATA)} bytes, its host states {len(data)}; nothing was downloaded" in refused(call=call)
    assert server.gets() == []
    server.faults = Faults(headless=True)  # so it shows only as the body comes
    assert f"its host states {len(data)}" in refused()
    assert all(path.stat().st_size == 0 for path in folder.glob("*"))


def test_body_that_does_not_end_is_stopped(server: HubServer, folder: Path) -> None:
    server.add_plain(PATH, DATA * 5)
    server.faults = Faults(unsized=True)
    assert f"expected {len(DATA)} bytes, its host states more" in refused()
    assert (folder / "model.pth.partial").stat().st_size <= len(DATA)


@pytest.mark.parametrize("faults", [Faults(headless=True), Faults(gzips=True), Faults(unsized=True)])
def test_hosts_of_other_habits(server: HubServer, faults: Faults) -> None:
    server.faults = faults
    assert hub.to_download(REMOTE) == len(DATA)
    assert hub.fetch(REMOTE).path.read_bytes() == DATA


@pytest.mark.parametrize(
    ("status", "expected", "requests"),
    [
        (404, "is gone (404): look for a newer clapsep", 1),
        (410, "is gone (410)", 1),
        (401, "is refused (401): check the proxy", 1),
        (403, "is refused (403)", 1),
        (429, "cannot be served now (status 429): try again in 60 s", 4),
        (500, "cannot be served now (status 500)", 4),
        (503, "cannot be served now (status 503)", 4),
        (418, "cannot be served now (status 418)", 1),
    ],
)
def test_refusals(server: HubServer, folder: Path, status: int, expected: str, requests: int) -> None:
    server.faults = Faults(status=status, retry_after="60")
    message = refused()
    assert expected in message
    assert message.startswith(WHERE)
    assert len(server.requests) == requests
    assert names(folder) == set()


@pytest.mark.parametrize("faults", [Faults(busy=3), Faults(busy_gets=3)])
def test_busy_host_is_asked_again(server: HubServer, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(transfer, "BACKOFF_S", (1.0, 2.0, 4.0))
    monkeypatch.setattr(transfer, "time", SimpleNamespace(sleep=pauses.append))
    server.faults = faults
    assert hub.fetch(REMOTE).path.read_bytes() == DATA
    assert pauses == [1.0, 2.0, 4.0]


def test_silent_host_times_out(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_client, "TIMEOUT_S", 0.02)
    server.faults = Faults(silent=0.1)
    assert "ReadTimeout" in refused()
    assert len(server.requests) == 4


def test_no_network_names_the_way_out(server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.stop()
    never = SimpleNamespace(sleep=lambda _: pytest.fail("waits for what is not there"))
    monkeypatch.setattr(transfer, "time", never)
    monkeypatch.setitem(MODELS, "web", replace(MODELS["clapsep"], name="web", remotes=(REMOTE,)))
    message = refused()
    assert "could not be downloaded (ConnectError" in message
    assert message.endswith("carry it here and run: clapsep models convert web --from model.pth")
    assert names(folder) == set()


@pytest.mark.parametrize("endpoint", ["files.example", "ftp://files.example", "http://[", "http://files.example:port"])
def test_endpoint_that_is_none(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLAPSEP_ENDPOINT", endpoint)
    assert f"{WHERE}, asked of {endpoint} (CLAPSEP_ENDPOINT), could not be downloaded" in refused()


def test_offline(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for call in (hub.to_download, hub.fetch):
        message = refused(call=call)
        assert f"HF_HUB_OFFLINE is set, and {WHERE} was not downloaded before: unset it" in message
        assert "clapsep models convert NAME --from model.pth" in message
    assert server.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.fetch(REMOTE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch(REMOTE).path.read_bytes() == DATA


def test_endpoint_may_have_a_path(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add_plain(f"/mirrors/one{PATH}", DATA)
    monkeypatch.setenv("CLAPSEP_ENDPOINT", f"{server.url}/mirrors/one/")
    hub.fetch(REMOTE)
    assert {request.path for request in server.requests} == {f"/mirrors/one{PATH}"}


def test_proxies_are_used(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLAPSEP_ENDPOINT", "http://files.example")
    monkeypatch.setenv("HTTP_PROXY", server.url)
    assert hub.fetch(REMOTE).path.read_bytes() == DATA
    assert {request.path for request in server.requests} == {f"http://files.example{PATH}"}


def test_redirects_are_followed_and_resumed(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer() as front:
        front.add_plain(PATH, DATA)
        front.faults = Faults(location=f"{server.url}{PATH}")
        monkeypatch.setenv("CLAPSEP_ENDPOINT", front.url)
        server.faults = Faults(cut_after=100_000, cuts=1)
        assert hub.fetch(REMOTE).path.read_bytes() == DATA
        assert ranges(server) == ["", "bytes=100000-"]
        front.faults = Faults(location=f"{front.url}{PATH}")
        assert "TooManyRedirects" in refused(replace(REMOTE, sha256="0" * 64))


def test_redirects_never_leave_encryption(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLAPSEP_ENDPOINT")
    asked: list[str] = []

    def answer(_: object, request: httpx2.Request) -> httpx2.Response:
        asked.append(str(request.url))
        onward = {"files.example": "https://other.example/x?y=1", "other.example": "http://login.example/page"}
        return httpx2.Response(302, headers={"Location": onward[request.url.host]})

    monkeypatch.setattr(httpx2.HTTPTransport, "handle_request", answer)
    message = refused()
    assert "other.example leads on to http://login.example, without encryption, which is refused" in message
    assert asked == [REMOTE.url, "https://other.example/x?y=1"]
    assert names(folder) == set()


def test_full_disk(server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(server)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=99_999))
        assert f"no space for {WHERE} (0.2 MB) in {folder}: free some, or set CLAPSEP_HOME" in refused()
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100_000))
        assert server.gets() == []
        assert hub.fetch(REMOTE).path.read_bytes() == DATA  # enough for what is lacking


def test_disk_that_runs_full(server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    class Full:
        """A file on a disk that has room for 150 000 bytes more."""

        def __init__(self, path: Path, mode: str) -> None:
            self.file, self.room = opened(path, mode), 150_000

        def write(self, data: bytes) -> None:
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.file.write(data)

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode="r", **_: Full(path, mode))
        assert "no space for" in refused()
    arrived = (folder / "model.pth.partial").read_bytes()
    assert 0 < len(arrived) <= 150_000
    assert arrived == DATA[: len(arrived)]
    assert hub.fetch(REMOTE).path.read_bytes() == DATA
    assert ranges(server)[-1] == f"bytes={len(arrived)}-"


def test_folder_that_cannot_be_written(server: HubServer, folder: Path) -> None:
    folder.parent.parent.mkdir()
    folder.parent.write_text("a file where a folder should be")
    assert f"cannot keep {WHERE} in {folder} (Not a directory): make that folder writable" in refused()
    assert "CLAPSEP_HOME" in refused()


def test_symlinked_home(server: HubServer, tmp_path: Path) -> None:
    elsewhere = tmp_path / "big-disk"
    elsewhere.mkdir()
    (tmp_path / "home").symlink_to(elsewhere, target_is_directory=True)
    fetched = hub.fetch(REMOTE)
    assert fetched.path.resolve().is_relative_to(elsewhere)
    hub.discard(fetched)
    assert not fetched.path.exists()


@pytest.mark.parametrize("recorded", [True, False])
def test_clear_leaves_nothing(server: HubServer, folder: Path, recorded: bool) -> None:
    assert hub.clear(REMOTE) == []
    interrupt(server)
    assert {path.name for path in hub.clear(REMOTE)} == {"model.pth.partial", "model.pth.etag"}
    server.faults = Faults(flip=True)
    refused()
    server.faults = Faults()
    path = hub.fetch(REMOTE).path
    if not recorded:
        for record in (hub.home() / "accepted").iterdir():
            record.unlink()
    (kept,) = (hub.home() / "quarantine").iterdir()
    assert hub.clear(REMOTE) == [path, kept]
    assert names(folder) == set()
    assert hub.verify(REMOTE) is None


def start(server: HubServer, home: Path) -> subprocess.Popen[str]:
    """A fresh process that fetches the file, and prints how far it is; all unpatched."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
    env = kept | {"CLAPSEP_HOME": str(home), "CLAPSEP_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", FETCH, json.dumps(asdict(REMOTE))]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_stopped_is_taken_over(server: HubServer, folder: Path, tmp_path: Path, by: int) -> None:
    server.faults = Faults(hold_at=98_304)
    with start(server, tmp_path / "home") as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 98_304:
            pass
        process.send_signal(by)
        process.communicate(timeout=20)
    assert process.returncode != 0
    server.faults.release.set()
    assert names(folder) == {"model.pth.partial", "model.pth.etag"}
    server.faults = Faults()
    server.requests.clear()
    assert hub.fetch(REMOTE).path.read_bytes() == DATA
    assert ranges(server) == ["bytes=98304-"]
    assert names(folder) == {"model.pth"}


def test_two_processes_download_once(server: HubServer, tmp_path: Path) -> None:
    server.faults = Faults(slow=0.2)
    both = [start(server, tmp_path / "home") for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [(process.returncode, error) for process, (_, error) in zip(both, outputs, strict=True)] == [(0, "")] * 2
    results = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
    assert results[0] == results[1]
    assert len(server.gets()) == 1

"""Downloads, by the real client from a Hub on the loopback that fails on demand."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import logging.handlers
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.file_download as client
import pytest
from hub_server import Faults, HubServer
from huggingface_hub import constants

from clapsep_cli.errors import DownloadError
from clapsep_cli.registry import MODELS, HubFile, Remote
from clapsep_cli.store import hub, hub_client, transfer

DATA = random.Random(5).randbytes(200_000)
REVISION = "0123456789abcdef0123456789abcdef01234567"
SHA256 = hashlib.sha256(DATA).hexdigest()
REMOTE = HubFile(
    repo="owner/name", repo_type="model", revision=REVISION, path="folder/file.bin", size=len(DATA), sha256=SHA256
)
OTHER_SHA256 = "4c5e" + "0" * 60
DISPUTED = replace(REMOTE, sha256=OTHER_SHA256, disputed=True)  # what clapsep pins is not what the Hub has
FETCH = """
import json, sys
from clapsep_cli.store import hub
from clapsep_cli.registry import HubFile
early = {"huggingface_hub", "httpx2", "filelock", "torch", "numpy"} & set(sys.modules)
assert not early, "imports before they are needed"
seen = []
fetched = hub.fetch(HubFile(**json.loads(sys.argv[1])), lambda done, total: seen.append(done))
print(json.dumps([str(fetched.path), fetched.sha256, seen]))
"""


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_file(REMOTE.repo, REMOTE.repo_type, REVISION, REMOTE.path, DATA)
        yield server


@pytest.fixture
def cache(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The client's cache, empty. The client reads its environment when imported, so its constants are set instead."""
    cache = tmp_path / "hf" / "hub"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    for module in (constants, client):
        monkeypatch.setattr(
            module,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            server.url + "/{repo_id}/resolve/{revision}/{filename}",
            raising=False,
        )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 16 * 1024)  # what a cut connection may lose of it
    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr(transfer, "BACKOFF_S", (0.0, 0.0, 0.0))
    monkeypatch.setenv("CLAPSEP_HOME", str(tmp_path / "home"))
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name == "HF_TOKEN"]:
        monkeypatch.delenv(name)
    yield cache
    huggingface_hub.close_session()


def refused(remote: Remote = REMOTE, call: Callable[[Remote], object] = hub.fetch) -> str:
    with pytest.raises(DownloadError) as caught:
        call(remote)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def held(cache: Path) -> list[bytes]:
    """All contents in the cache, under whatever name; locks and tags aside."""
    files = [path for path in cache.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path.read_bytes() for path in files if path.suffix not in (".lock", ".TAG") and path.name != ".gitignore"]


def records() -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in (hub.home() / "accepted").glob("*.json")]


def damage(path: Path) -> None:
    """Flip a byte, as a disk would: size and time stay."""
    before = path.stat()
    with path.resolve().open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("repo_type", ["model", "space"])
@pytest.mark.parametrize("redirect", [False, True])
def test_downloads_checks_and_records(
    server: HubServer, cache: Path, capfd: pytest.CaptureFixture[str], repo_type: str, redirect: bool
) -> None:
    server.redirect = redirect
    server.add_file("owner/other", repo_type, REVISION, "deep/a b.bin", DATA)
    remote = replace(REMOTE, repo="owner/other", repo_type=repo_type, path="deep/a b.bin")
    seen: list[tuple[int, int]] = []
    fetched = hub.fetch(remote, lambda done, total: seen.append((done, total)))
    assert fetched == hub.Fetched(fetched.path, len(DATA), SHA256, "pinned by clapsep", downloaded=True)
    assert fetched.path.read_bytes() == DATA
    assert cache in fetched.path.parents
    assert [total for _, total in seen] == [len(DATA)] * len(seen)
    assert sorted(seen) == seen
    assert seen[-1] == (len(DATA), len(DATA))
    assert len(seen) > 5
    (record,) = records()
    expected = {"repo": "owner/other", "revision": REVISION, "path": "deep/a b.bin", "size": len(DATA)}
    assert {key: record[key] for key in expected} == expected
    assert (record["sha256"], record["source"]) == (SHA256, "pinned by clapsep")
    assert capfd.readouterr() == ("", "")


def test_what_is_to_be_downloaded_is_known_before(server: HubServer, cache: Path) -> None:
    assert hub.to_download(REMOTE) == REMOTE.size
    assert held(cache) == []
    assert "gone" in refused(replace(REMOTE, path="none.bin"), hub.to_download)
    hub.fetch(REMOTE)
    assert hub.to_download(REMOTE) == 0


def test_second_time_needs_neither_server_nor_hashing(
    server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hub.fetch(REMOTE)
    server.stop()
    monkeypatch.setattr(hub, "digest", lambda _: pytest.fail("hashed again"))
    monkeypatch.setattr(hub_client, "cached", lambda _: pytest.fail("client asked again"))
    assert hub.fetch(REMOTE) == first


def test_what_another_process_checked_meanwhile_is_not_hashed_again(
    server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def contended(*_: object) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(hub, "lock", lambda *_: nullcontext())
            hub.fetch(REMOTE)
        monkeypatch.setattr(hub, "digest", lambda _: pytest.fail("hashed again"))
        yield

    monkeypatch.setattr(hub, "lock", contended)
    assert hub.fetch(REMOTE).downloaded
    assert len(server.gets()) == 1


def test_truncated_file_is_not_even_hashed(server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hub.fetch(REMOTE).path
    os.truncate(path, 1000)
    monkeypatch.setattr(hub, "digest", lambda _: pytest.fail("hashed"))
    assert "got 1000 bytes; it was moved" in refused()
    assert held(cache) == []


def test_touched_file_is_hashed_again_without_network(server: HubServer, cache: Path) -> None:
    path = hub.fetch(REMOTE).path
    server.stop()
    os.utime(path, ns=(1, 1))
    assert not hub.fetch(REMOTE).downloaded  # it may be another program's by now
    damage(path)
    os.utime(path, ns=(2, 2))
    assert "damaged" in refused()
    assert held(cache) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"repo": 1}', '{"sha256": 1, "source": "", "file": ""}'])
def test_broken_record_counts_as_none(server: HubServer, cache: Path, content: str) -> None:
    path = hub.fetch(REMOTE).path
    (record,) = (hub.home() / "accepted").iterdir()
    whole = record.read_text()
    record.write_text(content)
    server.stop()
    assert hub.fetch(REMOTE).path == path
    assert json.loads(record.read_text()) == json.loads(whole) | {"downloaded": False}


def test_verify_always_hashes(server: HubServer, cache: Path) -> None:
    assert hub.verify(REMOTE) is None
    path = hub.fetch(REMOTE).path
    assert hub.verify(REMOTE) == hub.fetch(REMOTE)
    damage(path)
    assert hub.fetch(REMOTE).path == path  # nothing shows without hashing
    assert "damaged" in refused(call=hub.verify)
    assert held(cache) == []
    assert records() == []
    assert hub.verify(REMOTE) is None
    assert hub.fetch(REMOTE).path.read_bytes() == DATA


def test_offline(server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refused()
    assert "HF_HUB_OFFLINE is set" in message
    assert "clapsep models convert NAME --from file.bin" in message
    assert server.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.hf_hub_download(REMOTE.repo, REMOTE.path, revision=REVISION)  # by another program
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fetched = hub.fetch(REMOTE)
    assert fetched.path.read_bytes() == DATA
    assert not fetched.downloaded


def test_no_network_names_the_way_out(server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.stop()
    never = SimpleNamespace(sleep=lambda _: pytest.fail("waits for what is not there"))
    monkeypatch.setattr(transfer, "time", never)
    message = refused(MODELS["clapsep"].remotes[0])
    assert f"could not be downloaded from {server.url} (ConnectError" in message
    assert "clapsep models convert clapsep --from music_audioset_epoch_15_esc_90.14.pt best_model.ckpt" in message
    address = "https://huggingface.co/lukewys/laion_clap/resolve/b3708341862f581175dba5c356a4ebf74a9b6651"
    assert f"or fetch {address}/music_audioset_epoch_15_esc_90.14.pt elsewhere" in message


@pytest.mark.parametrize("redirect", [False, True])
def test_cut_connection_resumes_where_it_broke(server: HubServer, cache: Path, redirect: bool) -> None:
    server.redirect = redirect
    server.faults = Faults(cut_after=100_000, cuts=1)
    seen: list[int] = []
    assert hub.fetch(REMOTE, lambda done, _: seen.append(done)).path.read_bytes() == DATA
    whole_chunks = 100_000 // constants.DOWNLOAD_CHUNK_SIZE * constants.DOWNLOAD_CHUNK_SIZE
    assert [request.range for request in server.gets()] == ["", f"bytes={whole_chunks}-"]
    assert sorted(seen) == seen
    assert seen[-1] == len(DATA)


def test_the_clients_warnings_are_kept_off_the_terminal(server: HubServer, cache: Path) -> None:
    logger, heard = logging.getLogger("huggingface_hub"), logging.handlers.BufferingHandler(100)
    logger.addHandler(heard)
    try:
        server.faults = Faults(cut_after=100_000, cuts=1)
        hub.fetch(REMOTE)
        assert heard.buffer == []
        logger.warning("of another program")
        assert len(heard.buffer) == 1
    finally:
        logger.removeHandler(heard)


def test_reset_connection_starts_again(server: HubServer, cache: Path) -> None:
    server.faults = Faults(cut_after=100_000, cuts=1, reset=True)
    assert hub.fetch(REMOTE).path.read_bytes() == DATA
    assert len(server.gets()) == 2


@pytest.mark.parametrize("faults", [Faults(cut_after=100_000), Faults(short_by=1000), Faults(cut_after=0, reset=True)])
def test_body_that_never_arrives_whole_leaves_nothing(server: HubServer, cache: Path, faults: Faults) -> None:
    server.faults = faults
    assert "check the network and try again" in refused()
    assert held(cache) == []
    assert records() == []
    server.faults = Faults()
    assert hub.fetch(REMOTE).path.read_bytes() == DATA


@pytest.mark.parametrize("symlinks", [True, False])
def test_flipped_byte_is_quarantined(
    server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch, symlinks: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", not symlinks)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS_WARNING", True)
    monkeypatch.setattr(client, "_are_symlinks_supported_in_dir", {})
    server.faults = Faults(flip=True)
    message = refused()
    (kept,) = (hub.home() / "quarantine").iterdir()
    assert f"SHA-256 {SHA256} (pinned by clapsep)" in message
    assert hashlib.sha256(kept.read_bytes()).hexdigest() in message
    assert f"moved to {kept}" in message
    assert held(cache) == []
    assert not any(path.is_symlink() for path in cache.rglob("*"))
    assert records() == []
    server.faults = Faults()
    assert hub.fetch(REMOTE).path.read_bytes() == DATA


def test_damaged_file_that_cannot_be_moved_is_deleted(server: HubServer, cache: Path) -> None:
    hub.home().mkdir()
    (hub.home() / "quarantine").write_text("a file where a folder should be")
    server.faults = Faults(flip=True)
    assert "it was deleted" in refused()
    assert held(cache) == []


def test_damaged_file_that_cannot_be_removed_is_never_believed(
    server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stays(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    damage(hub.fetch(REMOTE).path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stays)
        unlink = Path.unlink
        patch.setattr(Path, "unlink", lambda p, **k: unlink(p, **k) if hub.home() in p.parents else stays())
        assert "delete" in refused(call=hub.verify)
        assert "damaged" in refused()  # the record of it is gone
    assert "moved" in refused()


def test_disputed_hash_is_decided_by_the_hub_and_recorded(
    server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hub.fetch(DISPUTED).sha256 == SHA256
    (record,) = records()
    assert (record["sha256"], record["pinned_sha256"]) == (SHA256, OTHER_SHA256)
    assert record["source"] == f"stated by {server.url} for the pinned revision"
    server.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch(DISPUTED).sha256 == SHA256
    assert hub.verify(DISPUTED).sha256 == SHA256


def test_disputed_file_must_be_what_the_hub_states(server: HubServer, cache: Path) -> None:
    server.faults = Faults(flip=True)
    assert "stated by" in refused(DISPUTED)
    assert held(cache) == []
    assert records() == []


def test_disputed_file_of_the_cache_needs_the_hubs_word(
    server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface_hub.hf_hub_download(REMOTE.repo, REMOTE.path, revision=REVISION)  # by another program
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(DISPUTED)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert hub.fetch(DISPUTED).sha256 == SHA256
    assert len(server.gets()) == 1


def test_disputed_file_without_the_hubs_word_is_refused(server: HubServer, cache: Path) -> None:
    server.add_file(REMOTE.repo, REMOTE.repo_type, REVISION, REMOTE.path, DATA, lfs=False)
    assert "no SHA-256 is stated" in refused(DISPUTED)
    assert server.gets() == []
    assert hub.fetch(REMOTE).sha256 == SHA256  # an undisputed one does not need it


def test_what_was_accepted_of_a_disputed_file_stays(server: HubServer, cache: Path) -> None:
    hub.discard(hub.fetch(DISPUTED))
    server.faults = Faults(stated="f" * 64)
    message = refused(DISPUTED)
    assert SHA256 in message
    assert "f" * 64 in message
    server.faults = Faults()
    assert hub.fetch(DISPUTED).sha256 == SHA256


@pytest.mark.parametrize(
    ("remote", "faults", "expected"),
    [
        (replace(REMOTE, sha256=OTHER_SHA256), Faults(), f"expected SHA-256 {OTHER_SHA256} (pinned by clapsep)"),
        (replace(REMOTE, size=7), Faults(), f"expected 7 bytes, its host states {len(DATA)}"),
        (REMOTE, Faults(commit="f" * 40), f"expected revision {REVISION}, its host states {'f' * 40}"),
        (REMOTE, Faults(commit=""), "does not answer for folder/file.bin of the model owner/name as the Hub would"),
    ],
)
def test_another_file_than_pinned_is_not_downloaded(
    server: HubServer, cache: Path, remote: Remote, faults: Faults, expected: str
) -> None:
    server.faults = faults
    assert expected in refused(remote)
    assert server.gets() == []
    assert not cache.exists()


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        (Faults(status=404, error_code="RepoNotFound"), "the repository owner/name is gone from the Hub (404)"),
        (Faults(status=404, error_code="RevisionNotFound"), f"the pinned revision {REVISION} is gone from the Hub"),
        (Faults(status=404, error_code="EntryNotFound"), "the file is gone from the Hub (404)"),
        (Faults(status=401, error_code="RepoNotFound"), "private, gated or gone (401): log in with `hf auth login`"),
        (Faults(status=401), "private, gated or gone (401)"),
        (Faults(status=403, error_code="GatedRepo"), "private, gated or gone (403)"),
    ],
)
def test_refusals_are_final(server: HubServer, cache: Path, faults: Faults, expected: str) -> None:
    server.faults = faults
    message = refused()
    assert message.startswith("folder/file.bin of the model owner/name: ")
    assert expected in message
    assert len(server.requests) == 1


@pytest.mark.parametrize("faults", [Faults(busy=3), Faults(busy_gets=3)])
def test_busy_hub_is_asked_again(server: HubServer, cache: Path, faults: Faults) -> None:
    server.faults = faults
    assert hub.fetch(REMOTE).path.read_bytes() == DATA


def test_busy_hub_is_given_up(server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(transfer, "BACKOFF_S", (1.0, 2.0))
    monkeypatch.setattr(transfer, "time", SimpleNamespace(sleep=pauses.append))
    server.faults = Faults(busy=100)
    assert "cannot serve it now (status 503): try again later" in refused()
    assert (len(server.requests), pauses) == (3, [1.0, 2.0])


def test_silent_hub_times_out(server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.02)
    server.faults = Faults(silent=0.1)
    assert "ReadTimeout" in refused()
    assert len(server.requests) == 1 + len(transfer.BACKOFF_S)


def test_full_disk(server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=len(DATA) - 1))
        assert f"no space for folder/file.bin of the model owner/name (0.2 MB) in {cache}" in refused()
    assert server.gets() == []

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(client, "http_get", full)
        assert "no space for" in refused()
    assert held(cache) == []
    assert hub.fetch(REMOTE).path.read_bytes() == DATA


def test_cache_that_cannot_be_written(server: HubServer, cache: Path) -> None:
    cache.parent.write_text("a file where a folder should be")
    message = refused()
    assert f"in {cache} (Not a directory)" in message
    assert "HF_HOME" in message


def test_home_that_cannot_be_written(server: HubServer, cache: Path) -> None:
    hub.home().write_text("a file where a folder should be")
    assert f"cannot write to {hub.home()}" in refused()


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="cannot read"):
        hub.digest(tmp_path)


def test_symlinked_cache(server: HubServer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "big-disk" / "deeper"
    elsewhere.mkdir(parents=True)
    cache.parent.mkdir()
    cache.symlink_to(elsewhere, target_is_directory=True)
    server.faults = Faults(flip=True)
    assert "moved to" in refused()
    assert held(elsewhere) == []
    server.faults = Faults()
    fetched = hub.fetch(REMOTE)
    assert fetched.path.read_bytes() == DATA
    assert held(elsewhere) == [DATA]
    hub.discard(fetched)
    assert held(elsewhere) == []


def test_discard_leaves_what_others_downloaded(server: HubServer, cache: Path) -> None:
    huggingface_hub.hf_hub_download(REMOTE.repo, REMOTE.path, revision=REVISION)
    hub.discard(hub.fetch(REMOTE))
    assert held(cache) == [DATA]
    later = replace(REMOTE, revision=REVISION[::-1])  # has the same file, so the client only links it
    server.add_file(later.repo, later.repo_type, later.revision, later.path, DATA)
    hub.discard(hub.fetch(later))
    assert held(cache) == [DATA]
    assert len(server.gets()) == 1


def test_two_processes_download_once(server: HubServer, tmp_path: Path) -> None:
    """Fresh processes with the variables that users set, all unpatched."""
    server.faults = Faults(slow=0.2)
    kept = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
    env = kept | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "hf"),
        "CLAPSEP_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN"):
        env.pop(name, None)
    pinned = json.dumps(asdict(REMOTE))
    command = [sys.executable, "-c", FETCH, pinned]
    both = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [(process.returncode, error) for process, (_, error) in zip(both, outputs, strict=True)] == [(0, "")] * 2
    (path, sha256, seen), (path2, sha256_2, seen2) = (json.loads(output) for output, _ in outputs)
    assert (path, sha256) == (path2, sha256_2)
    assert Path(path).is_relative_to(tmp_path / "hf" / "hub")
    assert sha256 == SHA256
    assert sorted(done for done in (seen or [0])[-1:] + (seen2 or [0])[-1:]) == [0, len(DATA)]  # one of them worked
    assert len(server.gets()) == 1
    server.requests.clear()
    server.asides.clear()
    for record in (tmp_path / "home" / "accepted").iterdir():
        record.unlink()
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)  # finds the file, and hashes it
    assert (server.requests, server.asides) == ([], [])


def test_clear_takes_what_is_ours(server: HubServer, cache: Path, tmp_path: Path) -> None:
    """Of a process that was killed, of a damaged download, of one that was kept; not what others downloaded."""
    assert hub.clear(REMOTE) == []
    server.faults = Faults(hold_at=100_000)
    env = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(cache.parent), "HF_HUB_OFFLINE": "0"}
    with subprocess.Popen([sys.executable, "-c", FETCH, json.dumps(asdict(REMOTE))], env=env) as killed:
        deadline = time.monotonic() + 30
        while not hub_client.leftovers(REMOTE) and time.monotonic() < deadline:
            time.sleep(0.01)
        killed.kill()
    server.faults.release.set()
    other = next(cache.rglob("*.incomplete")).with_name(f"{OTHER_SHA256}.0123abcd.incomplete")
    other.touch()
    (left,) = hub.clear(REMOTE)
    assert left.name.startswith(SHA256)
    assert held(cache) == [b""]
    assert hub.clear(DISPUTED) == [other]
    server.faults = Faults(flip=True)
    refused()
    server.faults = Faults()
    path = hub.fetch(REMOTE).path
    assert hub.clear(REMOTE)[0] == path
    assert held(cache) == []
    assert not list((hub.home() / "quarantine").iterdir())
    huggingface_hub.hf_hub_download(REMOTE.repo, REMOTE.path, revision=REVISION)
    assert hub.clear(REMOTE) == []
    assert not hub.fetch(REMOTE).downloaded
    assert hub.clear(REMOTE) == []
    assert held(cache) == [DATA]


def test_lock_waits_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLAPSEP_HOME", str(tmp_path / "home"))
    locked, free = threading.Event(), threading.Event()
    order: list[str] = []

    def work() -> None:
        with hub.lock("clapsep"):
            locked.set()
            assert free.wait(10)
            order.append("first")

    def say(line: str) -> None:
        assert "waiting" in line
        assert "clapsep" in line
        free.set()

    other = threading.Thread(target=work)
    other.start()
    assert locked.wait(10)
    with hub.lock("another"):  # is not held up
        pass
    with hub.lock("clapsep", say):
        order.append("second")
    other.join()
    assert order == ["first", "second"]
    with pytest.raises(ValueError, match="of the body"), hub.lock("clapsep"):
        raise ValueError("of the body")
    with hub.lock("clapsep", lambda _: pytest.fail("still held")):
        pass


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"CLAPSEP_HOME": "/own"}, "/own"),
        ("linux", {"CLAPSEP_HOME": "~/own"}, "/me/own"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/clapsep"),
        ("linux", {}, "/me/.cache/clapsep"),
        ("darwin", {"XDG_CACHE_HOME": "/xdg"}, "/me/Library/Caches/clapsep"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/clapsep"),
        ("win32", {}, "/me/AppData/Local/clapsep"),
    ],
)
def test_home(platform: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    for name in ("CLAPSEP_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/me"} | variables).items():
        monkeypatch.setenv(name, value)
    assert hub.home() == Path(expected)

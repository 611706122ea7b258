"""Beyond one machine: shards, other workers on the same recordings, and object stores."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import soundfile
from conftest import Clapsep, Done, Stub
from hub_server import HubServer
from recordings import names, noise
from stand_ins import Moody

from clapsep_cli import Query
from clapsep_cli.jobs import exchange, planning, ray_engine, watch
from clapsep_cli.jobs import results as gathered
from clapsep_cli.jobs.batch import run
from clapsep_cli.jobs.inputs import Input, expand, in_shard
from clapsep_cli.jobs.job import Extraction, Failure, Options, Outcome, Skipped
from clapsep_cli.jobs.planning import lay_out, plan
from clapsep_cli.jobs.stores import Stage
from clapsep_cli.store import library

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
REMOTE = ["-r", "memory://lab/rec", "-o", "memory://lab/out", "--pos", "dog"]


@pytest.fixture
def stub(clapsep: Clapsep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """`clapsep extract` in `tmp_path`, with a model that takes no time."""
    model = Stub(Moody())
    monkeypatch.setattr(library, "load_model", lambda *_, **__: model)
    return lambda *arguments: clapsep("extract", *arguments, cwd=tmp_path)


@pytest.fixture
def memory() -> Iterator[Any]:
    """An empty store in memory."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    yield store
    store.store.clear()


@pytest.fixture
def recordings(tmp_path: Path, memory: Any) -> list[str]:
    """Recordings below `rec`, and the same in the store, with the same times of change."""
    listed = ["a.wav", "b.wav", "deep/c.wav", "deep/ä d.wav"]
    for seed, name in enumerate(listed):
        path = tmp_path / "rec" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, noise(9000, 2, seed=seed), 8000, "PCM_16")
        memory.put_file(str(path), f"/lab/rec/{name}")
        changed = memory.info(f"/lab/rec/{name}")["created"].replace(tzinfo=timezone.utc)
        os.utime(path, ns=(0, (changed - EPOCH) // timedelta(microseconds=1) * 1000))
    return listed


def stored(memory: Any, folder: str = "/lab/out") -> dict[str, bytes]:
    return {name.removeprefix(f"{folder}/"): memory.cat_file(name) for name in memory.find(folder)}


def markers(memory: Any) -> dict[str, dict[str, Any]]:
    return {name: json.loads(text) for name, text in stored(memory, "/lab/out/_clapsep").items()}


def statuses(done: Done) -> list[str]:
    return [json.loads(line)["status"] for line in done.stdout.splitlines()]


# Shards


def test_shards_share_out_all_recordings(stub: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for n in range(12):
        soundfile.write(tmp_path / "in" / ("deep" if n % 2 else "") / f"{n}.wav", noise(900, 1, seed=n), 8000)
    assert stub("-r", "in", "-o", "whole", "--pos", "dog").returncode == 0
    count = 0
    for k in range(3):
        done = stub("-r", "in", "-o", "out", "--pos", "dog", "--shard", f"{k}/3", "--json")
        assert done.returncode == 0
        count += len(done.stdout.splitlines())
    assert count == 12
    written = {name for name in names(tmp_path / "out") if not name.startswith("_clapsep")}
    assert written == set(names(tmp_path / "whole"))
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in written)
    again = stub("-r", "in", "-o", "out", "--pos", "dog", "--shard", "1/3", "--skip-existing", "--json")
    assert set(statuses(again)) == {"skipped"}


def test_a_shard_is_fixed_by_the_relative_name_alone() -> None:
    def shard(path: str, below: str) -> int:
        (k,) = [k for k in range(7) if in_shard(Input(Path(path), Path(below)), k, 7)]
        return k

    assert shard("/x/deep/a.wav", "deep/a.wav") == shard("/y/other/a.wav", "deep/a.wav") == 0
    assert shard("ä.wav", "a\u0308.wav") == shard("ä.wav", "\u00e4.wav")


def test_an_empty_shard_is_done_and_a_wrong_one_is_refused(stub: Callable[..., Done], tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(900, 1), 8000)
    codes = [stub("a.wav", "--pos", "dog", "--shard", f"{k}/4", "--overwrite").returncode for k in range(4)]
    assert codes == [0, 0, 0, 0]
    assert names(tmp_path).count("a.target.wav") == 1
    for wrong in ("4/4", "1", "-1/4", "1/0", "a/b"):
        refused = stub("a.wav", "--pos", "dog", f"--shard={wrong}")
        assert (refused.returncode, "--shard" in refused.stderr) == (2, True)


def test_two_outputs_of_one_name_are_found_across_shards(stub: Callable[..., Done], tmp_path: Path) -> None:
    for name in ("a.wav", "a.flac"):
        soundfile.write(tmp_path / name, noise(900, 1), 8000)
    for k in range(5):
        refused = stub("a.wav", "a.flac", "-o", "out", "--pos", "dog", "--shard", f"{k}/5")
        assert (refused.returncode, "would write it" in refused.stderr) == (1, True)


# Other workers on the same recordings


def worker(folder: Path, model: Stub, options: Options, meet: threading.Barrier | None = None) -> list[Outcome]:
    targets = {"target": Query("dog")}
    asked = [(item, targets) for item in expand([str(folder)])]
    jobs = plan(lay_out(asked, options), model, options).jobs
    if meet:
        meet.wait()
    return list(run(jobs, model, options))


def test_two_workers_on_the_same_recordings_both_succeed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for n in range(15):
        soundfile.write(tmp_path / "in" / f"{n}.wav", noise(9000, 1, seed=n), 8000)
    options, meet = Options(out=tmp_path / "out", skip_existing=True), threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        two = [pool.submit(worker, tmp_path / "in", Stub(Moody()), options, meet) for _ in range(2)]
        outcomes = [outcome for one in two for outcome in one.result()]
    assert not [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    assert any(isinstance(outcome, Skipped) for outcome in outcomes)
    worker(tmp_path / "in", Stub(Moody()), Options(out=tmp_path / "whole"))
    assert names(tmp_path / "out") == names(tmp_path / "whole")
    for name in names(tmp_path / "whole"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_output_of_another_query_is_no_success(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(9000, 1), 8000)
    options, model = Options(out=tmp_path / "out"), Stub(Moody())
    (item,) = expand([str(tmp_path / "a.wav")])
    dog, rain = (
        plan(lay_out([(item, {"target": Query(text)})], options), model, options).jobs for text in ("dog", "ox")
    )
    (first,), (second,) = list(run(dog, model, options)), list(run(rain, model, options))
    assert isinstance(first, Extraction)
    assert isinstance(second, Failure)
    assert "exists already" in str(second.error)


# Object stores


def test_outputs_in_a_store_are_those_of_a_local_run(
    stub: Callable[..., Done], memory: Any, recordings: list[str], tmp_path: Path
) -> None:
    assert stub("-r", "rec", "-o", "out", "--pos", "dog").returncode == 0
    done = stub(*REMOTE, "--json", "--scratch", "scratch")
    assert done.returncode == 0, done.stderr
    told = {row["input"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert sorted(told) == sorted(f"memory://lab/rec/{name}" for name in recordings)
    written = stored(memory)
    parts = {name: data for name, data in written.items() if not name.startswith("_clapsep")}
    assert parts == {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")}
    assert len(markers(memory)) == len(recordings)
    for row in markers(memory).values():
        etags = row.pop("etags")
        assert etags.keys() == row["outputs"].keys() == {"target", "residual"}
        assert row == told[row["input"]]
    assert list((tmp_path / "scratch").iterdir()) == []
    assert str(tmp_path / "scratch") not in done.stdout + done.stderr + json.dumps(list(markers(memory).values()))


def test_one_listing_of_markers_tells_what_is_left(
    stub: Callable[..., Done], memory: Any, recordings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stub(*REMOTE).returncode == 0
    (lost,) = [name for name in memory.find("/lab/out/_clapsep") if "/b.wav" in name]
    memory.rm_file(lost)  # as of a worker that was killed before its commit
    before = stored(memory)
    listed: list[str] = []
    for asked in ("find", "info", "cat_file"):
        monkeypatch.setattr(type(memory), asked, _counted(type(memory), asked, listed))
    again = stub(*REMOTE, "--skip-existing", "--json")
    assert again.returncode == 0
    assert sorted(statuses(again)) == ["done", "skipped", "skipped", "skipped"]
    assert [name for name in listed if name.endswith("_clapsep")] == ["find /lab/out/_clapsep"]
    assert not [name for name in listed if "a.wav" in name]
    after = stored(memory)
    assert {name: data for name, data in after.items() if "_clapsep" not in name} == {
        name: data for name, data in before.items() if "_clapsep" not in name
    }
    assert lost in memory.find("/lab/out/_clapsep")


def test_nothing_is_read_of_the_model_where_all_is_done(
    stub: Callable[..., Done], memory: Any, recordings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stub(*REMOTE).returncode == 0
    monkeypatch.setattr(Stub, "doubts", lambda *_: pytest.fail("reads the text encoder"))
    assert set(statuses(stub(*REMOTE, "--skip-existing", "--json"))) == {"skipped"}


def _counted(kind: type, name: str, listed: list[str]) -> Callable[..., Any]:
    method = getattr(kind, name)
    return lambda self, path, *rest, **more: listed.append(f"{name} {path}") or method(self, path, *rest, **more)


def test_what_exists_in_a_store_is_not_replaced_unasked(
    stub: Callable[..., Done], memory: Any, recordings: list[str]
) -> None:
    assert stub(*REMOTE).returncode == 0
    refused = stub(*REMOTE)
    assert (refused.returncode, "memory://lab/out/a.target.wav: exists already" in refused.stderr) == (1, True)
    other = [*REMOTE[:-1], "cat purr"]
    blocked = stub(*other, "--skip-existing")
    assert blocked.returncode == 1
    assert "memory://lab/out/a.target.wav: was not written for this query" in blocked.stderr
    before = stored(memory)
    replaced = stub(*other, "--overwrite", "--json")
    assert set(statuses(replaced)) == {"done"}
    assert stored(memory)["a.target.wav"] != before["a.target.wav"]
    assert len(markers(memory)) == len(recordings), "markers of what was replaced are gone"
    assert set(statuses(stub(*other, "--skip-existing", "--json"))) == {"skipped"}


def test_a_recording_that_changes_is_processed_again(
    stub: Callable[..., Done], memory: Any, recordings: list[str], tmp_path: Path
) -> None:
    line = ["memory://lab/rec/a.wav", "-o", "memory://lab/out", "--pos", "dog", "--skip-existing", "--json"]
    assert statuses(stub(*line)) == ["done"]
    assert statuses(stub(*line)) == ["skipped"]
    memory.put_file(str(tmp_path / "rec" / "b.wav"), "/lab/rec/a.wav")
    assert statuses(stub(*line)) == ["failed"], "its parts are of another recording"
    assert statuses(stub(*line, "--overwrite")) == ["done"]


def test_an_absent_recording_has_a_marker_and_a_failed_one_has_none(
    stub: Callable[..., Done], memory: Any, recordings: list[str]
) -> None:
    memory.pipe_file("/lab/rec/bad.wav", b"RIFF")
    done = stub(*REMOTE, "--min-presence", "9", "--json")
    assert done.returncode == 1
    assert sorted(statuses(done)) == ["absent"] * 4 + ["failed"]
    assert "memory://lab/rec/bad.wav: " in done.stderr
    assert [name for name in stored(memory) if not name.startswith("_clapsep")] == []
    assert {row["status"] for row in markers(memory).values()} == {"absent"}
    assert len(markers(memory)) == 4
    again = stub(*REMOTE, "--min-presence", "9", "--skip-existing", "--json")
    assert sorted(statuses(again)) == ["failed"] + ["skipped"] * 4


def test_pictures_and_events_go_to_a_store_with_their_parts(
    stub: Callable[..., Done], memory: Any, recordings: list[str], tmp_path: Path
) -> None:
    more = ["--events", "--events-presence", "-9", "--plot"]
    assert stub("-r", "rec", "-o", "out", "--pos", "dog", *more).returncode == 0
    done = stub(*REMOTE, *more, "--scratch", "scratch", "--json")
    assert done.returncode == 0, done.stderr
    parts = {name: data for name, data in stored(memory).items() if not name.startswith("_clapsep")}
    assert parts == {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")}
    assert {"a.events.csv", "a.png", "a.target.wav"} <= set(parts)
    for row in markers(memory).values():
        assert row["etags"].keys() == {"target", "residual", row["picture"], row["events_file"]}
    assert list((tmp_path / "scratch").iterdir()) == []
    assert set(statuses(stub(*REMOTE, *more, "--skip-existing", "--json"))) == {"skipped"}


@pytest.mark.parametrize("source", ["rec", "memory://lab/rec"])
def test_events_without_audio_go_to_a_store(
    stub: Callable[..., Done], memory: Any, recordings: list[str], source: str
) -> None:
    line = ["-r", source, *REMOTE[2:], "--events", "--no-audio", "--skip-existing", "--json"]
    done = stub(*line)
    assert (done.returncode, set(statuses(done))) == (0, {"done"}), done.stderr
    parts = [name for name in stored(memory) if not name.startswith("_clapsep")]
    assert sorted(parts) == [name.replace(".wav", ".events.csv") for name in recordings]
    again = stub(*line)
    assert set(statuses(again)) == {"skipped"}
    assert json.loads(again.stdout.splitlines()[0])["events_file"].startswith("memory://lab/out/")
    other = stub(*[word.replace("dog", "ox") for word in line])
    assert set(statuses(other)) == {"failed"}
    assert "memory://lab/out/a.events.csv: was not written for this query" in other.stderr


def test_what_arrives_in_a_folder_goes_to_a_store(
    stub: Callable[..., Done], memory: Any, recordings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Input(tmp_path / "rec" / name, Path(name)) for name in ("a.wav", "b.wav")]
    monkeypatch.setattr(watch, "arrivals", lambda *_: iter([[found[0]], found]))
    done = stub("--watch", "rec", "-o", "memory://lab/out", "--pos", "dog", "--json")
    assert done.returncode == 130
    assert sorted(statuses(done)) == ["done", "done", "skipped"]
    assert {"a.target.wav", "b.target.wav"} <= set(stored(memory))
    refused = stub("--watch", "rec", "-o", "out", "--pos", "dog", "--engine", "ray")
    assert (refused.returncode, "use it without --watch" in refused.stderr) == (2, True)


def test_parts_of_two_workers_always_match(
    stub: Callable[..., Done], memory: Any, recordings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker, whose samples differ, puts a part between ours and our marker."""
    put, others = Stage.put, [b"another target"]

    def interfering(stage: Stage, path: Path) -> None:
        put(stage, path)
        if path.name == "a.residual.wav" and others:
            memory.pipe_file("/lab/out/a.target.wav", others.pop())

    monkeypatch.setattr(Stage, "put", interfering)
    assert stub("memory://lab/rec/a.wav", "-o", "memory://lab/out", "--pos", "dog", "--json").returncode == 0
    (row,) = markers(memory).values()
    assert stored(memory)["a.target.wav"] != b"another target"
    for part in ("target", "residual"):
        assert row["etags"][part] == str(memory.info(f"/lab/out/a.{part}.wav")["created"])


def test_what_another_worker_committed_meanwhile_is_done(
    stub: Callable[..., Done], memory: Any, recordings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["memory://lab/rec/a.wav", "-o", "memory://lab/out", "--pos", "dog", "--skip-existing", "--json"]
    assert statuses(stub(*line)) == ["done"]
    before = stored(memory)
    monkeypatch.setattr(planning, "done_before", lambda job, stage: None)  # as when the listing is older
    monkeypatch.setattr(planning, "blocking", lambda job, stage: None)
    assert statuses(stub(*line)) == ["skipped"]
    assert stored(memory) == before


def test_urls_are_taken_wherever_paths_are(
    stub: Callable[..., Done], memory: Any, recordings: list[str], tmp_path: Path, tiny_folder: Path
) -> None:
    memory.pipe_file("/lab/list.txt", b"# some\nrec/a.wav\nmemory://lab/rec/deep/c.wav\n")
    memory.pipe_file("/lab/jobs.csv", b"file,pos,query_audio\n./rec/a.wav,dog,rec/b.wav\nmemory://lab/rec/b.wav,cat,\n")
    memory.put_file(str(tmp_path / "rec" / "b.wav"), "/lab/shots/b.wav")
    lines = {
        "@memory://lab/list.txt -o out1 --pos dog": ["a.target.wav", "c.target.wav"],
        "memory://lab/rec/*.wav -o out2 --pos dog": ["a.target.wav", "b.target.wav"],
        "memory://lab/rec/**/*.wav -o out3 --pos dog": ["a.target.wav", "b.target.wav", "deep/c.target.wav"],
        "--manifest memory://lab/jobs.csv -o out4": ["rec/a.target.wav", "rec/b.target.wav"],
        "rec/a.wav -o out5 --query-audio memory://lab/rec/b.wav": ["a.target.wav"],
        "rec/a.wav -o out6 --query-audio memory://lab/shots": ["a.target.wav"],
        "rec/a.wav -o out7 --target dog=memory://lab/rec/b.wav --target cat=cat": ["a.dog.wav", "a.cat.wav"],
    }
    for line, expected in lines.items():
        done = stub(*line.split())
        assert done.returncode == 0, (line, done.stderr)
        out = tmp_path / line.split("-o ")[1].split()[0]
        assert set(expected) <= set(names(out)), (line, names(out))
    assert stub("rec/a.wav", "--pos", "dog", "-o", "memory://lab/out").returncode == 0
    assert {"a.target.wav", "a.residual.wav"} <= set(stored(memory))
    assert stub("memory://lab/rec/a.wav", "--pos", "dog").returncode == 0  # beside the recording
    assert memory.exists("/lab/rec/a.target.wav")
    assert stub("-r", "memory://lab/rec", "--pos", "dog", "-o", "again").returncode == 0
    assert "a.target.target.wav" not in names(tmp_path / "again")


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an HTTPS server on loopback that serves `tmp_path`."""
    pytest.importorskip("aiohttp", reason="https:// takes the packages of clapsep[https]")
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(timezone.utc)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    certificate = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    certificate = certificate.not_valid_before(now).not_valid_after(now + timedelta(1)).serial_number(1)
    certificate = certificate.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
    pem, plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    own = tmp_path / "own.pem"
    own.write_bytes(key.private_bytes(pem, plain, serialization.NoEncryption()))
    with own.open("ab") as file:
        file.write(certificate.sign(key, hashes.SHA256()).public_bytes(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own)
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(tmp_path)))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setitem(fsspec.config.conf, "https", {"ssl": ssl.create_default_context(cafile=str(own))})
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"https://localhost:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_recordings_and_queries_come_from_the_web(
    stub: Callable[..., Done], web: str, recordings: list[str], tmp_path: Path
) -> None:
    done = stub(f"{web}/rec/a.wav?signed=secret", "--query-audio", f"{web}/rec/b.wav", "-o", "out", "--json")
    assert done.returncode == 0, done.stderr
    assert stub("rec/a.wav", "--query-audio", "rec/b.wav", "-o", "plain").returncode == 0
    for name in names(tmp_path / "plain"):
        theirs, own = (soundfile.read(tmp_path / folder / name)[0] for folder in ("out", "plain"))
        assert theirs.tobytes() == own.tobytes()
    assert json.loads(done.stdout)["input"] == f"{web}/rec/a.wav"
    assert "secret" not in done.stdout + done.stderr
    gone = stub(f"{web}/rec/gone.wav", "--pos", "dog", "-o", "out")
    assert (gone.returncode, f"{web}/rec/gone.wav: no such file" in gone.stderr) == (1, True)


def test_recordings_come_from_the_hub(
    stub: Callable[..., Done], recordings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HubServer() as hub:
        for name in recordings:
            hub.add_file("lab/rec", "dataset", "main", f"in/{name}", (tmp_path / "rec" / name).read_bytes())
        client = {"endpoint": hub.url, "token": False, "skip_instance_cache": True}
        monkeypatch.setitem(fsspec.config.conf, "hf", client)
        line = ("-r", "hf://datasets/lab/rec/in", "--query-audio", "hf://datasets/lab/rec/in/a.wav", "-o", "out")
        first, again = (stub(*line, "--json", "--skip-existing") for _ in range(2))
        gone = stub("hf://datasets/lab/rec/in/gone.wav", "--pos", "dog", "-o", "out")
    assert (first.returncode, again.returncode) == (0, 0), first.stderr
    assert {json.loads(row)["status"] for row in again.stdout.splitlines()} == {"skipped"}
    assert stub("-r", "rec", "--query-audio", "rec/a.wav", "-o", "plain").returncode == 0
    assert names(tmp_path / "plain")
    for name in names(tmp_path / "plain"):
        theirs, own = (soundfile.read(tmp_path / folder / name)[0] for folder in ("out", "plain"))
        assert theirs.tobytes() == own.tobytes()
    assert (gone.returncode, gone.stderr.count("\n")) == (1, 1), gone.stderr


def test_a_model_comes_from_a_store(
    clapsep: Clapsep, memory: Any, recordings: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    memory.put(str(tiny_folder), "/lab/tiny", recursive=True)
    line = ["extract", "rec/a.wav", "--pos", "dog", "--json"]
    local = clapsep(*line, "-o", "one", "--model", tiny_folder, cwd=tmp_path)
    remote = clapsep(*line, "-o", "two", "--model", "memory://lab/tiny", cwd=tmp_path)
    assert (local.returncode, remote.returncode) == (0, 0), remote.stderr
    assert json.loads(remote.stdout)["model"] == "tiny"
    for name in names(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("ftp://lab/a.wav", 2, "ftp://: is not known"),
        ("memory://lab/../a.wav", 1, "memory://lab/../a.wav: has an empty"),
        ("memory://lab//a.wav", 1, "has an empty"),
        ("memory://lab/none.wav", 1, "memory://lab/none.wav: no such file"),
        ("memory://lab/rec", 1, "no recording is in this folder; -r looks below it"),
        ("a.wav -o https://example.com/out", 2, "https://example.com/out/_clapsep: can only be read"),
        ("s3://AKIA:secret@lab/a.wav", 2, "leave credentials to the environment"),
        ("a.wav --scratch scratch", 2, "--scratch is for copies of the files at URLs"),
    ],
)
def test_wrong_urls_end_in_one_line(
    stub: Callable[..., Done], memory: Any, tmp_path: Path, line: str, code: int, said: str
) -> None:
    soundfile.write(tmp_path / "a.wav", noise(900, 1), 8000)
    memory.pipe_file("/lab/rec/deep/a.txt", b"")
    memory.pipe_file("/lab/rec/deep/a.wav", b"")
    done = stub(*line.split(), "--pos", "dog")
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr
    assert names(tmp_path) == ["a.wav"]


def test_keys_that_lead_out_of_the_staging_folder_are_refused(
    stub: Callable[..., Done], memory: Any, recordings: list[str], tmp_path: Path
) -> None:
    memory.store["/lab/rec/../../evil.wav"] = memory.store["/lab/rec/a.wav"]
    done = stub(*REMOTE, "--json", "--scratch", "scratch")
    assert done.returncode == 1
    assert sorted(statuses(done)) == ["done"] * 4 + ["failed"]
    assert "memory://lab/rec/../../evil.wav: has" in done.stderr
    assert not list(tmp_path.rglob("evil*"))


def test_query_strings_and_user_names_are_never_shown(tmp_path: Path) -> None:
    with Stage(tmp_path) as stage:
        path = stage.path("https://anna:pass@example.com/rec/a.wav?X-Signature=token#t")
        assert stage.shown(f"{path}: gone") == "https://example.com/rec/a.wav: gone"
        assert stage.shown(json.dumps({"input": str(path)})) == '{"input": "https://example.com/rec/a.wav"}'
        assert stage.url(path) == "https://anna:pass@example.com/rec/a.wav?X-Signature=token#t"
        with pytest.raises(Exception, match="named twice"):
            stage.path("https://example.com/rec/a.wav?X-Signature=other")
    assert list(tmp_path.iterdir()) == []


def test_staging_is_bounded_and_fails_where_there_is_no_room(
    stub: Callable[..., Done], memory: Any, recordings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(12):
        memory.cp_file("/lab/rec/a.wav", f"/lab/rec/{n}.wav")
    most, fetch = [0], Stage.fetch

    def counted(stage: Stage, path: Path, keep: bool = True) -> Path:
        fetched = fetch(stage, path, keep)
        assert stage.root is not None
        most[0] = max(most[0], len([p for p in stage.root.rglob("*.wav") if "/rec/" in str(p)]))
        return fetched

    monkeypatch.setattr(Stage, "fetch", counted)
    assert stub(*REMOTE).returncode == 0
    assert 1 <= most[0] <= exchange.AHEAD + exchange.UPLOADING + 3  # at work: two, and one more read ahead
    usage = shutil.disk_usage("/")._replace(free=3 * memory.info("/lab/rec/a.wav")["size"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert stub(*REMOTE, "--overwrite").returncode == 0, "one at a time has room"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    full = stub(*REMOTE, "--overwrite")
    assert (full.returncode, full.stderr.count("choose another folder with --scratch") >= 16) == (1, True)


def test_what_a_killed_run_staged_is_removed(
    stub: Callable[..., Done], memory: Any, recordings: list[str], tmp_path: Path
) -> None:
    left, young = tmp_path / "scratch" / "clapsep-stage-left", tmp_path / "scratch" / "clapsep-stage-young"
    for folder in (left, young):
        folder.mkdir(parents=True)
        (folder / ".lock").touch()
    os.utime(left / ".lock", (1, 1))
    assert stub(*REMOTE, "--scratch", "scratch").returncode == 0
    assert list((tmp_path / "scratch").iterdir()) == [young]


# Results


def test_results_are_gathered_from_the_markers(
    stub: Callable[..., Done], clapsep: Clapsep, memory: Any, recordings: list[str], tmp_path: Path
) -> None:
    assert stub(*REMOTE, "--presence").returncode == 0
    told = clapsep("results", "memory://lab/out", cwd=tmp_path)
    assert (told.returncode, told.stderr) == (0, "clapsep: 4 recordings\n")
    rows = [json.loads(line) for line in told.stdout.splitlines()]
    assert sorted(row["input"] for row in rows) == sorted(f"memory://lab/rec/{name}" for name in recordings)
    assert rows == sorted(markers(memory).values(), key=lambda row: [r["input"] for r in rows].index(row["input"]))
    table = clapsep("results", "memory://lab/out", "--format", "csv", "-q", cwd=tmp_path)
    (tmp_path / "table.csv").write_text(table.stdout)
    with (tmp_path / "table.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert [row["input"] for row in cells] == [row["input"] for row in rows]
    assert float(cells[0]["levels.target.rms_db"]) == rows[0]["levels"]["target"]["rms_db"]
    assert cells[0]["outputs.residual"] == rows[0]["outputs"]["residual"]
    assert (json.loads(cells[0]["absent"]), table.stderr) == ([], "")


def test_shards_leave_results_and_plain_local_runs_none(
    stub: Callable[..., Done], clapsep: Clapsep, tmp_path: Path
) -> None:
    for n in range(4):
        soundfile.write(tmp_path / f"{n}.wav", noise(900, 1, seed=n), 8000)
    assert stub("*.wav", "-o", "out", "--pos", "dog").returncode == 0
    none = clapsep("results", "out", cwd=tmp_path)
    assert (none.returncode, "no results below it" in none.stderr) == (1, True)
    for k in range(2):
        assert stub("*.wav", "-o", "out", "--pos", "dog", "--overwrite", "--shard", f"{k}/2").returncode == 0
    told = clapsep("results", "out", cwd=tmp_path)
    assert [json.loads(line)["input"] for line in told.stdout.splitlines()] == [f"{n}.wav" for n in range(4)]
    assert clapsep("results", "out", "-f", "xml", cwd=tmp_path).returncode == 2


def test_results_as_parquet(
    stub: Callable[..., Done],
    clapsep: Clapsep,
    memory: Any,
    recordings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet takes pyarrow")
    assert stub(*REMOTE).returncode == 0
    with Stage(tmp_path) as stage:
        found = list(gathered.rows(stage.path("memory://lab/out"), stage))
    stream = io.TextIOWrapper(io.BytesIO())
    assert gathered.write(iter(found), "parquet", stream) == 4
    table = parquet.read_table(io.BytesIO(stream.buffer.getvalue())).to_pylist()
    assert [row["input"] for row in table] == [row["input"] for row in found]
    assert table[0]["levels.target.rms_db"] == found[0]["levels"]["target"]["rms_db"]


# Ray's engine, in this process: what driver and workers do. `test_ray` has real ones.


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Run the workers of `--engine ray` here, in chunks of four; returns the names of recordings that kill workers."""
    killers: set[str] = set()

    class Remote:
        def __init__(self, actor: object) -> None:
            self.actor = actor

        def __getattr__(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(remote=getattr(self.actor, name))

    made = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: Remote(ray_engine.Tally())))
    ray = SimpleNamespace(
        get=lambda value: value,
        remote=lambda kind: made,
        get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: ""),
        util=SimpleNamespace(
            scheduling_strategies=SimpleNamespace(NodeAffinitySchedulingStrategy=lambda *_, **__: None)
        ),
    )

    def rounds(ray: Any, asked: list[Any], cluster: Any, arguments: tuple[Any, ...], alone: bool) -> Iterator[Any]:
        workers = [ray_engine.Worker(*arguments) for _ in range(2)]
        for number, first in enumerate(range(0, len(asked), 1 if alone else 4)):
            chunk = asked[first : first + (1 if alone else 4)]
            for _ in range(ray_engine.DEATHS if any(one["below"] in killers for one in chunk) else 0):
                arguments[-1].begin.remote(f"{alone} {number}")  # by a worker that died of it
            batch = {"chunk": [f"{alone} {number}"], "jobs": [json.dumps(chunk)]}
            yield from map(json.loads, workers[number % 2](batch)["row"])
        for worker in workers:
            worker.stop.set()
            worker.stage.close()

    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(ray_engine, "_connected", lambda cluster: contextlib.nullcontext(ray))
    monkeypatch.setattr(ray_engine, "_round", rounds)
    return killers


def test_ray_writes_what_a_plain_run_writes(
    stub: Callable[..., Done], engine: set[str], memory: Any, recordings: list[str], tmp_path: Path
) -> None:
    query = ["--pos", "dog", "--query-audio", "memory://lab/rec/b.wav", "--neg-span", "0-0.2"]
    assert stub("-r", "memory://lab/rec", "-o", "plain", *query).returncode == 0
    done = stub("-r", "memory://lab/rec", "-o", "memory://lab/out", *query, "--engine", "ray", "--json")
    assert (done.returncode, statuses(done)) == (0, ["done"] * 4), done.stderr
    parts = {name: data for name, data in stored(memory).items() if not name.startswith("_clapsep")}
    assert parts == {name: (tmp_path / "plain" / name).read_bytes() for name in names(tmp_path / "plain")}
    again = stub("-r", "memory://lab/rec", "-o", "memory://lab/out", *query, "--engine", "ray", "--json")
    assert (again.returncode, statuses(again)) == (0, ["skipped"] * 4)


def test_a_recording_that_kills_workers_is_named_and_the_others_are_done(
    stub: Callable[..., Done], engine: set[str], clapsep: Clapsep, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for n in range(10):
        soundfile.write(tmp_path / "in" / f"{n}.wav", noise(900, 1, seed=n), 8000)
    (tmp_path / "in" / "bad.wav").write_bytes(b"RIFF")
    engine.add("5.wav")
    done = stub("in", "-o", "out", "--pos", "dog", "--engine", "ray", "--json")
    assert done.returncode == 1
    rows = {Path(row["input"]).name: row for row in map(json.loads, done.stdout.splitlines())}
    assert {name for name, row in rows.items() if row["status"] == "failed"} == {"5.wav", "bad.wav"}
    assert "in/5.wav: 3 workers died" in rows["5.wav"]["error"]
    assert sum(row["status"] == "done" for row in rows.values()) == 9
    assert "2 of 11 files failed" in done.stderr
    assert len(clapsep("results", "out", cwd=tmp_path).stdout.splitlines()) == 9


def test_workers_with_different_models_stop_the_run(
    stub: Callable[..., Done], engine: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(8):
        soundfile.write(tmp_path / f"{n}.wav", noise(900, 1, seed=n), 8000)
    models = iter([Stub(Moody()), Stub(Moody())])

    def load(*_: object, **__: object) -> Stub:
        model = next(models)
        model.__dict__["identity"] = str(id(model))
        return model

    monkeypatch.setattr(library, "load_model", load)
    stopped = stub("*.wav", "-o", "out", "--pos", "dog", "--engine", "ray")
    assert (stopped.returncode, "workers have different models" in stopped.stderr) == (3, True)


def test_a_cluster_is_used_with_its_token_alone(
    stub: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="--engine ray takes the packages of clapsep[ray]")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    soundfile.write(tmp_path / "a.wav", noise(900, 1), 8000)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    line = ["a.wav", "--pos", "dog", "--engine", "ray", "--address", f"127.0.0.1:{port}"]
    refused = stub(*line)
    assert (refused.returncode, "RAY_AUTH_TOKEN" in refused.stderr) == (2, True)
    silent = stub(*line, "--insecure")
    assert (silent.returncode, "no answer" in silent.stderr) == (3, True)
    assert (refused.stderr + silent.stderr).count("\n") == 2

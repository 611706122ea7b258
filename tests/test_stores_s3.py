"""S3 as moto has it on loopback: a worker killed in the middle of an upload, and one that resumes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import soundfile
from conftest import Clapsep, Stub
from recordings import names, noise
from stand_ins import Moody

from clapsep_cli.store import library

pytest.importorskip("s3fs", reason="s3:// takes the packages of clapsep[s3]")
pytest.importorskip("moto.server", reason="S3 on loopback is moto's")
pytest.importorskip("flask_cors", reason="moto's server takes Flask")

ROOT = Path(__file__).parents[1]
COUNT = 6
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@dataclass
class Loopback:
    """A server whose uploads of `held` stop half-way until `release` is set; `put` are the keys that were put."""

    url: str = ""
    held: str = ""
    holding: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    put: list[str] = field(default_factory=list)

    def __call__(self, app: Callable[..., Any], environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] == "PUT":
            self.put.append(path)
            if self.held and self.held in path:
                environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]) // 2)
                self.holding.set()
                self.release.wait(60)
                start("500 Internal Server Error", [])
                return []
        return app(environ, start)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    for name, value in (("ACCESS_KEY_ID", "some"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    app, loopback = DomainDispatcherApplication(create_backend_app), Loopback()
    quiet = type("Quiet", (WSGIRequestHandler,), {"log": lambda *_: None})
    running = make_server(
        "127.0.0.1", 0, lambda environ, start: loopback(app, environ, start), threaded=True, request_handler=quiet
    )
    loopback.url = f"http://127.0.0.1:{running.port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", loopback.url)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield loopback
    loopback.release.set()
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture
def bucket(server: Loopback, tmp_path: Path) -> Any:
    """Recordings in a bucket, and the same in a folder, with the same times of change."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    urlopen(Request(f"{server.url}/moto-api/reset", method="POST")).close()  # its state outlives a server
    store = s3fs.S3FileSystem(anon=False)
    store.mkdir("lab")
    for n in range(COUNT):
        path = tmp_path / "rec" / f"{n}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, noise(40_000, 1, seed=n), 8000)
        store.put_file(str(path), f"lab/rec/{n}.wav")
        changed = store.info(f"lab/rec/{n}.wav")["LastModified"]
        os.utime(path, (0, changed.timestamp()))
    server.put.clear()
    return store


def contents(bucket: Any) -> dict[str, bytes]:
    bucket.invalidate_cache()
    return {name.removeprefix("lab/out/"): bucket.cat_file(name) for name in bucket.find("lab/out")}


def test_killed_in_the_middle_of_an_upload_and_resumed(
    server: Loopback, bucket: Any, clapsep: Clapsep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "load_model", lambda *_, **__: Stub(Moody()))
    line = ["extract", "-r", "s3://lab/rec", "-o", "s3://lab/out", "--pos", "dog", "--json"]
    server.held = "3.residual.wav"
    with subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "stand_ins.py"), *line, "--scratch", "scratch"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert server.holding.wait(60), process.stderr.read().decode() if process.poll() else "no upload began"
        process.kill()
    server.release.set()
    server.held = ""
    left = contents(bucket)
    done = {name.split(".")[0] for name in left if "_clapsep" not in name and name.endswith("residual.wav")}
    committed = {re.split(r"[/.]", name)[1] for name in left if name.startswith("_clapsep")}
    assert {"0", "1"} <= committed <= done
    assert not {"3"} & done
    server.put.clear()
    resumed = clapsep(*line, "--skip-existing", "--scratch", "scratch", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    statuses = {json.loads(row)["input"][-5]: json.loads(row)["status"] for row in resumed.stdout.splitlines()}
    assert {name for name, status in statuses.items() if status == "skipped"} == committed
    assert {Path(key).name.split(".")[0] for key in server.put} == set(statuses) - committed
    assert clapsep("extract", "-r", "rec", "-o", "out", "--pos", "dog", cwd=tmp_path).returncode == 0
    parts = {name: data for name, data in contents(bucket).items() if not name.startswith("_clapsep")}
    assert parts == {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")}
    told = clapsep("results", "s3://lab/out", cwd=tmp_path)
    rows = [json.loads(row) for row in told.stdout.splitlines()]
    assert [row["input"] for row in rows] == [f"s3://lab/rec/{n}.wav" for n in range(COUNT)]
    for row in rows:
        for part, url in row["outputs"].items():
            assert row["etags"][part] == bucket.info(url)["ETag"].strip('"')


def test_what_a_store_refuses_is_one_line(server: Loopback, bucket: Any, clapsep: Clapsep, tmp_path: Path) -> None:
    for url in ("s3://lab/none.wav", "s3://none/a.wav"):
        done = clapsep("extract", url, "--pos", "dog", "--model", "mini", "-o", "out", cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert done.stderr.startswith(f"clapsep: {url}: ")
        assert "secret" not in done.stderr

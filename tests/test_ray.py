"""Real Ray on this machine: two raylets on loopback; workers, nodes and drivers are killed. See `make test-ray`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
from recordings import names, noise

psutil = pytest.importorskip("psutil")
pytest.importorskip("ray", reason="--engine ray takes the packages of clapsep[ray]")
pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[1]
COUNT = int(os.environ.get("CLIPS", 40))
WAIT = 300.0  # seconds, also on a loaded machine
STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Clips, and what a plain run makes of them."""
    place = tmp_path_factory.mktemp("ray")
    (place / "rec").mkdir()
    for n in range(COUNT):
        soundfile.write(place / "rec" / f"{n}.wav", noise(16_000, 1, seed=n), 16_000, "PCM_16")
    (place / "model").symlink_to(tiny_folder)
    began = time.monotonic()
    assert command(place, "plain", "--threads", "1").wait(WAIT) == 0
    note(place, "plain run", time.monotonic() - began)
    return place


@pytest.fixture(autouse=True)
def _no_driver_outlives_its_test() -> Iterator[None]:
    yield
    while STARTED:
        STARTED.pop().kill()


@pytest.fixture
def cluster(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs, and two nodes with one each."""
    settings = {"RAY_AUTH_MODE": "disabled", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "PYTHONPATH": str(ROOT)}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def command(place: Path, out: str, *more: str) -> subprocess.Popen[str]:
    """The command as a process of its own, whose rows go to a file."""
    line = ["extract", "rec", "-o", out, "--pos", "dog", "--model", "model", "--json", *more]
    settings = {"cwd": place, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}
    with (place / f"{out}.jsonl").open("w") as rows, (place / f"{out}.err").open("w") as errors:
        STARTED.append(
            subprocess.Popen([sys.executable, "-m", "clapsep_cli", *line], stdout=rows, stderr=errors, **settings)
        )
    return STARTED[-1]


def note(place: Path, what: str, seconds: float) -> None:
    """Keep a measured time for the table in README, where CLIPS asks for many."""
    print(f"{what}: {seconds:.1f} s for {COUNT} clips")  # noqa: T201


def statuses(place: Path, out: str) -> Counter[str]:
    return Counter(json.loads(line)["status"] for line in (place / f"{out}.jsonl").read_text().splitlines())


def written(place: Path, out: str) -> int:
    return len(list((place / out).glob("*.residual.wav")))


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert process.poll() is None, "ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def same(place: Path, out: str) -> None:
    parts = [name for name in names(place / out) if not name.startswith("_clapsep")]
    assert parts == names(place / "plain")
    assert all((place / out / name).read_bytes() == (place / "plain" / name).read_bytes() for name in parts)
    assert len(names(place / out / "_clapsep")) == COUNT


def workers(parent: int) -> list[Any]:
    below = psutil.Process(parent).children(recursive=True)
    return [one for one in below if "MapWorker" in "".join(one.cmdline()[:1])]


def test_a_stopped_and_a_killed_driver_are_run_again_and_a_bad_file_fails_alone(place: Path) -> None:
    line = "again", "--engine", "ray", "--workers"
    (place / "rec" / "bad.wav").write_bytes(b"RIFF")
    try:
        stopped = command(place, *line, "1")
        until(lambda: written(place, "again") >= 2, stopped)
        stopped.send_signal(signal.SIGTERM)
        assert stopped.wait(WAIT) == 130
        assert not [name for name in names(place / "again") if name.endswith(".partial")]
        killed = command(place, *line, "2")
        until(lambda: written(place, "again") >= COUNT // 2, killed)
        killed.kill()
        killed.wait()
        before, began = written(place, "again"), time.monotonic()
        assert command(place, *line, "2").wait(WAIT) == 1
    finally:
        (place / "rec" / "bad.wav").unlink()
    after = statuses(place, "again")
    note(place, f"driver killed after {before}, again: {dict(after)}", time.monotonic() - began)
    assert after.total() == COUNT + 1
    assert after["failed"] == 1
    assert after["skipped"] >= COUNT // 2 - 2
    assert "rec/bad.wav: " in (place / "again.err").read_text()
    same(place, "again")


def test_a_killed_worker_and_a_killed_node_cost_their_chunks_alone(place: Path, cluster: Any) -> None:
    began = time.monotonic()
    process = command(place, "killed", "--engine", "ray", "--address", cluster.address, "--insecure")
    until(lambda: written(place, "killed") >= COUNT // 10, process)
    nodes = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]
    worker = next(one for node in nodes for one in workers(os.getpid()))
    worker.kill()
    until(lambda: written(place, "killed") >= COUNT // 4, process)
    cluster.remove_node(nodes[0], allow_graceful=False)
    assert process.wait(WAIT) == 0, (place / "killed.err").read_text()
    note(place, f"one worker and one of two nodes killed ({dict(statuses(place, 'killed'))})", time.monotonic() - began)
    assert statuses(place, "killed").total() == COUNT
    assert set(statuses(place, "killed")) <= {"done", "skipped"}
    same(place, "killed")

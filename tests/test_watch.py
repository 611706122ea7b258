"""`--watch`: recordings as they arrive, complete ones only; stopped, killed and begun again."""

from __future__ import annotations

import io
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from recordings import names, noise, read
from test_extract import stand_in

from clapsep_cli.jobs import watch

LONG = 60  # s that anything may take here


def recording(seconds: float = 0.5, seed: int = 0) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, noise(round(seconds * 8000), seed=seed), 8000, "PCM_16", format="WAV")
    return file.getvalue()


def until(there: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not there():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


def is_whole(folder: Path, name: str) -> bool:
    mixture, parts = folder / f"{name}.wav", [folder / "out" / f"{name}.{part}.wav" for part in ("target", "residual")]
    return all(part.exists() for part in parts) and bool(np.array_equal(sum(map(read, parts)), read(mixture)))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_recordings_are_taken_as_they_arrive_and_once(tmp_path: Path, end: signal.Signals) -> None:
    line = ("extract", "--watch", ".", "--pos", "dog", "-o", "out", "--model", "any")
    whole = recording()
    (tmp_path / "first.wav").write_bytes(whole)
    with stand_in(*line, cwd=tmp_path) as process:
        until(lambda: is_whole(tmp_path, "first"))
        with (tmp_path / "slow.wav").open("wb") as file:
            for at in range(0, len(whole), 2000):
                file.write(whole[at : at + 2000])
                file.flush()
                time.sleep(0.4)
                assert not (tmp_path / "out" / "slow.target.wav").exists(), "it was not complete"
        until(lambda: is_whole(tmp_path, "slow"))
        (tmp_path / "bad.wav").write_bytes(b"RIFFxxxxWAVE")
        process.send_signal(end)
        _, stderr = process.communicate(timeout=LONG)
    assert process.returncode == (130 if end == signal.SIGINT else -9)
    assert b"Traceback" not in stderr
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in names(tmp_path / "out")}
    assert sorted(before) == [f"{name}.{part}.wav" for name in ("first", "slow") for part in ("residual", "target")]
    with stand_in(*line, cwd=tmp_path) as process:
        (tmp_path / "third.wav").write_bytes(recording(seed=3))
        until(lambda: is_whole(tmp_path, "third"))
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=LONG)
    assert process.returncode == 130
    assert b"bad.wav" in stderr
    assert b"done before" in stdout
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before} == before


def test_a_kill_in_the_midst_leaves_no_half_recording(tmp_path: Path) -> None:
    line = ("extract", "--watch", ".", "--pos", "dog", "-o", "out", "--model", "any")
    (tmp_path / "long.wav").write_bytes(recording(20))
    with stand_in(*line, cwd=tmp_path, seconds=0.5) as process:
        until(lambda: (tmp_path / "out").exists() and any((tmp_path / "out").iterdir()))
        time.sleep(0.5)
        process.kill()
        process.communicate(timeout=LONG)
    assert not [name for name in names(tmp_path / "out") if name in ("long.target.wav", "long.residual.wav")]
    with stand_in(*line, cwd=tmp_path) as process:
        until(lambda: is_whole(tmp_path, "long"))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=LONG)
    assert names(tmp_path / "out") == ["long.residual.wav", "long.target.wav"]


def test_what_arrives_is_told_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    class Clock:
        """Ends after some looks; files change between them."""

        def is_set(self) -> bool:
            return looks > 12

        def wait(self, seconds: float) -> None:
            nonlocal looks
            looks += 1
            if looks in (1, 2, 3, 9):
                with (tmp_path / "a.wav").open("ab") as file:
                    file.write(b"more")
            if looks == 5:
                (tmp_path / "b.wav").write_bytes(b"some")
                (tmp_path / "empty.wav").touch()

    taken = [[item.path.name for item in items] for items in watch.arrivals(tmp_path, Clock())]  # type: ignore[arg-type]
    assert taken == [["a.wav"], ["b.wav"], ["a.wav"]]


@pytest.mark.parametrize(
    ("more", "message"),
    [(["mix.wav"], "use it without recordings"), (["-o", "-"], "use it without -o -"), ([], "--watch needs a folder")],
)
def test_what_watching_cannot_do(tmp_path: Path, more: list[str], message: str) -> None:
    with stand_in("extract", "--watch", "none", "--pos", "dog", *more, cwd=tmp_path) as process:
        _, stderr = process.communicate(timeout=LONG)
    assert process.returncode in (1, 2)
    assert message.encode() in stderr

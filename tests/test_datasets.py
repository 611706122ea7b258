"""Tests that data sets are fetched from a server on the loopback, checked, unpacked safely and listed."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile, ZipInfo

import pytest
from conftest import Clapsep
from data_sets import VIDEOS, esc50, fsd, serve_data_sets, serve_record, sound, zipped
from hub_server import HubServer

from clapsep_cli.cli.mixtures import FETCHED
from clapsep_cli.data import CAPTIONS, read_corpus
from clapsep_cli.errors import DownloadError, ManifestError, OutputError
from clapsep_cli.evaluation.datasets import DATA_SETS, OWN_COPY, fetch, unpack
from clapsep_cli.evaluation.mixtures import read_shots
from clapsep_cli.evaluation.prompted import read_parts
from clapsep_cli.store import download
from clapsep_cli.tables import read_table


@pytest.fixture
def server(served: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    monkeypatch.setattr(download, "PAUSES_S", (0.0,))
    serve_data_sets(served, monkeypatch)
    return served


def test_a_data_set_is_listed_and_its_hashes_are_told(server: HubServer, clapsep: Clapsep, tmp_path: Path) -> None:
    assert tuple(DATA_SETS) == FETCHED
    done = clapsep("mixtures", "fetch", "esc50", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sha256 = hashlib.sha256(esc50()).hexdigest()
    lines = done.stdout.splitlines()
    assert lines[0].startswith("esc50: CC BY-NC")
    assert lines[1].endswith(f"SHA-256 {sha256}")
    assert lines[2:] == ["esc50/clips.csv"]
    rows = [row for _, row in read_table(tmp_path / "esc50" / "clips.csv", ("file", "label", "split"))]
    assert [row["split"] for row in rows].count("fold5") == 8
    assert all((tmp_path / "esc50" / row["file"]).is_file() for row in rows)
    asked = len(server.requests)
    again = clapsep("mixtures", "fetch", "esc50", "--quiet", cwd=tmp_path)
    assert (again.returncode, again.stdout, len(server.requests)) == (0, "", asked), "what is there is used"
    (tmp_path / "esc50" / "ESC-50.zip").write_bytes(zipped({"other": b"x"}))
    other = clapsep("mixtures", "fetch", "esc50", cwd=tmp_path)
    assert (other.returncode, f"and had {sha256} before" in other.stderr) == (3, True)


def test_archives_come_from_their_record_or_by_hand(server: HubServer, tmp_path: Path) -> None:
    _, (clips, shots) = fetch("fsdkaggle2018", tmp_path / "fsd")
    assert [row["label"] for _, row in read_table(clips, ("file", "label"))] == ["Cello", "Bass_drum"]
    assert read_shots(shots)["the sound of bass drum"] == ("FSDKaggle2018.audio_train/train1.wav",)
    for name, data in fsd().items():
        (tmp_path / name).write_bytes(data)
    server.stop()
    with pytest.raises(DownloadError, match=r"could not be downloaded .* fetch musdb18hq\.zip elsewhere and save"):
        fetch("musdb18-hq", tmp_path)
    assert fetch("fsdkaggle2018", tmp_path)[1][0].read_text() == clips.read_text(), "archives brought by hand"


@pytest.mark.usefixtures("server")
def test_stems_and_captions_are_listed(tmp_path: Path) -> None:
    _, (songs,) = fetch("musdb18-hq", tmp_path / "musdb")
    (parts,) = read_parts(songs, songs.parent)
    assert parts.task == "music"
    caps = tmp_path / "caps"
    _, listed = fetch("audiocaps", caps)
    train = [row for _, row in read_table(caps / "train.csv", ("file_name", "caption", "caption_2"))]
    assert [path.name for path in listed] == ["train.csv", "test.csv"]
    assert [row["file_name"] for row in train] == [f"{VIDEOS[0]}.wav", f"{VIDEOS[1]}.wav"], "no sound is there yet"
    for name in (f"wav/Y{VIDEOS[0]}_30.wav", f"{VIDEOS[1]}.wav", "unrelated-11.wav"):
        (caps / name).parent.mkdir(exist_ok=True)
        (caps / name).write_bytes(sound(3))
    assert fetch("audiocaps", caps)[1] == [caps / "train.csv"]
    (first, second) = read_corpus(caps / "train.csv", labelling=CAPTIONS).clips
    assert (first.path.name, second.path.name) == (f"Y{VIDEOS[0]}_30.wav", f"{VIDEOS[1]}.wav")
    assert first.captions == (f"Sound {VIDEOS[0]}; and 0", f"Sound {VIDEOS[0]}; and 2")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"checksum": f"md5:{'0' * 32}"}, "is not what is stated of it: expected MD5"),
        ({"size": 5}, "longer than the 5 bytes"),
        ({"size": 10**12}, r"needed|ended after|could not be downloaded"),
        ({"checksum": "sha1:0"}, "does not state"),
        ({"key": "other"}, "record may be restricted"),
    ],
)
def test_what_its_server_states_otherwise_is_refused(
    server: HubServer, tmp_path: Path, wrong: dict[str, object], said: str
) -> None:
    serve_record(server, DATA_SETS["fsdkaggle2018"].record, fsd(), **wrong)
    with pytest.raises((DownloadError, OutputError), match=said):
        fetch("fsdkaggle2018", tmp_path / "fsd")
    assert not list((tmp_path / "fsd").iterdir())


def test_a_known_archive_is_read_once_and_another_refused(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sha256,) = DATA_SETS["musdb18-hq"].sha256.values()
    reads: list[str] = []
    monkeypatch.setattr(Path, "open", _noting(Path.open, reads))
    assert fetch("musdb18-hq", tmp_path / "musdb")[0] == {"musdb18hq.zip": sha256}
    assert len([name for name in reads if "musdb18hq.zip" in name]) == 1
    serve_record(server, DATA_SETS["musdb18-hq"].record, {"musdb18hq.zip": zipped({"other": b"x"})})
    with pytest.raises(DownloadError, match=f"is not what is stated of it: expected SHA-256 {sha256}, got"):
        fetch("musdb18-hq", tmp_path / "other")


def _noting(call: Callable[..., Any], reads: list[str]) -> Callable[..., Any]:
    def opened(path: Path, mode: str = "r", *rest: Any, **settings: Any) -> Any:
        if "r" in mode:
            reads.append(str(path))
        return call(path, mode, *rest, **settings)

    return opened


def _link(packed: ZipFile) -> None:
    link = ZipInfo("inside/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    packed.writestr(link, "/etc/passwd")


@pytest.mark.parametrize(
    "add",
    [
        lambda packed: packed.writestr("../evil.txt", "x"),
        lambda packed: packed.writestr("inside/../../evil.txt", "x"),
        lambda packed: packed.writestr("/evil.txt", "x"),
        lambda packed: packed.writestr("..\\evil.txt", "x"),
        _link,
    ],
)
def test_nothing_is_unpacked_elsewhere(tmp_path: Path, add: Callable[[ZipFile], None]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    with ZipFile(folder / "a.zip", "w") as packed:
        packed.writestr("inside/good.txt", "x")
        add(packed)
    with pytest.raises(DownloadError, match="would lie outside of"):
        unpack(folder / "a.zip", folder)
    assert [path.name for path in folder.iterdir()] == ["a.zip"]
    assert not (tmp_path / "evil.txt").exists()


def test_a_damaged_archive_and_another_layout_are_refused(tmp_path: Path, server: HubServer) -> None:
    data = bytearray(esc50())
    data[200] ^= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(DownloadError, match=r"a\.zip: cannot be unpacked"):
        unpack(tmp_path / "a.zip", tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "ESC"))] == []
    server.add_plain("/karolpiczak/ESC-50/archive/refs/heads/master.zip", zipped({"ESC-50-master/x": b""}))
    with pytest.raises(ManifestError, match=r"has no esc50\.csv"):
        fetch("esc50", tmp_path / "esc50")


def test_what_may_not_be_fetched_is_told(clapsep: Clapsep, tmp_path: Path) -> None:
    for name, said in (*OWN_COPY.items(), ("esc5", "there are esc50")):
        done = clapsep("mixtures", "fetch", name, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
    assert not list(tmp_path.iterdir())

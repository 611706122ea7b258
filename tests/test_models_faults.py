"""Tests `clapsep models` end to end with a model from a plain address, and faults of download and conversion."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_MINI, Clapsep, add_family
from hub_server import Faults, HubServer
from huggingface_hub import constants
from tiny_clapsep import ROBERTA, write_checkpoints

from clapsep_cli.families import mini
from clapsep_cli.models.mini import Mini
from clapsep_cli.registry import MODELS, Entry, Traits, WebFile
from clapsep_cli.store import download, library
from clapsep_cli.store.checkpoint import save_part
from clapsep_cli.store.released import read_checkpoint

PATH = "/media/owner/name/0123456/model.pth"


def convert_alone(files: Sequence[Path], folder: Path, **notes: str) -> None:
    """From a checkpoint of a separator and nothing else."""
    (file,) = files
    save_part(folder, "separator", "alone", TINY_MINI, read_checkpoint(file), **notes)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "carried" / "model.pth"
    path.parent.mkdir()
    torch.save(Mini(TINY_MINI).state_dict(), path)
    return path


@pytest.fixture
def server(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Serves the one file of the model `alone`, whose family has no query encoders. The home is empty."""
    data, family = checkpoint.read_bytes(), replace(mini.FAMILY, text=None, audio=None)
    remote = WebFile(url=f"https://files.example{PATH}", size=len(data), sha256=hashlib.sha256(data).hexdigest())
    entry = Entry(name="alone", family="alone", licence="AGPL-3.0", about="a separator", remotes=(remote,))
    add_family(monkeypatch, "alone", Traits(("separator",), ("text",)), family, convert_alone)
    monkeypatch.setitem(MODELS, "alone", entry)
    monkeypatch.setenv("CLAPSEP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "PAUSES_S", ())
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with HubServer() as server:
        server.add_plain(PATH, data)
        monkeypatch.setenv("CLAPSEP_ENDPOINT", server.url)
        yield server


def below(folder: Path) -> set[str]:
    """The files below a folder; locks aside."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(file) for file in files if file.suffix != ".lock"}


def test_the_way_of_a_model_from_a_plain_address(
    server: HubServer, clapsep: Clapsep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    entry = MODELS["alone"]
    listed = clapsep("models", "list", cwd=tmp_path).stdout
    assert f"not here; {download.amount(entry.download_bytes)} to download" in listed
    server.faults = Faults(cut_after=1000)
    failed = clapsep("models", "download", "alone", cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (3, "")
    licence, reason = failed.stderr.splitlines()
    assert licence == f"clapsep: downloading alone: {download.amount(entry.download_bytes)}; licence: AGPL-3.0"
    assert reason.endswith("clapsep models convert alone --from model.pth")
    server.faults = Faults()
    done = clapsep("models", "download", "alone", "--keep-original", cwd=tmp_path)
    folder = Path(done.stdout.strip())
    (row,) = [row for row in json.loads(clapsep("models", "list", "--json", cwd=tmp_path).stdout) if row["here"]][1:]
    assert (row["name"], row["folder"], row["licence"]) == ("alone", str(folder), "AGPL-3.0")
    assert row["remotes"][0]["url"] == entry.remotes[0].url
    assert clapsep("models", "path", "alone", cwd=tmp_path).stdout == f"{folder}\n"
    kept = home / "downloads" / entry.remotes[0].sha256[:12] / "model.pth"
    sound = clapsep("models", "verify", "alone", cwd=tmp_path)
    assert sound.stdout == f"{folder / 'separator.safetensors'}: intact\n{kept}: intact\n"
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    damaged = clapsep("models", "verify", "alone", cwd=tmp_path)
    assert damaged.returncode == 3
    assert f"is not what SHA256SUMS in its folder says; delete {kept.parent}" in damaged.stderr
    removed = clapsep("models", "rm", "alone", cwd=tmp_path).stdout
    assert set(removed.splitlines()) == {
        f"{folder}: removed",
        f"{kept.parent}: removed",
    }
    assert below(home) == set()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused = clapsep("models", "download", "alone", cwd=tmp_path)
    assert (refused.returncode, refused.stderr.count("\n")) == (3, 1)
    carried = clapsep("models", "convert", "alone", "--from", tmp_path / "carried" / "model.pth", cwd=tmp_path)
    assert (carried.returncode, carried.stdout, carried.stderr) == (0, f"{folder}\n", "")
    assert (tmp_path / "carried" / "model.pth").exists()


def test_the_licence_is_stated_before_the_first_byte(server: HubServer, tmp_path: Path) -> None:
    said: list[str] = []

    def say(line: str) -> None:
        assert server.gets() == []
        said.append(line)

    library.install("alone", say=say)
    assert len(server.gets()) == 1
    assert said[0].endswith("; licence: AGPL-3.0")


def test_originals_go_after_conversion(server: HubServer, clapsep: Clapsep, tmp_path: Path) -> None:
    assert clapsep("models", "download", "alone", cwd=tmp_path).returncode == 0
    assert not list((tmp_path / "home" / "downloads").rglob("model.pth*"))


def test_rm_takes_what_a_broken_download_left(server: HubServer, clapsep: Clapsep, tmp_path: Path) -> None:
    server.faults = Faults(cut_after=1000)
    clapsep("models", "download", "alone", cwd=tmp_path)
    removed = clapsep("models", "rm", "alone", cwd=tmp_path)
    assert removed.returncode == 0
    assert [line.rpartition(".")[2] for line in removed.stdout.splitlines()] == ["partial: removed"]
    assert below(tmp_path / "home") == set()
    again = clapsep("models", "rm", "alone", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (3, "")
    assert again.stderr == "clapsep: there is nothing of alone here: clapsep models list shows all models\n"


class Evil:
    """Leaves a mark if it is ever unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def _dumped(thing: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(thing))


_NESTED: list[Callable[[Any, Any], Any]] = [
    lambda evil, tensors: evil,
    lambda evil, tensors: {**tensors, "module.evil": evil},
    lambda evil, tensors: {"state_dict": {**tensors, "evil": evil}},
    lambda evil, tensors: {"model": {**tensors, "evil": evil}},
    lambda evil, tensors: {"state_dict": tensors, "optimizer": {"state": {0: {"exp_avg": evil}}}},
]
_WRITTEN: list[Callable[[Any, Path], None]] = [
    torch.save,
    lambda thing, path: torch.save(thing, path, _use_new_zipfile_serialization=False),
    _dumped,
]


@pytest.mark.parametrize("nest", _NESTED)
@pytest.mark.parametrize("write", _WRITTEN)
def test_a_malicious_file_that_was_carried_here(
    clapsep: Clapsep,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nest: Callable[[Any, Any], Any],
    write: Callable[[Any, Path], None],
) -> None:
    monkeypatch.setenv("CLAPSEP_HOME", str(tmp_path / "home"))
    mark, path = tmp_path / "owned", tmp_path / "evil.pt"
    write(nest(Evil(mark), {"a": torch.zeros(1)}), path)
    done = clapsep("models", "convert", "clapsep", "--from", path, cwd=tmp_path)
    assert done.returncode == 3
    warning, reason = done.stderr.splitlines()
    assert "evil.pt is not the released file that is pinned here" in warning
    assert "evil.pt: " in reason
    assert "refused" in reason
    assert not mark.exists()
    assert below(tmp_path / "home") == set()


CONVERT = """
import sys
from tiny_clapsep import convert_tiny
from clapsep_cli.store import checkpoint, convert_clapsep, released

convert_clapsep.convert_clapsep = convert_tiny
stop_at, save = sys.argv.pop(1), checkpoint.save_part

def save_part(folder, part, *rest, **notes):
    save(folder, part, *rest, **notes)
    if part == stop_at:
        print(folder, flush=True)
        sys.stdin.read()

released.save_part = save_part
from clapsep_cli.cli.app import run
run()
"""


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_conversion_that_is_stopped_is_not_believed(by: int, tmp_path: Path) -> None:
    """Two parts of three are written by then. The next conversion sweeps up what the killed one has left."""
    files = write_checkpoints(tmp_path / "released", ROBERTA)
    environment = os.environ | {
        "CLAPSEP_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1]))),
        "OMP_NUM_THREADS": "1",
    }

    def start(stop_at: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CONVERT, stop_at, "models", "convert", "clapsep", "--from", *map(str, files)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    models = tmp_path / "home" / "models"
    with start("text") as stopped:
        assert stopped.stdout is not None
        unfinished = Path(stopped.stdout.readline().strip())
        written = {path.name for path in unfinished.iterdir()}
        stopped.send_signal(by)
        _, said = stopped.communicate(timeout=60)
    assert written == {"separator.safetensors", "text.safetensors"}
    assert stopped.returncode == (130 if by == signal.SIGINT else -by)
    assert "Traceback" not in said
    if by == signal.SIGINT:
        assert below(models) == set()
    with start("none") as again:
        out, said = again.communicate(timeout=60)
    assert again.returncode == 0, said
    assert list(models.iterdir()) == [Path(out.strip())]
    assert "audio.safetensors" in below(Path(out.strip()))

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import constants
from hypothesis import HealthCheck, settings
from released import write_released
from tiny_clapsep import ROBERTA, convert_tiny, write_checkpoints
from torch import Tensor

from clapsep_cli.cli.app import main
from clapsep_cli.dsp import HOP, N_FFT, RATE_HZ
from clapsep_cli.families.base import Family, load_family
from clapsep_cli.models.base import AudioEncoder, MaskSeparator, Separator, TextEncoder
from clapsep_cli.models.mini import Mini, MiniConfig
from clapsep_cli.models.mini_queries import MiniAudio
from clapsep_cli.registry import FAMILIES, MODELS, Traits, WebFile, weights_folder
from clapsep_cli.store import convert_clapsep, convert_tuss
from clapsep_cli.store.checkpoint import Model, save_part
from clapsep_cli.store.convert_audiosep import convert_audiosep
from clapsep_cli.store.library import load_model, write_tokenizer

# The same examples at every run, so that a change fails for its own reasons alone; `make fuzz` looks for new ones.
# No example has a deadline: a machine may be slow for reasons of its own.
settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

TINY_MINI = MiniConfig(query=16, channels=(8, 8, 8), narrow=2, hidden=8, fine=2)


# Started in the background, the tests and their processes would ignore what tests send to stop them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


class Fixed(MaskSeparator):
    """Answers every window with one mask: a number, or values per bin, or one number per frame of the window."""

    rate = RATE_HZ

    def __init__(self, mask: float | Tensor, window: int = 10 * RATE_HZ) -> None:
        super().__init__()
        self.window = window
        self.value = torch.as_tensor(mask, dtype=torch.float32)
        self.heard: list[Tensor] = []

    def lower(self, dtype: torch.dtype) -> None:
        pass

    def encode(self, mixture: Tensor) -> Tensor:
        assert mixture.shape == (1, self.window)
        self.heard.append(mixture[0].clone())
        return mixture

    def mask(self, features: Tensor, condition: Tensor) -> Tensor:
        return self.value.expand(max(len(features), len(condition)), self.window // HOP + 1, N_FFT // 2 + 1)


class OneHot(TextEncoder):
    def embed(self, texts: Sequence[str]) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor([len(text) % 4 for text in texts]), 4).float()


class Mean(AudioEncoder):
    rate = RATE_HZ

    def embed(self, audio: Tensor) -> Tensor:
        return torch.nn.functional.normalize(torch.stack([audio.mean(), audio.std(), audio[0], audio[-1]]), dim=0)


class Stub(Model):
    """The bundled model with a given separator, and with encoders and the family of CLAPSep, which knows any word."""

    def __init__(self, separator: Separator[Any]) -> None:
        super().__init__("stub", weights_folder() / "mini", torch.device("cpu"), precision="high")
        self.kind, self.identity = load_family("clapsep"), "stub"
        self.separator, self.text, self.audio = separator, OneHot(), Mean()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mini model of random weights with the bundled text encoder."""
    folder = tmp_path_factory.mktemp("tiny")
    for name in ("text.safetensors", "tokenizer.json"):
        shutil.copy(weights_folder() / "mini" / name, folder / name)
    torch.manual_seed(0)
    for part, network in (("separator", Mini(TINY_MINI)), ("audio", MiniAudio(TINY_MINI))):
        save_part(folder, part, "mini", TINY_MINI, network.state_dict())
    return folder


@pytest.fixture(scope="session")
def audiosep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny AudioSep as it is converted."""
    from audiosep_stand_in import TINY, save_released, tiny_checkpoint

    place = tmp_path_factory.mktemp("audiosep")
    save_released(place / "a.ckpt", tiny_checkpoint())
    (place / "model").mkdir()
    convert_audiosep([place / "a.ckpt"], place / "model", TINY)
    write_tokenizer(MODELS["audiosep"], place / "model")
    return place / "model"


@pytest.fixture(scope="session")
def tuss_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TUSS of a few thousand weights that hears a fifth of a second."""
    from tuss_stand_in import TINY, released

    folder = tmp_path_factory.mktemp("tuss")
    save_part(folder, "separator", "tuss", TINY, convert_tuss.convert(released(TINY), TINY))
    return folder


@pytest.fixture
def tiny(tiny_folder: Path) -> Model:
    return load_model(tiny_folder, "cpu", "high")


@pytest.fixture(scope="session")
def released_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLAPSep model of the released size with stand-in weights."""
    folder = tmp_path_factory.mktemp("released")
    write_released(folder)
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and a `clapsep` that is made from tiny checkpoints."""
    monkeypatch.setenv("CLAPSEP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(convert_clapsep, "convert_clapsep", convert_tiny)
    return tmp_path / "home"


def add_family(
    patch: pytest.MonkeyPatch, name: str, traits: Traits, family: Family[Any, Any, Any], convert: Callable[..., None]
) -> None:
    """Make a further family known, as its modules in `families/` and `store/` would."""
    patch.setitem(FAMILIES, name, traits)
    patch.setitem(sys.modules, f"clapsep_cli.families.{name}", SimpleNamespace(FAMILY=family))
    patch.setitem(sys.modules, f"clapsep_cli.store.convert_{name}", SimpleNamespace(**{f"convert_{name}": convert}))


@pytest.fixture
def served(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server on the loopback that has the files of a tiny `clapsep`."""
    with HubServer() as server:
        remotes = tuple(serve(server, path) for path in write_checkpoints(tmp_path / "served", ROBERTA))
        monkeypatch.setitem(MODELS, "clapsep", replace(MODELS["clapsep"], remotes=remotes))
        monkeypatch.setenv("CLAPSEP_ENDPOINT", server.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


def serve(server: HubServer, path: Path) -> WebFile:
    """Serve a file, and pin it."""
    data = path.read_bytes()
    server.add_plain(f"/{path.name}", data)
    return WebFile(url=f"https://some.one/{path.name}", size=len(data), sha256=hashlib.sha256(data).hexdigest())


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


class Clapsep(Protocol):
    def __call__(self, *arguments: str | Path, cwd: Path) -> Done: ...


@pytest.fixture
def clapsep(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Clapsep:
    """The command, run in this process: importing torch for every call would take most of the time."""

    def run(*arguments: str | Path, cwd: Path) -> Done:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["clapsep", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, captured.out, captured.err)

    return run

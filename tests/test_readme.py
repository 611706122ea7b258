"""Runs the commands of README in their order, in a folder such as a reader might have.

The networks are tiny, presets of training take a step or two, and originals come from a server on the loopback.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from clips import write_clips
from conftest import TINY_MINI, Clapsep, serve
from data_sets import VIDEOS, serve_data_sets
from hub_server import HubServer
from media_files import encode
from recordings import noise
from tuss_stand_in import TINY, convert_tiny, released, save_released
from typer.main import get_command

from clapsep_cli.cli.app import app
from clapsep_cli.registry import MODELS
from clapsep_cli.store import convert_tuss
from clapsep_cli.training.recipes.presets import PRESETS

pytest.importorskip("lightning_fabric", reason="training takes the packages of clapsep[train]")
pytest.importorskip("starlette", reason="the page takes the packages of clapsep[ui]")
pytest.importorskip("uvicorn", reason="the page takes the packages of clapsep[ui]")

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = (ROOT / "EXAMPLES.md").read_text()
SUFFIXES = (".wav", ".flac", ".png", ".m4a", ".mkv")
# What cannot be had here: four devices, and the 40 clips of a sound that ten shots beside five mixtures of each take.
INSTEAD = {"--devices 4": "--devices 1", "--shots 10": "--shots 1"}
INSTALLERS = ("pip", "pipx", "uv")  # need a network, and change the environment
STAND_INS = {
    "ffmpeg": "cat mix.wav",
    "ffplay": "cat > played.wav",
    "clapsep": f'exec "{sys.executable}" -m clapsep_cli "$@"',
}


@dataclass(frozen=True)
class Block:
    line: int  # of README.md
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.strip()]


def blocks(page: str = README) -> Iterator[Block]:
    for found in re.finditer(r"^```(\w+)\n(.*?)^```$", page, re.M | re.S):
        yield Block(page[: found.start()].count("\n") + 2, found[1], found[2])


@pytest.fixture
def place(tmp_path: Path, served: HubServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder, with every recording that README names, and commands on the PATH that it calls."""
    place = tmp_path / "reader"
    for folder in ("barks", "recordings/april"):
        (place / folder).mkdir(parents=True)
    for seed, name in enumerate(re.findall(r"(?:clapsep extract|separate|--query-audio|siren=)\s*(\w+\.wav)", README)):
        soundfile.write(place / name, noise(120_000, 2, seed=seed), 24_000, "PCM_16")
    for name in ("barks/one.wav", "barks/two.wav", "recordings/a.wav", "recordings/april/b.wav"):
        soundfile.write(place / name, noise(24_000, 1), 24_000, "PCM_16")
    (tmp_path / "flat").mkdir()
    rows = write_clips(tmp_path / "flat").read_text().splitlines()
    for clip in (tmp_path / "flat").glob("*.wav"):
        (place / "clips" / clip.stem[:-1]).mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, place / "clips" / clip.stem[:-1])
    listed = [f"clips/{row.split(',')[2]}/{row}" for row in rows[1:]]
    for name in ("mine.csv", "large.csv"):
        (place / name).write_text("\n".join([rows[0], *listed]) + "\n")
    for kept in ("clap.pt", "clapsep.ckpt"):
        names = {"clap.pt": "music_audioset_epoch_15_esc_90.14.pt", "clapsep.ckpt": "best_model.ckpt"}
        shutil.copy(tmp_path / "served" / kept, place / names[kept])
    (tmp_path / "bin").mkdir()
    for name, script in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setattr("webbrowser.open", lambda address: True)
    monkeypatch.setattr("clapsep_cli.page.server.Page.run", lambda self: None)  # which has tests of its own
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return place


@pytest.fixture
def small(place: Path, served: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets that take a step or two, and a TUSS of a few thousand weights in place of the released one."""
    mini: dict[str, object] = {
        "mini": {**dataclasses.asdict(TINY_MINI), "seconds": 2},
        "separator": {"steps": 1, "batch": 2},
        "draw": {"seconds": 1.0},
        "validation_mixtures": 1,
    }
    paper: dict[str, object] = {"batch": 2, "epochs": 1, "precision": "32-true"}
    monkeypatch.setitem(PRESETS, "mini", replace(PRESETS["mini"], settings=mini))
    monkeypatch.setitem(PRESETS, "clapsep-hybrid", replace(PRESETS["clapsep-hybrid"], settings=paper))
    text = {**PRESETS["clapsep-text"].settings, **paper}
    monkeypatch.setitem(PRESETS, "clapsep-text", replace(PRESETS["clapsep-text"], settings=text))
    monkeypatch.setattr(convert_tuss, "convert_tuss", convert_tiny)
    path = tmp_path / "served" / "tuss.pth"
    save_released(path, released(TINY))
    monkeypatch.setitem(MODELS, "tuss-medium", replace(MODELS["tuss-medium"], remotes=(serve(served, path),)))


def run(command: str, place: Path, clapsep: Clapsep) -> None:
    """Run a line in `place`. Pipes go through a shell, with the whole command."""
    if "|" in command:
        shell = subprocess.run(["sh", "-ec", command], cwd=place, capture_output=True, text=True, timeout=120)
        assert shell.returncode == 0, f"{command}: {shell.stderr}"
        assert soundfile.info(place / "played.wav").frames == soundfile.info(place / "mix.wav").frames
        return
    program, *arguments = shlex.split(command, comments=True)
    assert program == "clapsep", f"{command}: not a command that this test knows"
    done = clapsep(*arguments, cwd=place)
    assert done.returncode == 0, f"{command}: {done.stderr}"


def heard(place: Path) -> set[Path]:
    return {path for path in place.rglob("*") if path.suffix in SUFFIXES}


def sections() -> dict[str, list[Block]]:
    """Blocks of shell commands, by the heading they stand under. A section needs nothing that another one wrote."""
    found: dict[str, list[Block]] = {}
    for block in blocks():
        if block.language == "sh":
            above = "\n".join(README.splitlines()[: block.line])
            headings = re.findall(r"^## (.*)$", above, re.M)
            found.setdefault(headings[-1] if headings else "clapsep", []).append(block)
    return found


@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore::UserWarning:lightning_fabric")
@pytest.mark.parametrize("section", sections())
def test_every_shell_line_runs(section: str, place: Path, clapsep: Clapsep) -> None:
    inputs = heard(place)
    for block in sections()[section]:
        for at, line in enumerate(block.commands):
            command, _, comment = line.partition("#")
            program, *arguments = shlex.split(command)
            if program in INSTALLERS:
                assert "." in arguments, f"{line}: installs something else"
                continue
            if program == "make":
                assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.M), line
                continue
            for wanted, instead in INSTEAD.items():
                command = command.replace(wanted, instead)
            run(command, place, clapsep)
            if arguments[:2] == ["mixtures", "render"]:  # what another program would make of them
                shutil.copytree(place / "wavs" / "mixture", place / "theirs")
                inputs |= heard(place / "theirs")
            made = heard(place) - inputs
            if arguments[0] in ("extract", "separate"):
                assert made, f"README.md:{block.line + at}: wrote nothing"
            base = next((name.removesuffix(".wav") for name in arguments if name.endswith(".wav")), "")
            for name in re.findall(r"(?<!\w)[\w-]*\.[\w.-]+\.wav|(?<=, )\.\w+\.wav", comment):
                assert place / (base + name if name.startswith(".") else name) in made, f"{line}: no {name}"
            for path in made:  # most lines of a block are alternatives
                path.unlink()


RECIPES = (ROOT / "RECIPES.md").read_text()


def write_archives(place: Path) -> None:
    """Small stand-ins of what the recipes begin with, in the layouts of the data sets."""

    def sound(name: str, seed: int, seconds: float = 0.5) -> None:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(place / name, noise(round(16_000 * seconds), 1, seed=seed), 16_000, "PCM_16")

    for n, name in enumerate(VIDEOS):
        sound(f"audiocaps/wav/Y{name}_30.wav", 30 + n)
    for n, instrument in enumerate(("cello", "flute")):
        sound(f"MUSIC21/{instrument}/{n}.wav", 50 + n)
    for n, stem in enumerate(("mix", "speech", "music", "sfx")):
        sound(f"dnr_v2/tt/1002/{stem}.wav", 70 + n)


@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore::UserWarning:lightning_fabric")
def test_every_recipe_runs_on_stand_ins(
    place: Path, clapsep: Clapsep, served: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_data_sets(served, monkeypatch)
    write_archives(place)
    lines = [
        line for block in blocks(RECIPES) for line in ([block.text] if block.language == "python" else block.commands)
    ]
    assert len(lines) > 20
    for line in lines:
        if "\n" in line:
            monkeypatch.chdir(place)
            exec(line, {})
        elif line.startswith("clapsep "):
            # BSS-eval takes most of the time, and README's lines have it; two clips have no ten shots.
            faster = " --no-bss" if line.startswith("clapsep evaluate") and not re.search("no-bss|tuss", line) else ""
            run(line.replace("--shots 10", "--shots 1") + faster, place, clapsep)
        else:
            shell = subprocess.run(["sh", "-ec", line], cwd=place, capture_output=True, text=True, timeout=60)
            assert shell.returncode == 0, f"{line}: {shell.stderr}"
    for made in ("esc50.html", "systems.html", "audiocaps.html", "fig8.npz", "runs/text/separator.safetensors"):
        assert (place / made).stat().st_size, made
    assert (place / "scores" / "fsd" / "scores.csv").read_text().count("both text+1 shot") == 2


def test_the_python_block_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for block in blocks():
        if block.language == "python":
            exec(block.text, {})
    mixture, rate = soundfile.read(place / "mix.wav")
    dog, rate_out = soundfile.read(place / "dog.wav")
    assert (dog.shape, rate_out) == (mixture.shape, rate)
    assert 0 < np.square(dog).mean() < np.square(mixture).mean()


@pytest.mark.usefixtures("small")
def test_every_recipe_runs(place: Path, clapsep: Clapsep, monkeypatch: pytest.MonkeyPatch) -> None:
    """EXAMPLES.md, in a folder with the recordings that it names."""
    pytest.importorskip("av", reason="films take the packages of clapsep[av]")
    pytest.importorskip("matplotlib", reason="pictures take the packages of clapsep[plot]")
    for seed, name in enumerate(("talk.wav", "dawn.wav", "wren.wav", "incoming/new.wav")):
        (place / name).parent.mkdir(exist_ok=True)
        soundfile.write(place / name, noise(100_000, 2, seed=seed), 24_000, "PCM_16")
    soundfile.write(place / "bats.wav", noise(400_000, 1), 384_000, "PCM_16")
    encode(place / "film.mkv", noise(6, 100_000), 48_000, "flac", pictures=10)
    (place / "birds.txt").write_text("a bird\nan owl\n")
    inputs = {path for path in place.rglob("*") if path.is_file()}
    recipes = list(blocks(EXAMPLES))
    assert len(re.findall(r"^## \d+\. ", EXAMPLES, re.M)) == len(recipes) == 10
    for block in recipes:
        if block.language == "python":
            monkeypatch.chdir(place)
            exec(block.text, {})
            assert {path.name for path in (place / "parts").iterdir()} == {"target.wav", "residual.wav"}
        for line in block.commands if block.language == "sh" else ():
            command, _, comment = line.partition("#")
            run(command.replace("--watch incoming", "incoming"), place, clapsep)  # it would not end
            made = {path for path in place.rglob("*") if path.is_file()} - inputs
            assert made or " hear " in command or "--min-presence" in command, f"EXAMPLES.md: {line} wrote nothing"
            for name in re.findall(r"[\w-]+\.[\w.-]+\.\w+", comment):
                assert place / name in made, f"{line}: no {name}"
            for path in made:
                path.unlink()


def test_no_block_is_of_another_kind() -> None:
    assert {block.language for block in blocks()} == {"sh", "python", "bash", "yaml"}
    assert sum(len(block.commands) for block in blocks() if block.language == "sh") > 25


def test_extras_and_files_that_are_named_exist() -> None:
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    for extra in re.findall(r"clapsep\[(\w+)\]", README):
        assert re.search(rf"^{extra} = \[", extras, re.M), extra
    for link in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
    headings = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", README, re.M)
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        assert anchor in headings, anchor


@pytest.mark.parametrize("language", ["bash", "yaml"])
def test_options_of_commands_for_other_machines_exist(language: str) -> None:
    known = {name: {o for p in command.params for o in p.opts} for name, command in get_command(app).commands.items()}
    seen = 0
    for block in blocks():
        for line in block.commands if block.language == language else ():
            line = re.sub(r"[][,\"']", " ", line.partition("  #")[0])
            command = line.rpartition("clapsep ")[2]
            if line.startswith("#") or "clapsep " not in line:
                continue
            name, *words = command.replace("'", " ").split()
            if name in known:
                assert {word.split("=")[0] for word in words if re.match("--?[a-z]", word)} <= known[name], line
                seen += 1
    assert seen

"""Any arguments end in an exit code and one line, never in a traceback or leftover files.

`HYPOTHESIS_PROFILE=search pytest tests/test_any_arguments.py` tries 2,000 lines instead of a few.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import typer
from conftest import Clapsep, Stub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stand_ins import Moody

from clapsep_cli.cli.app import app
from clapsep_cli.store import library

COMMANDS: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
LEFT_OUT = {"--help", "--model", "--model-dir", "--device", "--precision", "--threads", "--plot"}

RECORDINGS = [
    "mix.wav",
    "two.flac",
    "bad.wav",
    "empty.wav",
    "none.wav",
    "in",
    "*.wav",
    "in/**/*",
    "@list.txt",
    "[",
    "-",
]
ODD = [
    "",
    " ",
    "-",
    "--",
    "~",
    "nan",
    "inf",
    "-1",
    "0",
    "1e999",
    "0x10",
    "1,5",
    "犬",
    "é",
    "a=b",
    "=",
    "a=",
    "a=mix.wav",
]
ODD += [
    "../x",
    "/",
    ".",
    "..",
    "CON",
    "{",
    "}",
    "{stem}",
    "{part}.{ext}",
    "{query}-{part}.{ext}",
    "{x}",
    "{stem!r}",
    "%s",
]
ODD += [
    "\n",
    "\t",
    "\x1b[31m",
    "\u202e",
    "x" * 300,
    os.fsdecode(b"\xff\xfe"),
    "*" * 40,
    "[" * 40,
    "@",
    "@none",
    "mix.wav",
]
NUMBERS = ["0", "1", "2", "7", "-3", "0.5", "1:02", "99:99", "0-1", "0.1-0.2", "1-0", "5-", "3:2-3:4", "1e3", "²", "１"]
WORDS = [
    "wav",
    "flac",
    "ogg",
    "opus",
    "mp3",
    "pcm16",
    "pcm24",
    "float",
    "warn",
    "rescale",
    "error",
    "auto",
    "json",
    "none",
]
WORDS += [
    "dog",
    "rain",
    "speech",
    "speech sfx",
    "residual",
    "target",
    "mixture",
    "music",
    "cinematic",
    "out",
    "in",
    "jobs.csv",
]
values = st.sampled_from([*ODD, *NUMBERS, *WORDS, *RECORDINGS]) | st.text(max_size=8).filter(
    lambda text: "\0" not in text
)


inside = values.filter(lambda text: ".." not in text and not text.startswith("/"))  # for where to write


PLAUSIBLE = {
    "--pos": ["dog", "犬", "a dog barking"],
    "--neg": ["rain", "dog"],
    "--query-audio": ["two.flac", "in"],
    "--neg-audio": ["in/3.wav", "bad.wav"],
    "--pos-span": ["0-0.2", "0.1-0.3", "0-9"],
    "--neg-span": ["0.3-0.4"],
    "--alpha": ["0", "0.3", "1"],
    "--target": ["a=dog", "b=two.flac", "犬=cat"],
    "--min-presence": ["-1", "0", "0.5"],
    "--prompts": ["speech", "rain", "dog"],
    "--only": ["rain"],
    "--start": ["0", "0.1", "0:00.2"],
    "--end": ["0.3", "0:00.4", "9"],
    "--out": ["out", "in", "deep/er", "-"],
    "--filename": ["{stem}-{part}.{ext}", "{query}/{part}.{ext}"],
    "--format": ["wav", "flac", "ogg", "opus", "mp3"],
    "--subtype": ["pcm16", "pcm24", "float"],
    "--clip": ["warn", "rescale", "error"],
    "--progress": ["auto", "json", "none"],
    "--batch-size": ["0", "1", "5"],
    "--jobs": ["1", "3"],
}


def options(name: str) -> dict[str, Any]:
    """The options of a command, by their long names."""
    found = {o: p for p in COMMANDS[name].params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")}
    return {option: parameter for option, parameter in found.items() if option not in LEFT_OUT}


@st.composite
def wild(draw: st.DrawFn) -> list[str]:
    """Any options with any values."""
    name = draw(st.sampled_from(["extract", "separate"]))
    pieces = [[item] for item in draw(st.lists(st.sampled_from(RECORDINGS) | values, max_size=3))]
    for option in draw(st.lists(st.sampled_from(sorted(options(name))), max_size=6)):
        value = inside if option == "--out" else values
        pieces.append([option, *([] if options(name)[option].is_flag else [draw(value)])])
    return [name, *(word for piece in draw(st.permutations(pieces)) for word in piece)]


@st.composite
def tame(draw: st.DrawFn) -> list[str]:
    """Options with values that they may have, in any combination."""
    name = draw(st.sampled_from(["extract", "separate"]))
    line = [name, *draw(st.lists(st.sampled_from(["mix.wav", "two.flac", "in", "bad.wav"]), min_size=1, max_size=3))]
    line += (
        draw(st.sampled_from([["--pos", "dog"], ["--target", "c=dog"], ["--neg", "rain"]])) if name == "extract" else []
    )
    line += ["--prompts", "dog", "rain"] if name == "separate" else []
    for option in draw(st.lists(st.sampled_from(sorted(options(name))), max_size=6, unique=True)):
        if options(name)[option].is_flag:
            line.append(option)
        elif option in PLAUSIBLE:
            line += [option, draw(st.sampled_from(PLAUSIBLE[option]))]
    return line


def prepare(folder: Path) -> None:
    (folder / "in" / "deep").mkdir(parents=True)
    noise = 0.1 * np.random.default_rng(0).standard_normal((4000, 2))
    for name in ("mix.wav", "two.flac", "in/3.wav", "in/deep/mix.wav"):
        soundfile.write(folder / name, noise, 8000)
    (folder / "bad.wav").write_bytes(b"RIFF\x24\0\0\0WAVEfmt ")
    (folder / "empty.wav").touch()
    (folder / "list.txt").write_text("mix.wav\n# two.flac\nin/3.wav\n")
    (folder / "jobs.csv").write_text("file,pos,neg\nmix.wav,dog,\nin/3.wav,,rain\n")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(line=wild() | tame())
def test_any_line_ends_well(clapsep: Clapsep, monkeypatch: pytest.MonkeyPatch, line: list[str]) -> None:
    monkeypatch.setattr(library, "load_model", lambda *_, **__: Stub(Moody()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "here"
        folder.mkdir()
        prepare(folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        done = clapsep(*line, cwd=folder)
        assert done.returncode in (0, 1, 2)
        assert "Traceback" not in done.stdout + done.stderr
        if done.returncode:
            assert done.stderr
        else:
            assert "failed" not in done.stderr
        for path, content in before.items():
            assert path.read_bytes() == content
        assert not [path for path in Path(name).rglob("*") if path.name.endswith(".partial")]
        assert [path.name for path in Path(name).iterdir()] == ["here"]

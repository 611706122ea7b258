"""Tests the command as users see it: files, messages and exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import typer
from conftest import Clapsep

import clapsep_cli
from clapsep_cli.audio.writers import Outputs
from clapsep_cli.cli.app import app
from clapsep_cli.errors import ClapsepWarning
from clapsep_cli.registry import MODELS
from clapsep_cli.store import library
from clapsep_cli.training.recipes.presets import PRESETS

ROOT = Path(__file__).parents[1]


def process(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "clapsep_cli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def mix(tmp_path: Path) -> Path:
    path = tmp_path / "ein Hund im Regen – 犬.wav"
    audio = 0.1 * np.random.default_rng(0).standard_normal((4000, 2))
    soundfile.write(path, audio, 16_000, subtype="PCM_16")
    return path


def test_help_needs_no_torch() -> None:
    code = "import sys, clapsep_cli, clapsep_cli.cli.app; assert not {'torch', 'numpy', 'soundfile'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [("extract", 2), ("extract none.wav --pos dog", 1), ("separate none.wav --task music", 1), ("separate", 2)],
)
def test_a_mistake_is_told_without_torch(arguments: str, exit_code: int, tmp_path: Path) -> None:
    """Which takes a second to import."""
    code = f"""
import sys
from clapsep_cli.cli.app import main
sys.argv = ["clapsep", *{arguments.split()}]
try:
    main()
except SystemExit as ended:
    sys.exit(ended.code if "torch" not in sys.modules else "torch was imported")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == exit_code, done.stderr
    assert done.stderr.startswith("clapsep: ")
    assert "torch was imported" not in done.stderr


def test_help_and_version(clapsep: Clapsep, tmp_path: Path) -> None:
    shown = clapsep("--help", cwd=tmp_path)
    assert shown.returncode == 0
    for command in ("extract", "train", "evaluate"):
        assert command in shown.stdout
    assert clapsep("--version", cwd=tmp_path).stdout == f"clapsep {clapsep_cli.__version__}\n"


def test_extract_writes_target_and_residual_and_says_so(mix: Path, tiny_folder: Path) -> None:
    done = process("extract", mix.name, "--pos", "dog barking", "--neg", "rain", "--model", tiny_folder, cwd=mix.parent)
    assert (done.returncode, done.stderr) == (0, "")
    parts = {part: mix.with_name(f"{mix.stem}.{part}.wav") for part in ("target", "residual")}
    for path in parts.values():
        assert path.name in done.stdout
    total = sum(soundfile.read(path, dtype="int16")[0].astype(int) for path in parts.values())
    np.testing.assert_array_equal(total, soundfile.read(mix, dtype="int16")[0])
    assert sorted(mix.parent.iterdir()) == sorted([mix, *parts.values()])


def test_quiet_prints_nothing_and_out_is_made(clapsep: Clapsep, mix: Path, tiny_folder: Path) -> None:
    arguments = ["extract", mix, "--neg", "rain", "--model", tiny_folder, "-o", "new/folder", "-q"]
    done = clapsep(*arguments, cwd=mix.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(list((mix.parent / "new" / "folder").iterdir())) == 2
    again = clapsep(*arguments, cwd=mix.parent)
    assert again.returncode == 1
    assert "--overwrite" in again.stderr
    assert clapsep(*arguments, "--overwrite", cwd=mix.parent).returncode == 0


def test_quiet_prints_no_notes(
    clapsep: Clapsep, mix: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    """Of falling back to another model, of clipping, of what is left out, and of the library's warnings."""
    soundfile.write(mix, 3 * np.random.default_rng(0).standard_normal(4000), 16_000, subtype="FLOAT")
    load = library.load_model

    def load_with_notes(*_: object, say: Callable[[str], None], **__: object) -> Any:
        say("fell back")
        warnings.warn("an odd query", ClapsepWarning, stacklevel=1)
        warnings.warn("an odd query", ClapsepWarning, stacklevel=1)
        return load(tiny_folder, "cpu", "high")

    monkeypatch.setattr(library, "load_model", load_with_notes)
    mix.with_name(f"{mix.stem}.target.wav").write_bytes(mix.read_bytes())
    common = ["extract", mix.parent, "--pos", "dog", "--subtype", "pcm16", "-o", "out", "--overwrite"]
    told = clapsep(*common, cwd=mix.parent).stderr
    for note in ("fell back", "over full scale", "left out, as outputs", "clapsep: an odd query\n"):
        assert told.count(note) >= 1, note
    assert told.count("an odd query") == 1
    quiet = clapsep(*common, "-q", cwd=mix.parent)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("line", "closed", "code"),
    [
        ("--help", "2>&-", 0),
        ("--help", ">&-", 1),
        ("models path mini", ">&-", 1),
        ("extract none.wav --pos dog", "2>&-", 1),
        ("extract none.wav --pos dog", ">&- 2>&- <&-", 1),
        ("extract mix.wav --pos dog -q", ">&- 2>&- <&-", 0),
        ("extract mix.wav --pos dog", ">&-", 1),
        ("extract mix.wav --pos dog -o -", ">&-", 1),
    ],
)
def test_closed_streams(mix: Path, tiny_folder: Path, line: str, closed: str, code: int) -> None:
    mix.rename(mix.with_name("mix.wav"))
    model = f"--model '{tiny_folder}'" if "extract" in line else ""
    script = f"'{sys.executable}' -W error -m clapsep_cli {line} {model} {closed}"
    done = subprocess.run(
        ["sh", "-c", script],
        cwd=mix.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    if closed == ">&-":
        assert "standard output" in done.stderr.splitlines()[-1]
        assert "closed" in done.stderr.splitlines()[-1]
    if "mix.wav" in line and "-o" not in line:
        for part in ("target", "residual"):
            assert soundfile.info(mix.with_name(f"mix.{part}.wav")).frames == 4000


def test_a_deleted_folder_and_a_huge_query_take_a_line(clapsep: Clapsep, mix: Path, tiny_folder: Path) -> None:
    (mix.parent / "gone").mkdir()
    script = f"rmdir ../gone; '{sys.executable}' -m clapsep_cli extract '{mix}' --pos dog --model '{tiny_folder}'"
    run = {"cwd": mix.parent / "gone", "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "timeout": 60}
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, **run)  # type: ignore[call-overload]
    assert done.returncode == 1
    assert done.stderr == "clapsep: the current folder was deleted; cd into another one\n"
    for query in (["--pos", "q" * 100_000], ["--target", "q" * 100_000], ["--pos-span", "q" * 100_000]):
        told = clapsep("extract", mix, *query, "--model", tiny_folder, cwd=mix.parent)
        assert len(told.stdout + told.stderr) < 1500


def test_the_environment_names_the_model_and_the_device(
    clapsep: Clapsep, mix: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLAPSEP_MODEL", str(tiny_folder))
    assert clapsep("extract", mix, "--pos", "dog", cwd=mix.parent).stdout.startswith(f"{tiny_folder.name} on ")
    monkeypatch.setenv("CLAPSEP_DEVICE", "gpu")
    refused = clapsep("extract", mix, "--pos", "dog", "--overwrite", cwd=mix.parent)
    assert (refused.returncode, "no device 'gpu'" in refused.stderr) == (3, True)
    assert clapsep("extract", mix, "--pos", "dog", "--overwrite", "-d", "cpu", cwd=mix.parent).returncode == 0


def test_audio_queries_from_files_and_folders(clapsep: Clapsep, mix: Path, tiny_folder: Path) -> None:
    shots = mix.parent / "shots"
    shots.mkdir()
    for name in ("a.wav", "b.flac"):
        soundfile.write(shots / name, 0.1 * np.random.default_rng(1).standard_normal(3000), 8000)
    (shots / "notes.txt").write_text("not a recording")
    common = [mix, "--model", tiny_folder, "--overwrite"]
    assert (
        clapsep("extract", *common, "--query-audio", shots, "--neg-audio", shots / "a.wav", cwd=mix.parent).returncode
        == 0
    )
    empty = mix.parent / "empty"
    empty.mkdir()
    failed = clapsep("extract", *common, "--query-audio", empty, cwd=mix.parent)
    assert failed.returncode == 1
    assert "no recordings" in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["mix.wav"], 2, 'e.g. --pos "dog barking"'),
        (["none.wav", "--pos", "dog"], 1, "none.wav: no such file"),
        (["text.wav", "--pos", "dog"], 1, "text.wav: cannot be read as audio"),
        (["mix.wav", "--pos", ""], 2, "--pos is empty"),
        (["mix.wav", "--pos", "dog", "--alpha", "2"], 2, "--alpha"),
        (["mix.wav", "--pos", "dog", "--model", "huge"], 3, "no model 'huge'"),
        (["mix.wav", "--pos", "dog", "-d", "gpu"], 3, "no device 'gpu'"),
        (["mix.wav", "--pos", "dog", "--precision", "low"], 2, "no precision 'low'"),
        (["mix.wav", "copy.wav", "--pos", "qzxv"], 2, "qzxv"),
        (["mix.wav", "--query-audio", "none.wav"], 1, "none.wav: no such file"),
        (["mix.wav", "mix.flac", "--pos", "dog"], 1, "would write it"),
        (["mix.wav", "--pos", "dog", "-o", "text.wav"], 1, "cannot be written"),
        (["mix.wav", "--pos"], 2, "requires an argument"),
        (["--pos", "dog"], 2, "no recordings"),
        (["mix.wav", "--pos", "dog", "--start", "soon"], 2, "soon"),
        (["mix.wav", "--pos", "dog", "--clip", "never"], 2, "warn, rescale, error"),
    ],
)
def test_mistakes_get_one_clear_line(
    clapsep: Clapsep, mix: Path, tiny_folder: Path, arguments: list[str], code: int, message: str
) -> None:
    folder = mix.parent
    mix.rename(folder / "mix.wav")
    (folder / "text.wav").write_text("I am not audio")
    for copy in ("copy.wav", "mix.flac"):
        shutil.copy(folder / "mix.wav", folder / copy)
    before = sorted(folder.rglob("*"))
    model = [] if "--model" in arguments else ["--model", str(tiny_folder)]
    done = clapsep("extract", *model, *arguments, cwd=folder)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    if "requires" not in message:
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("clapsep: ")
    assert sorted(folder.rglob("*")) == before


def test_one_bad_file_does_not_stop_the_rest(clapsep: Clapsep, mix: Path, tiny_folder: Path) -> None:
    bad = mix.parent / "bad.wav"
    bad.write_bytes(b"RIFF")
    done = clapsep("extract", bad, mix, "--pos", "dog", "--model", tiny_folder, cwd=mix.parent)
    assert done.returncode == 1
    assert "bad.wav: " in done.stderr
    assert "1 of 2 files failed" in done.stderr
    assert mix.with_name(f"{mix.stem}.target.wav").exists()


def test_one_name_that_leads_nowhere_does_not_stop_the_rest(clapsep: Clapsep, mix: Path, tiny_folder: Path) -> None:
    """Neither as an argument, nor in a pattern, a list or a manifest."""
    (mix.parent / "link.wav").symlink_to("nowhere")
    (mix.parent / "list.txt").write_text(f"none.wav\n{mix.name}\n")
    (mix.parent / "jobs.csv").write_text(f"file,pos\nnone.wav,dog\n{mix.name},dog\n")
    for names, missing in (
        ([mix, "none.wav"], "none.wav: no such file"),
        (["*.wav"], "link.wav: no such file"),
        (["empty/*.wav", mix], "nothing matches"),
        (["@list.txt"], "line 1: none.wav: no such file"),
        (["--manifest", "jobs.csv"], "line 2: no such file none.wav"),
    ):
        query = [] if "--manifest" in names else ["--pos", "dog"]
        arguments = ["extract", *names, *query, "--model", tiny_folder, "-o", "out", "--json", "--overwrite"]
        done = clapsep(*arguments, cwd=mix.parent)
        assert done.returncode == 1
        assert missing in done.stderr
        told = [json.loads(line) for line in done.stdout.splitlines()]
        assert sorted(one["status"] for one in told) == ["done", "failed"]


def test_the_wheel_brings_its_weights(tmp_path: Path, mix: Path) -> None:
    """What `pip install` puts down is enough to extract, in an empty folder, with no checkout and no network."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("clapsep-*.whl")
    installed = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(installed)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    for page in ("report.html", "report.css"):
        assert (installed / "clapsep_cli" / "evaluation" / page).is_file()
    empty = tmp_path / "empty"
    empty.mkdir()
    query = ("--model", "mini", "--pos", "a dog barking")
    done = process("extract", mix, *query, "-o", ".", cwd=empty, PYTHONPATH=str(installed), HOME=str(empty))
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list(empty.iterdir())) == 2
    shown = process("demo", cwd=empty, PYTHONPATH=str(installed), HOME=str(empty))
    gains = [float(gain) for gain in re.findall(r" SI-SDRi against the clean dog: ([+-][\d.]+) dB", shown.stdout)]
    assert (shown.returncode, shown.stderr, len(gains)) == (0, "", 2)
    assert min(gains) > 5
    assert wheel.stat().st_size < 40e6
    assert sum(path.stat().st_size for path in (installed / "clapsep_cli" / "examples").iterdir()) <= 2e6


def test_an_interrupted_run_leaves_nothing_behind(
    clapsep: Clapsep, mix: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Outputs, parts: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Outputs, "write", interrupted)
    done = clapsep("extract", mix, "--pos", "dog", "--model", tiny_folder, cwd=mix.parent)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert list(mix.parent.iterdir()) == [mix]


def test_pictures_are_refused_before_anything_is_done(
    clapsep: Clapsep, mix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused = clapsep("extract", mix, "--pos", "dog", "--plot", cwd=mix.parent)
    assert refused.returncode == 3
    assert refused.stderr == 'clapsep: --plot needs matplotlib: pip install "clapsep[plot]"\n'
    assert list(mix.parent.iterdir()) == [mix]


@pytest.mark.parametrize("columns", [50, 60, 80, 200])
@pytest.mark.parametrize("command", ["extract", "separate", "ui", "evaluate", "train"])
def test_help_names_every_option_in_full_however_narrow(columns: int, command: str, tmp_path: Path) -> None:
    shown = process(command, "--help", cwd=tmp_path, COLUMNS=str(columns)).stdout
    whole: Any = typer.main.get_command(app)
    options = {option for parameter in whole.commands[command].params for option in parameter.opts if "--" in option}
    assert not [option for option in options if not re.search(rf"{option}(?![\w-])", shown)]
    assert max(map(len, shown.splitlines())) <= columns
    assert not re.findall(r"<[a-z]|bool|list\[|range", shown)


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("clapsep ex", ["extract"]),
        ("clapsep extract --model-", ["--model-dir"]),
        ("clapsep extract --model ", list(MODELS)),
        ("clapsep extract --precision f", ["fast"]),
        ("clapsep separate mix.wav --prompts sp", ["speech"]),
        ("clapsep separate --task c", ["cinematic"]),
        ("clapsep models rm tuss-", ["tuss-medium", "tuss-large"]),
        ("clapsep train --preset ", list(PRESETS)),
    ],
)
def test_a_shell_completes(words: str, completions: list[str], tmp_path: Path) -> None:
    """As the script asks that `--install-completion` writes for bash."""
    asked = {"_CLAPSEP_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    code = "import sys; sys.argv[0] = 'clapsep'; from clapsep_cli.cli.app import run; run()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | asked, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, completions, "")


def test_readme_and_help_name_the_same_options() -> None:
    readme = re.sub(r"ffmpeg [^|]*\|", "|", (ROOT / "README.md").read_text())  # which has options of its own
    readme = re.sub(r"^(?:pip|pipx|uv|#SBATCH) .*$", "", readme, flags=re.M)  # likewise
    command: Any = typer.main.get_command(app)
    commands = {"clapsep": command, **dict(_commands(command.commands))}
    options = {name: {o for p in c.params for o in (*p.opts, *p.secondary_opts)} for name, c in commands.items()}
    for option in {o for o in options["extract"] if o.startswith("-")} - {"--help"}:
        assert f"`{option}" in readme or f", `{option}" in readme, f"README does not explain {option}"
    for option in set(re.findall(r"(?<=[\s`])--?[a-z][a-z-]*", readme)):
        assert option in set().union(*options.values()), f"README speaks of {option}, which no command has"


def _commands(commands: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, command in commands.items():
        yield name, command
        yield from _commands(getattr(command, "commands", {}))

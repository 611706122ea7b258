"""Every option of every command has an effect, or is refused where it would have none."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import fsspec
import numpy as np
import pytest
import soundfile
import torch
import typer
from conftest import Clapsep, Stub
from media_files import encode
from recordings import noise
from stand_ins import Moody
from tuss_stand_in import TINY

from clapsep_cli.cli.app import app
from clapsep_cli.evaluation import datasets
from clapsep_cli.families.base import load_family
from clapsep_cli.jobs import batch
from clapsep_cli.models.tuss import Tuss
from clapsep_cli.store import adapters, library
from clapsep_cli.training.loop import train  # noqa: F401  imports the real `load_model`, which tests replace

Observed = dict[str, Any]
LIBRARYS_OWN = {"--help", "--install-completion", "--show-completion"}  # typer's
TIMING = re.compile(r'in [\d.]+ s \([\d.]+ times real time\)|"(?:elapsed|real_time_factor)": [\d.e-]+')

SHARED = {  # by option: a line, and what of it makes a difference when it is added
    "--recursive": ("in -o out {query}", "-r"),
    "--start": ("mix.wav {query}", "--start 0.2"),
    "--end": ("mix.wav {query}", "--end 0.2"),
    "--lenient": ("cut.wav {query}", "--lenient"),
    "--stream": ("film.mkv {query}", "--stream 2"),
    "--expand": ("fast.wav {query}", "--expand 2"),
    "--out": ("mix.wav {query}", "-o out"),
    "--filename": ("mix.wav {query}", "--filename {{part}}/{{stem}}.{{ext}}"),
    "--format": ("mix.wav {query}", "-f flac"),
    "--subtype": ("mix.wav {query}", "--subtype pcm24"),
    "--remux": ("film.mkv {query}", "--remux"),
    "--clip": ("loud.wav --subtype pcm16 {query}", "--clip rescale"),
    "--plot": ("mix.wav --end 0.2 {query}", "--plot"),
    "--events": ("mix.wav {query}", "--events"),
    "--events-format": ("mix.wav {query} --events", "--events-format raven"),
    "--events-level": ("mix.wav {query} --events --events-presence -9", "--events-level 60"),
    "--events-presence": ("mix.wav {query} --events --events-presence -9", "--events-presence 9"),
    "--events-length": ("mix.wav {query} --events --events-presence -9", "--events-length 9"),
    "--no-audio": ("mix.wav {query} --events", "--no-audio"),
    "--overwrite": ("old.wav {query}", "--overwrite"),
    "--skip-existing": ("old.wav {query}", "--skip-existing"),
    "--shard": ("mix.wav two.flac {query}", "--shard 0/2"),
    "--scratch": ("memory://lab/mix.wav -o out {query}", "--scratch stage"),
    "--engine": ("mix.wav {query}", "--engine ray"),
    "--address": ("mix.wav {query} --engine ray", "--address auto"),
    "--workers": ("mix.wav {query} --engine ray", "--workers 2"),
    "--gpus-per-worker": ("mix.wav {query} --engine ray", "--gpus-per-worker 1"),
    "--insecure": ("mix.wav {query} --engine ray --address auto", "--insecure"),
    "--model": ("mix.wav {query}", "--model mini"),
    "--adapter": ("mix.wav {query}", "--adapter adapter.safetensors"),
    "--device": ("mix.wav {query}", "-d cpu"),
    "--precision": ("mix.wav {query}", "--precision fast"),
    "--refine": ("mix.wav {query} --no-refine", "--refine"),
    "--no-refine": ("mix.wav {query} --refine", "--no-refine"),
    "--model-dir": ("mix.wav {query}", "--model-dir kept"),
    "--threads": ("mix.wav {query}", "--threads 3"),
    "--batch-size": ("mix.wav {query}", "--batch-size 2"),
    "--jobs": ("mix.wav {query}", "-j 5"),
    "--json": ("mix.wav {query}", "--json"),
    "--progress": ("mix.wav {query}", "--progress json"),
    "--quiet": ("mix.wav {query}", "-q"),
}
TWO = "mix.wav --target one=dog --target two=two.flac"
EVALUATE = "--mixtures mixtures.csv --audio labels"
SHOTS = f"{EVALUATE} --shots 1 --shots-csv shots.csv"
PROMPTED = "--mixtures parts.csv --audio . --model tuss"
MAKE = "labels --per-clip 1 -o new.csv"
EFFECTS: dict[str, dict[str, tuple[str, str]]] = {
    "clapsep": {"--version": ("", "--version")},
    "extract": {
        **{option: (line.format(query="--pos dog"), more.format()) for option, (line, more) in SHARED.items()},
        "--pos": ("mix.wav --neg rain", "--pos dog"),
        "--neg": ("mix.wav --pos dog", "--neg rain"),
        "--query-audio": ("mix.wav --pos dog", "--query-audio two.flac"),
        "--neg-audio": ("mix.wav --pos dog", "--neg-audio two.flac"),
        "--pos-span": ("mix.wav --pos dog", "--pos-span 0-0.2"),
        "--neg-span": ("mix.wav --pos dog", "--neg-span 0-0.2"),
        "--alpha": ("mix.wav --pos dog --query-audio two.flac", "--alpha 0.9"),
        "--target": ("mix.wav", "--target one=dog"),
        "--mutual": (f"{TWO} --no-mutual", "--mutual"),
        "--no-mutual": (TWO, "--no-mutual"),
        "--manifest": ("", "--manifest jobs.csv"),
        "--watch": ("mix.wav --pos dog", "--watch in"),
        "--presence": ("mix.wav --pos dog", "--presence"),
        "--no-presence": ("mix.wav --pos dog --json", "--no-presence"),
        "--min-presence": ("mix.wav --pos dog", "--min-presence 9"),
        "--residual": ("mix.wav --pos dog --no-residual", "--residual"),
        "--no-residual": ("mix.wav --pos dog", "--no-residual"),
        "--remove": ("mix.wav --pos dog", "--remove"),
    },
    "separate": {
        **{option: (line.format(query="--prompts dog rain"), more.format()) for option, (line, more) in SHARED.items()},
        "--prompts": ("mix.wav", "--prompts dog rain"),
        "--task": ("mix.wav", "--task music"),
        "--only": ("mix.wav --prompts dog rain", "--only dog"),
        "--residual": ("mix.wav --prompts dog rain", "--residual"),
        "--consistent": ("mix.wav --prompts dog rain", "--consistent"),
    },
    "hear": {
        "--vocabulary": ("mix.wav --vocabulary sounds.txt", "--vocabulary more.txt"),
        "--top": ("mix.wav --vocabulary sounds.txt --min-score 0", "--top 1"),
        "--min-score": ("mix.wav --vocabulary sounds.txt --min-score 0", "--min-score 1"),
        "--recursive": ("in --vocabulary sounds.txt", "-r"),
        "--start": ("mix.wav --vocabulary sounds.txt --min-score 0", "--start 0.2"),
        "--end": ("mix.wav --vocabulary sounds.txt --min-score 0", "--end 0.2"),
        "--lenient": ("cut.wav --vocabulary sounds.txt", "--lenient"),
        "--stream": ("film.mkv --vocabulary sounds.txt --min-score 0", "--stream 2"),
        "--expand": ("fast.wav --vocabulary sounds.txt --min-score 0", "--expand 2"),
        "--plot": ("mix.wav --vocabulary sounds.txt", "--plot"),
        "--overwrite": ("drawn.wav --vocabulary sounds.txt --plot", "--overwrite"),
        "--model": ("mix.wav --vocabulary sounds.txt", "--model mini"),
        "--adapter": ("mix.wav --vocabulary sounds.txt", "--adapter adapter.safetensors"),
        "--device": ("mix.wav --vocabulary sounds.txt", "-d cpu"),
        "--model-dir": ("mix.wav --vocabulary sounds.txt", "--model-dir kept"),
        "--threads": ("mix.wav --vocabulary sounds.txt", "--threads 3"),
        "--json": ("mix.wav --vocabulary sounds.txt", "--json"),
        "--quiet": ("mix.wav --vocabulary sounds.txt", "-q"),
    },
    "results": {"--format": ("kept", "--format csv"), "--quiet": ("kept", "-q")},
    "ui": {
        "--stream": ("film.mkv", "--stream 2"),
        "--model": ("", "--model mini"),
        "--device": ("", "-d cpu"),
        "--port": ("", "--port 8080"),
        "--no-browser": ("", "--no-browser"),
        "--model-dir": ("", "--model-dir kept"),
    },
    "demo": {"--out": ("", "-o somewhere")},
    "train": {
        "--manifest": ("", "--manifest mine.csv"),
        "--audio": ("mine.csv", "--audio labels"),
        "--val": ("mine.csv", "--val clips.csv"),
        "--out": ("mine.csv", "-o out"),
        "--preset": ("mine.csv", "--preset clapsep-text"),
        "--init": ("mine.csv", "--init clapsep"),
        "--lora-only": ("mine.csv --init clapsep", "--lora-only"),
        "--encoder": ("mine.csv --preset clapsep-text", "--encoder frozen"),
        "--config": ("mine.csv", "--config settings.toml"),
        "--set": ("mine.csv", "--set separator.batch=3"),
        "--encoders": ("mine.csv", "--encoders kept"),
        "--space": ("mine.csv", "--space fit"),
        "--paraphrases": ("mine.csv", "--paraphrases more.csv"),
        "--steps": ("mine.csv", "--steps 3"),
        "--epochs": ("mine.csv --preset clapsep-text", "--epochs 3"),
        "--seed": ("mine.csv", "--seed 3"),
        "--accelerator": ("mine.csv", "--accelerator cpu"),
        "--devices": ("mine.csv", "--devices 2"),
        "--nodes": ("mine.csv", "--nodes 2"),
        "--precision": ("mine.csv", "--precision 32-true"),
        "--model-dir": ("mine.csv --init clapsep", "--model-dir kept"),
        "--quiet": ("mine.csv", "-q"),
    },
    "evaluate": {
        "--mixtures": ("--audio labels", "--mixtures mixtures.csv"),
        "--audio": ("--mixtures mixtures.csv", "--audio labels"),
        "--model": (EVALUATE, "--model mini"),
        "--estimates": (EVALUATE, "--estimates made"),
        "--device": (EVALUATE, "-d cpu"),
        "--precision": (EVALUATE, "--precision fast"),
        "--batch-size": (EVALUATE.replace("mixtures.csv", "pair.csv"), "--batch-size 2"),
        "--model-dir": (EVALUATE, "--model-dir kept"),
        "--queries": (EVALUATE, "--queries pos"),
        "--condition": (EVALUATE, "--condition raw"),
        "--shots": (f"{EVALUATE} --shots-csv shots.csv", "--shots 1"),
        "--shots-csv": (f"{EVALUATE} --shots 1", "--shots-csv shots.csv"),
        "--shots-audio": (f"{SHOTS.replace('shots.csv', 'far.csv')}", "--shots-audio labels/dog"),
        "--shot-seconds": (SHOTS, "--shot-seconds 0.5"),
        "--text": (f"{SHOTS} --no-text", "--text"),
        "--no-text": (SHOTS, "--no-text"),
        "--refine": (f"{EVALUATE} --no-refine", "--refine"),
        "--no-refine": (f"{EVALUATE} --refine", "--no-refine"),
        "--bss": (f"{EVALUATE} --no-bss", "--bss"),
        "--no-bss": (EVALUATE, "--no-bss"),
        "--single-prompt": (PROMPTED, "--single-prompt"),
        "--segment": (PROMPTED, "--segment 0.2"),
        "--shift": (f"{PROMPTED} --segment 0.2", "--shift 0.15"),
        "--out": (EVALUATE, "-o scores"),
        "--report": (EVALUATE, "--report new.html"),
        "--dataset": (f"{EVALUATE} --report new.html", "--dataset ESC-50"),
        "--json": (EVALUATE, "--json"),
        "--labels": (EVALUATE, "--labels"),
        "--skip-missing": ("--mixtures more.csv --audio labels", "--skip-missing"),
        "--overwrite": (f"{EVALUATE} --report old.html", "--overwrite"),
        "--quiet": (EVALUATE, "-q"),
    },
    "embed": {
        "--text": ("mix.wav", "--text dog"),
        "--out": ("mix.wav", "-o new.npz"),
        "--model": ("mix.wav", "--model mini"),
        "--device": ("mix.wav", "-d cpu"),
        "--model-dir": ("mix.wav", "--model-dir kept"),
        "--overwrite": ("mix.wav -o old.html", "--overwrite"),
        "--quiet": ("mix.wav", "-q"),
    },
    "mixtures render": {
        "--audio": ("mixtures.csv -o made", "--audio labels"),
        "--out": ("mixtures.csv --audio labels", "-o new"),
        "--overwrite": ("mixtures.csv --audio labels -o wavs", "--overwrite"),
        "--quiet": ("mixtures.csv --audio labels -o new", "-q"),
    },
    "mixtures fetch": {"--out": ("esc50", "-o new"), "--quiet": ("esc50", "-q")},
    "mixtures make": {
        "--out": ("labels", "-o new.csv"),
        "--per-clip": (MAKE, "--per-clip 2"),
        "--per-label": (MAKE, "--per-label 1"),
        "--shots": (MAKE, "--shots 1"),
        "--split": ("clips.csv -o new.csv", "--split test"),
        "--prefix": (MAKE, "--prefix some"),
        "--exclude-labels": (MAKE, "--exclude-labels bell"),
        "--interferers": (f"{MAKE} --exclude-labels bell --per-label 1", "--interferers 4"),
        "--seed": (MAKE, "--seed 5"),
        "--overwrite": ("labels", "--overwrite"),
        "--quiet": (MAKE, "-q"),
    },
    "models list": {"--json": ("", "--json"), "--model-dir": ("", "--model-dir kept")},
    "models download": {
        "--keep-original": ("mini", "--keep-original"),
        "--quiet": ("mini", "-q"),
        "--model-dir": ("mini", "--model-dir kept"),
    },
    "models convert": {
        "--from": ("mini", "--from mix.wav"),
        "--quiet": ("mini --from mix.wav", "-q"),
        "--model-dir": ("mini --from mix.wav", "--model-dir kept"),
    },
    "models verify": {"--model-dir": ("mini", "--model-dir kept")},
    "models path": {"--model-dir": ("mini", "--model-dir kept")},
    "models rm": {"--model-dir": ("mini", "--model-dir kept")},
    "env": {"--json": ("", "--json"), "--model-dir": ("", "--model-dir kept")},
}
CALLS = (("remove", [Path("a")]), ("path_of", "a"), ("installed", None))  # of the library of models, and their results
REFUSED = [
    ("extract mix.wav --pos dog", "--alpha 0.9"),
    ("extract mix.wav --pos dog --neg-audio two.flac", "--alpha 0.9"),
    ("extract mix.wav --target a=dog --target b=cat", "--alpha 0.9"),
    (f"extract {TWO} --no-mutual", "--alpha 0.9"),
    (f"extract {TWO} --neg rain", "--alpha 7"),
    ("extract mix.wav --pos dog", "--no-mutual"),
    ("extract mix.wav --target a=dog", "--mutual"),
    ("extract --manifest jobs.csv", "--recursive"),
    ("extract mix.wav --pos dog", "--watch in"),
    ("extract mix.wav --pos dog --min-presence 0", "--no-presence"),
    ("extract mix.wav --pos dog --remove", "--no-residual"),
    ("extract mix.wav --pos dog -o -", "--residual"),
    ("extract mix.wav --pos dog -o -", "--overwrite"),
    ("extract mix.wav --pos dog -o -", "--skip-existing"),
    ("extract mix.wav --pos dog -o -", "--plot"),
    ("extract mix.wav --pos dog -o -", "--filename {part}.wav"),
    ("extract mix.wav --pos dog -o -", "--json"),
    ("extract mix.wav --pos dog -o -", "--events"),
    ("extract mix.wav --pos dog", "--no-audio"),
    ("hear mix.wav --vocabulary sounds.txt", "--overwrite"),
    ("extract film.mkv --pos dog --remux", "--format flac"),
    ("extract film.mkv --pos dog --remux", "--start 0.1"),
    ("extract mix.wav --pos dog", "--events-format raven"),
    ("extract mix.wav --pos dog", "--events-length 1"),
    ("extract mix.wav --pos dog --events --no-audio", "--format flac"),
    ("extract mix.wav --pos dog --events --no-audio", "--residual"),
    ("extract mix.wav --pos dog", "--scratch stage"),
    ("extract mix.wav --pos dog", "--address auto"),
    ("extract mix.wav --pos dog", "--workers 2"),
    ("extract mix.wav --pos dog", "--gpus-per-worker 1"),
    ("extract mix.wav --pos dog", "--insecure"),
    ("separate mix.wav --prompts dog rain --only dog -o -", "--residual"),
    (f"evaluate {EVALUATE}", "--overwrite"),
    (f"evaluate {EVALUATE}", "--no-text"),
    (f"evaluate {EVALUATE}", "--shots 1"),
    (f"evaluate {EVALUATE}", "--shot-seconds 1"),
    (f"evaluate {EVALUATE}", "--shots-audio labels"),
    (f"evaluate {EVALUATE}", "--dataset ESC-50"),
    (f"evaluate {EVALUATE}", "--single-prompt"),
    (f"evaluate {EVALUATE}", "--segment whole"),
    (f"evaluate {PROMPTED}", "--labels"),
    ("ui", "--stream 2"),
    ("train mine.csv", "--epochs 3"),
    ("train mine.csv", "--lora-only"),
    ("train mine.csv --preset clapsep-text", "--encoders kept"),
    ("train mine.csv --preset tuss-medium", "--encoder frozen"),
]


class Opened:
    """Stands in for a page and its session."""

    address = "http://127.0.0.1/"

    def __repr__(self) -> str:
        return "opened"

    def run(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Recordings and lists for all the lines above."""
    place = tmp_path / "here"
    (place / "kept" / "_clapsep").mkdir(parents=True)
    (place / "kept" / "_clapsep" / "a.wav.0.json").write_text('{"input": "a.wav", "status": "done"}')
    for folder in ("in/deep", "labels/dog", "labels/rain", "labels/bell"):
        (place / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("mix.wav", "two.flac", "old.wav", "in/one.wav", "in/deep/two.wav"):
        soundfile.write(place / name, 0.1 * rng.standard_normal((5000, 1)), 8000, "PCM_16")
    soundfile.write(place / "fast.wav", 0.1 * rng.standard_normal(5000), 16_000, "PCM_16")
    soundfile.write(place / "loud.wav", 3 * rng.standard_normal(3000), 8000, "FLOAT")
    whole = (place / "mix.wav").read_bytes()
    (place / "cut.wav").write_bytes(whole[:-4000])
    encode(place / "film.mkv", noise(2, 5000), 8000, "flac", further=[noise(2, 5000, seed=1)])
    for label in ("dog", "rain", "bell"):
        for n in range(3):
            soundfile.write(place / "labels" / label / f"{n}.wav", 0.1 * rng.standard_normal(8000), 8000)
    clips = [f"labels/{label}/{n}.wav" for label in ("dog", "rain", "bell") for n in range(3)]
    rows = [f"{name},{name.split('/')[1]},{'test' if '0' in name else 'train'}" for name in clips]
    (place / "clips.csv").write_text("\n".join(["file,label,split", *rows, "labels/dog/0.wav,cat,test"]))
    listed = "source_file,positive_caption,noise_file,negative_caption\ndog/0.wav,a dog,rain/0.wav,rain\n"
    (place / "mixtures.csv").write_text(listed)
    (place / "more.csv").write_text(f"{listed}none.wav,a dog,rain/0.wav,rain\n")
    (place / "pair.csv").write_text(f"{listed}rain/1.wav,rain,dog/1.wav,a dog\n")
    (place / "shots.csv").write_text("class,file\na dog,dog/1.wav\nrain,rain/1.wav\n")
    (place / "far.csv").write_text("class,file\na dog,1.wav\nrain,2.wav\n")
    (place / "parts.csv").write_text("mixture,prompt,reference\nmix.wav,speech,old.wav\nmix.wav,sfx,mix.wav\n")
    for folder in ("made", "wavs"):
        (place / folder).mkdir(parents=True)
    (place / "wavs" / "rendered.csv").touch()
    soundfile.write(place / "made" / "00001.wav", 0.1 * rng.standard_normal(80_000), 8000)
    (place / "jobs.csv").write_text("file,pos\nmix.wav,dog\n")
    (place / "settings.toml").write_text("seed = 9\n")
    (place / "mine.csv").touch()
    (place / "sounds.txt").write_text("dog\nrain on a roof\n")
    (place / "more.txt").write_text("a cat\n")
    soundfile.write(place / "drawn.wav", 0.1 * rng.standard_normal(5000), 8000, "PCM_16")
    (place / "drawn.sounds.png").touch()
    (place / "old.html").touch()
    for part in ("target", "residual", "dog", "rain"):
        (place / f"old.{part}.wav").touch()
    return place


@pytest.fixture
def observe(clapsep: Clapsep, place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Observed]:
    """Run a line; what can be seen of it: what it prints, writes, and asks of the model and the machine."""
    seen: list[Any] = []
    monkeypatch.setenv("CLAPSEP_HOME", str(place / "home"))

    def noted(name: str, result: Any = None) -> Callable[..., Any]:
        def note(*arguments: Any, **named: Any) -> Any:
            told = {key: value for key, value in named.items() if key not in ("say", "progress")}
            plain = [a for a in arguments if not callable(a)]
            seen.append((name, repr(plain), repr(told), os.environ["CLAPSEP_HOME"]))
            return result

        return note

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers: int, **settings: Any) -> None:
            seen.append(("threads", workers))
            super().__init__(workers, **settings)

    def on_ray(jobs: Any, options: Any, loading: Any, cluster: Any, *_: Any) -> Iterator[Any]:
        seen.append(("ray", len(jobs), loading, cluster))
        yield from ()

    def staged(prefix: str, dir: Path) -> str:  # noqa: A002
        seen.append(("staged", dir.name))
        return mkdtemp(prefix=prefix, dir=dir)

    def run(line: str) -> Observed:
        seen.clear()
        separator = Moody(8000)
        model = Stub(separator)
        model.family = "clapsep"
        if "parts.csv" in line:
            torch.manual_seed(0)
            model.family, model.kind, model.separator = "tuss", load_family("tuss"), Tuss(TINY)
        loaded = noted("load", model)
        monkeypatch.setattr(library, "load_model", lambda *a, **k: loaded(*a, **k))
        monkeypatch.setattr(adapters, "apply", lambda model, path: noted("adapter")(path))
        monkeypatch.setattr(torch, "set_num_threads", noted("torch"))
        monkeypatch.setattr(batch, "ThreadPoolExecutor", Pool)
        monkeypatch.setattr("clapsep_cli.jobs.ray_engine.run_on_ray", on_ray)
        monkeypatch.setattr(tempfile, "mkdtemp", staged)
        monkeypatch.setattr("clapsep_cli.training.loop.train.train", noted("train", True))
        monkeypatch.setattr(Opened, "open", noted("open"), raising=False)
        monkeypatch.setattr("clapsep_cli.page.session.Session", noted("session", Opened()))
        monkeypatch.setattr("clapsep_cli.page.server.Page", noted("page", Opened()))
        monkeypatch.setattr("webbrowser.open", noted("browser"))
        for name, result in (("install", Path("a")), ("verify", [Path("a")]), *CALLS):
            monkeypatch.setattr(library, name, noted(name, result))
        monkeypatch.setattr(datasets, "fetch", noted("fetch", ({}, [Path("a.csv")])))
        before = {path for path in place.rglob("*") if path.is_file()}
        for path in before:
            os.utime(path, (1, 1))
        kept = {path: path.read_bytes() for path in before}
        fsspec.filesystem("memory").pipe_file("/lab/mix.wav", kept[place / "mix.wav"])
        done = clapsep(*shlex.split(line), cwd=place)
        files = {path.relative_to(place): content(path) for path in place.rglob("*") if path.is_file()}
        for path in [path for path in place.rglob("*") if path.is_file()]:
            path.unlink() if path not in kept else path.write_bytes(kept[path])
        printed = [TIMING.sub("", text) for text in (done.stdout, done.stderr)]
        batches = sorted([*separator.batches, *separator.encoded])
        return {"code": done.returncode, "printed": printed, "files": files, "seen": list(seen), "batches": batches}

    return run


def content(path: Path) -> str:
    """What a file holds; of a recording without its tags, where a key would show options that change nothing else."""
    if path.suffix in (".wav", ".flac") and path.stat().st_size:
        audio, rate = soundfile.read(path)
        return f"{hashlib.sha256(audio.tobytes()).hexdigest()} {rate} {soundfile.info(path).subtype}"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def commands(command: Any, name: str = "clapsep") -> Iterator[tuple[str, Any]]:
    yield name, command
    for nested in getattr(command, "commands", {}).values():
        yield from commands(nested, nested.name if name == "clapsep" else f"{name} {nested.name}")


@pytest.mark.parametrize(("name", "command"), list(commands(typer.main.get_command(app))))
def test_every_option_has_a_line_above(name: str, command: Any) -> None:
    options = {o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")}
    assert options - LIBRARYS_OWN == set(EFFECTS.get(name, {}))


@pytest.mark.parametrize("command", EFFECTS)
def test_every_option_has_an_effect(observe: Callable[[str], Observed], command: str) -> None:
    lines = {
        option: (f"{command} {line}".removeprefix("clapsep "), more)
        for option, (line, more) in EFFECTS[command].items()
    }
    without = {line: observe(line) for line, _ in lines.values()}
    some = next(iter(without))
    assert observe(some) == without[some], "what is compared has to be the same at every run"
    for option, (line, more) in lines.items():
        changed = observe(f"{line} {more}")
        assert changed != without[line], f"{option} has no effect"
        assert changed["code"] == 0 or option in ("--skip-existing", "--watch"), changed["printed"]


@pytest.mark.parametrize(("line", "option"), REFUSED)
def test_an_option_without_effect_is_refused(observe: Callable[[str], Observed], line: str, option: str) -> None:
    refused = observe(f"{line} {option}")
    assert refused["code"] == 2, refused["printed"]
    assert option.split()[0].strip("-").replace("-", "_") in refused["printed"][1].replace("-", "_")
    if not line.startswith("train"):
        assert observe(line)["code"] == 0

"""Records a training run beside its weights: settings, data, hardware, and figures of its progress."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from clapsep_cli.data import Corpus
from clapsep_cli.errors import CheckpointError
from clapsep_cli.files import replacing
from clapsep_cli.training.loop.settings import flatten
from clapsep_cli.version import __version__

PACKAGES = ("torch", "numpy", "lightning-fabric", "peft", "safetensors", "soundfile", "soxr", "tokenizers")
RECORD, LOG = "run.json", "log.csv"


def check(folder: Path, recipe: Any, corpus: Corpus) -> None:
    """Raise `CheckpointError` if `folder` holds a run with other settings or clips."""
    try:
        before = _read(folder)
        if before is None:
            return
        settings, digest = before["settings"], before["data"]["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / RECORD}: cannot be read as the record of a run; use another --out") from error
    now = settings_of(recipe)
    names = sorted((settings.keys() | now.keys()) - recipe.free)
    differing = [f"{n} was {settings.get(n)!r}, now {now.get(n)!r}" for n in names if settings.get(n) != now.get(n)]
    if before.get("recipe") != type(recipe).__name__:
        differing = [f"it is a {before.get('recipe')}"]
    if differing:
        raise CheckpointError(
            f"{folder}: holds a run of another configuration ({'; '.join(differing)}); use another --out"
        )
    if digest != corpus.digest:
        raise CheckpointError(
            f"{folder}: holds a run on other clips than {corpus.manifest} lists now; use another --out"
        )


def precision(folder: Path) -> str:
    """Return the precision of the run in `folder`; "" if there is none."""
    calls = _calls(folder)
    return str(calls[-1].get("precision", "")) if calls else ""


def write(folder: Path, recipe: Any, corpus: Corpus, hardware: Mapping[str, object]) -> None:
    """Write `run.json`: settings, the data's digest, and each call's hardware, packages and revision of the code."""
    call = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "clapsep": __version__,
        "git": _revision(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        **hardware,
    }
    record = {
        "recipe": type(recipe).__name__,
        "settings": settings_of(recipe),
        "data": {
            "manifest": str(corpus.manifest.resolve()),
            "digest": corpus.digest,
            "clips": len(corpus.train),
            "held_out": len(corpus.held_out),
            "hours": round(corpus.hours, 3),
        },
        "calls": [*_calls(folder), call],
    }
    replace_text(folder / RECORD, json.dumps(record, indent=2) + "\n")


def _read(folder: Path) -> Any:
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _calls(folder: Path) -> list[dict[str, object]]:
    return list((_read(folder) or {"calls": []})["calls"])


def replace_text(path: Path, text: str) -> None:
    """Write a text file, completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def settings_of(recipe: Any) -> dict[str, Any]:
    """Return all settings of a recipe by dotted name, as JSON holds them."""
    return dict(json.loads(json.dumps(dict(flatten(recipe)))))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _revision() -> str | None:
    """Return the commit of the checkout that the code runs from, "+" if files were changed; None without a checkout."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+" if changes.strip() else "")


class Log:
    """Logs figures of a run as rows `stage,step,figure,value` of `log.csv`, and as TensorBoard's events.

    Rows of the stage after the first `step` are removed, as these steps are repeated.
    """

    def __init__(self, folder: Path, stage: str, step: int) -> None:
        from lightning_fabric.loggers.tensorboard import TensorBoardLogger

        self.path, self.stage = folder / LOG, stage
        rows = []
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = [r for r in csv.reader(file) if len(r) == 4 and not (r[0] == stage and int(r[1]) > step)]
        header = [["stage", "step", "figure", "value"]] if not rows else []
        lines = [",".join(row) for row in (*header, *rows)]
        replace_text(self.path, "\n".join(lines) + "\n")
        self.events = TensorBoardLogger(
            folder, name="tensorboard", version=stage.replace(" ", "-"), purge_step=step + 1
        )

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Log figures of a step, by name."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(
                (self.stage, step, name, repr(value)) for name, value in figures.items()
            )
        self.events.log_metrics(dict(figures), step)

    def close(self) -> None:
        """Write buffered events to disk."""
        self.events.finalize("success")

"""`clapsep env` prints the facts for a bug report on any machine, and no secrets."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch

import clapsep_cli
from clapsep_cli.cli.env import environment
from clapsep_cli.store import library


def test_says_what_is_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLAPSEP_HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    facts = environment()
    assert facts["clapsep"].startswith(f"{clapsep_cli.__version__} in {Path(clapsep_cli.__file__).parent}")
    assert facts["python"].startswith(platform.python_version())
    assert facts["torch"].startswith(torch.__version__)
    assert "mini in " in facts["models"]
    assert str(tmp_path) in facts["models"]
    assert (facts["CLAPSEP_HOME"], facts["OMP_NUM_THREADS"]) == (str(tmp_path), "3")
    for name in ("cpu", "cores", "memory", "cuda", "mps", "libsndfile", "soundfile", "soxr", "numpy", "safetensors"):
        assert facts[name]
        assert not facts[name].startswith("unknown"), name
    assert all("\n" not in line for line in facts.values())


def test_tells_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OMP_SECRET", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:hf_secret@with@mirror.example/hub?key=hf_secret")
    facts = environment()
    assert facts["HF_ENDPOINT"] == "https://…mirror.example/hub…"
    assert "hf_secret" not in str(facts)


def test_what_cannot_be_read_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output\nerror")

    names = list(environment())
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    for owner, name in (
        (subprocess, "run"),
        (platform, "platform"),
        (library, "installed"),
        (metadata, "version"),
        (torch.cuda, "is_available"),
        (os, "cpu_count"),
    ):
        monkeypatch.setattr(owner, name, broken)
    facts = environment()
    assert list(facts) == names
    for name in ("platform", "models", "numpy", "cuda", "cores", "nvidia driver"):
        assert facts[name] == "unknown (OSError: [Errno 5] Input/output error)"
    assert facts["python"].startswith(platform.python_version())


def test_programs_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    facts = environment()
    assert facts["nvidia driver"] == "not found"

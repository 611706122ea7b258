"""`clapsep env`: prints facts for a bug report, versions and the machine, never a token or a password."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from clapsep_cli.cli import options as opt
from clapsep_cli.registry import MODELS, home
from clapsep_cli.version import __version__

UNKNOWN = "unknown"
PACKAGES = ("numpy", "soundfile", "soxr", "safetensors", "tokenizers", "huggingface_hub", "av", "librosa", "matplotlib")
# By name: whatever else is set on the machine, secrets among it, stays there.
VARIABLES = (
    *("CLAPSEP_HOME", "CLAPSEP_MODEL", "CLAPSEP_DEVICE", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE"),
    *("CUDA_VISIBLE_DEVICES", "PYTORCH_ENABLE_MPS_FALLBACK", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS"),
    "OPENBLAS_NUM_THREADS",
)
DRIVER_VERSION = ("--query-gpu=driver_version", "--format=csv,noheader")
REASON_LETTERS = 120
WAIT_SECONDS = 5  # for a program to print its version


def env(
    as_json: Annotated[bool, opt.option(opt.RUN, "--json", "Print a JSON object instead.")] = False,
    _model_dir: opt.ModelDir = None,
) -> None:
    """Print the versions and the machine for a bug report; no names, no secrets."""
    facts = environment()
    typer.echo(json.dumps(facts, indent=2) if as_json else "\n".join(f"{k:22} {v}" for k, v in facts.items()))


def environment() -> dict[str, str]:
    """Return the facts by name, in the order to print them; `unknown (reason)` for one that cannot be determined."""
    facts: dict[str, Callable[[], str]] = {
        "clapsep": lambda: f"{__version__} in {Path(__file__).parents[1]}",
        "python": lambda: f"{platform.python_version()} ({platform.python_implementation()}) in {sys.prefix}",
        "platform": platform.platform,
        "cpu": _cpu,
        "cores": _cores,
        "memory": _memory,
        "torch": _torch,
        "cuda": _cuda,
        "mps": lambda: "available" if import_module("torch").backends.mps.is_available() else "not available",
        "nvidia driver": lambda: _output("nvidia-smi", *DRIVER_VERSION).split("\n")[0] or "not found",
        "libsndfile": lambda: str(import_module("soundfile").__libsndfile_version__),
        **{name: _version_of(name) for name in PACKAGES},
        "models": _models,
        "encodings": lambda: f"files {sys.getfilesystemencoding()}, stdout {getattr(sys.stdout, 'encoding', None)}",
        **{name: _variable(name) for name in VARIABLES if name in os.environ},
    }
    return {name: _tried(fact) for name, fact in facts.items()}


def _tried(fact: Callable[[], str]) -> str:
    try:
        return " ".join(fact().split()) or UNKNOWN
    except Exception as error:  # a report that lacks one fact is better than none
        return f"{UNKNOWN} ({type(error).__name__}: {' '.join(str(error).split())[:REASON_LETTERS]})"


def _output(*command: str) -> str:
    """Return the output of a program; "" if it is not installed."""
    program = shutil.which(command[0])
    if program is None:
        return ""
    done = subprocess.run(
        [program, *command[1:]], capture_output=True, stdin=subprocess.DEVNULL, timeout=WAIT_SECONDS, check=True
    )
    return done.stdout.decode(errors="replace")


def _cpu() -> str:
    if sys.platform == "linux":
        said = Path("/proc/cpuinfo").read_text()
        found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", said, re.MULTILINE)
        return f"{found[1] if found else UNKNOWN}, {platform.machine()}"
    if sys.platform == "darwin":
        return f"{_output('sysctl', '-n', 'machdep.cpu.brand_string').strip()}, {platform.machine()}"
    return f"{platform.processor()}, {platform.machine()}"


def _cores() -> str:
    there = os.cpu_count()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    return f"{there}" if usable == there else f"{there}, of which {usable} may be used"


def _memory() -> str:
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    allowed = limit.read_text().strip() if limit.is_file() else ""
    limited = f", of which {int(allowed) / 2**30:.1f} GiB may be used" if allowed.isdecimal() else ""
    return f"{_memory_bytes() / 2**30:.1f} GiB{limited}"


def _memory_bytes() -> int:
    if sys.platform != "win32":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    import ctypes

    kibibytes = ctypes.c_ulonglong()
    ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kibibytes))
    return kibibytes.value * 1024


def _torch() -> str:
    import torch

    version = torch.version
    built = f"CUDA {version.cuda}" if version.cuda else f"HIP {version.hip}" if version.hip else "CPU"
    return f"{torch.__version__}, built for {built}, {torch.get_num_threads()} threads"


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return "not available"
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return "; ".join(f"{d.name}, {d.total_memory / 2**30:.1f} GiB, sm_{d.major}{d.minor}" for d in devices)


def _version_of(package: str) -> Callable[[], str]:
    def version() -> str:
        from importlib import metadata

        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    return version


def _models() -> str:
    from clapsep_cli.store import library

    here = ", ".join(f"{name} in {folder}" for name, one in MODELS.items() if (folder := library.installed(one)))
    return f"{here or 'none'}; home {home()}"


def _variable(name: str) -> Callable[[], str]:
    # The address of a mirror may have a password in it.
    return lambda: re.sub(r"(?<=//)[^/]*@|\?.*", "…", os.environ[name])

"""Speed, as ratios measured in one run: `make bench`. Figures are medians; state the machine's load with them."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import soundfile
import torch
from torch.utils.flop_counter import FlopCounterMode

from clapsep_cli import Query, extract, library, load_model
from clapsep_cli.models.base import condition
from clapsep_cli.models.clapsep import CLAPSep, CLAPSepConfig
from clapsep_cli.registry import MODELS
from clapsep_cli.tasks import Options

RUNS = 5


def median(work: Callable[[], object], runs: int = RUNS) -> float:
    """Median wall time of `work` in seconds, after one run that is not counted."""
    times = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def row(name: str, value: str) -> None:
    print(f"{name:<58} {value}", flush=True)


def bench_start() -> None:
    def spent(*arguments: str) -> float:
        return median(lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True))

    bare, helped = spent("-c", "pass"), spent("-m", "clapsep_cli", "--help")
    row("clapsep --help", f"{helped:.3f} s ({helped / bare:.1f} × bare Python)")


def bench_mini(folder: Path) -> None:
    model, rate, seconds = load_model("mini", "cpu"), 48_000, 120
    path = folder / "mix.wav"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal((seconds * rate, 2)), rate)
    query, options = Query("dog barking", "rain"), Options(overwrite=True)
    spent = median(lambda: extract(path, query, model, options=options), 3)
    row(f"mini, {seconds} s of stereo at 48 kHz, file to files", f"{spent:.2f} s ({seconds / spent:.0f} × real time)")


def bench_clapsep_start(folder: Path) -> None:
    """Whole processes of the released size, on stand-in weights: the reference takes 13 s to start and 3.8 GB."""
    home = folder / "home"
    os.environ["CLAPSEP_HOME"] = str(home)
    place = library.place(MODELS["clapsep"])
    # In a process of its own: what this one has ever held would count in its children's peaks.
    write = f"from pathlib import Path; from released import write_released; write_released(Path({str(place)!r}))"
    subprocess.run([sys.executable, "-c", write], check=True, cwd=Path(__file__).parent)
    library.write_tokenizer(MODELS["clapsep"], place)
    for seconds in (10, 60):
        path = folder / f"{seconds}.wav"
        soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal((seconds * 48_000, 2)), 48_000)
        for query in ("first", "repeated"):
            times, peaks = zip(*(_process(path, home if query == "first" else None) for _ in range(3)), strict=True)
            spent = f"{statistics.median(times):.2f} s, peak {statistics.median(peaks):.2f} GB"
            row(f"clapsep, process to files, {seconds} s of stereo, {query} query", spent)


def _process(path: Path, forget: Path | None) -> tuple[float, float]:
    """Wall time (s) and peak resident memory (GB) of one extraction; `forget`: a home whose text cache goes first."""
    if forget:
        shutil.rmtree(forget / "texts", ignore_errors=True)
    command = [sys.executable, "-m", "clapsep_cli", "extract", str(path), "--model", "clapsep", "-q", "--overwrite"]
    began = time.perf_counter()
    process = subprocess.Popen([*command, "--pos", "dog barking", "--neg", "rain"])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9


@torch.inference_mode()
def bench_clapsep() -> None:
    a = torch.randn(2048, 2048)
    rate = 2 * 2048**3 / median(lambda: a @ a, 20) / 1e9  # GFLOP/s
    row("matrix product, float32", f"{rate:.0f} GFLOP/s")
    torch.manual_seed(0)
    net = CLAPSep(CLAPSepConfig()).eval()
    mixture, wanted = 0.1 * torch.randn(1, net.window), condition(torch.randn(1, 512), torch.randn(1, 512))
    with FlopCounterMode(display=False) as products:
        features = net.encode(mixture)
        net.mask(features, wanted)
    gflop = products.get_total_flops() / 1e9
    encode, mask = median(lambda: net.encode(mixture)), median(lambda: net.mask(features, wanted))
    share = (encode + mask) / (gflop / rate)
    row("CLAPSep (random weights), one window of 10 s, float32", f"{encode:.2f} s to encode + {mask:.2f} s to mask")
    row("", f"{share:.1f} × the time of its {gflop:.0f} GFLOP of products at that rate")


if __name__ == "__main__":
    row("load average, threads", f"{os.getloadavg()[0]:.2f}, {torch.get_num_threads()}")
    bench_start()
    with tempfile.TemporaryDirectory() as name:
        bench_mini(Path(name))
        bench_clapsep_start(Path(name))
    bench_clapsep()

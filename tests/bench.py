"""Speed and memory, as ratios measured in one run: `make bench`; `make bench LONG=1` adds 3 h and 2,000 files.

Figures are medians. Those of whole processes are taken with stand-in weights of the released size. State the machine's
load with them: it is printed first. `make bench PART=cores BEFORE=/path/to/checkout` takes turns with another version.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from clapsep_cli.startup import prepare

prepare()

import numpy as np
import soundfile
import soxr
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from clapsep_cli.audio.encoding import choose_encoding
from clapsep_cli.audio.samples import on_grid
from clapsep_cli.audio.sources import Source, read_mono
from clapsep_cli.audio.writers import Outputs
from clapsep_cli.dsp import RATE_HZ, spectrum, waveform
from clapsep_cli.models.base import condition
from clapsep_cli.models.clapsep import CLAPSep, CLAPSepConfig
from clapsep_cli.query import Query
from clapsep_cli.registry import MODELS
from clapsep_cli.separation import BLOCK_SECONDS, Workers
from clapsep_cli.store import library
from clapsep_cli.store.checkpoint import Model, native_bfloat16

HERE = Path(__file__).parent
LONG = bool(os.environ.get("LONG"))
BEFORE = os.environ.get("BEFORE")  # a checkout of another version, for `cores`
RUNS, ROUNDS = 9, 3  # of a function, and of a whole process
QUERY = ("--pos", "dog barking", "--neg", "rain")


def row(name: str, value: str) -> None:
    print(f"{name:<58} {value}", flush=True)


def taking_turns(works: dict[str, Callable[[], object]], runs: int = RUNS) -> dict[str, float]:
    """Median wall time in seconds of each, measured in turns, after one run each that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(runs + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(spent[1:]) for name, spent in times.items()}


class Spent(NamedTuple):
    """Wall time and processor time of a process in s, and its peak resident memory in GB."""

    wall: float
    worked: float
    peak: float


def process(*arguments: str, checkout: str | Path = HERE.parent) -> Spent:
    """Run a command of ours, or of another version's checkout."""
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "clapsep_cli", *arguments], cwd=checkout)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return Spent(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9)


def processes_in_turns(name: str, works: dict[str, Callable[[], Spent]]) -> None:
    """Print the medians of processes that take turns; and what the first took of the one called "before"."""
    runs: dict[str, list[Spent]] = {label: [] for label in works}
    for _ in range(ROUNDS):
        for label, work in works.items():
            runs[label].append(work())
    medians = {label: Spent(*map(statistics.median, zip(*taken, strict=True))) for label, taken in runs.items()}
    for label, (wall, worked, peak) in medians.items():
        busy = f"{worked / wall:.2f} cores busy, {worked:.1f} s of processor time"
        row(f"{name}, {label}", f"{wall:.1f} s, {busy}, peak {peak:.2f} GB")
    if "before" in medians:
        shares = (f"{now / before:.2f}" for now, before in zip(medians["now"], medians["before"], strict=True))
        row("… now, of before: wall, processor time, memory", ", ".join(shares))


def noise(path: Path, seconds: float, rate: int = 48_000, channels: int = 2) -> Path:
    """Write quiet noise, a minute at a time."""
    rng = np.random.default_rng(0)
    with soundfile.SoundFile(path, "w", rate, channels, "PCM_16", format="RF64") as file:
        left = round(seconds * rate)
        while left:
            count = min(left, 60 * rate)
            file.write(0.1 * rng.standard_normal((count, channels), dtype=np.float32))
            left -= count
    return path


def bench_start() -> None:
    def spent(*arguments: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    times = taking_turns(
        {
            "bare": spent("-c", "pass"),
            "--help": spent("-m", "clapsep_cli", "--help"),
            "library": spent("-c", "import clapsep_cli"),
            "torch": spent("-c", "import torch"),
        },
        5,
    )
    row("clapsep --help", f"{times['--help']:.3f} s (bare Python {times['bare']:.3f} s)")
    row("import clapsep_cli, beyond bare Python", f"{times['library'] - times['bare']:.3f} s")
    row("import torch, beyond bare Python", f"{times['torch'] - times['bare']:.3f} s")


def _attention_products(q: Sequence[int], k: Sequence[int], *_: object, **__: object) -> int:
    batch, heads, tokens, depth = q
    return 4 * batch * heads * tokens * k[2] * depth


@torch.inference_mode()
def bench_window() -> None:
    """One window of 10 s through networks of the released size, beside the products it takes.

    Bfloat16 is timed where it is native: with AVX2 alone one product of the size that is timed here takes 90 s.
    """
    sys.path.insert(0, str(HERE))
    from released import released_parts

    state = released_parts()["separator"]
    with torch.device("meta"):
        high, fast = CLAPSep(CLAPSepConfig()), CLAPSep(CLAPSepConfig())
    for net in (high, fast):
        net.load_state_dict(state, assign=True)
        net.eval()
    fast.lower(torch.bfloat16)
    heard = torch.from_numpy(read_mono(HERE.parent / "examples" / "mix.flac", RATE_HZ))[: high.window]
    heard = F.pad(heard, (0, high.window - len(heard)))[None]
    wanted = condition(*torch.randn(2, 1, 512, generator=torch.Generator().manual_seed(0)))
    # PyTorch does not count those of attention on a CPU: queries by keys, and weights by values.
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_products}
    with FlopCounterMode(display=False, custom_mapping=fused) as products:
        features = high.encode(heard)
        high.mask(features, wanted)
    gflop = products.get_total_flops() / 1e9
    nets = {"float32": high} | ({"bfloat16": fast} if native_bfloat16(torch.device("cpu")) else {})
    works: dict[str, Callable[[], object]] = {}
    for name, net in nets.items():
        side = torch.randn(2048, 2048, dtype=getattr(torch, name))
        works[f"product {name}"] = partial(torch.mm, side, side)
        works[f"encode {name}"] = partial(net.encode, heard)
        works[f"mask {name}"] = partial(net.mask, net.encode(heard), wanted)
    times = taking_turns(works)
    for name in nets:
        rate = 2 * 2048**3 / times[f"product {name}"] / 1e9
        encode, mask = times[f"encode {name}"], times[f"mask {name}"]
        whole = encode + mask
        row(f"matrix product, {name}", f"{rate:.0f} GFLOP/s")
        row(f"clapsep, one window of 10 s, {name}", f"{whole:.3f} s ({encode:.3f} to encode + {mask:.3f} to mask)")
        row("", f"{whole / (gflop / rate):.2f} × the time of its {gflop:.0f} GFLOP of products at that rate")
        row("", f"a second target costs {mask / whole:.0%} of the first")
    waves = [waveform(spectrum(heard) * net.mask(net.encode(heard), wanted), high.window) for net in (high, fast)]
    near = 10 * torch.log10(waves[0].square().sum() / (waves[1] - waves[0]).square().sum())
    row("bfloat16 beside float32, waveform of a real mixture", f"{near:.1f} dB")


def beside(script: str) -> None:
    """Run a benchmark in a process of its own, which must not begin with what this one holds."""
    subprocess.run([sys.executable, HERE / script], check=True)


def stand_in(folder: Path) -> Path:
    """Make `folder / "home"` the home of models, with a CLAPSep of the released size; return that model's folder.

    The version to compare with writes it, if there is one: later versions read it, but it refuses newer settings.
    """
    os.environ["CLAPSEP_HOME"] = str(folder / "home")
    entry = MODELS["clapsep"]
    place = library.place(entry)
    if not place.exists():
        # In a process of its own: what this one has ever held would count in its children's peaks.
        checkout = Path(BEFORE) if BEFORE else HERE.parent
        written = f"write_released(Path({str(place)!r}), pin={library.pin(entry)!r})"
        write = f"from pathlib import Path; from released import write_released; {written}"
        paths = {"PYTHONPATH": f"{checkout}{os.pathsep}{checkout / 'tests'}"}
        subprocess.run([sys.executable, "-c", write], check=True, cwd=checkout, env=os.environ | paths)
        library.write_tokenizer(entry, place)
    return place


def bench_processes(folder: Path) -> None:
    """From a cold process to written files: the reference takes 13 s to start, 16 s for 60 s of audio, 3.8 GB."""
    stand_in(folder)
    home = folder / "home"
    options = ("--model", "clapsep", "-q", "--overwrite", *QUERY)
    for seconds in (10, 60):
        path = str(noise(folder / f"{seconds}.wav", seconds))
        for query in ("first", "repeated"):
            for precision in ("high", "fast"):
                taken = []
                for _ in range(3):
                    if query == "first":
                        shutil.rmtree(home / "texts", ignore_errors=True)
                    taken.append(process("extract", path, *options, "--precision", precision))
                spent, _, peak = (statistics.median(column) for column in zip(*taken, strict=True))
                row(f"clapsep, {seconds} s of stereo, {query} query, {precision}", f"{spent:.2f} s, peak {peak:.2f} GB")
    path = noise(folder / "600.wav", 600)
    taken = [process("extract", str(path), *options, "--precision", "fast") for _ in range(3)]
    spent = statistics.median(one.wall for one in taken)
    row("clapsep, 10 min of stereo, fast, process to files", f"{spent:.1f} s, real-time factor {spent / 600:.4f}")
    row("… of which reading, resampling and writing, one thread", f"{read_and_write(path) / spent:.1%}")


def read_and_write(path: Path) -> float:
    """Processor time in seconds to do with a file what is done beside the model."""
    began = time.process_time()
    with Source(path) as source:
        ear = soxr.ResampleStream(source.rate, RATE_HZ, source.channels, "float32", "HQ")
        encoding = choose_encoding("wav", None, source.rate, source.channels, source.bits)
        paths = {part: path.with_name(f"part.{part}.wav") for part in ("target", "residual")}
        with Outputs(paths, source.rate, source.channels, encoding, overwrite=True) as outputs:
            for block in source.blocks(BLOCK_SECONDS):
                ear.resample_chunk(np.ascontiguousarray(block.T))
                rounded = on_grid(block, encoding.bits)
                outputs.write({"target": rounded, "residual": block - rounded})
            outputs.commit()
    return time.process_time() - began


def bench_growth(folder: Path) -> None:
    """Time linear and memory flat in the length of a recording; linear, and no leak, in the number of files."""
    options = ("--model", "mini", "-q", "--overwrite", *QUERY)
    for seconds in (10, 60, 600, 3600, *([10_800] if LONG else [])):
        path = noise(folder / "long.wav", seconds)
        spent, _, peak = process("extract", str(path), *options)
        row(
            f"mini, {seconds} s of stereo", f"{spent:.1f} s, real-time factor {spent / seconds:.4f}, peak {peak:.2f} GB"
        )
        for file in folder.glob("long*.wav"):
            file.unlink()
    for count in (20, 200, *([2000] if LONG else [])):
        short = folder / f"short{count}"
        short.mkdir()
        first = noise(short / "0.wav", 2, 16_000, 1)
        for n in range(1, count):
            shutil.copy(first, short / f"{n}.wav")
        spent, _, peak = process("extract", str(short), *options, "-o", str(folder / "out"))
        row(f"mini, {count} files of 2 s", f"{spent:.1f} s, {spent / count * 1000:.0f} ms a file, peak {peak:.2f} GB")
        shutil.rmtree(short)


def bench_cores(folder: Path) -> None:
    """A window on each core: whole commands, cores busy, the same bits; seconds a window by the number of workers."""
    clapsep, files = str(stand_in(folder)), folder / "files"
    ten, minute = noise(folder / "ten.wav", 600), noise(folder / "minute.wav", 60)
    files.mkdir()
    for number in range(20):
        noise(files / f"{number}.wav", 600 if LONG else 60)
    settings: dict[str, tuple[tuple[str, ...], str | Path]] = {
        "now": ((), HERE.parent),
        "all cores in a window": (("--batch-size", "1"), HERE.parent),
        "one core": (("--threads", "1"), HERE.parent),
    }
    if BEFORE:
        settings["before"] = (), BEFORE
    for name, given, model in (
        ("mini, 10 min of stereo", ten, "mini"),
        (f"mini, 20 files of {10 if LONG else 1} min", files, "mini"),
        ("clapsep, 60 s of stereo from cold", minute, clapsep),
    ):
        command = ("extract", str(given), "--model", model, "-d", "cpu", "--precision", "high", "-q", "--overwrite")
        out = folder / name.replace(",", "")
        outs = {label: ("-o", str(out / label)) for label in settings}
        processes_in_turns(
            name,
            {
                label: partial(process, *command, *QUERY, *outs[label], *options, checkout=checkout)
                for label, (options, checkout) in settings.items()
            },
        )
        pairs = ((file, out / "one core" / file.name) for file in (out / "now").iterdir())
        same = all(first.read_bytes() == second.read_bytes() for first, second in pairs)
        row("… the same bits on one core and on all", "yes" if same else "NO")
    for name, given_model in (("mini", "mini"), ("clapsep", clapsep)):
        bench_workers(name, library.load_model(given_model, "cpu", "high"))


def bench_workers(name: str, model: Model) -> None:
    cores = torch.get_num_threads()
    windows = [torch.randn(model.separator.window) for _ in range(2 * cores)]
    wanted = model.ask([Query("dog barking", "rain")])
    results: dict[int, list[torch.Tensor]] = {}

    def shared(count: int) -> None:
        torch.set_num_threads(count)
        with Workers(model) as workers:
            results[count] = [coming.result()[0] for coming in [workers.submit(one, wanted) for one in windows]]
        torch.set_num_threads(cores)

    works: dict[str, Callable[[], object]] = {
        f"{count} at once, one thread each": partial(shared, count) for count in sorted({1, 2, cores})
    }
    works["one at once, all threads"] = lambda: [model.infer([window], wanted) for window in windows]
    for label, spent in taking_turns(works, ROUNDS).items():
        row(f"{name}, a window, {label}", f"{spent / len(windows):.3f} s")
    same = all(torch.equal(*pair) for pair in zip(results[1], results[max(results)], strict=True))
    row("… the same bits with one and with all", "yes" if same else "NO")


def main(chosen: Sequence[str]) -> None:
    row("load average, threads", f"{os.getloadavg()[0]:.2f}, {torch.get_num_threads()}")
    with tempfile.TemporaryDirectory() as name:
        parts: dict[str, Callable[[], None]] = {
            "start": bench_start,
            "processes": lambda: bench_processes(Path(name)),  # before this process has held much
            "growth": lambda: bench_growth(Path(name)),
            "cores": lambda: bench_cores(Path(name)),
            "window": bench_window,
            "audiosep": lambda: beside("bench_audiosep.py"),
            "tuss": lambda: beside("bench_tuss.py"),
        }
        for part in chosen or parts:
            parts[part]()


if __name__ == "__main__":
    main(sys.argv[1:])

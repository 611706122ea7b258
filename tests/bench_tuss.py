"""TUSS medium against a plain eager forward, on one thread, with stand-in weights: `python tests/bench_tuss.py`.

Times are processor seconds of one thread, which other programs disturb least, medians of rounds that take turns; peaks
are of processes of their own. PyTorch is imported late, as a child's peak would count what its parent held.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

ROUNDS = 3
SCENE = ("speech", "sfxbg", "musicbg")
STEMS = ("drums", "bass", "vocals", "other")


def row(name: str, value: str) -> None:
    print(f"{name:<58} {value}", flush=True)


def taking_turns(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median processor time of each, in seconds."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            began = time.process_time()
            work()
            times[name].append(time.process_time() - began)
    return {name: statistics.median(spent) for name, spent in times.items()}


def peak(seconds: int) -> None:
    """Separate a recording of `seconds` into three stems, segment by segment, and print the peak memory in bytes."""
    import torch

    from clapsep_cli.models.prompts import PROMPTS
    from clapsep_cli.models.tuss import MEDIUM, Tuss
    from clapsep_cli.stitch.stems import StemStream

    with torch.inference_mode():
        model = Tuss(MEDIUM).eval()
        prompts = torch.tensor([PROMPTS.index(prompt) for prompt in SCENE])
        stream = StemStream(model.window, SCENE, model.rate, model.rate, 1, torch.device("cpu"), model.overlap)
        for second in range(seconds + 1):
            piece = 0.1 * torch.randn(1, model.rate if second < seconds else 0).numpy()
            for window in stream.push(piece, piece, second == seconds):
                stream.accept(model.separate(window[None], prompts)[0])
            stream.pull()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def bench_memory() -> None:
    def measured(seconds: int) -> float:
        command = [sys.executable, __file__, "peak", str(seconds)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1e9

    peaks = {seconds: measured(seconds) for seconds in (6, 12, 60)}
    for seconds, gigabytes in peaks.items():
        row(f"TUSS medium, 3 prompts, {seconds} s in a process: peak memory", f"{gigabytes:.2f} GB")
    row("… growth from 12 s to 60 s", f"{100 * (peaks[60] / peaks[12] - 1):.0f} %")


def bench_time() -> None:
    import torch
    from plain_tuss import PlainTuss
    from tuss_stand_in import MEDIUM, audio, released, separator, wave

    from clapsep_cli.models.prompts import PROMPTS

    def asked(prompts: tuple[str, ...]) -> torch.Tensor:
        return torch.tensor([PROMPTS.index(prompt) for prompt in prompts])

    def half() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model.separate(mixture, asked(SCENE))

    torch.set_num_threads(1)
    with torch.inference_mode():
        tensors, mixture = released(MEDIUM), audio(wave(MEDIUM.window, 0))
        model = separator(MEDIUM, tensors)
        plain = PlainTuss({name.removeprefix("model."): t for name, t in tensors.items()}, MEDIUM.groups, MEDIUM.heads)
        works: dict[str, Callable[[], object]] = {
            "plain": lambda: plain.separate(mixture, SCENE),
            "ours": lambda: model.separate(mixture, asked(SCENE)),
            "half": half,
        }
        for kept in range(1, 5):
            works[f"{kept} of 4"] = lambda kept=kept: model.separate(mixture, asked(STEMS), range(kept))
        spent = taking_turns(works)
        row("TUSS medium, 3 prompts, 6 s, plain eager forward", f"{spent['plain']:.1f} s")
        row("… here, float32", f"{spent['ours']:.1f} s ({spent['plain'] / spent['ours']:.1f} × faster)")
        expected, rounded = model.separate(mixture, asked(SCENE)), half()
        noise = 10 * torch.log10(expected.square().sum() / (expected - rounded).square().sum())
        row(
            "… here, bfloat16 where it may be",
            f"{spent['half']:.1f} s ({spent['plain'] / spent['half']:.1f} × faster), {noise:.0f} dB from float32",
        )
        for kept in range(1, 5):
            share = spent[f"{kept} of 4"] / spent["4 of 4"]
            row(f"TUSS medium, 4 prompts, 6 s, {kept} kept", f"{spent[f'{kept} of 4']:.1f} s ({share:.0%} of all)")


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(int(sys.argv[2]))
    else:
        row("load average", f"{os.getloadavg()[0]:.2f}")
        bench_memory()
        bench_time()

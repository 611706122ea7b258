"""AudioSep against a plain eager forward, on one thread, with stand-in weights: `python tests/bench_audiosep.py`.

Times are processor seconds, user and system (a third of the plain one's goes into mapping memory), medians of rounds
that take turns; peaks are of processes of their own, measured
before PyTorch is imported here: a child's peak would count what its parent held.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

ROUNDS = 3


def row(name: str, value: str) -> None:
    print(f"{name:<58} {value}", flush=True)


def peak(seconds: int) -> None:
    """Separate stereo noise of `seconds` as a stream, and print the peak memory in bytes."""
    import torch

    from clapsep_cli.models.audiosep import N_FFT, AudioSep, AudioSepConfig
    from clapsep_cli.stitch.complex_masks import ComplexMaskStream

    rate, block = 32_000, 160_000
    with torch.inference_mode():
        model, wanted = AudioSep(AudioSepConfig()).eval(), torch.randn(1, 512)
        sizes = model.window, model.config.grid, N_FFT, len(wanted), rate, 2
        stream = ComplexMaskStream(*sizes, torch.device("cpu"))
        for at in range(0, seconds * rate + block, block):
            piece = 0.1 * torch.randn(2, block if at < seconds * rate else 0).numpy()
            for window in stream.push(piece, piece, at >= seconds * rate):
                stream.accept(model.infer(window[None], wanted)[0])
            stream.pull()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def bench_memory() -> None:
    for seconds in (10, 60):
        command = [sys.executable, __file__, "peak", str(seconds)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row(f"AudioSep, {seconds} s of stereo in a process: peak memory", f"{int(done.stdout) / 1e9:.2f} GB")


def bench_time() -> None:
    import torch
    from audiosep_stand_in import AudioSepConfig, condition, separator, separator_tensors
    from fill import signal
    from plain_audiosep import PlainAudioSep

    torch.set_num_threads(1)
    config, audio = AudioSepConfig(), signal(10, 32_000, 200)[None]
    tensors = {name.removeprefix("ss_model."): tensor for name, tensor in separator_tensors(config).items()}
    model, plain = separator(config), PlainAudioSep(tensors)
    works = {"plain": plain.separate, "ours": model}
    times: dict[str, list[float]] = {name: [] for name in works}
    with torch.inference_mode():
        expected, got = (work(audio, condition(1)) for work in works.values())
        for _ in range(ROUNDS):
            for name, work in works.items():
                began = time.process_time()
                work(audio, condition(1))
                times[name].append(time.process_time() - began)
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    row("AudioSep, 10 s, plain eager forward", f"{medians['plain']:.1f} s")
    row("… here", f"{medians['ours']:.1f} s ({medians['plain'] / medians['ours']:.1f} × faster)")
    noise = 10 * torch.log10(expected.square().sum() / (expected - got).square().sum())
    row("… to the plain one", f"{noise:.0f} dB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(int(sys.argv[2]))
    else:
        row("load average", f"{os.getloadavg()[0]:.2f}")
        bench_memory()
        bench_time()

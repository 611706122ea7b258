"""Extracts a dog from the rain, once by words and once by an example, and measures both against the clean recording."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile

from clapsep_cli.metrics import sdr, si_sdr

HERE = (
    Path(__file__).parent.relative_to(Path.cwd())
    if Path(__file__).parent.is_relative_to(Path.cwd())
    else Path(__file__).parent
)
OUT = HERE / "out"


def extract(folder: Path, *query: str) -> None:
    """Run the command as a user would, and print how well the target matches the clean dog."""
    arguments = ["extract", str(HERE / "mix.flac"), *query, "-o", str(folder), "--overwrite"]
    sys.stdout.write("\n$ clapsep " + " ".join(f'"{a}"' if " " in a else a for a in arguments) + "\n")
    sys.stdout.flush()
    # A demo is short: two threads that wait for work would only disturb what else the machine does.
    subprocess.run(
        [sys.executable, "-m", "clapsep_cli", *arguments], check=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    )
    mixture, dog, target = (
        soundfile.read(path, dtype="float32")[0]
        for path in (HERE / "mix.flac", HERE / "dog.flac", folder / "mix.target.wav")
    )
    residual = soundfile.read(folder / "mix.residual.wav", dtype="float32")[0]
    assert np.array_equal(target + residual, mixture), "target and residual do not add up to the mixture"
    gains = {name: metric(target, dog) - metric(mixture, dog) for name, metric in (("SDRi", sdr), ("SI-SDRi", si_sdr))}
    sys.stdout.write("  against the clean dog: " + ", ".join(f"{n} {g:+.1f} dB" for n, g in gains.items()) + "\n")


if __name__ == "__main__":
    extract(OUT / "by-text", "--model", "mini", "--pos", "dog barking", "--neg", "rain")
    extract(OUT / "by-audio", "--model", "mini", "--query-audio", str(HERE / "another-dog.flac"))

"""Small recordings to train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

from clapsep_cli.training.loop.train import Recipe, Report, train


def write_clips(folder: Path, each: int = 4) -> Path:
    """Four labels of tones and noises, `each` clips of each, of which half are held out; the manifest's path."""
    rng, t = np.random.default_rng(0), np.arange(16_000) / 16_000
    lines = ["file,split,label,captions"]
    for label, frequency in (("dog", 300), ("rain", 0), ("violin", 1500), ("bell", 4000)):
        for n in range(each):
            sound = np.sin(2 * np.pi * frequency * (1 + n / 10) * t) if frequency else rng.standard_normal(len(t))
            soundfile.write(folder / f"{label}{n}.wav", 0.3 * sound[: 9000 + 2000 * (n % 4)], 16_000)
            lines.append(f"{label}{n}.wav,{'dev' if n >= each / 2 else 'train'},{label},a {label};{label} sound")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.csv"


def reported(manifest: Path, out: Path, recipe: Recipe, stop_at: tuple[str, int] = ("", 0)) -> list[Report]:
    """Train, and return all reports; `stop_at` a report of this stage and step."""
    reports: list[Report] = []

    def listen(report: Report) -> None:
        reports.append(report)
        if (report.stage, report.step) == stop_at:
            raise KeyboardInterrupt

    assert train(manifest, out, recipe, listen)
    return reports

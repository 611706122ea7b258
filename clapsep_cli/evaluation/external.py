"""Scores other programs: writes mixtures as WAVs, and reads the WAVs that a program separated from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import astuple, fields
from pathlib import Path

import numpy as np
import soundfile

from clapsep_cli.audio.sources import SUFFIXES
from clapsep_cli.data import fit, read_clip
from clapsep_cli.dsp import RATE_HZ
from clapsep_cli.errors import ManifestError, OutputError
from clapsep_cli.evaluation.evaluate import DIGITS, digest_of, mixer, score
from clapsep_cli.evaluation.mixtures import EvaluationSet, Mixture
from clapsep_cli.evaluation.scores import Score
from clapsep_cli.tables import MAX_FAULTS_SHOWN, write_table
from clapsep_cli.version import __version__

RENDERED = "rendered.csv"
PARTS = ("mixture", "target", "interferer")  # folders of the WAVs
LONGEST_GAP = 0.5  # seconds by which an estimate may be shorter than its mixture, as programs drop frames


def name_of(number: int) -> str:
    """Return the file name of a mixture, counted from 1."""
    return f"{number:05}.wav"


def is_rendered(out: Path) -> bool:
    """Return True if a folder holds any rendered mixtures."""
    return (out / RENDERED).exists() or any(path for part in PARTS for path in (out / part).glob("*"))


def render(data: EvaluationSet, out: Path) -> Iterator[str]:
    """Write mixture, target and interferer of each row as float WAVs, mono at 32 kHz, and a CSV that lists them.

    Args:
        data: the mixtures.
        out: the folder. The CSV is written last, so a folder with one is complete.

    Yields:
        The name of each mixture's files.

    Raises:
        ManifestError: for a clip that cannot be read.
        OutputError: a file cannot be written.
    """
    mixed, lines = mixer(data.folder), []
    for number, row in enumerate(data.rows, 1):
        mixture, target = mixed(row)
        name = name_of(number)
        for part, audio in zip(PARTS, (mixture, target, mixture - target), strict=True):
            path = out / part / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(path, audio, RATE_HZ, "FLOAT")
            except (OSError, soundfile.LibsndfileError) as error:
                raise OutputError(f"{path}: cannot be written ({error})") from error
        lines.append((*(f"{part}/{name}" for part in PARTS), *astuple(row)))
        yield name
    write_table(out / RENDERED, [*PARTS, *(f.name for f in fields(Mixture))], lines)


def estimates_of(folder: Path, count: int) -> list[Path]:
    """Find the estimates of `count` mixtures in a folder: `00001.wav` and so on, or in another format.

    Raises `ManifestError` if some are missing.
    """
    found = {path.stem: path for path in sorted(folder.glob("*")) if path.suffix.lower() in SUFFIXES}
    names = [Path(name_of(number)).stem for number in range(1, count + 1)]
    if missing := [name for name in names if name not in found]:
        shown = ", ".join(missing[:MAX_FAULTS_SHOWN]) + (" …" if len(missing) > MAX_FAULTS_SHOWN else "")
        raise ManifestError(
            f"{folder}: {len(missing)} of {count} estimates are missing: {shown}; name each as `mixtures render` "
            f"named its mixture"
        )
    return [found[name] for name in names]


def score_estimates(
    folder: Path, data: EvaluationSet, query: str, bss: bool = True, start: int = 0
) -> Iterator[list[Score]]:
    """Score estimates of targets that another program wrote for rendered mixtures.

    Args:
        folder: the estimates, of any rate and number of channels, named as the mixtures.
        data: the mixtures.
        query: the kind of query that the program used, for tables.
        bss: also compute BSS-eval SDRi.
        start: index of the first mixture to score.

    Yields:
        The score of each mixture.

    Raises:
        ManifestError: for estimates that are missing, cannot be read, or are shorter than their mixture.
    """
    files, mixed = estimates_of(folder, len(data.rows)), mixer(data.folder)
    for row, path in list(zip(data.rows, files, strict=True))[start:]:
        mixture, target = mixed(row)
        estimate = read_clip(path)
        if len(estimate) < len(mixture) - LONGEST_GAP * RATE_HZ:
            seconds = len(estimate) / RATE_HZ
            raise ManifestError(f"{path}: lasts {seconds:.2f} s, and its mixture {len(mixture) / RATE_HZ:.0f} s")
        yield score(
            row, mixture, target, {query: np.ascontiguousarray(fit(estimate, len(mixture)))}, "cpu" if bss else ""
        )


def provenance_of(folder: Path, data: EvaluationSet, query: str, bss: bool) -> dict[str, object]:
    """Return everything that the scores of estimates depend on."""
    sizes = [(path.name, path.stat().st_size) for path in estimates_of(folder, len(data.rows))]
    return {
        "clapsep": __version__,
        "model": folder.resolve().name,
        "mixtures": len(data.rows),
        "data": digest_of(data),
        "estimates": hashlib.sha256(repr(sizes).encode()).hexdigest()[:DIGITS],
        "queries": query,
        "bss": bss,
    }

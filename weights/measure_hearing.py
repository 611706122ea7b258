"""Measures how well `clapsep hear` names what is in a mixture, and calibrates its scores.

    python weights/measure_hearing.py --list weights/dev-mixtures.csv --audio ../shared/audio \
        --vocabulary ../shared/audio/manifest.csv --write weights/sounds/mini.json
    python weights/measure_hearing.py --list weights/unseen-mixtures.csv --audio ../shared

Every mixture of the list, 10 s at 0 dB, is heard with all captions of the list as the vocabulary; two of them are true.
Printed: mAP (the mean over captions of the average precision over mixtures), the share of mixtures whose first sound is
true, and how far scores are from the share that is true. --write fits slope and middle of the scores to this list, and
writes them with the vocabulary: the first caption of each label of a manifest with eight clips to train on or more.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from clapsep_cli import load_model
from clapsep_cli.audio.samples import Audio
from clapsep_cli.audio.sources import read_mono
from clapsep_cli.data import read_manifest
from clapsep_cli.evaluation.mixtures import Mixture, read_mixtures
from clapsep_cli.listening.hearing import Calibration, Listener, Vocabulary, vocabulary_of

RATE, SECONDS, LEAST_CLIPS = 32_000, 10, 8
Values = NDArray[np.float64]


def mix(row: Mixture, folder: Path) -> Audio:
    clips = []
    for name in (row.source_file, row.noise_file):
        clip = read_mono(folder / name, RATE)[: SECONDS * RATE]
        clips.append(np.pad(clip / np.sqrt(np.square(clip).sum() + 1e-12), (0, SECONDS * RATE - len(clip))))
    total = clips[0] + clips[1]
    return np.asarray(0.5 * total / np.abs(total).max(), np.float32)[None]


def average_precision(scores: Values, true: NDArray[np.bool_]) -> float:
    hits = true[np.argsort(-scores, kind="stable")]
    return float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())


def fitted(likenesses: Values, true: NDArray[np.bool_]) -> Calibration:
    """Fit a logistic curve by maximum likelihood."""

    def loss(parameters: Values) -> float:
        x = parameters[0] * (likenesses - parameters[1])
        return float(np.mean(np.logaddexp(0, np.where(true, -x, x))))

    slope, middle = minimize(loss, np.array([10.0, 0.5]), method="Nelder-Mead").x
    return Calibration(round(float(slope), 2), round(float(middle), 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", type=Path, required=True)
    parser.add_argument("--audio", type=Path, required=True)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--vocabulary", type=Path, help="manifest of labelled clips, for --write")
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    model = load_model(given.model, "cpu")
    rows = read_mixtures(given.list)
    rows = rows[:: max(1, len(rows) // given.limit)][: given.limit]
    captions = tuple(sorted({caption for row in rows for caption in (row.positive_caption, row.negative_caption)}))
    listener = Listener(model, Vocabulary(captions, Calibration(1, 0)))
    likenesses, true = [], []
    for row in rows:
        mixture = mix(row, given.audio)
        windows = (mixture[:, round(at * RATE) : round((at + 5) * RATE)] for at in (0, 2.5, 5))
        likenesses.append(np.max([listener.likeness(window, RATE) for window in windows], 0))
        true.append([caption in (row.positive_caption, row.negative_caption) for caption in captions])
    scores, right = np.array(likenesses, np.float64), np.array(true)
    precisions = [average_precision(scores[:, i], right[:, i]) for i in range(len(captions)) if right[:, i].any()]
    first = right[np.arange(len(rows)), scores.argmax(1)].mean()
    print(f"{len(rows)} mixtures, {len(captions)} captions: mAP {np.mean(precisions):.3f}, top-1 {first:.3f}")
    calibration = fitted(scores, right) if given.write else vocabulary_of(model).calibration
    told = calibration(scores.astype(np.float32))
    for low in np.arange(0, 1, 0.2):
        inside = (told >= low) & (told < low + 0.2)
        if inside.any():
            mean, share = told[inside].mean(), right[inside].mean()
            print(f"  scores {low:.1f}-{low + 0.2:.1f}: {inside.sum():6d}, mean {mean:.2f}, true {share:.2f}")
    if given.write:
        clips = [clip for clip in read_manifest(given.vocabulary) if clip.split == "train"]
        counts = Counter(clip.label for clip in clips)
        sounds = sorted({clip.captions[0] for clip in clips if counts[clip.label] >= LEAST_CLIPS})
        facts = {"slope": calibration.slope, "middle": calibration.middle, "sounds": sounds}
        given.write.write_text(json.dumps(facts, indent=1) + "\n")
        print(f"wrote {given.write}: {calibration}, {len(sounds)} sounds")


if __name__ == "__main__":
    main()

"""What a separator in training is measured by: fixed mixtures of clips that it is not trained on.

Clips of each split are mixed among themselves: those of sources that are trained on (`dev`), and those of whole sources
kept out of training, which tell what a model is worth elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clapsep_cli import dsp
from clapsep_cli.audio.samples import to_rate
from clapsep_cli.data import fit
from clapsep_cli.models.base import AudioEncoder, MaskSeparator, TextEncoder, condition
from clapsep_cli.training.loop.pool import Pool
from clapsep_cli.training.recipes.augment import levelled
from clapsep_cli.training.recipes.objective import si_snr

SEED = 1
DEV = "dev"  # the split whose clips are of sources that are trained on


@dataclass(frozen=True)
class Case:
    """A mixture at 0 dB and its target, float32 `[window]`, and a condition for each kind of query."""

    mixture: Tensor
    target: Tensor
    conditions: dict[str, Tensor]


def choose(pool: Pool, held_out: Sequence[int], count: int) -> list[tuple[int, int, int | None]]:
    """Up to `count` times the clips of a target, an interferer that sounds unlike it, and another shot of the target's
    label where there is one. All labels come up before one comes up twice."""
    rng, groups = np.random.default_rng(SEED), dict[str, list[int]]()
    for index in rng.permutation(held_out).tolist():
        groups.setdefault(pool.clips[index].label, []).append(index)
    chosen: list[tuple[int, int, int | None]] = []
    for turn in range(max(map(len, groups.values()), default=0)):
        for label, members in groups.items():
            if turn >= len(members):
                continue
            target = members[turn]
            taken = set(pool.clips[target].captions)
            others = [i for i in held_out if pool.clips[i].label != label and not taken & set(pool.clips[i].captions)]
            if others:
                shot = members[turn - 1] if len(members) > 1 else None
                chosen.append((target, others[rng.integers(len(others))], shot))
    return chosen[:count]


@torch.no_grad()
def cases(
    pool: Pool, held_out: Sequence[int], count: int, window: int, text: TextEncoder, audio: AudioEncoder | None
) -> list[Case]:
    """Cases of the kinds "both" and "positive" (texts), and "shot" where there is an audio encoder: `count` of each
    split. Where there are several, a kind is named after its split, as "unseen both", and `dev` comes last. The
    encoders are on one device; so are the conditions."""
    splits = dict.fromkeys(pool.clips[i].split for i in held_out)
    made = []
    for split in sorted(splits, key=lambda name: name == DEV):
        members = [i for i in held_out if pool.clips[i].split == split]
        prefix = f"{split} " if len(splits) > 1 else ""
        made += _cases(pool, choose(pool, members, count), window, text, audio, prefix)
    return made


def _cases(
    pool: Pool,
    chosen: Sequence[tuple[int, int, int | None]],
    window: int,
    text: TextEncoder,
    audio: AudioEncoder | None,
    prefix: str,
) -> list[Case]:
    made = []
    for target, interferer, shot in chosen:
        first, second = (torch.from_numpy(fit(pool.read(i, 0, window), window)) for i in (target, interferer))
        wanted, other = levelled(first[None], second[None], torch.zeros(1))
        positive, negative = text.embed([pool.clips[i].captions[0] for i in (target, interferer)])[:, None]
        conditions = {
            f"{prefix}both": condition(positive, negative),
            f"{prefix}positive": condition(positive, None),
        }
        if audio is not None and shot is not None:
            heard = to_rate(pool.read(shot, 0, pool.samples(shot)), dsp.RATE_HZ, audio.rate)
            conditions[f"{prefix}shot"] = condition(
                audio.embed(torch.from_numpy(heard).to(positive.device))[None], None
            )
        made.append(Case((wanted + other)[0], wanted[0], conditions))
    return made


@torch.no_grad()
def improvements(separator: MaskSeparator, validated: Sequence[Case]) -> dict[str, float]:
    """Mean SI-SDRi in dB (Eq. 16) by kind of query."""
    gains: dict[str, list[float]] = {}
    for case in validated:
        for kind, wanted in case.conditions.items():
            mixture, target = (signal[None].to(wanted.device) for signal in (case.mixture, case.target))
            mask = separator.mask(separator.encode(mixture), wanted)
            estimate = dsp.masked(dsp.spectrum(mixture), mask, mixture.shape[1])
            gains.setdefault(kind, []).append(float(si_snr(estimate, target) - si_snr(mixture, target)))
    return {kind: float(np.mean(values)) for kind, values in gains.items()}

"""Validates a separator in training: SI-SDRi on fixed mixtures of held-out clips.

Clips are mixed within each split. The clips of `dev` come from the sources of the training clips; other splits hold
whole sources that are not trained on, and show how a model generalises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clapsep_cli import dsp
from clapsep_cli.audio.samples import to_rate
from clapsep_cli.data import fit
from clapsep_cli.metrics import si_sdr
from clapsep_cli.models.base import AudioEncoder, ConditionedSeparator, TextEncoder, condition
from clapsep_cli.training.loop.sampling import Pool
from clapsep_cli.training.recipes.augment import levelled

SEED = 1
DEV = "dev"  # the split of held-out clips from the sources of the training clips


@dataclass(frozen=True)
class Case:
    """A mixture at 0 dB and its target, float32 `[window]` each, and a condition `[1, 2 · dim]` by kind of query."""

    mixture: Tensor
    target: Tensor
    conditions: dict[str, Tensor]


def choose(pool: Pool, held_out: Sequence[int], count: int) -> list[tuple[int, int, int | None]]:
    """Choose clips to mix. Every label is chosen once before one is chosen twice.

    Args:
        pool: all clips.
        held_out: indices of the clips to choose from.
        count: most mixtures.

    Returns:
        For each mixture, the indices of the target, of an interferer of another label without a caption in common, and
        of another clip of the target's label, or None.
    """
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
    """Make the mixtures to validate on, and their conditions.

    Args:
        pool: all clips.
        held_out: indices of the clips to mix.
        count: most mixtures of each split.
        window: length of a mixture in samples.
        text: embeds captions, for the kinds of query "both" and "positive".
        audio: embeds another clip of the label, for the kind "shot"; on the same device.

    Returns:
        The cases, `dev` last. With several splits, kinds are named after theirs: "unseen both".
    """
    splits = dict.fromkeys(pool.clips[i].split for i in held_out)
    made = []
    for split in sorted(splits, key=lambda name: name == DEV):
        prefix = f"{split} " if len(splits) > 1 else ""
        for target, interferer, shot in choose(pool, [i for i in held_out if pool.clips[i].split == split], count):
            first, second = (torch.from_numpy(fit(pool.read(i, 0, window), window)) for i in (target, interferer))
            wanted, other = levelled(first[None], second[None], torch.zeros(1))
            positive, negative = text.embed([pool.clips[i].captions[0] for i in (target, interferer)])[:, None]
            conditions = {
                f"{prefix}both": condition(positive, negative),
                f"{prefix}positive": condition(positive, None),
            }
            if audio is not None and shot is not None:
                heard = to_rate(pool.read(shot, 0, pool.samples(shot)), dsp.RATE_HZ, audio.rate)
                embedding = audio.embed(torch.from_numpy(heard).to(positive.device))
                conditions[f"{prefix}shot"] = condition(embedding[None], None)
            made.append(Case((wanted + other)[0], wanted[0], conditions))
    return made


@torch.no_grad()
def improvements(separator: ConditionedSeparator[Any], validated: Sequence[Case]) -> dict[str, float]:
    """Compute the mean SI-SDRi in dB by kind of query, as `clapsep evaluate` does."""
    gains: dict[str, list[float]] = {}
    for case in validated:
        device = next(iter(case.conditions.values())).device
        estimates = separator.estimate(case.mixture[None].to(device), case.conditions.values())
        mixture, target = case.mixture.numpy(), case.target.numpy()
        for kind, estimate in zip(case.conditions, estimates, strict=True):
            gains.setdefault(kind, []).append(si_sdr(estimate[0].cpu().numpy(), target) - si_sdr(mixture, target))
    return {kind: float(np.mean(values)) for kind, values in gains.items()}

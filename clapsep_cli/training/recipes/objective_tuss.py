"""What the training of a TUSS minimises: negative SNR, which source is which left open among equal prompts."""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

SOFT_LIMIT = 10 ** (-30 / 10)  # of the error's energy relative to the source's: beyond 30 dB little is gained
INACTIVE_WEIGHT = 0.1  # of a source that is silent
EPSILON = 1e-7


def source_losses(estimates: Tensor, references: Tensor, prompts: Tensor) -> Tensor:
    """The loss of each source in dB, float32 `[batch, prompts]`; its mean is what training minimises.

    `estimates` and `references`: `[batch, prompts, samples]`; `prompts`: int64 `[prompts]` or `[batch, prompts]`. Each
    reference is compared with that estimate of an equal prompt by which the group of equal prompts fares best. Where a
    reference is silent, the estimate's level counts, relative to all that the group's prompts should give.
    """
    estimates, references = estimates.float(), references.float()
    rows = []
    for e, r, ids in zip(estimates, references, prompts.expand(estimates.shape[:2]).tolist(), strict=True):
        losses: list[Tensor] = [e.new_zeros(())] * len(ids)
        for prompt in dict.fromkeys(ids):
            members = [i for i, other in enumerate(ids) if other == prompt]
            for i, loss in zip(members, _group_losses(e[members], r[members]), strict=True):
                losses[i] = loss
        rows.append(torch.stack(losses))
    return torch.stack(rows)


def _group_losses(estimates: Tensor, references: Tensor) -> Tensor:
    """Losses of the references of one prompt, both `[sources, samples]`, in the best order of the estimates."""
    power = references.square().sum(1)
    active = power > 0
    scale = torch.where(active, power, references.sum(0).square().sum())
    errors = torch.stack([(estimates - reference).square().sum(1) for reference in references])
    level = 10 * torch.log10(errors + SOFT_LIMIT * scale[:, None] + EPSILON)
    weight = torch.where(active, 1.0, INACTIVE_WEIGHT)
    losses = weight[:, None] * (level - torch.where(active, 10 * torch.log10(scale + EPSILON), 0)[:, None])
    orders = torch.tensor(list(permutations(range(len(losses)))), device=losses.device)
    totals = losses.detach()[torch.arange(len(losses)), orders].sum(1)
    return losses[torch.arange(len(losses)), orders[totals.argmin()]]

"""A recipe of one linear layer without normalisation over the batch, so that it is the same however a batch is shared.

As a script: `linear_recipe.py MANIFEST OUT DEVICES`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from clapsep_cli.data import Corpus
from clapsep_cli.store.tensors import save_tensors
from clapsep_cli.training.loop.optimisation import Trapezoid
from clapsep_cli.training.loop.sampling import Draw, MemoryPool, Sampler
from clapsep_cli.training.loop.settings import settings
from clapsep_cli.training.loop.task import Plan, Task, Weights
from clapsep_cli.training.loop.train import Hardware, Recipe, Run, train
from clapsep_cli.training.recipes.augment import levelled
from clapsep_cli.training.recipes.objective import waveform_loss


@settings
class LinearRecipe(Recipe):
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    report_every: int = 1
    accumulate: int = 1

    def check(self, corpus: Corpus) -> None:
        pass

    def train(self, run: Run) -> None:
        run.fit(LinearTask(self, run))


class LinearTask(Task):
    name, state = "linear", "state.safetensors"

    def __init__(self, recipe: LinearRecipe, run: Run) -> None:
        torch.manual_seed(0)
        self.net, self.folder = nn.Linear(80, 80), run.folder
        self.plan = Plan(4, 8, Trapezoid(0.01, 4, 1, 0.5), recipe.accumulate, report_every=1, validate_every=2)
        self.sampler = Sampler(MemoryPool(run.corpus), Draw(seconds=0.1), 0, run.corpus.train)

    def draw(self, step: int, rows: range) -> tuple[Tensor, ...]:
        return self.sampler.pairs(step, rows)[:3]

    def prepare(self, drawn: tuple[Tensor, ...], step: int, rows: range) -> tuple[Tensor, Tensor]:
        targets, others = levelled(*drawn)
        return targets + others, targets

    def loss(self, prepared: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        mixtures, targets = prepared
        return {"loss": waveform_loss(self.net(mixtures.view(len(mixtures), -1, 80)).flatten(1), targets)}

    def write(self, weights: Weights) -> None:
        save_tensors(weights, self.folder / "linear.safetensors", {})


if __name__ == "__main__":
    hardware = Hardware("cpu", sys.argv[3])
    leads = train(Path(sys.argv[1]), Path(sys.argv[2]), LinearRecipe(), hardware=hardware)
    sys.stdout.write("leads\n" if leads else "follows\n")

"""Trains a TUSS as the released ones were trained (arXiv 2410.23987).

Mixtures are made on the fly of clips whose labels name prompts, and the network gets all of these prompts. The loss is
the negative SNR, in the best assignment of sources to equal prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from clapsep_cli.data import TRAIN, Corpus, Labelling
from clapsep_cli.errors import ManifestError, RecipeError
from clapsep_cli.models.tuss import LARGE, MEDIUM, Tuss, TussConfig
from clapsep_cli.store.checkpoint import load_part, save_part
from clapsep_cli.training.loop.optimisation import Plateau
from clapsep_cli.training.loop.sampling import DiskPool, Pool, ahead, open_pool
from clapsep_cli.training.loop.settings import Share, Workers, settings
from clapsep_cli.training.loop.task import Plan, Task, Weights
from clapsep_cli.training.loop.train import Recipe, Run
from clapsep_cli.training.recipes.objective import source_losses
from clapsep_cli.training.recipes.prompt_mixing import ListedMixtures, PromptMixer, PromptMixing, check_audible
from clapsep_cli.training.recipes.validation import SEED

FAMILY = "tuss"


@settings
class TussRecipe(Recipe):
    """Settings of the training of a TUSS, on stretches of clips as long as its window.

    The manifest's `prompt` column, or else its `label` column, names the clips' prompts. Each split other than "train"
    is a set to validate on; the mean over the sets counts.

    Attributes:
        init: a TUSS to continue from, by name or folder, which decides the size; if empty, one of the size `tuss` is
            trained from scratch.
        prompts: of the model, in this order; by default those of `init` or `tuss`. Fewer make a specialist; a new one
            gets its own token, and is trained together with the others.
        validation_lists: CSVs `mixture,prompt,reference`, each a further set to validate on.
    """

    free: ClassVar[frozenset[str]] = Recipe.free | {"epochs"}
    use: ClassVar[str] = "clapsep separate --model {folder} MIX --prompts NAME..."

    workers: Workers = 4
    save_every: PositiveInt = 500
    init: str = ""
    tuss: TussConfig = MEDIUM
    prompts: tuple[str, ...] = ()
    mixing: PromptMixing = PromptMixing()
    prompt_dropout: Share = 0.0  # share of the steps with only some of the prompts; 0 for the released models
    epochs: PositiveInt = 150
    epoch_steps: PositiveInt = 2500
    batch: PositiveInt = 4
    accumulate: PositiveInt = 1  # parts of a device's batch that are computed one after the other
    lr: NonNegativeFloat = 1e-3  # of both sizes, as released; the paper used 5e-4 for the large one
    warmup: NonNegativeInt = 10_000  # steps
    lr_factor: Share = 0.5
    lr_epochs: NonNegativeInt = 75  # first epochs, in which the learning rate is not lowered
    stale_epochs: PositiveInt = 5  # allowed without improvement; one more lowers it, as the released code counts
    weight_decay: NonNegativeFloat = 0.01
    epsilon: PositiveFloat = 1e-8  # of AdamW
    clip: PositiveFloat = 5.0  # norm of the gradient
    average: PositiveInt = 5  # number of the best epochs whose weights are averaged
    validation_mixtures: NonNegativeInt = 100  # of each set
    validation_lists: tuple[str, ...] = ()

    @property
    def needs(self) -> str:
        return self.init

    @property
    def start(self) -> TussConfig:
        """The size and prompts of the model to start from. Raises `RecipeError` if `init` is of another family."""
        config: TussConfig = self.model(TussConfig, "TUSS").config if self.init else self.tuss
        return config

    @property
    def size(self) -> TussConfig:
        """The network's size and prompts. Raises `RecipeError` for prompts that are not possible."""
        try:
            return replace(self.start, prompts=self.prompts or self.start.prompts)
        except ValueError as error:
            raise RecipeError(f"prompts: {error}") from error

    @property
    def labelling(self) -> Labelling:
        return Labelling(columns=("prompt", "label"), known=self.size.prompts, captions=False, alone=True)

    def check(self, corpus: Corpus) -> None:
        if self.init and self.tuss not in (MEDIUM, LARGE, self.start):
            raise RecipeError(f"the size is that of {self.init}: set init, or settings of tuss")
        if unknown := {prompt for pair in self.mixing.never for prompt in pair} - {*self.size.prompts}:
            known = ", ".join(self.size.prompts)
            raise RecipeError(f"mixing.never: no prompt {', '.join(sorted(unknown))}; there are: {known}")
        pool = DiskPool(corpus, rate=None)
        self.mixers(pool, corpus)
        check_audible(pool)

    def mixers(self, pool: Pool, corpus: Corpus) -> tuple[PromptMixer, dict[str, PromptMixer | ListedMixtures]]:
        """Make the mixer to train on, and the sets to validate on: the other splits, and `validation_lists`."""
        splits: dict[str, list[int]] = {}
        for index, clip in enumerate(corpus.clips):
            splits.setdefault(clip.split, []).append(index)
        config, made = self.size, dict[str, PromptMixer]()
        for split, among in splits.items():
            seed = self.seed if split == TRAIN else SEED
            try:
                made[split] = PromptMixer(pool, among, config.window, seed, self.mixing, config.prompts)
            except ManifestError as error:
                raise ManifestError(f"{corpus.manifest}: split {split!r}: {error}") from error
        listed = {list_: ListedMixtures(Path(list_), config.window, config.prompts) for list_ in self.validation_lists}
        return made.pop(TRAIN), {**made, **listed}

    def train(self, run: Run) -> None:
        pool = open_pool(run.corpus, self.store, rate=None, seconds=math.inf)
        run.fit(TussTask(self, run, self.build(), *self.mixers(pool, run.corpus)))

    def build(self) -> Tuss:
        """Make the network in its initial state, on the CPU."""
        torch.manual_seed(self.seed)
        size, start = self.size, self.start
        if not self.init:
            return Tuss(size)
        net: Tuss = load_part(self.model(TussConfig, "TUSS").folder, "separator", FAMILY, start)
        if size != start:
            tokens = torch.randn(len(size.prompts), size.width)  # of new prompts, as when training begins
            for at, prompt in enumerate(size.prompts):
                if prompt in start.prompts:
                    tokens[at] = net.prompts.data[start.prompts.index(prompt)]
            net.prompts, net.config = nn.Parameter(tokens), size
        return net


class Prepared(NamedTuple):
    """Mixtures `[rows, samples]` and sources `[rows, prompts, samples]`, float32; prompts, int64 `[rows, prompts]`."""

    mixtures: Tensor
    sources: Tensor
    prompts: Tensor


def whole_of(drawn: tuple[Tensor, ...]) -> Prepared:
    """Mix sources, unless their mixture is given, too. All sources are targets."""
    sources, prompts, *mixture = drawn
    return Prepared(mixture[0] if mixture else sources.sum(1), sources, prompts)


class TussTask(Task):
    """Trains the separator to split mixtures into all their sources."""

    name, state, measure = "separator", "state.safetensors", "SNR in dB, up to 30"

    def __init__(
        self,
        recipe: TussRecipe,
        run: Run,
        net: Tuss,
        mixer: PromptMixer,
        sets: Mapping[str, PromptMixer | ListedMixtures],
    ) -> None:
        self.recipe, self.run, self.mixer = recipe, run, mixer
        self.net: Tuss = net
        self.sets = sets if recipe.validation_mixtures else {}
        self.plan = Plan.of(
            recipe,
            steps=recipe.epochs * recipe.epoch_steps,
            schedule=Plateau(
                recipe.lr, 0.0, recipe.lr_factor, recipe.stale_epochs + 1, recipe.warmup, ignored=recipe.lr_epochs + 1
            ),
            validate_every=recipe.epoch_steps,
            keep_best=recipe.average,
        )

    def draw(self, step: int, rows: range) -> tuple[Tensor, ...]:
        sources, prompts = self.mixer.batch(step, rows)
        return torch.from_numpy(sources), torch.from_numpy(prompts)

    def prepare(self, drawn: tuple[Tensor, ...], step: int, rows: range) -> Prepared:
        whole = whole_of(drawn)
        rng, count = np.random.default_rng((self.recipe.seed, 4, step)), drawn[1].shape[1]
        if count < 2 or rng.random() >= self.recipe.prompt_dropout:
            return whole
        asked = int(rng.integers(1, count))  # the same number in all rows
        orders = np.argsort(rng.random((self.plan.batch, count)), axis=1)[rows.start : rows.stop, :asked]
        kept = torch.from_numpy(np.sort(orders, axis=1)).to(drawn[1].device)
        row = torch.arange(len(kept), device=kept.device)[:, None]
        return Prepared(whole.mixtures, whole.sources[row, kept], whole.prompts[row, kept])

    def loss(self, prepared: Prepared) -> dict[str, Tensor]:
        estimates = self.net.separate(prepared.mixtures, prepared.prompts)
        return {"loss": source_losses(estimates, prepared.sources, prepared.prompts).mean()}

    def validate(self, weights: Weights) -> Mapping[str, float]:
        """Return minus the loss, an SNR, by set."""
        self.net.eval()
        figures = {name: -float(np.mean(list(self._losses(mixtures)))) for name, mixtures in self.sets.items()}
        return {"mean of sets": float(np.mean([*figures.values()])), **figures} if len(figures) > 1 else figures

    @torch.no_grad()
    def _losses(self, mixtures: PromptMixer | ListedMixtures) -> Iterator[float]:
        steps = range(self.recipe.validation_mixtures)
        if isinstance(mixtures, ListedMixtures):
            steps = steps[: len(mixtures.parts)]
        drawn = ahead(lambda step: mixtures.batch(step, range(1)), steps, self.plan.workers)
        for batch in drawn:
            prepared = whole_of(self.run.fabric.to_device(tuple(map(torch.from_numpy, batch))))
            with self.run.fabric.autocast():
                yield self.loss(prepared)["loss"].item()

    def write(self, weights: Weights) -> None:
        tensors = {name: tensor.cpu() for name, tensor in weights.items()}
        notes = {"base": self.recipe.init} if self.recipe.init else {}
        save_part(self.run.folder, "separator", FAMILY, self.net.config, tensors, **notes)

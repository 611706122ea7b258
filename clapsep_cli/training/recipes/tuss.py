"""Training of a TUSS as the released ones were trained (arXiv 2410.23987): mixtures made on the fly of clips whose
labels name prompts, all of which are asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from clapsep_cli.data import TRAIN, Corpus, Labelling
from clapsep_cli.errors import ManifestError, RecipeError
from clapsep_cli.models.prompts import PROMPTS
from clapsep_cli.models.tuss import LARGE, MEDIUM, Tuss, TussConfig
from clapsep_cli.store.checkpoint import load_part, save_part
from clapsep_cli.store.library import load_model
from clapsep_cli.training.loop.pool import DiskPool, Pool, open_pool
from clapsep_cli.training.loop.sampling import ahead
from clapsep_cli.training.loop.schedules import Plateau
from clapsep_cli.training.loop.settings import Share, Workers, settings
from clapsep_cli.training.loop.task import Plan, Task, Weights
from clapsep_cli.training.loop.train import Recipe, Run
from clapsep_cli.training.recipes.objective_tuss import source_losses
from clapsep_cli.training.recipes.prompt_mixing import PromptMixer, PromptMixing, check_audible
from clapsep_cli.training.recipes.validation import SEED

FAMILY = "tuss"


@settings
class TussRecipe(Recipe):
    """`init`: a TUSS to go on from, by name or folder, which decides the size and the prompts; if empty, one of the
    size `tuss` is trained from scratch. Clips are heard in stretches of its window.

    The manifest's `prompt` column, or else its `label` column, names the clips' prompts. Each split other than "train"
    is a set to validate on; the mean over the sets counts.
    """

    free: ClassVar[frozenset[str]] = Recipe.free | {"epochs"}
    use: ClassVar[str] = "clapsep separate --model {folder} MIX --prompts NAME..."

    workers: Workers = 4
    save_every: PositiveInt = 500
    init: str = ""
    tuss: TussConfig = MEDIUM
    mixing: PromptMixing = PromptMixing()
    epochs: PositiveInt = 150
    epoch_steps: PositiveInt = 2500
    batch: PositiveInt = 4
    accumulate: PositiveInt = 1  # parts of a device's batch that are computed one after the other
    lr: NonNegativeFloat = 1e-3
    warmup: NonNegativeInt = 10_000  # steps
    lr_factor: Share = 0.5
    lr_epochs: NonNegativeInt = 75  # before which the learning rate is not lowered
    stale_epochs: PositiveInt = 5  # without improvement, until it is
    weight_decay: NonNegativeFloat = 0.01
    epsilon: PositiveFloat = 1e-8  # of AdamW
    clip: PositiveFloat = 5.0  # norm of the gradient
    average: PositiveInt = 5  # of how many of the best epochs the weights are averaged
    validation_mixtures: NonNegativeInt = 100  # of each set

    @property
    def needs(self) -> str:
        return self.init

    @property
    def size(self) -> TussConfig:
        """Of the network. Raises `RecipeError` where it is to go on from a model of another family."""
        if not self.init:
            return self.tuss
        model = load_model(self.init, "cpu")
        if not isinstance(model.config, TussConfig):
            raise RecipeError(f"{model.name} is of the family {model.family!r}; this preset trains TUSS models")
        return model.config

    @property
    def labelling(self) -> Labelling:
        return Labelling(columns=("prompt", "label"), known=self.size.prompts, captions=False, alone=True)

    def check(self, corpus: Corpus) -> None:
        if self.init and self.tuss not in (MEDIUM, LARGE, self.size):
            raise RecipeError(f"the size is that of {self.init}: set init, or settings of tuss")
        unknown = [prompt for prompt in self.size.prompts if prompt not in PROMPTS]
        if unknown:
            raise RecipeError(f"nothing is known of how to mix {', '.join(unknown)}; prompts are {', '.join(PROMPTS)}")
        pool = DiskPool(corpus, rate=None)
        self.mixers(pool, corpus)
        check_audible(pool)

    def mixers(self, pool: Pool, corpus: Corpus) -> dict[str, PromptMixer]:
        """By split: of the clips to train on, and of those of each set to validate on."""
        splits: dict[str, list[int]] = {}
        for index, clip in enumerate(corpus.clips):
            splits.setdefault(clip.split, []).append(index)
        config, made = self.size, {}
        for split, among in splits.items():
            seed = self.seed if split == TRAIN else SEED
            try:
                made[split] = PromptMixer(pool, among, config.window, seed, self.mixing, config.prompts)
            except ManifestError as error:
                raise ManifestError(f"{corpus.manifest}: split {split!r}: {error}") from error
        return made

    def train(self, run: Run) -> None:
        pool = open_pool(run.corpus, self.store, rate=None, seconds=math.inf)
        run.fit(TussTask(self, run, self.build(), self.mixers(pool, run.corpus)))

    def build(self) -> Tuss:
        """The network as training finds it, on the CPU."""
        torch.manual_seed(self.seed)
        if not self.init:
            return Tuss(self.tuss)
        net: Tuss = load_part(load_model(self.init, "cpu").folder, "separator", FAMILY, self.size)
        return net


class Prepared(NamedTuple):
    """Mixtures, float32 `[rows, samples]`, the sources they are made of, `[rows, prompts, samples]`, and the prompts of
    these, int64 `[rows, prompts]`."""

    mixtures: Tensor
    sources: Tensor
    prompts: Tensor


class TussTask(Task):
    """The separator learns to take mixtures apart into all that was mixed."""

    name, state, measure = "separator", "state.safetensors", "SNR in dB, up to 30"

    def __init__(self, recipe: TussRecipe, run: Run, net: Tuss, mixers: Mapping[str, PromptMixer]) -> None:
        self.recipe, self.run = recipe, run
        self.net: Tuss = net
        self.mixer = mixers[TRAIN]
        self.sets = {split: mixer for split, mixer in mixers.items() if split != TRAIN and recipe.validation_mixtures}
        self.plan = Plan(
            steps=recipe.epochs * recipe.epoch_steps,
            batch=recipe.batch,
            accumulate=recipe.accumulate,
            schedule=Plateau(
                recipe.lr, 0.0, recipe.lr_factor, recipe.stale_epochs, recipe.warmup, ignored=recipe.lr_epochs
            ),
            weight_decay=recipe.weight_decay,
            epsilon=recipe.epsilon,
            clip=recipe.clip,
            report_every=recipe.report_every,
            validate_every=recipe.epoch_steps,
            save_every=recipe.save_every,
            keep_best=recipe.average,
            workers=recipe.workers,
        )

    def draw(self, step: int, rows: range) -> tuple[Tensor, ...]:
        sources, prompts = self.mixer.batch(step, rows)
        return torch.from_numpy(sources), torch.from_numpy(prompts)

    def prepare(self, drawn: tuple[Tensor, ...], step: int, rows: range) -> Prepared:
        sources, prompts = drawn
        return Prepared(sources.sum(1), sources, prompts)

    def loss(self, prepared: Prepared) -> dict[str, Tensor]:
        estimates = self.net.separate(prepared.mixtures, prepared.prompts)
        return {"loss": source_losses(estimates, prepared.sources, prepared.prompts).mean()}

    def validate(self, weights: Weights) -> Mapping[str, float]:
        """Less the loss, which is how far the SNR is, by set."""
        self.net.eval()
        figures = {split: self._figure(mixer) for split, mixer in self.sets.items()}
        return {"mean of sets": float(np.mean([*figures.values()])), **figures} if len(figures) > 1 else figures

    @torch.no_grad()
    def _figure(self, mixer: PromptMixer) -> float:
        drawn = ahead(
            lambda step: mixer.batch(step, range(1)), range(self.recipe.validation_mixtures), self.plan.workers
        )
        losses = []
        for step, (sources, prompts) in enumerate(drawn):
            on_device = (self.run.fabric.to_device(torch.from_numpy(part)) for part in (sources, prompts))
            with self.run.fabric.autocast():
                losses.append(self.loss(self.prepare(tuple(on_device), step, range(1)))["loss"].item())
        return -float(np.mean(losses))

    def write(self, weights: Weights) -> None:
        tensors = {name: tensor.cpu() for name, tensor in weights.items()}
        notes = {"base": self.recipe.init} if self.recipe.init else {}
        save_part(self.run.folder, "separator", FAMILY, self.net.config, tensors, **notes)

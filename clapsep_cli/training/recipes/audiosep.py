"""Trains AudioSep as the released one was trained (arXiv 2308.05037, and its code).

CLAP's text tower is frozen, two clips make a mixture, and the loss is the mean absolute difference of waveforms. Two
things differ: the interferer is always another sound, as small collections need, and the text tower has no dropout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from clapsep_cli.data import Corpus, fit
from clapsep_cli.dsp import RATE_HZ
from clapsep_cli.models.audiosep import AudioSep, AudioSepConfig
from clapsep_cli.store.checkpoint import Model, load_part, save_part
from clapsep_cli.store.tensors import copy
from clapsep_cli.training.loop.sampling import Pool, open_pool
from clapsep_cli.training.loop.settings import Workers, settings
from clapsep_cli.training.loop.task import Plan, Task, Weights
from clapsep_cli.training.loop.train import Recipe, Run
from clapsep_cli.training.recipes.augment import levelled, seeded
from clapsep_cli.training.recipes.conditions import embed_all
from clapsep_cli.training.recipes.validation import Case, choose, improvements

FAMILY = "audiosep"
WIDEST_SNR_DB = 10  # of a mixture, either way; a whole number is drawn


@dataclass(frozen=True)
class Staircase:
    """Schedule of a thousandth, a hundredth and a tenth of `lr` for `tread` steps each, then all of it."""

    lr: float
    tread: int

    def rate(self, step: int, figures: Sequence[float]) -> float:
        """Return the learning rate of `step`."""
        return self.lr * 10.0 ** min(0, step // self.tread - 3)


@settings
class AudioSepRecipe(Recipe):
    """Settings of the training of an AudioSep.

    Attributes:
        base: a model by name or folder, whose text tower is used.
        init: a model whose separator is trained further, with its text tower; if empty, a separator of the size of that
            of `base` is trained from scratch.
    """

    free: ClassVar[frozenset[str]] = Recipe.free | {"epochs"}

    precision: Literal["auto", "32-true", "bf16-mixed"] = "32-true"
    min_clips: PositiveInt = 2
    workers: Workers = 4
    save_every: PositiveInt = 500
    base: str = "audiosep"
    init: str = ""
    seconds: Annotated[float, Field(ge=0.05, le=60)] = 5.0  # of a mixture
    epochs: PositiveInt = 50
    epoch_steps: PositiveInt = 20_000  # after which the model is validated
    batch: PositiveInt = 96
    accumulate: PositiveInt = 8  # parts of a device's batch that are computed, and normalised, one after the other
    lr: NonNegativeFloat = 1e-3
    warmup: PositiveInt = 10_000  # steps of each of the three stages before the full learning rate
    weight_decay: NonNegativeFloat = 0.0
    validation_mixtures: NonNegativeInt = 100

    @property
    def needs(self) -> str:
        return self.init or self.base

    def check(self, corpus: Corpus) -> None:
        self.model(AudioSepConfig, "AudioSep")

    def train(self, run: Run) -> None:
        model, pool = self.model(AudioSepConfig, "AudioSep", run.device), open_pool(run.corpus, self.store)
        if run.leads:
            for name in ("text.safetensors", "tokenizer.json"):
                copy(model.folder / name, run.folder / name)
        used = (run.corpus.clips[i] for i in (*run.corpus.train, *run.corpus.held_out))
        embedded = embed_all(model.text, sorted({caption for clip in used for caption in clip.captions}))
        del model.text  # no longer needed
        run.fit(AudioSepTask(self, run, model, build(self, model), pool, embedded))


def build(recipe: AudioSepRecipe, model: Model) -> AudioSep:
    """Make the separator in its initial state, on the CPU."""
    if recipe.init:
        net: AudioSep = load_part(model.folder, "separator", FAMILY, model.config)
        return net
    torch.manual_seed(recipe.seed)
    net = AudioSep(model.config)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net


class AudioSepTask(Task):
    """Trains the separator to extract from a mixture the clip that a text describes."""

    name, state = "separator", "state.safetensors"

    def __init__(
        self,
        recipe: AudioSepRecipe,
        run: Run,
        model: Model,
        net: AudioSep,
        pool: Pool,
        embedded: Mapping[str, Tensor],
    ) -> None:
        self.recipe, self.run, self.model, self.pool = recipe, run, model, pool
        self.net: AudioSep = net
        self.samples = round(recipe.seconds * RATE_HZ)
        self.plan = Plan.of(
            recipe,
            steps=recipe.epochs * recipe.epoch_steps,
            schedule=Staircase(recipe.lr, recipe.warmup),
            amsgrad=True,
            clip=math.inf,
            validate_every=recipe.epoch_steps,
            keep_best=1,
        )
        row = {text: at for at, text in enumerate(embedded)}
        self.captions = [[row[caption] for caption in clip.captions] for clip in pool.clips]
        self.texts = torch.stack(list(embedded.values())).to(run.device)  # [captions, dim]
        self.validated = self.cases()

    def draw(self, step: int, rows: range) -> tuple[Tensor, ...]:
        audio = np.empty((2, len(rows), self.samples), np.float32)
        captions = np.empty(len(rows), np.int64)
        for at, row in enumerate(rows):
            rng = np.random.default_rng((self.recipe.seed, step, row))
            target = int(rng.choice(self.run.corpus.train))
            for side, clip in enumerate((target, self.pool.unlike(target, self.run.corpus.train, rng))):
                audio[side, at] = self.pool.stretch(clip, self.samples, rng)
            captions[at] = rng.choice(self.captions[target])
        targets, interferers = torch.from_numpy(audio)
        return targets, interferers, torch.from_numpy(captions)

    def prepare(self, drawn: tuple[Tensor, ...], step: int, rows: range) -> tuple[Tensor, Tensor, Tensor]:
        clips, captions = (drawn[0], drawn[1]), drawn[2]
        generator = seeded(self.recipe.seed, 1, step)
        snr_db = torch.randint(-WIDEST_SNR_DB, WIDEST_SNR_DB + 1, (self.plan.batch,), generator=generator)
        own = snr_db[rows.start : rows.stop].float().to(captions.device)
        targets, interferers = levelled(*clips, own)
        return targets + interferers, targets, self.texts[captions]

    def loss(self, prepared: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        mixtures, targets, conditions = prepared
        return {"loss": (self.net(mixtures, conditions) - targets).abs().mean()}

    def cases(self) -> list[Case]:
        """Make the mixtures to validate on, at 0 dB, from clips that are held out."""
        made = []
        for *pair, _ in choose(self.pool, self.run.corpus.held_out, self.recipe.validation_mixtures):
            clips = [fit(self.pool.read(i, 0, self.samples), self.samples) for i in pair]
            one, two = torch.from_numpy(np.stack(clips))[:, None]
            target, other = levelled(one, two, torch.zeros(1))
            condition = self.texts[self.captions[pair[0]][:1]]
            made.append(Case((target + other)[0], target[0], {"positive": condition}))
        return made

    def validate(self, weights: Weights) -> Mapping[str, float]:
        return improvements(self.net.eval(), self.validated)

    def write(self, weights: Weights) -> None:
        tensors = {name: tensor.cpu() for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}
        save_part(self.run.folder, "separator", FAMILY, self.net.config, tensors, base=self.model.name)

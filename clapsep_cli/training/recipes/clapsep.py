"""Trains CLAPSep as in the paper (arXiv 2402.17455, III and IV-B).

CLAP is frozen, the separator's encoder is tuned by LoRA, and the decoder is trained from scratch or further.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from typing import Annotated, ClassVar, Literal, NamedTuple, cast

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep_cli import dsp
from clapsep_cli.data import CAPTIONS, Corpus, Labelling
from clapsep_cli.errors import RecipeError
from clapsep_cli.models import htsat
from clapsep_cli.models.base import condition
from clapsep_cli.models.clap import ClapAudioEncoder
from clapsep_cli.models.clapsep import AggregatorLayer, CLAPSep, CLAPSepConfig, Features, TransformerLayer
from clapsep_cli.store import adapters
from clapsep_cli.store.checkpoint import Model, load_part, save_part
from clapsep_cli.store.tensors import copy
from clapsep_cli.training.loop.optimisation import Plateau
from clapsep_cli.training.loop.record import settings_of
from clapsep_cli.training.loop.sampling import Pool, open_pool
from clapsep_cli.training.loop.settings import Share, Shares, Workers, settings
from clapsep_cli.training.loop.task import Plan, Task, Weights
from clapsep_cli.training.loop.train import Recipe, Run
from clapsep_cli.training.recipes.augment import levelled, masked, seeded, stripes
from clapsep_cli.training.recipes.conditions import embed_all
from clapsep_cli.training.recipes.objective import waveform_loss
from clapsep_cli.training.recipes.validation import Case, cases, improvements

ADAPTER = "adapter.safetensors"
TIME_STRIPE, MEL_STRIPE = 64, 8  # SpecAugment: stripes of frames and mel bins are narrower, as in the code
LINEAR_STD = 0.02  # of the decoder's linear weights at first
DEEPEST_DROP = 0.1  # rate at which the decoder's last Swin block is dropped; 0 for the first (stochastic depth)
SPECTRUM_MOMENTUM = 0.01  # of the running statistics of the spectrum


@settings
class ClapsepRecipe(Recipe):
    """Settings of the training of a CLAPSep.

    Attributes:
        base: the model whose CLAP is used, by name or folder.
        init: a model whose separator is trained further, with its CLAP; if empty, the separator's encoder starts as
            CLAP's and its decoder from scratch.
        encoder: trained by LoRA, frozen, trained in full from scratch, or none: then zeros replace it (Table IV).
        queries: the weight of audio, α ~ U(0, 1) (Eq. 3), 0 or 1.
        phase: add a head that changes the mixture's phases, as a variant of the released code does; at first it changes
            nothing. The model `init` keeps the head that it has.
        valence: shares of the steps with the positive query alone, the negative alone, and both.
    """

    free: ClassVar[frozenset[str]] = Recipe.free | {"epochs"}

    min_clips: PositiveInt = 2
    workers: Workers = 4
    save_every: PositiveInt = 500
    base: str = "clapsep"
    init: str = ""
    encoder: Literal["lora", "frozen", "scratch", "none"] = "lora"
    lora_only: bool = False  # do not train the decoder
    lora_rank: PositiveInt = 16
    lora_alpha: PositiveFloat = 1.0
    queries: Literal["hybrid", "text", "audio"] = "hybrid"
    phase: bool = False
    valence: Annotated[Shares, Field(min_length=3, max_length=3)] = (0.25, 0.25, 0.5)
    speeds: Annotated[tuple[Annotated[float, Field(ge=0.5, le=2)], ...], Field(min_length=1)] = (
        0.9,
        1.1,
    )  # at one of which a query shot is played
    spec_augment: bool = True  # of query shots
    snr_weight: Share = 0.9  # λ of Eq. 14
    epochs: PositiveInt = 150  # in each of which every clip is a target once
    batch: PositiveInt = 32
    accumulate: PositiveInt = 1  # parts of a device's batch that are computed one after the other
    lr: NonNegativeFloat = 1e-4
    lr_floor: NonNegativeFloat = 5e-6
    lr_factor: Share = 0.3
    stale_epochs: PositiveInt = 5  # without improvement, until the learning rate is lowered: by the paper's words
    weight_decay: NonNegativeFloat = 0.01
    clip: PositiveFloat = 5.0  # norm of the gradient
    validation_mixtures: NonNegativeInt | None = None  # at most; None for one for each held-out clip
    keep: Literal["best", "last"] = "best"  # weights of which epoch are written

    @property
    def labelling(self) -> Labelling:
        return CAPTIONS

    @property
    def needs(self) -> str:
        return self.init or self.base

    def check(self, corpus: Corpus) -> None:
        if self.lora_only and not (self.init and self.encoder == "lora"):
            raise RecipeError("lora_only tunes an existing separator: set init, and encoder lora")
        if self.lora_only and self.phase:
            raise RecipeError("lora_only tunes only the encoder: leave phase out")
        self.model(CLAPSepConfig, "CLAPSep")

    def train(self, run: Run) -> None:
        model, pool = self.model(CLAPSepConfig, "CLAPSep", run.device), open_pool(run.corpus, self.store)
        if run.leads:
            for name in ("text.safetensors", "audio.safetensors", "tokenizer.json"):
                copy(model.folder / name, run.folder / name)
        net = build(self, model)
        captions = sorted({c for i in run.corpus.train for c in run.corpus.clips[i].captions})
        embedded = embed_all(model.text, captions)
        window = net.config.window
        audio = None if self.queries == "text" else model.audio  # CLAP's; not read if no shot is a query
        count = len(run.corpus.held_out) if self.validation_mixtures is None else self.validation_mixtures
        validated = cases(pool, run.corpus.held_out, count, window, model.text, audio)
        del model.text  # not needed any more
        run.fit(ClapsepTask(self, run, model, net, pool, embedded, validated))


def build(recipe: ClapsepRecipe, model: Model) -> CLAPSep:
    """Make the separator in its initial state, on the CPU."""
    torch.manual_seed(recipe.seed)
    config = replace(model.config, phase=recipe.phase or model.config.phase)
    if recipe.init:
        net: CLAPSep = load_part(model.folder, "separator", model.family, model.config)
        if config != model.config:
            more = CLAPSep(config)
            more.load_state_dict({**more.state_dict(), **net.state_dict()})
            net = more
    else:
        net = CLAPSep(config)
        start_decoder(net)
        net.encoder.load_state_dict(load_part(model.folder, "audio", model.family, model.config).htsat.state_dict())
    net.mask_net.spec_norm.momentum = SPECTRUM_MOMENTUM
    net.requires_grad_(not recipe.lora_only)
    match recipe.encoder:
        case "lora":
            adapters.inject(net.encoder, recipe.lora_rank, recipe.lora_alpha)
        case "scratch":
            net.encoder = net.config.build_htsat(stretch=False)
        case "frozen" | "none":
            net.encoder.requires_grad_(False)
    if recipe.encoder == "none":  # zeros, so that only the condition and the spectrum have an effect
        for parameter in net.encoder.parameters():
            parameter.data.zero_()
    return net


def start_decoder(net: CLAPSep) -> None:
    """Set the linear layers of a decoder as the reference does: truncated normal weights, and biases of zero.

    The input projections of MaskNet's attention are no linear layers there but torch's own attention: Xavier, uniform.
    """
    for part in (net.aggregator, net.mask_net):
        for layer in part.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=LINEAR_STD)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    for attention in net.mask_net.layers:
        nn.init.xavier_uniform_(cast(TransformerLayer, attention).qkv.weight)
    if net.mask_net.turn is not None:
        nn.init.zeros_(net.mask_net.turn.weight)


class Prepared(NamedTuple):
    """Holds mixtures and targets, float32 `[rows, window]`, the mixtures at the encoder's rate, and the conditions.

    `depth`: factors of what each Swin block of the decoder adds, float32 `[rows, blocks, 2]`, 0 where it is dropped.
    """

    mixtures: Tensor
    heard: Tensor
    targets: Tensor
    conditions: Tensor
    depth: Tensor


class ClapsepTask(Task):
    """Trains the separator to mask mixtures of two clips at 0 dB, made on the fly."""

    name, state = "separator", "state.safetensors"

    def __init__(
        self,
        recipe: ClapsepRecipe,
        run: Run,
        model: Model,
        net: CLAPSep,
        pool: Pool,
        embedded: Mapping[str, Tensor],
        validated: Sequence[Case],
    ) -> None:
        self.recipe, self.run, self.model, self.pool, self.validated = recipe, run, model, pool, validated
        self.net: CLAPSep = net
        self.clips = run.corpus.train
        epoch = max(1, len(self.clips) // recipe.batch)
        self.epoch = epoch  # in steps
        self.plan = Plan.of(
            recipe,
            steps=recipe.epochs * epoch,
            schedule=Plateau(recipe.lr, recipe.lr_floor, recipe.lr_factor, recipe.stale_epochs),
            validate_every=epoch,
            keep_best=int(recipe.keep == "best"),
        )
        row = {text: at for at, text in enumerate(embedded)}
        self.captions = {i: [row[c] for c in run.corpus.clips[i].captions if c in row] for i in self.clips}
        self.texts = torch.stack(list(embedded.values())).to(run.device)  # [captions, dim]
        self.window = net.config.window
        self.audio: ClapAudioEncoder | None = None
        if recipe.queries != "text":
            assert isinstance(model.audio, ClapAudioEncoder)
            self.audio = model.audio.requires_grad_(False)
            self.players = [
                dsp.Resampler(round(dsp.RATE_HZ * speed), self.audio.rate).to(run.device) for speed in recipe.speeds
            ]

    def draw(self, step: int, rows: range) -> tuple[Tensor, ...]:
        audio = np.empty((2, len(rows), self.window), np.float32)
        captions = np.empty((len(rows), 2), np.int64)
        for at, row in enumerate(rows):
            rng = np.random.default_rng((self.recipe.seed, step, row))
            target = self.target(step, row)
            for side, clip in enumerate((target, self.pool.unlike(target, self.clips, rng))):
                audio[side, at] = self.pool.stretch(clip, self.window, rng)
                captions[at, side] = rng.choice(self.captions[clip])
        targets, interferers = torch.from_numpy(audio)
        return targets, interferers, torch.from_numpy(captions)

    def target(self, step: int, row: int) -> int:
        """Return the target clip of a row: each clip once in an epoch, in a new order each time."""
        epoch, within = divmod(step, self.epoch)
        order = _order(self.recipe.seed, epoch, len(self.clips))
        return self.clips[order[(within * self.recipe.batch + row) % len(order)]]

    def prepare(self, drawn: tuple[Tensor, ...], step: int, rows: range) -> Prepared:
        clips, captions = (drawn[0], drawn[1]), drawn[2]
        targets, interferers = levelled(clips[0], clips[1], torch.zeros(len(captions), device=captions.device))
        rng = np.random.default_rng((self.recipe.seed, 1, step))
        alpha = {"hybrid": float(rng.random()), "text": 0.0, "audio": 1.0}[self.recipe.queries]
        asked = ((True, False), (False, True), (True, True))[rng.choice(3, p=self.recipe.valence)]
        sides = [
            self._query(clips[side], captions[:, side], alpha, (step, side), rows) if wanted else None
            for side, wanted in enumerate(asked)
        ]
        mixtures = targets + interferers
        depth = self._depth(step, rows).to(mixtures.device)
        return Prepared(mixtures, self.net.resample(mixtures), targets, condition(*sides), depth)

    def _depth(self, step: int, rows: range) -> Tensor:
        """Draw the decoder's Swin blocks that are dropped for each row, later blocks more often."""
        highest = 0.0 if self.recipe.lora_only else DEEPEST_DROP
        rates = torch.linspace(0, highest, len(self.net.aggregator.layers))[:, None]
        shape = (self.plan.batch, len(rates), 2)
        kept = torch.rand(shape, generator=seeded(self.recipe.seed, 4, step)) >= rates
        return (kept / (1 - rates))[rows.start : rows.stop]

    def _query(self, clips: Tensor, captions: Tensor, alpha: float, key: tuple[int, int], rows: range) -> Tensor:
        """Embed one side, α · audio + (1 − α) · text (Eq. 3), `[rows, dim]`; the audio is the clip itself, altered."""
        texts = self.texts[captions]
        return texts if self.audio is None else alpha * self._shots(clips, key, rows) + (1 - alpha) * texts

    def _shots(self, clips: Tensor, key: tuple[int, int], rows: range) -> Tensor:
        """Embed clips at a slightly lower or higher speed, with random stripes of time and mel bands masked."""
        assert self.audio is not None
        generator, batch, window = seeded(self.recipe.seed, 2, *key), self.plan.batch, self.audio.window
        speeds = torch.randint(len(self.players), (batch,), generator=generator)[rows.start : rows.stop].tolist()
        each = [self.players[at](clip[None])[0, :window] for at, clip in zip(speeds, clips, strict=True)]
        played = torch.stack([F.pad(clip, (0, window - len(clip))) for clip in each])
        frames = dsp.spectrum(played[:1], htsat.HOP).shape[1]
        kept = stripes(batch, frames, TIME_STRIPE, generator)[:, :, None]
        kept = kept * stripes(batch, self.audio.htsat.mels, MEL_STRIPE, generator)[:, None]
        own = kept[rows.start : rows.stop].to(clips.device) if self.recipe.spec_augment else torch.ones(())
        with masked(self.audio.htsat.bn0, own), self.run.fabric.autocast():
            return self.audio.embed_windows(played).float()

    def loss(self, prepared: Prepared) -> dict[str, Tensor]:
        spectrum = dsp.spectrum(prepared.mixtures)
        # `prepared.heard` was resampled in float32: the precision of the networks is too low for that.
        features = Features(spectrum.abs(), self.net.encoder(prepared.heard))
        with ExitStack() as dropped:
            factors = prepared.depth.permute(1, 2, 0)
            for layer, (attention, mlp) in zip(self.net.aggregator.layers, factors, strict=True):
                assert isinstance(layer, AggregatorLayer)
                windows = (layer.block.side // layer.block.window) ** 2
                dropped.enter_context(masked(layer.block.attn, attention.repeat_interleave(windows)[:, None, None]))
                dropped.enter_context(masked(layer.block.mlp, mlp[:, None, None]))
            mask = self.net.mask(features, prepared.conditions)
        estimate = dsp.masked(spectrum, mask, self.window)
        return {"loss": waveform_loss(estimate, prepared.targets, self.recipe.snr_weight)}

    def ready(self) -> None:
        self.net.train(not self.recipe.lora_only)
        self.net.encoder.train(self.recipe.encoder == "scratch")

    def validate(self, weights: Weights) -> Mapping[str, float]:
        return improvements(self.net.eval(), self.validated)

    def write(self, weights: Weights) -> None:
        recipe, folder = self.recipe, self.run.folder
        plain = adapters.merged(weights, recipe.lora_alpha / recipe.lora_rank)
        tensors = {name: tensor.cpu() for name, tensor in plain.items() if not name.endswith("num_batches_tracked")}
        save_part(folder, "separator", self.model.family, self.net.config, tensors, base=self.model.name)
        if recipe.lora_only:
            settings = settings_of(recipe)
            adapters.save(folder / ADAPTER, weights, self.model, recipe.lora_rank, recipe.lora_alpha, settings)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    """Shuffle the clips of an epoch."""
    order: list[int] = np.random.default_rng((seed, 3, epoch)).permutation(count).tolist()
    return order

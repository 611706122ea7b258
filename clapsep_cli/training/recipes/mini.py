"""Trains a mini model: optionally the space of its queries, in closed form, then its separator.

The trunk is frozen. Mixtures are made on the fly as in the paper (IV-B), each with several queries: half of them have
both sides, the others one; α weighs text and audio of a side; the loss is −(0.9 · SNR + 0.1 · SI-SNR).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from clapsep_cli import dsp
from clapsep_cli.data import Clip, Corpus, read_clip, read_paraphrases
from clapsep_cli.errors import ManifestError, ModelError, QueryError, RecipeError
from clapsep_cli.files import path_in
from clapsep_cli.models.mini import Mini, MiniConfig, lay_out
from clapsep_cli.models.mini_queries import STRETCH_SECONDS, MiniAudio, MiniText
from clapsep_cli.registry import BUNDLED, weights_folder
from clapsep_cli.store.checkpoint import Model, load_part, save_part
from clapsep_cli.store.tensors import copy, read_tensors, save_tensors
from clapsep_cli.tables import read_table
from clapsep_cli.training.loop.optimisation import Trapezoid
from clapsep_cli.training.loop.sampling import Draw, Pool, Sampler, open_pool
from clapsep_cli.training.loop.settings import Share, flatten, settings
from clapsep_cli.training.loop.task import Plan, Task, Weights
from clapsep_cli.training.loop.train import ESTIMATE, Clock, Recipe, Report, Run
from clapsep_cli.training.recipes.augment import Acoustics, elsewhere, levelled, room_spectra, seeded
from clapsep_cli.training.recipes.conditions import DrawnQueries, Mixing, Queries, Texts
from clapsep_cli.training.recipes.objective import BandStatistics, separation_loss, statistics
from clapsep_cli.training.recipes.space import balanced, fit_sounds, fit_words
from clapsep_cli.training.recipes.validation import Case, cases, improvements

# Layers that begin and end the network, or know its queries: Muon is not for these.
ENDS = ("stem", "norms", "query", "scale", "alike", "head", "fine")
FEWEST_STEPS, MOST_STEPS = 200, 6000  # of the separator, unless they are set
BATCH, FEW_CLIPS_BATCH = 8, 4  # mixtures of a step, unless they are set
HEARD, HEARD_EVERY = "heard.safetensors", 50  # features of the clips; clips between two reports
ENCODERS = ("text.safetensors", "audio.safetensors")


@settings
class SeparatorSettings:
    """Length and learning rate of the separator's training."""

    lr: NonNegativeFloat = 1.5e-3
    steps: NonNegativeInt = 0  # by the size of the data if 0
    batch: NonNegativeInt = 0  # mixtures of a step; by the size of the data if 0
    warmup: NonNegativeInt = 50
    decay: Share = 0.4  # the learning rate falls to zero over this last share of the steps


@settings
class MiniRecipe(Recipe):
    """Settings of the training of a mini model.

    Attributes:
        encoders: folder of a mini model whose text and audio encoders are used; the bundled one if empty.
        init: folder or name of a mini model whose encoders are used and whose separator is trained further.
        space: "keep" uses the encoders as they are, "words" fits the text encoder's map to the clips, "fit" both maps.
        paraphrases: a CSV `label,captions`.
        rooms: a CSV `file` of impulse responses.
        cache: a file for decoded clips, so that they are decoded once.
    """

    free: ClassVar[frozenset[str]] = Recipe.free | {
        "validate_every",
        "separator.steps",
        "separator.warmup",
        "separator.decay",
        "cache",
    }

    encoders: str = ""
    init: str = ""
    space: Literal["keep", "words", "fit"] = "keep"
    whitening: PositiveFloat = 0.5  # see `space.fit_sounds`; of a space that is fitted
    ridge: PositiveFloat = 100.0  # see `space.fit_words`; of a space that is fitted
    paraphrases: str = ""
    rooms: str = ""
    cache: str = ""
    draw: Draw = Draw(seconds=4.0, label_power=0.6, hard=0.1, speed=0.2, speed_share=0.5)
    separator: SeparatorSettings = SeparatorSettings()
    mixing: Mixing = Mixing()
    quiet: NonNegativeFloat = 0.45  # weight of a dB of output where the target is absent
    untold: Share = 0.25  # share of the queries that reach the network only through the maps of likeness
    acoustics: Acoustics = Acoustics()
    optimiser: Literal["muon", "adamw"] = "muon"
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.997
    weight_decay: NonNegativeFloat = 0.01
    validate_every: PositiveInt = 500
    validation_mixtures: NonNegativeInt = 48
    mini: MiniConfig = field(default_factory=MiniConfig)

    @property
    def source(self) -> Path:
        """The folder that the encoders are taken from, and with `init` the separator, too."""
        bundled = weights_folder() / BUNDLED
        chosen = self.init or self.encoders
        return bundled if chosen in ("", BUNDLED) else Path(chosen)

    def suited(self, corpus: Corpus) -> MiniRecipe:
        """Set two steps for each 10 s of the clips, within limits."""
        # The bundled model's 10 hours in 9,000 clips get the most.
        tens = sum(max(1.0, corpus.seconds[index] / 10) for index in corpus.train)
        steps = self.separator.steps or round(min(max(2 * tens, FEWEST_STEPS), MOST_STEPS))
        batch = self.separator.batch or (BATCH if steps > FEWEST_STEPS else FEW_CLIPS_BATCH)
        return replace(self, separator=replace(self.separator, steps=steps, batch=batch))

    def plan(self) -> Plan:
        """Make the plan of the separator's training."""
        stage = self.separator
        return Plan.of(
            self,
            steps=stage.steps,
            batch=stage.batch,
            schedule=Trapezoid(stage.lr, stage.steps, min(stage.warmup, stage.steps // 10), stage.decay),
        )

    def check(self, corpus: Corpus) -> None:
        try:
            with torch.device("meta"):
                window = Mini(self.mini).window
        except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError) as error:
            raise RecipeError(f"mini.mini: a network cannot have these sizes ({error})") from error
        if window < 1:
            raise RecipeError(f"mini.mini.seconds should be greater than 0, not {self.mini.seconds}")
        if self.init and self.encoders:
            raise RecipeError(f"{self.init} brings its own encoders: set init or encoders, not both")
        if self.init and (self.source / "separator.safetensors").is_file():
            config = Model(self.init, self.source, torch.device("cpu")).config
            if not isinstance(config, MiniConfig):
                raise RecipeError(f"{self.source}: is no mini model; --init of mini needs one")
            here = dict(flatten(self.mini, "mini."))
            other = {name: size for name, size in flatten(config, "mini.") if size != here[name]}
            if other:
                sizes = " ".join(f"{name}={json.dumps(size, separators=(',', ':'))}" for name, size in other.items())
                raise RecipeError(f"{self.source}: is of another size than is set; set {sizes}")
        needed = (*ENCODERS, "tokenizer.json", *(["separator.safetensors"] if self.init else []))
        for name in needed:
            if not (self.source / name).is_file():
                wanted = f"--{'init' if self.init else 'encoders'} takes a folder with a mini model"
                raise ModelError(f"{self.source / name}: no such file; {wanted}")

    @property
    def needs(self) -> str:
        return self.init

    def train(self, run: Run) -> None:
        pool = open_pool(run.corpus, self.store, cache=Path(self.cache) if self.cache else None)
        audio = load_part(self.source, "audio", "mini", self.mini).to(run.device)
        means = heard(run, pool, audio)
        if run.leads:
            write_encoders(self, run, means, audio)
        run.fabric.barrier()
        text, audio = (load_part(run.folder, part, "mini", self.mini).to(run.device) for part in ("text", "audio"))
        with torch.no_grad():  # as one batch: a call for each clip would fragment the memory
            points = audio.keys.project(torch.cat(list(means.values())).to(run.device)).cpu()
        views = dict(zip(means, points.split([len(each) for each in means.values()]), strict=True))
        texts = Texts(text, run.corpus.clips, read_paraphrases(Path(self.paraphrases)) if self.paraphrases else {})
        sampler = Sampler(pool, self.draw, self.seed, run.corpus.train, texts.nearest() if self.draw.hard else None)
        queries = Queries(pool, texts, views, self.mixing)
        seconds = run.rehearse(SeparatorTask(self, sampler, queries, [], audio, run))
        told = {f"{SeparatorTask.name} ({self.separator.steps} steps)": seconds}
        run.tell(Report(ESTIMATE, 0, self.separator.steps, told, seconds))
        window = self.mini.seconds * dsp.RATE_HZ
        validated = cases(pool, run.corpus.held_out, self.validation_mixtures, window, text, audio)
        run.fit(SeparatorTask(self, sampler, queries, validated, audio, run))


class Places:
    """Simulates other recordings of clips (see `elsewhere`); the draws depend only on seed, step and row."""

    def __init__(self, recipe: MiniRecipe, samples: int, device: torch.device) -> None:
        self.recipe = recipe
        listed = Path(recipe.rooms) if recipe.rooms else None
        files = [path_in(listed.parent, row["file"]) for _, row in read_table(listed, ("file",))] if listed else []
        self.rooms = room_spectra([read_clip(file) for file in files], samples).to(device) if files else None

    def __call__(self, audio: Tensor, step: int, rows: range, side: int = 0) -> Tensor:
        """Alter the given rows of a step's batch, float32 `[rows, samples]`, targets or those of another `side`."""
        generators = [seeded(self.recipe.seed, 3 + side, step, row) for row in rows]
        return elsewhere(audio, self.rooms, self.recipe.acoustics, generators)


def heard(run: Run, pool: Pool, net: MiniAudio) -> dict[int, Tensor]:
    """Compute the trunk's features of the training clips, at the beginning and the end of each.

    Args:
        run: the run; its folder keeps the result.
        pool: its clips.
        net: the audio encoder.

    Returns:
        By the clip's index, float32 `[2, 1536]`, or `[1, 1536]` for a short clip.
    """
    among, path = run.corpus.train, run.folder / HEARD
    if run.leads and not path.exists():
        means, clock, length = {}, Clock(), STRETCH_SECONDS * net.rate
        for number, index in enumerate(among, 1):
            run.check_stop()
            starts = sorted({0, max(0, pool.samples(index) - length)})
            stretches = [torch.from_numpy(pool.read(index, at, at + length)).to(run.device) for at in starts]
            means[str(index)] = torch.stack([net.hear(audio) for audio in stretches]).cpu()
            if number % HEARD_EVERY == 0 or number == len(among):
                left = clock.seconds_left(number, len(among))
                run.tell(Report("clips heard", number, len(among), {}, left))
        save_tensors(means, path, {})
    run.fabric.barrier()
    return {int(name): means for name, means in read_tensors(path).items()}


def write_encoders(recipe: MiniRecipe, run: Run, means: Mapping[int, Tensor], audio: MiniAudio) -> None:
    """Write the encoders to the run's folder, as they are or fitted to the clips, unless they are there."""
    kept = {"keep": ENCODERS, "words": ("audio.safetensors",), "fit": ()}[recipe.space]
    for name in ("tokenizer.json", *kept):
        copy(recipe.source / name, run.folder / name)
    if recipe.space == "keep" or (run.folder / "text.safetensors").exists():
        return
    text = load_part(recipe.source, "text", "mini", recipe.mini)
    clips = [run.corpus.clips[index] for index in means]
    weights = balanced([clip.label for clip in clips])
    sounds = torch.stack([each.square().mean(0).sqrt() for each in means.values()]).double()
    if recipe.space == "fit":
        audio.keys.put(*fit_sounds(sounds, weights, recipe.mini.dim, recipe.whitening))
        save_part(run.folder, "audio", "mini", recipe.mini, _half(audio.state_dict()))
    points = audio.keys.project(sounds.to(run.device, torch.float32)).detach().cpu().double()
    matrix, offset = fit_words(*_captioned(text, clips, points, weights), recipe.ridge)
    text.map.load_state_dict({"weight": matrix.T, "bias": offset})
    save_part(run.folder, "text", "mini", recipe.mini, _half(text.state_dict()))


def _captioned(text: MiniText, clips: Sequence[Clip], points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the word vectors of the captions that the encoder understands, and their points and weights.

    The captions of a clip share its weight. Raises `ManifestError` if the encoder understands none.
    """
    vectors: dict[str, Tensor] = {}
    for caption in {caption for clip in clips for caption in clip.captions}:
        with suppress(QueryError):
            vectors[caption] = text.word_vector(caption).double()
    rows = []
    for clip, point, weight in zip(clips, points, weights, strict=True):
        known = [vectors[caption] for caption in clip.captions if caption in vectors]
        rows += [(vector, point, weight / len(known)) for vector in known]
    if not rows:
        raise ManifestError("no caption of the manifest has a word that the text encoder knows")
    words, wanted, shares = (torch.stack(column) for column in zip(*rows, strict=True))
    return words, wanted, shares


class Prepared(NamedTuple):
    """Holds the separator's inputs, the queries, and the statistics that score its masks."""

    levels: Tensor
    maps: list[Tensor]
    asked: DrawnQueries
    told: Tensor  # see `Mini.band_mask`
    statistics: BandStatistics


class SeparatorTask(Task):
    """Trains the separator to mask mixtures that are made on the fly, by several queries each."""

    name, state = "separator", "state.safetensors"

    def __init__(
        self,
        recipe: MiniRecipe,
        sampler: Sampler,
        queries: Queries,
        validated: Sequence[Case],
        audio: MiniAudio,
        run: Run,
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.sampler, self.queries = recipe, sampler, queries
        self.places = Places(recipe, sampler.length, run.device)
        self.validated, self.folder, self.device = validated, run.folder, run.device
        self.plan = recipe.plan()
        self.net: Mini = Mini(replace(recipe.mini, seconds=math.ceil(recipe.draw.seconds)))
        if recipe.init:
            self.net.load_state_dict(load_part(recipe.source, "separator", "mini", recipe.mini).state_dict())
        if not recipe.init or recipe.space == "fit":
            self.net.keys.load_state_dict(audio.keys.state_dict())
        self.net.trunk.load_state_dict(audio.trunk.state_dict())
        self.net.keys.requires_grad_(False)  # part of the space of queries
        lay_out(self.net)

    def hidden(self, name: str) -> bool:
        """Return True if Muon trains a parameter: a matrix or kernel, but not of the first or last layer."""
        matrix = self.net.get_parameter(name).dim() >= 2
        return self.recipe.optimiser == "muon" and matrix and name.split(".")[0] not in ENDS

    def draw(self, step: int, rows: range) -> tuple[Tensor, ...]:
        pairs = self.sampler.pairs(step, rows)
        generators = [np.random.default_rng((self.recipe.seed, 1, step, row)) for row in rows]
        asked = self.queries.draw(self.sampler, pairs.clips.tolist(), generators)
        return pairs.targets, pairs.interferers, pairs.snr_db, *asked

    def prepare(self, drawn: tuple[Tensor, ...], step: int, rows: range) -> Prepared:
        targets, others, snr_db, *asked = drawn
        targets, others = self.places(targets, step, rows), self.places(others, step, rows, side=1)
        targets, others = levelled(targets, others, snr_db)
        of = statistics(targets, others, self.net.bands, self.net.spread)
        levels = self.net.levels(of.bands, of.mixture / of.bands.shape[1])
        maps = self.net.trunk(self.net.trunk.hear(targets + others))
        queries, count = DrawnQueries(*asked), self.queries.mixing.queries
        drawn_told = [torch.rand(count, 1, generator=seeded(self.recipe.seed, 2, step, row)) for row in rows]
        told = (torch.cat(drawn_told) >= self.recipe.untold).float().to(levels.device)
        return Prepared(levels, maps, queries, told, of.by_two().ask(queries.mixtures, queries.interferer))

    def loss(self, prepared: Prepared) -> dict[str, Tensor]:
        levels, maps, asked, told, of = prepared
        features = self.net.features(levels, maps).of(asked.mixtures)
        mask = self.net.band_mask(features, asked.conditions, told)[:, : of.squares.shape[1]]
        return {"loss": separation_loss(mask.float(), of, asked.present, self.recipe.quiet)}

    def validate(self, weights: Weights) -> Mapping[str, float]:
        net = Mini(self.recipe.mini).eval()  # at full window length
        net.load_state_dict(weights)
        return improvements(net.to(self.device), self.validated)

    def write(self, weights: Weights) -> None:
        save_part(self.folder, "separator", "mini", self.recipe.mini, _half(weights))


def _half(state: Weights) -> dict[str, Tensor]:
    """Convert weights for storage: matrices to float16, without an audible difference; counters are dropped.

    Vectors stay float32: the variance of a norm may be too large for float16.
    """

    def stored(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.half() if tensor.dim() > 1 else tensor.float()

    return {name: stored(tensor) for name, tensor in state.items() if tensor.dim()}

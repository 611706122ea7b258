"""Training of a mini model: its audio encoder into the word space, then its separator, with both encoders frozen.

The recipe follows the paper where it applies (IV-B): mixtures made on the fly, positive, negative and both
queries in 25, 25 and 50 % of the examples, text and audio of a side mixed with one α, loss 0.9 · SNR + 0.1 · SI-SNR.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep_cli import dsp
from clapsep_cli.data import Corpus, read_clip, read_paraphrases
from clapsep_cli.errors import CheckpointError, ModelError, RecipeError
from clapsep_cli.files import path_in
from clapsep_cli.models.mini import Mini, MiniAudio, MiniConfig
from clapsep_cli.registry import BUNDLED, weights_folder
from clapsep_cli.store.checkpoint import Model, load_part, read_metadata, save_part
from clapsep_cli.store.whole import copy, read_tensors, save_whole
from clapsep_cli.tables import read_table
from clapsep_cli.training.loop.optimisation import Trapezoid
from clapsep_cli.training.loop.sampling import Draw, Pool, Sampler, open_pool
from clapsep_cli.training.loop.settings import Share, flatten, settings
from clapsep_cli.training.loop.task import Plan, Task, Weights
from clapsep_cli.training.loop.train import ESTIMATE, Clock, Recipe, Report, Run
from clapsep_cli.training.recipes.augment import Acoustics, elsewhere, levelled, room_spectra, seeded, striped
from clapsep_cli.training.recipes.conditions import Mixing, Queries, Texts
from clapsep_cli.training.recipes.objective import BandStatistics, separation_loss, statistics
from clapsep_cli.training.recipes.validation import Case, cases, improvements

ENDS = ("stem", "head", "fine", "out")  # the layers that begin and end a network, which Muon is not for
FEWEST_STEPS, MOST_STEPS = 200, 6000  # of the separator, where they are not set
BATCH, FEW_CLIPS_BATCH = 32, 8  # likewise
AUDIO_VIEWS = 4  # embeddings kept per clip, each of another stretch and augmentation
AUDIO_WEIGHT_DECAY = 0.05
SHOTS = "shots.safetensors"
TEXT_FILES = ("text.safetensors", "tokenizer.json")


@settings
class Stage:
    """How long and how fast one network is trained."""

    lr: NonNegativeFloat
    steps: NonNegativeInt = 0  # by the size of the data if 0
    batch: NonNegativeInt = 0  # likewise
    warmup: NonNegativeInt = 200
    decay: Share = 0.3  # the learning rate falls to zero over this last share of the steps

    def suited(self, steps: int, batch: int) -> Stage:
        """With so many `steps` of such a `batch`, unless they are set, and no longer a warm-up than suits them."""
        warmup = self.warmup if self.steps else min(self.warmup, steps // 10)
        return replace(self, steps=self.steps or steps, batch=self.batch or batch, warmup=warmup)

    def plan(self, recipe: MiniRecipe, weight_decay: float, ema: float = 0.0) -> Plan:
        """How the stage is trained: its steps, its batch, its learning rate."""
        return Plan(
            steps=self.steps,
            batch=self.batch,
            schedule=Trapezoid(self.lr, self.steps, self.warmup, self.decay),
            weight_decay=weight_decay,
            ema=ema,
            report_every=recipe.report_every,
            validate_every=recipe.validate_every,
            save_every=recipe.save_every,
            workers=recipe.workers,
        )


@settings
class MiniRecipe(Recipe):
    """`text`: a folder with a text encoder, the bundled one if empty. `init`: a mini model's folder, or its name, whose
    encoders are taken as they are and whose separator is trained further. `paraphrases`: a CSV `label,captions`.
    `rooms`: a CSV `file` of impulse responses. `cache`: a file for decoded clips, so that they are decoded once."""

    free: ClassVar[frozenset[str]] = Recipe.free | {
        "validate_every",
        *(f"{stage}.{name}" for stage in ("audio", "separator") for name in ("steps", "warmup")),
        "audio.decay",
        "cache",
    }

    text: str = ""
    init: str = ""
    paraphrases: str = ""
    rooms: str = ""
    cache: str = ""
    draw: Draw = Draw()
    audio: Stage = Stage(lr=2e-3)
    separator: Stage = Stage(lr=1e-3)
    temperature: PositiveFloat = 0.07  # of the audio encoder's softmax over captions
    mixing: Mixing = Mixing()
    acoustics: Acoustics = Acoustics()
    optimiser: Literal["muon", "adamw"] = "muon"
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    weight_decay: NonNegativeFloat = 0.01
    validate_every: PositiveInt = 1000
    validation_mixtures: NonNegativeInt = 48
    mini: MiniConfig = field(default_factory=MiniConfig)

    @property
    def source(self) -> Path:
        """Where the text encoder is taken from, and with `init` all the rest."""
        bundled = weights_folder() / BUNDLED
        chosen = self.init or self.text
        return bundled if chosen in ("", BUNDLED) else Path(chosen)

    def suited(self, corpus: Corpus) -> MiniRecipe:
        """A step of the separator for each stretch of the clips, within limits, and half as many of the encoder."""
        # The bundled model's 7 hours in 6,000 clips get the most of both.
        stretches = sum(max(1.0, corpus.seconds[index] / self.draw.seconds) for index in corpus.train)
        steps = round(min(max(stretches, FEWEST_STEPS), MOST_STEPS))
        batch = BATCH if steps > FEWEST_STEPS else FEW_CLIPS_BATCH
        audio, separator = self.audio.suited(steps // 2, batch * 3 // 2), self.separator.suited(steps, batch)
        return replace(self, audio=audio, separator=separator)

    def check(self, corpus: Corpus) -> None:
        try:
            with torch.device("meta"):
                window = Mini(self.mini).window * MiniAudio(self.mini).window
        except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError) as error:
            raise RecipeError(f"mini.mini: a network cannot have these sizes ({error})") from error
        if window < 1:
            raise RecipeError(f"mini.mini.seconds should be greater than 0, not {self.mini.seconds}")
        if self.init and (self.source / "separator.safetensors").is_file():
            config = Model(self.init, self.source, torch.device("cpu")).config
            if not isinstance(config, MiniConfig):
                raise RecipeError(f"{self.source}: is no mini model, so mini cannot go on from it")
            here = dict(flatten(self.mini, "mini."))
            other = {name: size for name, size in flatten(config, "mini.") if size != here[name]}
            if other:
                sizes = " ".join(f"{name}={json.dumps(size, separators=(',', ':'))}" for name, size in other.items())
                raise RecipeError(f"{self.source}: is of another size than is set; set {sizes}")
        needed = (*TEXT_FILES, "audio.safetensors", "separator.safetensors") if self.init else TEXT_FILES
        for name in needed:
            if not (self.source / name).is_file():
                wanted = (
                    "--init takes a folder with a mini model" if self.init else "--text takes a text encoder's folder"
                )
                raise ModelError(f"{self.source / name}: no such file; {wanted}")

    @property
    def needs(self) -> str:
        return self.init

    def train(self, run: Run) -> None:
        if run.leads:
            for name in (*TEXT_FILES, *(["audio.safetensors"] if self.init else [])):
                copy(self.source / name, run.folder / name)
        run.fabric.barrier()
        encoder = load_part(run.folder, "text", "mini", self.mini).to(run.device)
        pool = open_pool(run.corpus, self.store, cache=Path(self.cache) if self.cache else None)
        texts = Texts(encoder, run.corpus.clips, read_paraphrases(Path(self.paraphrases)) if self.paraphrases else {})
        estimate(run, self, pool, texts)
        if not self.init:
            train_audio(run, self, pool, texts)
        audio = load_part(run.folder, "audio", "mini", self.mini).to(run.device)
        validated = cases(pool, run.corpus.held_out, self.validation_mixtures, audio.window, encoder, audio)
        views = shots(run, self, pool, audio)
        near = texts.nearest() if self.draw.hard else None
        sampler = Sampler(pool, self.draw, self.seed, run.corpus.train, near)
        queries = Queries(pool, texts, views, self.mixing)
        run.fit(SeparatorTask(self, sampler, queries, validated, run))


class MiniTask(Task):
    """What the two have in common: their hidden layers are trained by Muon."""

    recipe: MiniRecipe

    def hidden(self, name: str) -> bool:
        """Whether Muon trains this parameter: a matrix or kernel that is not of the first or last layer."""
        matrix = self.net.get_parameter(name).dim() >= 2
        return self.recipe.optimiser == "muon" and matrix and name.split(".")[0] not in ENDS


class Places:
    """Makes clips sound as if recorded elsewhere; how, depends on seed, step and row alone."""

    def __init__(self, recipe: MiniRecipe, samples: int, device: torch.device) -> None:
        self.recipe = recipe
        listed = Path(recipe.rooms) if recipe.rooms else None
        files = [path_in(listed.parent, row["file"]) for _, row in read_table(listed, ("file",))] if listed else []
        self.rooms = room_spectra([read_clip(file) for file in files], samples).to(device) if files else None

    def __call__(self, audio: Tensor, step: int, rows: range, side: int = 0) -> Tensor:
        """`audio`: the given rows of a step's batch, float32 `[rows, samples]`, targets or those of another `side`."""
        generators = [seeded(self.recipe.seed, 3 + side, step, row) for row in rows]
        return elsewhere(audio, self.rooms, self.recipe.acoustics, generators)


class AudioTask(MiniTask):
    """The audio encoder learns to point at the captions of what it hears."""

    name, state = "audio encoder", "audio-state.safetensors"

    def __init__(self, recipe: MiniRecipe, sampler: Sampler, texts: Texts, folder: Path, device: torch.device) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.sampler, self.folder = recipe, sampler, folder
        self.places = Places(recipe, sampler.length, device)
        self.plan = recipe.audio.plan(recipe, AUDIO_WEIGHT_DECAY)
        self.net: MiniAudio = MiniAudio(recipe.mini)
        _channels_last(self.net)
        self.table = texts.table.to(device)
        labels = list(texts.targets)
        self.row = {label: row for row, label in enumerate(labels)}
        self.targets = torch.stack([texts.targets[label] for label in labels]).to(device)

    def draw(self, step: int, rows: range) -> tuple[Tensor, ...]:
        pairs = self.sampler.pairs(step, rows)
        labels = [self.row[self.sampler.pool.clips[i].label] for i in pairs.clips[:, 0].tolist()]
        return pairs.targets, pairs.interferers, pairs.snr_db, torch.tensor(labels)

    def prepare(self, drawn: tuple[Tensor, ...], step: int, rows: range) -> tuple[Tensor, Tensor]:
        targets, others, snr_db, labels = drawn
        targets, others = levelled(self.places(targets, step, rows), others, snr_db)
        generator, batch = seeded(self.recipe.seed, step), self.plan.batch
        # A shot is rarely clean: half of them have something else in the background, 5 to 30 dB down.
        background = 10 ** -(0.25 + 1.25 * torch.rand(batch, 1, generator=generator))
        background *= (torch.rand(batch, 1, generator=generator) < 0.5).float()
        audio = targets + others * background[rows.start : rows.stop].to(targets.device)
        power = dsp.power(dsp.spectrum(audio))
        return striped(power, generator, batch, rows), self.targets[labels]

    def loss(self, prepared: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        power, wanted = prepared
        embedding = self.net(power)
        with torch.autocast(power.device.type, enabled=False):
            logits = embedding.float() @ self.table.T / self.recipe.temperature
        hits = wanted.gather(1, logits.argmax(1, keepdim=True)).gt(0).float().mean()
        return {"loss": -(wanted * F.log_softmax(logits, 1)).sum(1).mean(), "accuracy": hits}

    def write(self, weights: Weights) -> None:
        (self.folder / SHOTS).unlink(missing_ok=True)
        save_part(self.folder, "audio", "mini", self.recipe.mini, _half(weights), steps=str(self.plan.steps))


def audio_task(run: Run, recipe: MiniRecipe, pool: Pool, texts: Texts) -> AudioTask:
    """The audio encoder's task, which draws labels more evenly than the separator's, and none that are alike."""
    draw = replace(recipe.draw, label_power=0.5, hard=0.0)
    sampler = Sampler(pool, draw, recipe.seed + 1, run.corpus.train)
    return AudioTask(recipe, sampler, texts, run.folder, run.device)


def estimate(run: Run, recipe: MiniRecipe, pool: Pool, texts: Texts) -> None:
    """Tell how long all stages will take, by two steps of each."""
    views = {index: torch.zeros(AUDIO_VIEWS, recipe.mini.dim) for index in run.corpus.train}  # stand in for shots
    queries, sampler = Queries(pool, texts, views, recipe.mixing), Sampler(pool, recipe.draw, 0, run.corpus.train)
    stages: list[tuple[Task, Stage]] = [(SeparatorTask(recipe, sampler, queries, [], run), recipe.separator)]
    if not (run.folder / "audio.safetensors").exists():
        stages.insert(0, (audio_task(run, recipe, pool, texts), recipe.audio))
    seconds = {f"{task.name} ({stage.steps} steps)": run.rehearse(task) for task, stage in stages}
    run.tell(Report(ESTIMATE, 0, sum(stage.steps for _, stage in stages), seconds, sum(seconds.values())))


def train_audio(run: Run, recipe: MiniRecipe, pool: Pool, texts: Texts) -> None:
    """Leave an audio encoder in the run's folder that was trained for `recipe.audio.steps`."""
    path = run.folder / "audio.safetensors"
    had = int(read_metadata(path)["steps"]) if path.exists() else 0
    if had >= recipe.audio.steps:
        return
    if had and not (run.folder / AudioTask.state).exists():
        raise CheckpointError(f"{path}: was trained for {had} steps and cannot go on from there: set audio.steps={had}")
    run.fit(audio_task(run, recipe, pool, texts))


@torch.no_grad()
def shots(run: Run, recipe: MiniRecipe, pool: Pool, net: MiniAudio) -> dict[int, Tensor]:
    """Audio embeddings of augmented stretches of the clips to train on, by clip: float32 `[AUDIO_VIEWS, dim]`.

    They are kept in the run's folder.
    """
    among, path = run.corpus.train, run.folder / SHOTS
    if run.leads and not path.exists():
        sampler = Sampler(pool, recipe.draw, recipe.seed + 2)
        places = Places(recipe, sampler.length, run.device)
        out = torch.empty(len(among), AUDIO_VIEWS, recipe.mini.dim)
        clock = Clock()
        for view in range(AUDIO_VIEWS):
            for start in range(0, len(among), 32):
                run.check_stop()
                few = among[start : start + 32]
                placed = [sampler.place(i, np.random.default_rng((recipe.seed, view, i))) for i in few]
                audio = torch.from_numpy(np.stack(placed)).to(run.device)
                if view % 2:
                    audio = places(audio, view, range(start, start + len(few)))
                out[start : start + len(few), view] = net(dsp.power(dsp.spectrum(audio))).cpu()
            left = clock.seconds_left(view + 1, AUDIO_VIEWS)
            run.tell(Report("shots embedded", view + 1, AUDIO_VIEWS, {}, left))
        save_whole(dict(zip(map(str, among), out, strict=True)), path, {})
    run.fabric.barrier()
    return {int(name): embedded for name, embedded in read_tensors(path).items()}


class Prepared(NamedTuple):
    """What the separator hears, `[batch, 1, frames, bands]`, under which conditions; and what its mask is judged by."""

    bands: Tensor
    conditions: Tensor
    statistics: BandStatistics
    present: Tensor


class SeparatorTask(MiniTask):
    """The separator learns to mask mixtures that are made on the fly."""

    name, state = "separator", "state.safetensors"

    def __init__(
        self, recipe: MiniRecipe, sampler: Sampler, queries: Queries, validated: Sequence[Case], run: Run
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.sampler, self.queries = recipe, sampler, queries
        self.places = Places(recipe, sampler.length, run.device)
        self.validated, self.folder, self.device = validated, run.folder, run.device
        self.plan = recipe.separator.plan(recipe, recipe.weight_decay, recipe.ema)
        self.net: Mini = Mini(replace(recipe.mini, seconds=int(recipe.draw.seconds)))
        if recipe.init:
            self.net.load_state_dict(load_part(recipe.source, "separator", "mini", recipe.mini).state_dict())
        _channels_last(self.net)

    def draw(self, step: int, rows: range) -> tuple[Tensor, ...]:
        pairs = self.sampler.pairs(step, rows)
        generators = [np.random.default_rng((self.recipe.seed, 1, step, row)) for row in rows]
        conditions, present = self.queries.draw(self.sampler, pairs.clips.tolist(), generators)
        return pairs.targets, pairs.interferers, pairs.snr_db, conditions, present

    def prepare(self, drawn: tuple[Tensor, ...], step: int, rows: range) -> Prepared:
        targets, others, snr_db, conditions, present = drawn
        targets, others = self.places(targets, step, rows), self.places(others, step, rows, side=1)
        targets, others = levelled(targets, others, snr_db)
        of = statistics(targets, others, self.net.front.matrix, self.net.spread)
        heard = self.net.front.compress(of.bands, of.mixture / of.bands.shape[1])
        return Prepared(self.net.pad(heard).contiguous(memory_format=torch.channels_last), conditions, of, present)

    def loss(self, prepared: Prepared) -> dict[str, Tensor]:
        bands, conditions, of, present = prepared
        mask = self.net.band_mask(bands, conditions)[:, : of.bands.shape[1]]
        return {"loss": separation_loss(mask.float(), of, present)}

    def validate(self, weights: Weights) -> Mapping[str, float]:
        net = Mini(self.recipe.mini).eval()  # at full window length
        net.load_state_dict(weights)
        return improvements(net.to(self.device), self.validated)

    def write(self, weights: Weights) -> None:
        save_part(self.folder, "separator", "mini", self.recipe.mini, _half(weights))


def _channels_last(net: nn.Module) -> None:
    """Lay the kernels out as oneDNN likes them: a third faster in bfloat16."""
    for parameter in net.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _half(state: Weights) -> dict[str, Tensor]:
    """Weights as they are stored: matrices in float16, which costs nothing that can be heard, and no counters.

    Vectors stay float32: a variance that a norm has met may be beyond float16.
    """
    return {k: v.half() if v.dim() > 1 else v.float() for k, v in state.items() if v.is_floating_point()}

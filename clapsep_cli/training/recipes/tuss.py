"""Trains a TUSS as the released ones were trained (arXiv 2410.23987).

Mixtures are made on the fly of clips whose labels name prompts, all of which are asked for. What is minimised is the
negative SNR; which of equal prompts gives which source is left open.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from clapsep_cli.audio.samples import Audio, to_rate
from clapsep_cli.data import TRAIN, Corpus, Labelling
from clapsep_cli.errors import ManifestError, RecipeError
from clapsep_cli.models.prompts import COUNTS, PROMPTS, STEMS, draw, drawable, indices, odds_of
from clapsep_cli.models.tuss import LARGE, MEDIUM, Tuss, TussConfig
from clapsep_cli.store.checkpoint import load_part, save_part
from clapsep_cli.store.library import load_model
from clapsep_cli.training.loop.optimisation import Plateau
from clapsep_cli.training.loop.sampling import DiskPool, Pool, ahead, open_pool
from clapsep_cli.training.loop.settings import Share, Shares, Workers, settings
from clapsep_cli.training.loop.task import Plan, Task, Weights
from clapsep_cli.training.loop.train import Recipe, Run
from clapsep_cli.training.recipes.objective import source_losses
from clapsep_cli.training.recipes.validation import SEED

FAMILY = "tuss"
RATE_HZ = 48_000
TRIES = 10  # stretches of a clip that are tried before the loudest of it is looked for
AUDIBLE = 1e-3  # root mean square from which on a stretch is not silent (−60 dB)
SCANNED = 2**18  # samples of a clip that are looked through at a time
# Which prompts' clips a background may be summed from, where it is not a recording of its own.
INGREDIENTS = {"sfxbg": ("sfx",), "musicbg": STEMS}
QUIET, QUIETEST_DB, QUIETEST_OTHERS_DB = ("sfx", "sfxbg", "musicbg"), -20.0, -10.0  # of a source; the loudest is 0 dB


@settings
class PromptMixing:
    """Settings of mixtures, by default as for the released models.

    `never`: pairs of prompts that are never mixed, beside those of the released models. A new prompt is mixed with all.
    """

    counts: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = COUNTS  # of prompts, equally often
    recorded: Share = 0.75  # share of backgrounds that are recordings; the others are summed …
    summed: Shares = (0.1, 0.4, 0.4, 0.1)  # … from one clip, from two, and so on, in these shares
    never: tuple[tuple[str, str], ...] = ()


@settings
class TussRecipe(Recipe):
    """Settings of the training of a TUSS, on stretches of clips as long as its window.

    The manifest's `prompt` column, or else its `label` column, names the clips' prompts. Each split other than "train"
    is a set to validate on; the mean over the sets counts.

    Attributes:
        init: a TUSS to continue from, by name or folder, which decides the size; if empty, one of the size `tuss` is
            trained from scratch.
        prompts: of the model, in this order; by default those of `init` or `tuss`. With fewer it becomes a specialist;
            a new one gets a token of its own, and is learned while the others go on.
    """

    free: ClassVar[frozenset[str]] = Recipe.free | {"epochs"}
    use: ClassVar[str] = "clapsep separate --model {folder} MIX --prompts NAME..."

    workers: Workers = 4
    save_every: PositiveInt = 500
    init: str = ""
    tuss: TussConfig = MEDIUM
    prompts: tuple[str, ...] = ()
    mixing: PromptMixing = PromptMixing()
    prompt_dropout: Share = 0.0  # share of the steps that ask for some of the prompts only; the released ones' did not
    epochs: PositiveInt = 150
    epoch_steps: PositiveInt = 2500
    batch: PositiveInt = 4
    accumulate: PositiveInt = 1  # parts of a device's batch that are computed one after the other
    lr: NonNegativeFloat = 1e-3  # of both sizes, as released; the paper used 5e-4 for the large one
    warmup: NonNegativeInt = 10_000  # steps
    lr_factor: Share = 0.5
    lr_epochs: NonNegativeInt = 75  # before which the learning rate is not lowered
    stale_epochs: PositiveInt = 5  # without improvement, after one more of which it is: as the released code counts
    weight_decay: NonNegativeFloat = 0.01
    epsilon: PositiveFloat = 1e-8  # of AdamW
    clip: PositiveFloat = 5.0  # norm of the gradient
    average: PositiveInt = 5  # of how many of the best epochs the weights are averaged
    validation_mixtures: NonNegativeInt = 100  # of each set

    @property
    def needs(self) -> str:
        return self.init

    @property
    def start(self) -> TussConfig:
        """The size and prompts of the model to start from. Raises `RecipeError` where `init` is of another family."""
        if not self.init:
            return self.tuss
        model = load_model(self.init, "cpu")
        if not isinstance(model.config, TussConfig):
            raise RecipeError(f"{model.name} is of the family {model.family!r}; this preset trains TUSS models")
        return model.config

    @property
    def size(self) -> TussConfig:
        """The network's size and prompts. Raises `RecipeError` where they cannot be."""
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

    def mixers(self, pool: Pool, corpus: Corpus) -> dict[str, PromptMixer]:
        """Make the mixer of each split: one to train on, the others to validate on."""
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
        """Make the network in its initial state, on the CPU."""
        torch.manual_seed(self.seed)
        size, start = self.size, self.start
        if not self.init:
            return Tuss(size)
        net: Tuss = load_part(load_model(self.init, "cpu").folder, "separator", FAMILY, start)
        if size != start:
            tokens = torch.randn(len(size.prompts), size.width)  # of new prompts, as when training begins
            for at, prompt in enumerate(size.prompts):
                if prompt in start.prompts:
                    tokens[at] = net.prompts.data[start.prompts.index(prompt)]
            net.prompts, net.config = nn.Parameter(tokens), size
        return net


class Prepared(NamedTuple):
    """Holds mixtures, float32 `[rows, samples]`, the sources asked for, `[rows, prompts, samples]`, and the prompts of
    these, int64 `[rows, prompts]`."""

    mixtures: Tensor
    sources: Tensor
    prompts: Tensor


def whole_of(drawn: tuple[Tensor, ...]) -> Prepared:
    """Mix sources, all of which are asked for."""
    sources, prompts = drawn
    return Prepared(sources.sum(1), sources, prompts)


class TussTask(Task):
    """Trains the separator to split mixtures into all their sources."""

    name, state, measure = "separator", "state.safetensors", "SNR in dB, up to 30"

    def __init__(self, recipe: TussRecipe, run: Run, net: Tuss, mixers: Mapping[str, PromptMixer]) -> None:
        self.recipe, self.run = recipe, run
        self.net: Tuss = net
        self.mixer = mixers[TRAIN]
        self.sets = {split: mixer for split, mixer in mixers.items() if split != TRAIN and recipe.validation_mixtures}
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
        asked = int(rng.integers(1, count))  # the same of all rows, which of them differs
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
        figures = {split: -float(np.mean(list(self._losses(mixer)))) for split, mixer in self.sets.items()}
        return {"mean of sets": float(np.mean([*figures.values()])), **figures} if len(figures) > 1 else figures

    @torch.no_grad()
    def _losses(self, mixer: PromptMixer) -> Iterator[float]:
        steps = range(self.recipe.validation_mixtures)
        drawn = ahead(lambda step: mixer.batch(step, range(1)), steps, self.plan.workers)
        for batch in drawn:
            prepared = whole_of(self.run.fabric.to_device(tuple(map(torch.from_numpy, batch))))
            with self.run.fabric.autocast():
                yield self.loss(prepared)["loss"].item()

    def write(self, weights: Weights) -> None:
        tensors = {name: tensor.cpu() for name, tensor in weights.items()}
        notes = {"base": self.recipe.init} if self.recipe.init else {}
        save_part(self.run.folder, "separator", FAMILY, self.net.config, tensors, **notes)


class PromptMixer:
    """Draws mixtures of clips. What it draws depends only on the seed, the step and the row.

    Args:
        pool: the clips, each at its own rate.
        among: indices of the clips to draw from.
        samples: length of a mixture at 48 kHz.
        seed: of all that is drawn.
        mixing: how mixtures are made.
        vocabulary: the model's prompts.

    Raises:
        ManifestError: where there are too few clips that may be mixed with each other.
    """

    def __init__(
        self,
        pool: Pool,
        among: Sequence[int],
        samples: int,
        seed: int,
        mixing: PromptMixing,
        vocabulary: Sequence[str] = PROMPTS,
    ) -> None:
        self.pool, self.samples, self.seed, self.mixing, self.vocabulary = pool, samples, seed, mixing, vocabulary
        self.by_prompt: dict[str, list[int]] = {prompt: [] for prompt in vocabulary}
        for index in among:
            self.by_prompt[pool.clips[index].label].append(index)
        self.supply = {prompt: len(members) or bool(self._pools(prompt)) for prompt, members in self.by_prompt.items()}
        self.odds = odds_of(vocabulary, mixing.never)
        self.counts = [count for count in mixing.counts if drawable(count, self.supply, odds=self.odds)]
        if not self.counts:
            present = ", ".join(prompt for prompt, number in self.supply.items() if number) or "none"
            raise ManifestError(f"no {min(mixing.counts)} of the clips may be mixed with each other ({present})")

    def batch(self, step: int, rows: range) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Draw the given rows of a step's batch. All mixtures of a step have equally many prompts.

        Returns:
            The sources to be summed, float32 `[rows, prompts, samples]`, and their prompts, indices into the
            vocabulary, int64 `[rows, prompts]`.
        """
        count = int(np.random.default_rng((self.seed, step, 0)).choice(self.counts))
        sources, prompts = [], []
        for row in rows:
            rng = np.random.default_rng((self.seed, step, 1 + row))
            names = draw(rng, count, self.supply, self.odds)
            sources.append(self._sources(rng, names))
            prompts.append(indices(names, self.vocabulary))
        return np.stack(sources), np.array(prompts)

    def _sources(self, rng: np.random.Generator, names: Sequence[str]) -> Audio:
        chosen: list[list[int]] = []
        for name in names:
            chosen.append(self._choose(rng, name, {index for others in chosen for index in others}))
        rate = min(self.pool.rates[index] for members in chosen for index in members)
        sources = []
        for name, members in zip(names, chosen, strict=True):
            several = [_levelled(self._stretch(rng, index, rate)) for index in members]
            if len(several) > 1:  # ingredients have levels of their own
                labels = [self.pool.clips[index].label for index in members]
                several = [one * _gain(rng, label) for one, label in zip(several, labels, strict=True)]
            source = _levelled(np.sum(several, axis=0))
            sources.append(source * _gain(rng, name))
        return np.stack(sources).astype(np.float32)

    def _choose(self, rng: np.random.Generator, name: str, used: set[int]) -> list[int]:
        """Choose the clips of a source: a recording not yet in the mixture, or several to be summed."""
        recordings = [index for index in self.by_prompt[name] if index not in used]
        pools = self._pools(name)
        if recordings and (not pools or rng.random() < self.mixing.recorded):
            return [recordings[rng.integers(len(recordings))]]
        many = 1 + int(rng.choice(len(self.mixing.summed), p=self.mixing.summed))
        if len(INGREDIENTS[name]) == 1:
            return [int(i) for i in rng.choice(pools[0], min(many, len(pools[0])), replace=False)]
        different = rng.choice(len(pools), min(many, len(pools)), replace=False)
        return [pools[i][rng.integers(len(pools[i]))] for i in different]

    def _pools(self, name: str) -> list[list[int]]:
        pools = (self.by_prompt.get(prompt, []) for prompt in INGREDIENTS.get(name, ()))
        return [members for members in pools if members]

    def _stretch(self, rng: np.random.Generator, index: int, rate: int) -> Audio:
        """Read an audible stretch of a clip, or place all of a short one at random; band-limited to `rate`."""
        own = self.pool.rates[index]
        length = math.ceil(self.samples * own / RATE_HZ)
        stretch = _audible(rng, self.pool, index, length)
        at = int(rng.integers(0, length - len(stretch) + 1))
        stretch = np.pad(stretch, (at, length - len(stretch) - at))
        limited = to_rate(to_rate(stretch, own, rate), rate, RATE_HZ)[: self.samples]
        return np.pad(limited, (0, self.samples - len(limited)))


def check_audible(pool: Pool) -> None:
    """Raise `ManifestError` that names all clips that are silent throughout."""
    with ThreadPoolExecutor(8) as threads:
        audible = threads.map(lambda index: any(peak > 0 for _, peak in _peaks(pool, index)), range(len(pool.clips)))
        silent = [str(clip.path) for clip, heard in zip(pool.clips, audible, strict=True) if not heard]
    if silent:
        raise ManifestError("silent throughout: " + ", ".join(silent))


def _audible(rng: np.random.Generator, pool: Pool, index: int, length: int) -> Audio:
    """Read a random audible stretch of up to `length` samples; in a nearly silent clip, the one around its peak."""
    last = max(0, pool.samples(index) - length)
    for start in rng.integers(0, last + 1, TRIES).tolist():
        stretch = pool.read(index, start, start + length)
        if np.sqrt(np.square(stretch).mean()) >= AUDIBLE:
            return stretch
    peak, _ = max(_peaks(pool, index), key=lambda found: found[1])
    start = min(max(0, peak - length // 2), last)
    return pool.read(index, start, start + length)


def _peaks(pool: Pool, index: int) -> Iterator[tuple[int, float]]:
    """Yield the position and height of the peak of each piece of a clip."""
    for start in range(0, pool.samples(index), SCANNED):
        piece = np.abs(pool.read(index, start, start + SCANNED))
        at = int(piece.argmax())
        yield start + at, float(piece[at])


def _gain(rng: np.random.Generator, prompt: str) -> float:
    """Draw the gain of a source, evenly in dB."""
    return float(10 ** (rng.uniform(QUIETEST_DB if prompt in QUIET else QUIETEST_OTHERS_DB, 0) / 20))


def _levelled(audio: Audio) -> Audio:
    """Scale to a root mean square of 1; silence stays silence."""
    return np.asarray(audio / (np.sqrt(np.square(audio, dtype=np.float64).mean()) or 1.0), np.float32)

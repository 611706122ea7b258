"""Training of a mini model: its audio encoder into the word space, then its separator, with both encoders frozen.

The recipe follows the paper where it applies (IV-B): mixtures made on the fly, positive, negative and both
queries in 25, 25 and 50 % of the examples, text and audio of a side mixed with one α, loss 0.9 · SNR + 0.1 · SI-SNR.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep_cli import dsp
from clapsep_cli.audio import Audio
from clapsep_cli.augment import disguise, equaliser, seeded
from clapsep_cli.checkpoint import load_part, read_metadata, read_tensors, save_part
from clapsep_cli.conditions import Mixing, Queries, Texts
from clapsep_cli.data import (
    Clip,
    Draw,
    Pool,
    Sampler,
    ahead,
    fit,
    mix,
    read_clip,
    read_manifest,
    read_paraphrases,
)
from clapsep_cli.errors import CheckpointError, ManifestError, ModelError
from clapsep_cli.evaluate import score
from clapsep_cli.mixtures import make_mixtures
from clapsep_cli.models.base import condition
from clapsep_cli.models.mini import Mini, MiniAudio, MiniConfig
from clapsep_cli.objective import separation_loss, statistics

VALIDATION_MIXTURES = 48
AUDIO_VIEWS = 4  # embeddings kept per clip, each of another stretch and augmentation


@dataclass(frozen=True)
class Stage:
    """How long and how fast one network is trained."""

    steps: int
    batch: int
    lr: float
    warmup: int = 200
    decay: float = 0.3  # the learning rate falls to zero over this last share of the steps


@dataclass(frozen=True)
class TrainConfig:
    seed: int = 0
    draw: Draw = Draw()
    audio: Stage = Stage(steps=2500, batch=48, lr=2e-3)
    separator: Stage = Stage(steps=5400, batch=32, lr=1e-3)
    temperature: float = 0.07  # of the audio encoder's softmax over captions
    mixing: Mixing = Mixing()
    eq_db: float = 4.0  # standard deviation of the random equaliser at its control points
    ema: float = 0.999
    weight_decay: float = 0.01
    report_every: int = 50
    validate_every: int = 1000
    save_every: int = 250
    mini: MiniConfig = field(default_factory=MiniConfig)


@dataclass(frozen=True)
class Report:
    """What a run says of itself while it goes on. `figures` are averages since the last report."""

    stage: str
    step: int
    steps: int
    figures: Mapping[str, float]


Listener = Callable[[Report], None]
Validate = Callable[[Mini], Mapping[str, float]]  # mean SI-SDRi by kind of query


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, constant, then linear to zero over the last `decay` share (so a run can be made longer)."""
    return stage.lr * min(1.0, (step + 1) / stage.warmup, (stage.steps - step) / max(1.0, stage.decay * stage.steps))


def train_audio(
    net: MiniAudio, steps: range, pool: Pool, texts: Texts, config: TrainConfig, among: Sequence[int], listen: Listener
) -> None:
    """Train an audio encoder to point at the captions of what it hears, on the clips `among`, for `steps`.

    Where they do not begin at 0, the learning rate rises and falls once more over those that are left.
    """
    net.train()
    _channels_last(net)
    stage = replace(config.audio, steps=len(steps))
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.05, fused=True)
    sampler = Sampler(pool, replace(config.draw, label_power=0.5), config.seed + 1, among)
    hits, losses = 0.0, 0.0
    for step, drawn in zip(steps, ahead(lambda s: sampler.pairs(s, stage.batch), steps), strict=True):
        clips, others, indices = drawn
        generator = seeded(config.seed, step)
        # A shot is rarely clean: half of them have something else in the background, 5 to 30 dB down.
        background = 10 ** -(0.25 + 1.25 * torch.rand(len(clips), 1, generator=generator))
        background *= (torch.rand(len(clips), 1, generator=generator) < 0.5).float()
        audio = torch.from_numpy(clips) + torch.from_numpy(others) * background
        power = disguise(dsp.power(dsp.spectrum(audio)), config.eq_db, generator)
        wanted = torch.stack([texts.targets[pool.clips[i].label] for i in indices[:, 0]])
        with torch.autocast("cpu", torch.bfloat16):
            embedding = net(power)
        logits = embedding.float() @ texts.table.T / config.temperature
        loss = -(wanted * F.log_softmax(logits, 1)).sum(1).mean()
        _update(net, optimiser, loss, learning_rate(stage, step - steps.start))
        hits += float(wanted.gather(1, logits.argmax(1, keepdim=True)).gt(0).float().mean())
        losses += loss.item()
        if (step + 1) % config.report_every == 0:
            means = {"loss": losses / config.report_every, "accuracy": hits / config.report_every}
            listen(Report("audio encoder", step + 1, steps.stop, means))
            hits = losses = 0.0
    net.eval()


def _channels_last(net: nn.Module) -> None:
    """Lay the kernels out as oneDNN likes them: a third faster in bfloat16."""
    for parameter in net.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _update(net: nn.Module, optimiser: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(net.parameters(), 5.0)
    optimiser.step()


@torch.inference_mode()
def shots(net: MiniAudio, pool: Pool, config: TrainConfig, among: Sequence[int]) -> Tensor:
    """Audio embeddings of augmented stretches of the clips `among`: float32 `[len(among), AUDIO_VIEWS, dim]`."""
    sampler = Sampler(pool, config.draw, config.seed + 2)
    out = torch.empty(len(among), AUDIO_VIEWS, config.mini.dim)
    for view in range(AUDIO_VIEWS):
        for start in range(0, len(among), 32):
            rows = range(start, min(start + 32, len(among)))
            audio = np.stack(
                [sampler.place(among[r], np.random.default_rng((config.seed, view, among[r]))) for r in rows]
            )
            generator = seeded(config.seed, view, start)
            power = dsp.power(dsp.spectrum(torch.from_numpy(audio)))
            out[start : start + len(rows), view] = net(disguise(power, config.eq_db, generator) if view % 2 else power)
    return out


class Run:
    """A separator in training, with its averaged weights and all that a resumed run needs."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        torch.manual_seed(config.seed)
        self.config, self.path = config, folder / "state.safetensors"
        crop = replace(config.mini, seconds=int(config.draw.seconds))
        self.net = Mini(crop).train()
        _channels_last(self.net)
        self.names = [name for name, _ in self.net.named_parameters()]
        self.optimiser = torch.optim.AdamW(self.net.parameters(), weight_decay=config.weight_decay, fused=True)
        self.average = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
        self.step = 0

    def update_average(self) -> None:
        keep = min(self.config.ema, (1 + self.step) / (10 + self.step))
        for name, value in self.net.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - keep)
            else:
                self.average[name].copy_(value)

    def save(self) -> None:
        tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        moments = self.optimiser.state_dict()["state"]
        for index, name in enumerate(self.names):
            tensors |= {f"optimiser.{name}.{k}": v for k, v in moments.get(index, {}).items()}
        temporary = self.path.with_suffix(".partial")
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"step": str(self.step)})
        temporary.replace(self.path)

    def resume(self) -> None:
        if not self.path.exists():
            return
        tensors = read_tensors(self.path)
        with safe_open(self.path, "pt") as file:
            self.step = int(file.metadata()["step"])

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        try:
            self.net.load_state_dict(part("net."))
        except RuntimeError as error:
            raise CheckpointError(
                f"{self.path}: was written by a run of another configuration; use another --out"
            ) from error
        for name, value in part("average.").items():
            self.average[name].copy_(value)
        groups = self.optimiser.state_dict()["param_groups"]
        state = {i: part(f"optimiser.{name}.") for i, name in enumerate(self.names)}
        # The fused optimiser walks weights and moments by their place in memory: lay the moments out alike.
        for i, parameter in enumerate(self.net.parameters()):
            state[i] = {k: torch.empty_like(parameter).copy_(v) if v.dim() else v for k, v in state[i].items()}
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})


def train_separator(run: Run, sampler: Sampler, queries: Queries, validate: Validate, listen: Listener) -> None:
    """Train until `config.separator.steps`, from wherever `run` stands; saves as it goes."""
    config, stage = run.config, run.config.separator

    def draw(step: int) -> tuple[tuple[Audio, Audio, NDArray[np.int64]], tuple[Tensor, Tensor]]:
        drawn = sampler.pairs(step, stage.batch)
        rng = np.random.default_rng((config.seed, 1, step))
        return drawn, queries.draw(sampler, drawn[2].tolist(), rng)

    losses: list[float] = []
    began = time.monotonic()
    for drawn in ahead(draw, range(run.step, stage.steps)):
        (targets, others, _), (conditions, present) = drawn
        generator = seeded(config.seed, 2, run.step)
        gains = (equaliser(stage.batch, config.eq_db, generator), equaliser(stage.batch, config.eq_db, generator))
        of = statistics(
            torch.from_numpy(targets), torch.from_numpy(others), gains, run.net.front.matrix, run.net.spread
        )
        frames = of.bands.shape[1]
        heard = run.net.front.compress(of.bands, of.mixture / frames)
        with torch.autocast("cpu", torch.bfloat16):
            mask = run.net.band_mask(run.net.pad(heard).contiguous(memory_format=torch.channels_last), conditions)
        loss = separation_loss(mask[:, :frames].float(), of, present)
        _update(run.net, run.optimiser, loss, learning_rate(stage, run.step))
        run.step += 1
        run.update_average()
        losses.append(loss.item())
        if run.step % config.report_every == 0:
            rate = len(losses) * stage.batch / (time.monotonic() - began)
            listen(Report("separator", run.step, stage.steps, {"loss": float(np.mean(losses)), "examples/s": rate}))
            losses, began = [], time.monotonic()
        if run.step % config.save_every == 0 or run.step == stage.steps:
            run.save()
        if run.step % config.validate_every == 0 or run.step == stage.steps:
            listen(Report("validation", run.step, stage.steps, validate(averaged(run))))
            began = time.monotonic()


def averaged(run: Run) -> Mini:
    """The separator with the averaged weights, at full window length, ready for use."""
    net = Mini(run.config.mini).eval()
    net.load_state_dict(run.average)
    return net


def audio_encoder(
    folder: Path, pool: Pool, texts: Texts, config: TrainConfig, among: Sequence[int], listen: Listener
) -> tuple[MiniAudio, dict[int, Tensor]]:
    """The audio encoder, saved in `folder`, and its embeddings of the clips `among`.

    It is trained, or trained further, unless it has had `config.audio.steps` already.
    """
    path, views = folder / "audio.safetensors", folder / "shots.safetensors"
    had = int(read_metadata(path)["steps"]) if path.exists() else 0
    if had < config.audio.steps:
        torch.manual_seed(config.seed)
        net = load_part(folder, "audio", "mini", config.mini) if had else MiniAudio(config.mini)
        train_audio(net, range(had, config.audio.steps), pool, texts, config, among, listen)
        views.unlink(missing_ok=True)
        save_part(folder, "audio", "mini", config.mini, _half(net.state_dict()), steps=str(config.audio.steps))
    net = load_part(folder, "audio", "mini", config.mini)
    if not views.exists():
        save_file(dict(zip(map(str, among), shots(net, pool, config, among), strict=True)), views)
    return net, {int(name): embedded for name, embedded in read_tensors(views).items()}


def _half(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as they are stored: float16, which costs nothing that can be heard, and no counters."""
    return {k: v.half() for k, v in state.items() if v.is_floating_point()}


def validation(folder: Path, clips: Sequence[Clip], texts: Texts, audio: MiniAudio) -> Validate:
    """A function that gives a separator's mean SI-SDRi by kind of query, on a mixture of each label of `clips`."""
    cases: list[tuple[str, Tensor, Audio, Audio]] = []
    with torch.inference_mode():
        for row in make_mixtures(clips, folder, seed=1, per_label=1)[:VALIDATION_MIXTURES]:
            source, noise = (fit(read_clip(folder / name), audio.window) for name in (row.source_file, row.noise_file))
            mixture, target = mix(source, noise)
            positive, negative = texts.encoder.embed([row.positive_caption, row.negative_caption])[:, None]
            cases.append(("both", condition(positive, negative), mixture, target))
            cases.append(("positive", condition(positive, None), mixture, target))
            if row.shot_file:
                shot = audio.embed(torch.from_numpy(read_clip(folder / row.shot_file)))[None]
                cases.append(("shot", condition(shot, None), mixture, target))

    def validate(net: Mini) -> dict[str, float]:
        gains: dict[str, list[float]] = {}
        for kind, wanted, mixture, target in cases:
            gains.setdefault(kind, []).append(score(net, wanted, mixture, target)[1])
        return {kind: float(np.mean(values)) for kind, values in gains.items()}

    return validate


def train(
    manifest: Path, out: Path, text: Path, paraphrases: Path | None, config: TrainConfig, listen: Listener
) -> None:
    """Train a mini model on the clips of `manifest` and write it to the folder `out`.

    `text`: a folder with the text encoder (`text.safetensors`, `tokenizer.json`). A run that was stopped goes on from
    `out`; what it would have drawn does not change. Clips whose split is not "train" are only validated on.
    """
    clips = read_manifest(manifest)
    among = [index for index, clip in enumerate(clips) if clip.split == "train"]
    if len({clips[index].label for index in among}) < 2:
        raise ManifestError(f"{manifest}: needs clips of two labels or more in the split 'train'")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("text.safetensors", "tokenizer.json"):
        if not (text / name).is_file():
            raise ModelError(f"{text / name}: no such file; --text takes a folder with a text encoder")
        if text.resolve() != out.resolve():
            shutil.copy(text / name, out / name)
    (out / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    encoder = load_part(out, "text", "mini", config.mini)
    pool = Pool.load(clips)
    texts = Texts(encoder, clips, read_paraphrases(paraphrases) if paraphrases else {})
    audio, views = audio_encoder(out, pool, texts, config, among, listen)
    held_out = [clip for clip in clips if clip.split != "train"]
    labels = len({clip.label for clip in held_out})
    validate = validation(manifest.parent, held_out, texts, audio) if labels > 1 else lambda net: {}

    run = Run(config, out)
    run.resume()
    sampler = Sampler(pool, config.draw, config.seed, among)
    train_separator(run, sampler, Queries(pool, texts, views, config.mixing), validate, listen)
    save_part(out, "separator", "mini", config.mini, _half(run.average))

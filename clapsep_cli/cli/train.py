"""`clapsep train`: trains a model, and prints the progress."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clapsep_cli import startup
from clapsep_cli.cli import options as opt
from clapsep_cli.cli.run import stoppable
from clapsep_cli.cli.terminal import load_model
from clapsep_cli.registry import FAMILIES, MODELS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clapsep_cli.training.loop.train import Recipe, Report

PRESETS = [preset for traits in FAMILIES.values() for preset in traits.presets]

DATA, SETTINGS = "Clips", "Settings"  # headings in --help, with MODEL and RUN

Manifest = Annotated[
    Path | None,
    typer.Argument(
        metavar="[MANIFEST.csv]",
        help="Clips: file,label[,captions,split]; clapsep: also file_name,caption; tuss: file,prompt[,split].",
    ),
]
ManifestOption = Annotated[Path | None, opt.option(DATA, "--manifest CSV", "The manifest, as an option.")]
Audio = Annotated[Path | None, opt.option(DATA, "--audio DIR", "Folder of the clips; by default that of the manifest.")]
Val = Annotated[
    Path | None, opt.option(DATA, "--val CSV", "Clips to validate on; by default those of the splits other than train.")
]
Paraphrases = Annotated[
    opt.Text, opt.option(DATA, "--paraphrases CSV", "mini: more captions by label: label,captions.")
]
Out = Annotated[
    Path | None, opt.option(opt.MODEL, "--out -o DIR", "Folder of the model and the run's state; runs/MANIFEST.")
]
Preset = Annotated[
    opt.Text,
    opt.option(
        opt.MODEL,
        "--preset NAME",
        f"{', '.join(PRESETS[:-1])} or {PRESETS[-1]}; by default mini, or the one that fits --init.",
        PRESETS,
    ),
]
Init = Annotated[
    opt.Text,
    opt.option(opt.MODEL, "--init NAME|PATH", "A model to train further; by default from scratch.", list(MODELS)),
]
LoraOnly = Annotated[
    bool, opt.option(opt.MODEL, "--lora-only", "With --init: train a small adapter, and nothing else of the model.")
]
Encoder = Annotated[
    opt.Text,
    opt.option(
        opt.MODEL,
        "--encoder HOW",
        "clapsep: the separator's encoder: lora, frozen, scratch or none.",
        ("lora", "frozen", "scratch", "none"),
    ),
]
Encoders = Annotated[
    opt.Text,
    opt.option(opt.MODEL, "--encoders DIR", "mini: folder of the query encoders; by default the bundled ones."),
]
Space = Annotated[
    opt.Text,
    opt.option(
        opt.MODEL,
        "--space HOW",
        "mini: keep the encoders, or fit their words or all of them to your clips: keep, words or fit.",
        ("keep", "words", "fit"),
    ),
]
Config = Annotated[
    Path | None, opt.option(SETTINGS, "--config FILE", "Settings that differ from the preset's: .toml or .yaml.")
]
Set = Annotated[opt.Texts, opt.option(SETTINGS, "--set KEY=VALUE", "One such setting, e.g. batch=16; repeatable.")]
Steps = Annotated[int | None, opt.option(SETTINGS, "--steps N", "mini: steps of the separator.", min=1)]
Epochs = Annotated[
    int | None,
    opt.option(
        SETTINGS,
        "--epochs N",
        "clapsep: in each, every clip is a target once; tuss, audiosep: of epoch_steps steps.",
        min=1,
    ),
]
Seed = Annotated[int | None, opt.option(SETTINGS, "--seed N", "Seed of all random draws; 0.")]
Accelerator = Annotated[str, opt.option(opt.RUN, "--accelerator NAME", "auto, cpu, cuda or mps.", opt.DEVICES)]
Devices = Annotated[str, opt.option(opt.RUN, "--devices N|auto", "Number of devices on each machine.")]
Nodes = Annotated[
    int, opt.option(opt.RUN, "--nodes N", "Number of machines; start this on each, by torchrun or SLURM.", min=1)
]
Precision = Annotated[
    str, opt.option(opt.RUN, "--precision NAME", "bf16-mixed or 32-true; by default bf16-mixed where native.")
]


def train(
    manifest: Manifest = None,
    manifest_option: ManifestOption = None,
    audio: Audio = None,
    val: Val = None,
    out: Out = None,
    preset: Preset = None,
    init: Init = None,
    lora_only: LoraOnly = False,
    encoder: Encoder = None,
    config: Config = None,
    settings: Set = None,
    encoders: Encoders = None,
    space: Space = None,
    paraphrases: Paraphrases = None,
    steps: Steps = None,
    epochs: Epochs = None,
    seed: Seed = None,
    accelerator: Accelerator = "auto",
    devices: Devices = "1",
    nodes: Nodes = 1,
    precision: Precision = "",
    _model_dir: opt.ModelDir = None,
    quiet: opt.Quiet = False,
) -> None:
    """Train a model, or tune one for your own sounds. After a stop, the same command continues the run.

    Example: clapsep train mine.csv --init clapsep --lora-only
    """
    if (manifest is None) == (manifest_option is None):
        raise typer.BadParameter("name one manifest: clapsep train MANIFEST.csv")
    listed = manifest or manifest_option
    assert listed is not None
    flags = {
        "init": init,
        "lora_only": lora_only or None,
        "encoder": encoder,
        "encoders": encoders,
        "space": space,
        "paraphrases": paraphrases,
        "separator.steps": steps,
        "epochs": epochs,
        "seed": seed,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    recipe = _recipe(preset, init, config, settings or [], given, quiet)
    from clapsep_cli.training.loop.train import Hardware
    from clapsep_cli.training.loop.train import train as train_model

    startup.keep_memory()
    folder = out or Path("runs") / listed.stem
    hardware = Hardware(accelerator, devices, nodes, precision)
    listen = (lambda report: None) if quiet else _print
    with stoppable(quiet, "stopping after this step; its state is saved") as stop:
        leads = train_model(listed, folder, recipe, listen, hardware, stop, audio, val)
    if leads and not quiet:
        typer.echo(f"done: {recipe.use.format(folder=folder)}")
        for adapter in sorted(folder.glob("adapter.safetensors")):
            typer.echo(
                f"the adapter alone: {adapter}, {adapter.stat().st_size / 1e6:.1f} MB; --adapter with --model {init}"
            )


def _recipe(
    preset: str | None,
    init: str | None,
    config: Path | None,
    settings: list[str],
    given: Mapping[str, object],
    quiet: bool,
) -> Recipe:
    """Return the preset with all overrides. Downloads the model that it starts from."""
    from clapsep_cli.training.loop.settings import parse_setting, read_settings
    from clapsep_cli.training.recipes import presets

    if preset is None:
        preset = presets.preset_of(load_model(init, "cpu", "auto", quiet).family, init) if init else presets.DEFAULT
    overrides = [read_settings(config)] if config else []
    recipe = presets.build(preset, *overrides, *map(parse_setting, settings), given)
    if recipe.needs:
        load_model(recipe.needs, "cpu", "auto", quiet)
    return recipe


def _print(report: Report) -> None:
    from clapsep_cli.training.loop.train import ESTIMATE

    if report.stage == ESTIMATE:
        stages = ", ".join(f"{stage} {_duration(seconds)}" for stage, seconds in report.figures.items())
        typer.echo(f"about {_duration(report.seconds_left)} in all: {stages}")
        return
    figures = "  ".join(f"{name} {value:.4g}" for name, value in report.figures.items())
    measure = f"{report.measure}: " if report.measure else ""
    left = "" if math.isnan(report.seconds_left) else f"  {_duration(report.seconds_left)} left"
    text = f"  {report.text}" if report.text else ""
    typer.echo(f"{report.stage} {report.step}/{report.steps}  {measure}{figures}{left}{text}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min" if minutes else f"{rest} s"

"""`clapsep train`: makes settings from options, trains, and prints the progress."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clapsep_cli import startup
from clapsep_cli.cli.run import stoppable
from clapsep_cli.cli.terminal import DEVICES, ModelDirOption, QuietOption, among, downloads, notes
from clapsep_cli.registry import FAMILIES, MODELS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clapsep_cli.training.loop.train import Recipe, Report

PRESETS = [preset for traits in FAMILIES.values() for preset in traits.presets]

ManifestArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[MANIFEST.csv]",
        help="Clips: file,label[,captions,split]; clapsep: also file_name,caption; tuss: file,prompt[,split].",
    ),
]
ManifestOption = Annotated[Path | None, typer.Option("--manifest", metavar="CSV", help="The same, as an option.")]
AudioOption = Annotated[
    Path | None, typer.Option("--audio", metavar="DIR", help="Folder of the clips; by default that of the manifest.")
]
ValOption = Annotated[
    Path | None, typer.Option("--val", metavar="CSV", help="Clips to validate on; else those of splits but train.")
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="DIR", help="Where the model and the run's state go; runs/MANIFEST if not given."
    ),
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        autocompletion=among(*PRESETS),
        help=f"{', '.join(PRESETS[:-1])} or {PRESETS[-1]}; mini, or as --init says.",
    ),
]
InitOption = Annotated[
    str | None,
    typer.Option(
        "--init",
        metavar="NAME|PATH",
        autocompletion=among(*MODELS),
        help="A model to go on from, rather than from scratch.",
    ),
]
LoraOnlyOption = Annotated[
    bool, typer.Option("--lora-only", help="With --init: tune a small adapter, and nothing else of the model.")
]
EncoderOption = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        metavar="HOW",
        autocompletion=among("lora", "frozen", "scratch", "none"),
        help="The separator's: lora, frozen, scratch or none.",
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Settings that differ from the preset's: .toml or .yaml."),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One such setting, e.g. batch=16; repeatable.")
]
EncodersOption = Annotated[
    str | None,
    typer.Option("--encoders", metavar="DIR", help="mini: folder of the query encoders; the bundled ones by default."),
]
SpaceOption = Annotated[
    str | None,
    typer.Option(
        "--space",
        metavar="HOW",
        autocompletion=among("keep", "words", "fit"),
        help="mini: keep the encoders, or fit their words, or all, to your clips (words, fit); keep.",
    ),
]
ParaphrasesOption = Annotated[
    str | None, typer.Option("--paraphrases", metavar="CSV", help="mini: further captions by label: label,captions.")
]
StepsOption = Annotated[int | None, typer.Option("--steps", metavar="N", min=1, help="mini: steps of the separator.")]
EpochsOption = Annotated[
    int | None,
    typer.Option(
        "--epochs",
        metavar="N",
        min=1,
        help="clapsep: in each, every clip is a target once; tuss, audiosep: of epoch_steps.",
    ),
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Everything drawn at random follows from it; 0.")
]
AcceleratorOption = Annotated[
    str,
    typer.Option("--accelerator", metavar="NAME", autocompletion=among(*DEVICES), help="auto, cpu, cuda or mps."),
]
DevicesOption = Annotated[str, typer.Option("--devices", metavar="N|auto", help="How many of them, on each machine.")]
NodesOption = Annotated[
    int, typer.Option("--nodes", metavar="N", min=1, help="Machines; start this on each, by torchrun or SLURM.")
]
PrecisionOption = Annotated[
    str, typer.Option("--precision", metavar="NAME", help="bf16-mixed or 32-true; by default bf16-mixed where native.")
]


def train(
    manifest: ManifestArgument = None,
    manifest_option: ManifestOption = None,
    audio: AudioOption = None,
    val: ValOption = None,
    out: OutOption = None,
    preset: PresetOption = None,
    init: InitOption = None,
    lora_only: LoraOnlyOption = False,
    encoder: EncoderOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    encoders: EncodersOption = None,
    space: SpaceOption = None,
    paraphrases: ParaphrasesOption = None,
    steps: StepsOption = None,
    epochs: EpochsOption = None,
    seed: SeedOption = None,
    accelerator: AcceleratorOption = "auto",
    devices: DevicesOption = "1",
    nodes: NodesOption = 1,
    precision: PrecisionOption = "",
    _model_dir: ModelDirOption = None,
    quiet: QuietOption = False,
) -> None:
    """Train a model, or tune one for your own sounds. Stopped, it goes on where it was when called again.

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
    with stoppable(quiet, "stopping after this step; its state is saved") as stop:
        leads = train_model(listed, folder, recipe, _ignore if quiet else _print, hardware, stop, audio, val)
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
    from clapsep_cli.store.library import load_model
    from clapsep_cli.training.loop.settings import parse_setting, read_settings
    from clapsep_cli.training.recipes import presets

    with downloads(quiet) as shown:
        if preset is None:
            preset = presets.DEFAULT
            if init:
                preset = presets.preset_of(load_model(init, "cpu", say=notes(quiet), progress=shown).family, init)
        overrides = [read_settings(config)] if config else []
        recipe = presets.build(preset, *overrides, *map(parse_setting, settings), given)
        if recipe.needs:
            load_model(recipe.needs, "cpu", say=notes(quiet), progress=shown)
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


def _ignore(report: Report) -> None:
    pass

"""The options of all commands that separate, and how a command comes to have them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from clapsep_cli.cli.terminal import PROGRESS, among, device_option, model_option, quiet_option, use_home

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Command = Callable[..., None]
Options = TypeVar("Options", bound="DataclassInstance")

INPUT, OUTPUT, MODEL, RUN = "Recordings", "Outputs", "Model", "Run"  # panels of --help


def _option(name: str, *more: str, panel: str, **settings: Any) -> Any:
    return typer.Option(name, *more, rich_help_panel=panel, **settings)


@dataclass(frozen=True)
class Common:
    """Which recordings are separated, where the parts go, with which model, and what is said meanwhile."""

    recursive: Annotated[
        bool, _option("--recursive", "-r", panel=INPUT, help="Take folders with all that is below them.")
    ] = False
    start: Annotated[
        str | None, _option("--start", panel=INPUT, metavar="TIME", help="Begin there: seconds, or as 1:02:03.")
    ] = None
    end: Annotated[str | None, _option("--end", panel=INPUT, metavar="TIME", help="End there.")] = None
    lenient: Annotated[
        bool, _option("--lenient", panel=INPUT, help="Take what there is of recordings that are cut or damaged.")
    ] = False
    stream: Annotated[
        int | None,
        _option(
            "--stream",
            panel=INPUT,
            min=1,
            max=1024,
            metavar="N",
            help="Take this sound track of a film; else the first.",
        ),
    ] = None

    out: Annotated[
        Path | None,
        _option(
            "--out",
            "-o",
            panel=OUTPUT,
            metavar="DIR",
            help="Where to write; by default beside each input; - is stdout.",
        ),
    ] = None
    filename: Annotated[
        str | None,
        _option("--filename", panel=OUTPUT, metavar="NAME", help='By default "{stem}.{part}.{ext}"; also {query}.'),
    ] = None
    format: Annotated[
        str,
        _option(
            "--format",
            "-f",
            panel=OUTPUT,
            metavar="NAME",
            autocompletion=among("wav", "flac", "ogg", "opus", "mp3"),
            help="wav, flac, ogg, opus or mp3.",
        ),
    ] = "wav"
    subtype: Annotated[
        str | None,
        _option(
            "--subtype",
            panel=OUTPUT,
            metavar="NAME",
            autocompletion=among("pcm16", "pcm24", "float"),
            help="pcm16, pcm24 or float; by default the input's, at least 16 bit.",
        ),
    ] = None
    clip: Annotated[
        str,
        _option(
            "--clip",
            panel=OUTPUT,
            metavar="HOW",
            autocompletion=among("warn", "rescale", "error"),
            help="What is over full scale: warn and cut it, rescale all parts alike, or error.",
        ),
    ] = "warn"
    plot: Annotated[bool, _option("--plot", panel=OUTPUT, help="Also write a picture of the parts, {stem}.png.")] = (
        False
    )
    overwrite: Annotated[bool, _option("--overwrite", panel=OUTPUT, help="Replace existing outputs.")] = False
    skip_existing: Annotated[
        bool, _option("--skip-existing", panel=OUTPUT, help="Leave out what was done before, for all the same wishes.")
    ] = False

    model: Annotated[str | None, model_option(MODEL)] = None
    adapter: Annotated[
        Path | None,
        _option("--adapter", panel=MODEL, metavar="FILE", help="Tuned by `clapsep train --lora-only`, for the model."),
    ] = None
    device: Annotated[str, device_option(MODEL)] = "auto"
    precision: Annotated[
        str,
        _option(
            "--precision",
            panel=MODEL,
            metavar="HOW",
            autocompletion=among("auto", "high", "fast"),
            help="high (float32), fast (bfloat16), or auto: fast where it is native.",
        ),
    ] = "auto"
    model_dir: Annotated[
        Path | None,
        _option(
            "--model-dir",
            panel=MODEL,
            metavar="DIR",
            callback=use_home,
            help="Where models are kept; the environment variable CLAPSEP_HOME says the same.",
        ),
    ] = None

    threads: Annotated[
        int | None,
        _option("--threads", panel=RUN, min=1, max=1024, metavar="N", help="To compute with; by default all cores."),
    ] = None
    batch_size: Annotated[
        int,
        _option(
            "--batch-size", panel=RUN, min=0, max=1024, metavar="N", help="Windows at once; 0 lets the device decide."
        ),
    ] = 0
    jobs: Annotated[
        int, _option("--jobs", "-j", panel=RUN, min=1, max=64, metavar="N", help="Threads that read and write.")
    ] = 2
    json: Annotated[bool, _option("--json", panel=RUN, help="Print a JSON object for each recording on stdout.")] = (
        False
    )
    progress: Annotated[
        str,
        _option(
            "--progress",
            panel=RUN,
            metavar="HOW",
            autocompletion=among(*PROGRESS),
            help="auto (bars on a terminal), json (lines on stderr) or none.",
        ),
    ] = "auto"
    quiet: Annotated[bool, quiet_option(RUN)] = False


def takes(options: type[Options]) -> Callable[[Command], Command]:
    """Give a command the fields of a dataclass as options of its own; it gets them as the argument `common`."""

    def decorate(command: Command) -> Command:
        hints = get_type_hints(options, include_extras=True)
        shared = [
            inspect.Parameter(
                f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if f.default is MISSING else f.default,
                annotation=hints[f.name],
            )
            for f in fields(options)
        ]

        def wrapper(**values: Any) -> None:
            common = options(**{f.name: values.pop(f.name) for f in fields(options) if f.name in values})
            command(common=common, **values)

        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "common"]
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
        wrapper.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in (*own, *shared)}
        return wrapper

    return decorate

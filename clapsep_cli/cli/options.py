"""The options that `extract` and `separate` share, and a decorator that adds them to a command."""

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
    """Options for inputs, outputs, the model and messages."""

    recursive: Annotated[
        bool, _option("--recursive", "-r", panel=INPUT, help="Read folders with all their subfolders.")
    ] = False
    start: Annotated[
        str | None, _option("--start", panel=INPUT, metavar="TIME", help="Start at this time: seconds, or as 1:02:03.")
    ] = None
    end: Annotated[str | None, _option("--end", panel=INPUT, metavar="TIME", help="End at this time.")] = None
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
            help="Output folder; by default that of each input; - is stdout.",
        ),
    ] = None
    filename: Annotated[
        str | None,
        _option(
            "--filename", panel=OUTPUT, metavar="NAME", help='Output name, "{stem}.{part}.{ext}"; also {name}, {query}.'
        ),
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
            help="Samples over full scale: warn and clip, rescale all parts by one gain, or error.",
        ),
    ] = "warn"
    plot: Annotated[bool, _option("--plot", panel=OUTPUT, help="Also write a picture of the parts, {stem}.png.")] = (
        False
    )
    overwrite: Annotated[bool, _option("--overwrite", panel=OUTPUT, help="Replace existing outputs.")] = False
    skip_existing: Annotated[
        bool, _option("--skip-existing", panel=OUTPUT, help="Skip recordings already processed with the same settings.")
    ] = False

    model: Annotated[str | None, model_option(MODEL)] = None
    adapter: Annotated[
        Path | None,
        _option(
            "--adapter", panel=MODEL, metavar="FILE", help="An adapter for the model, from `clapsep train --lora-only`."
        ),
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
            help="Folder of the models; like the variable CLAPSEP_HOME.",
        ),
    ] = None

    threads: Annotated[
        int | None,
        _option(
            "--threads", panel=RUN, min=1, max=1024, metavar="N", help="Threads that compute; by default all cores."
        ),
    ] = None
    batch_size: Annotated[
        int,
        _option(
            "--batch-size",
            panel=RUN,
            min=0,
            max=1024,
            metavar="N",
            help="Windows processed at once; 0 chooses by the device.",
        ),
    ] = 0
    jobs: Annotated[
        int, _option("--jobs", "-j", panel=RUN, min=1, max=64, metavar="N", help="Threads that read and write files.")
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

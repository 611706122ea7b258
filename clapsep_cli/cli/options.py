"""The options that `extract` and `separate` share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clapsep_cli.cli.terminal import MODEL, PROGRESS, RUN, among, name_by
from clapsep_cli.errors import UsageError

if TYPE_CHECKING:
    from clapsep_cli.jobs.stores import Stage
    from clapsep_cli.jobs.tasks import Options

INPUT, OUTPUT, BEYOND = "Recordings", "Outputs", "Beyond one machine"  # panels of --help, as MODEL and RUN are


def _option(panel: str, text: str, *names: str, known: tuple[str, ...] = (), **settings: Any) -> Any:
    completion = among(*known) if known else None
    return typer.Option(*names, rich_help_panel=panel, help=text, autocompletion=completion, **settings)


def _number(panel: str, text: str, *names: str, most: int = 1024, least: int = 1) -> Any:
    return _option(panel, text, *names, metavar="N", min=least, max=most)


# Values that shells complete.
CLIPS = ("warn", "rescale", "error")
FORMATS = ("wav", "flac", "ogg", "opus", "mp3", "m4a")
SUBTYPES = ("pcm16", "pcm24", "float")
EVENTS = ("csv", "audacity", "raven")
PRECISIONS = ("auto", "high", "fast")
ENGINES = ("local", "ray")
OF_RAY = ("address", "workers", "gpus_per_worker", "insecure")  # options

Inputs = Annotated[
    list[str] | None,
    typer.Argument(metavar="MIX...", help="Recordings, folders, patterns, @list.txt, URLs; or - for stdin."),
]
Recursive = Annotated[bool, _option(INPUT, "Read folders with all their subfolders.", "--recursive", "-r")]
Start = Annotated[str | None, _option(INPUT, "Start at this time: seconds, or as 1:02:03.", "--start", metavar="TIME")]
End = Annotated[str | None, _option(INPUT, "End at this time.", "--end", metavar="TIME")]
Lenient = Annotated[bool, _option(INPUT, "Read damaged or truncated recordings as far as possible.", "--lenient")]
Stream = Annotated[int | None, _number(INPUT, "Read this sound track of a film; else the first.", "--stream")]

Expand = Annotated[
    float,
    _option(
        INPUT, "Hear recordings this many times slower, for sounds above hearing: 10 for bats.", "--expand", metavar="X"
    ),
]

Out = Annotated[
    str | None,
    _option(
        OUTPUT, "Output folder or URL; by default that of each input; - is stdout.", "--out", "-o", metavar="DIR|URL"
    ),
]
Filename = Annotated[
    str | None,
    _option(OUTPUT, 'Output name, "{stem}.{part}.{ext}"; also {name}, {query}.', "--filename", metavar="NAME"),
]
Format = Annotated[
    str, _option(OUTPUT, "wav, flac, ogg, opus, mp3 or m4a.", "--format", "-f", metavar="NAME", known=FORMATS)
]
Subtype = Annotated[
    str | None,
    _option(
        OUTPUT,
        "pcm16, pcm24 or float; by default the input's, at least 16 bit.",
        "--subtype",
        metavar="NAME",
        known=SUBTYPES,
    ),
]
Remux = Annotated[
    bool, _option(OUTPUT, "Write films again with each part as the sound track; pictures are copied.", "--remux")
]
Clip = Annotated[
    str,
    _option(
        OUTPUT,
        "Samples over full scale: warn and clip, rescale all parts by one gain, or error.",
        "--clip",
        metavar="HOW",
        known=CLIPS,
    ),
]
Events = Annotated[bool, _option(OUTPUT, "Also write when each target sounds, {stem}.events.csv.", "--events")]
EventsFormat = Annotated[
    str,
    _option(
        OUTPUT,
        "csv, audacity (labels) or raven (a selection table).",
        "--events-format",
        metavar="NAME",
        known=EVENTS,
    ),
]
EventsLevel = Annotated[
    float | None,
    _option(OUTPUT, "Level in dB relative to the mixture at which an event begins.", "--events-level", metavar="DB"),
]
EventsPresence = Annotated[
    float | None, _option(OUTPUT, "Least presence of an event.", "--events-presence", metavar="X")
]
EventsLength = Annotated[
    float | None, _option(OUTPUT, "Shortest event, in seconds.", "--events-length", metavar="SECONDS")
]
NoAudio = Annotated[bool, _option(OUTPUT, "Write the events alone, which is faster.", "--no-audio")]
Plot = Annotated[bool, _option(OUTPUT, "Also write a picture of the parts, {stem}.png.", "--plot")]
Overwrite = Annotated[bool, _option(OUTPUT, "Replace existing outputs.", "--overwrite")]
SkipExisting = Annotated[
    bool, _option(OUTPUT, "Skip recordings already processed with the same settings.", "--skip-existing")
]

Adapter = Annotated[
    str | None,
    _option(MODEL, "An adapter for the model, from `clapsep train --lora-only`.", "--adapter", metavar="FILE"),
]
Refine = Annotated[
    bool,
    _option(
        MODEL,
        "Separate in two passes: the second leaves out what sounds like the rest of the first.",
        "--refine/--no-refine",
    ),
]
Precision = Annotated[
    str,
    _option(
        MODEL,
        "high (float32), fast (bfloat16), or auto: fast where it is native.",
        "--precision",
        metavar="HOW",
        known=PRECISIONS,
    ),
]

Threads = Annotated[int | None, _number(RUN, "Cores to compute on; by default all.", "--threads")]
BatchSize = Annotated[int, _number(RUN, "Windows in one batch; 0 chooses by the device.", "--batch-size", least=0)]
Jobs = Annotated[int, _number(RUN, "Threads that read and write files.", "--jobs", "-j", most=64)]
Json = Annotated[bool, _option(RUN, "Print a JSON object for each recording on stdout.", "--json")]
Progress = Annotated[
    str,
    _option(
        RUN, "auto (bars on a terminal), json (lines on stderr) or none.", "--progress", metavar="HOW", known=PROGRESS
    ),
]


Shard = Annotated[
    str | None,
    _option(BEYOND, "Process only shard K of N, counted from 0, by the names of recordings.", "--shard", metavar="K/N"),
]
Scratch = Annotated[
    Path | None, _option(BEYOND, "Folder for what is fetched from and sent to URLs.", "--scratch", metavar="DIR")
]
Engine = Annotated[str, _option(BEYOND, "local, or ray for many machines.", "--engine", metavar="NAME", known=ENGINES)]
Address = Annotated[
    str | None,
    _option(BEYOND, "Ray cluster: auto or HOST:PORT; by default, a new one here.", "--address", metavar="ADDR"),
]
Workers = Annotated[
    int | None, _number(BEYOND, "Ray workers; by default what the cluster holds.", "--workers", most=65536)
]
GpusPerWorker = Annotated[
    float | None, _option(BEYOND, "GPUs of each Ray worker; 0 by default.", "--gpus-per-worker", metavar="X", min=0)
]
Insecure = Annotated[bool, _option(BEYOND, "Connect to a Ray cluster without a token.", "--insecure")]


@dataclass(frozen=True)
class Setup:
    """Options for the model, the device and the messages of a run, named as those of the commands."""

    model: str | None
    adapter: str | None
    device: str
    precision: str
    refine: bool
    threads: int | None
    scratch: Path | None
    engine: str
    address: str | None
    workers: int | None
    gpus_per_worker: float | None
    insecure: bool
    json: bool
    progress: str
    quiet: bool


@contextmanager
def staging(scratch: Path | None) -> Iterator[Stage]:
    """Yield what mirrors the stores of URLs, and print its paths as URLs."""
    from clapsep_cli.jobs.stores import Stage

    with Stage(scratch) as stage:
        name_by(stage.shown)
        yield stage


def parse_shard(text: str) -> tuple[int, int]:
    """Return K and N of `K/N`. Raises `UsageError`."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text.strip())
    if match is None or not int(match[1]) < int(match[2]):
        raise UsageError(f"--shard {text!r}: give K/N, K from 0 to N - 1, as in 0/40")
    return int(match[1]), int(match[2])


def options_of(given: Mapping[str, Any], stage: Stage) -> Options:
    """Make `Options` from the arguments of a command, by name; `stage` mirrors URLs.

    Raises `QueryError` for an invalid time, `UsageError` for an invalid shard or URL.
    """
    from clapsep_cli.jobs.tasks import Options
    from clapsep_cli.query import parse_time

    times = {name: None if given[name] is None else parse_time(given[name]) for name in ("start", "end")}
    out = None if given["out"] is None else stage.path(given["out"])
    shard = None if given["shard"] is None else parse_shard(given["shard"])
    values = {**given, **times, "start": times["start"] or 0.0, "out": out, "shard": shard}
    on_ray = given["engine"] == "ray"
    values["markers"] = shard is not None or on_ray
    values["skip_existing"] |= on_ray and not values["overwrite"]  # so that the same command goes on from a lost driver
    return Options(**{f.name: values[f.name] for f in fields(Options) if f.name in values})


def setup_of(given: Mapping[str, Any]) -> Setup:
    """Make a `Setup` from the arguments of a command, by name. Raises `UsageError` for an unknown `--progress`."""
    if given["progress"] not in PROGRESS:
        raise UsageError(f"there is no --progress {given['progress']!r}; there are {', '.join(PROGRESS)}")
    if given["engine"] not in ENGINES:
        raise UsageError(f"there is no --engine {given['engine']!r}; there are {', '.join(ENGINES)}")
    for name in OF_RAY:
        if given["engine"] != "ray" and given[name]:
            raise UsageError(f"--{name.replace('_', '-')} is for --engine ray: use them together")
    return Setup(**{f.name: given[f.name] for f in fields(Setup)})

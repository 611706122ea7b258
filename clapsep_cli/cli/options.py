"""The options that `extract` and `separate` share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clapsep_cli.cli.terminal import MODEL, PROGRESS, RUN, among
from clapsep_cli.errors import UsageError

if TYPE_CHECKING:
    from clapsep_cli.jobs.tasks import Options

INPUT, OUTPUT = "Recordings", "Outputs"  # panels of --help, as MODEL and RUN are


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

Inputs = Annotated[
    list[str] | None,
    typer.Argument(metavar="MIX...", help="Recordings, folders, patterns, @list.txt; or - for stdin."),
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
    Path | None,
    _option(OUTPUT, "Output folder; by default that of each input; - is stdout.", "--out", "-o", metavar="DIR"),
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
    Path | None,
    _option(MODEL, "An adapter for the model, from `clapsep train --lora-only`.", "--adapter", metavar="FILE"),
]
Refine = Annotated[
    bool | None,
    _option(
        MODEL,
        "Separate in two passes: the second leaves out what sounds like the rest of the first; with mini: yes.",
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

Threads = Annotated[int | None, _number(RUN, "Threads that compute; by default all cores.", "--threads")]
BatchSize = Annotated[int, _number(RUN, "Windows processed at once; 0 chooses by the device.", "--batch-size", least=0)]
Jobs = Annotated[int, _number(RUN, "Threads that read and write files.", "--jobs", "-j", most=64)]
Json = Annotated[bool, _option(RUN, "Print a JSON object for each recording on stdout.", "--json")]
Progress = Annotated[
    str,
    _option(
        RUN, "auto (bars on a terminal), json (lines on stderr) or none.", "--progress", metavar="HOW", known=PROGRESS
    ),
]


@dataclass(frozen=True)
class Setup:
    """Options for the model, the device and the messages of a run, named as those of the commands."""

    model: str | None
    adapter: Path | None
    device: str
    precision: str
    refine: bool | None
    threads: int | None
    json: bool
    progress: str
    quiet: bool


def options_of(given: Mapping[str, Any]) -> Options:
    """Make `Options` from the arguments of a command, by name. Raises `QueryError` for an invalid time."""
    from clapsep_cli.jobs.tasks import Options
    from clapsep_cli.query import parse_time

    times = {name: None if given[name] is None else parse_time(given[name]) for name in ("start", "end")}
    values = {**given, **times, "start": times["start"] or 0.0}
    return Options(**{f.name: values[f.name] for f in fields(Options) if f.name in values})


def setup_of(given: Mapping[str, Any]) -> Setup:
    """Make a `Setup` from the arguments of a command, by name. Raises `UsageError` for an unknown `--progress`."""
    if given["progress"] not in PROGRESS:
        raise UsageError(f"there is no --progress {given['progress']!r}; there are {', '.join(PROGRESS)}")
    return Setup(**{f.name: given[f.name] for f in fields(Setup)})

"""Declares the options that several commands share, and checks them."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clapsep_cli.cli.terminal import name_by
from clapsep_cli.errors import ClapsepWarning, OutputError, UsageError
from clapsep_cli.registry import MODELS

if TYPE_CHECKING:
    from clapsep_cli.jobs.job import Cluster, Loading, Options
    from clapsep_cli.jobs.stores import Stage

# Headings in --help.
INPUT, QUERY, OUTPUT, MODEL, RUN, BEYOND = "Recordings", "Queries", "Outputs", "Model", "Run", "Beyond one machine"
COUNT = {"min": 1, "max": 1024}  # bounds of most numbers

# Values that shells complete.
CLIPS = ("warn", "rescale", "error")
FORMATS = ("wav", "flac", "ogg", "opus", "mp3", "m4a")
SUBTYPES = ("pcm16", "pcm24", "float")
EVENTS = ("csv", "audacity", "raven")
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "high", "fast")
PROGRESS = ("auto", "json", "none")
ENGINES = ("local", "ray")
OF_RAY = ("address", "workers", "gpus_per_worker", "insecure")  # options for --engine ray alone

# Types of options that may be left out.
Text = str | None
Texts = list[str] | None
Paths = list[Path] | None
Number = float | None


def option(
    panel: str, spec: str, text: str, known: Sequence[str] = (), *, closed: bool = False, **settings: Any
) -> Any:
    """Declare an option.

    Args:
        panel: heading of --help under which it is listed.
        spec: its names and the placeholder of its value, e.g. `--out -o DIR`.
        text: its help.
        known: values that shells complete.
        closed: refuse other values than the `known` ones.
        **settings: more of `typer.Option`.
    """
    names = [word for word in spec.split() if word.startswith("-")]
    value = spec.rpartition(" ")[2]
    metavar = None if value in names else value
    if closed:
        settings["callback"] = one_of(names[0], known)
    completion = completing(known) if known else None
    return typer.Option(
        *names, metavar=metavar, help=text, rich_help_panel=panel, autocompletion=completion, **settings
    )


def completing(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a function that completes a value to those of `known`."""

    def matches(incomplete: str) -> list[str]:
        return [name for name in known if name.startswith(incomplete)]

    return matches


def one_of(name: str, known: Sequence[str]) -> Callable[[Text], Text]:
    """Return a function that raises `UsageError` for a value of option `name` that is not `known`."""

    def check(value: Text) -> Text:
        if value is not None and value not in known:
            raise UsageError(f"there is no {name} {value!r}; there are {', '.join(known)}")
        return value

    return check


def _silence(quiet: bool) -> bool:
    """Ignore the library's warnings from now on if `quiet`."""
    if quiet:
        warnings.simplefilter("ignore", ClapsepWarning)
    return quiet


def _use_home(folder: Path | None) -> Path | None:
    """Keep models in `folder` from now on."""
    if folder is not None:
        os.environ["CLAPSEP_HOME"] = str(folder)
    return folder


Inputs = Annotated[
    Texts, typer.Argument(metavar="MIX...", help="Recordings, folders, patterns, @list.txt, URLs; or - for stdin.")
]
Recursive = Annotated[bool, option(INPUT, "--recursive -r", "Read folders with all their subfolders.")]
Start = Annotated[Text, option(INPUT, "--start TIME", "Start time, in seconds or as 1:02:03.")]
End = Annotated[Text, option(INPUT, "--end TIME", "End time.")]
Lenient = Annotated[bool, option(INPUT, "--lenient", "Read damaged or truncated recordings as far as possible.")]
Stream = Annotated[
    int | None, option(INPUT, "--stream N", "Sound track of a film to read; by default the first.", **COUNT)
]
Expand = Annotated[
    float, option(INPUT, "--expand X", "Hear recordings this many times slower, for sounds above hearing: 10 for bats.")
]

Out = Annotated[
    Text, option(OUTPUT, "--out -o DIR|URL", "Output folder or URL; by default that of each input; - is stdout.")
]
Filename = Annotated[
    Text, option(OUTPUT, "--filename NAME", 'Output name, "{stem}.{part}.{ext}"; also {name}, {query}.')
]
Format = Annotated[str, option(OUTPUT, "--format -f NAME", "wav, flac, ogg, opus, mp3 or m4a.", FORMATS)]
Subtype = Annotated[
    Text, option(OUTPUT, "--subtype NAME", "pcm16, pcm24 or float; by default the input's, at least 16 bit.", SUBTYPES)
]
Remux = Annotated[
    bool, option(OUTPUT, "--remux", "Write films with each part as the sound track; pictures are copied.")
]
Clip = Annotated[
    str,
    option(
        OUTPUT, "--clip HOW", "Samples over full scale: warn and clip, rescale all parts by one gain, or error.", CLIPS
    ),
]
Events = Annotated[bool, option(OUTPUT, "--events", "Also write when each target sounds, {stem}.events.csv.")]
EventsFormat = Annotated[
    str, option(OUTPUT, "--events-format NAME", "csv, audacity (labels) or raven (a selection table).", EVENTS)
]
EventsLevel = Annotated[
    Number, option(OUTPUT, "--events-level DB", "Level in dB relative to the mixture at which an event begins.")
]
EventsPresence = Annotated[Number, option(OUTPUT, "--events-presence X", "Least presence of an event.")]
EventsLength = Annotated[Number, option(OUTPUT, "--events-length SECONDS", "Shortest event, in seconds.")]
NoAudio = Annotated[bool, option(OUTPUT, "--no-audio", "Write the events alone, which is faster.")]
Plot = Annotated[bool, option(OUTPUT, "--plot", "Also write a picture of the parts, {stem}.png.")]
Overwrite = Annotated[bool, option(OUTPUT, "--overwrite", "Replace existing outputs.")]
SkipExisting = Annotated[
    bool, option(OUTPUT, "--skip-existing", "Skip recordings already processed with the same settings.")
]

Model = Annotated[
    Text,
    option(
        MODEL,
        "--model NAME|PATH",
        "A model by name or folder; by default the best available.",
        list(MODELS),
        envvar="CLAPSEP_MODEL",
    ),
]
ModelDir = Annotated[
    Path | None,
    option(
        MODEL,
        "--model-dir DIR",
        "Folder of the models; like the variable CLAPSEP_HOME.",
        callback=_use_home,
        expose_value=False,
    ),
]
Device = Annotated[
    str, option(MODEL, "--device -d NAME", "auto, cpu, cuda, cuda:N or mps.", DEVICES, envvar="CLAPSEP_DEVICE")
]
Adapter = Annotated[
    Text, option(MODEL, "--adapter FILE", "An adapter for the model, from `clapsep train --lora-only`.")
]
Refine = Annotated[
    bool,
    option(
        MODEL,
        "--refine/--no-refine",
        "Separate in two passes: the second leaves out what sounds like the rest of the first.",
    ),
]
Precision = Annotated[
    str,
    option(MODEL, "--precision HOW", "high (float32), fast (bfloat16), or auto: fast where it is native.", PRECISIONS),
]

Threads = Annotated[int | None, option(RUN, "--threads N", "Cores to compute on; by default all.", **COUNT)]
BatchSize = Annotated[
    int, option(RUN, "--batch-size N", "Windows in one batch; 0 chooses by the device.", min=0, max=1024)
]
Jobs = Annotated[int, option(RUN, "--jobs -j N", "Threads that read and write files.", min=1, max=64)]
Json = Annotated[bool, option(RUN, "--json", "Print a JSON object for each recording on stdout.")]
Progress = Annotated[
    str,
    option(RUN, "--progress HOW", "auto (bars on a terminal), json (lines on stderr) or none.", PROGRESS, closed=True),
]
Quiet = Annotated[bool, option(RUN, "--quiet -q", "Print nothing but errors.", callback=_silence)]

Shard = Annotated[
    Text, option(BEYOND, "--shard K/N", "Process only shard K of N, counted from 0; names decide the shard.")
]
Scratch = Annotated[Path | None, option(BEYOND, "--scratch DIR", "Folder for copies of the files at URLs.")]
Engine = Annotated[str, option(BEYOND, "--engine NAME", "local, or ray for many machines.", ENGINES, closed=True)]
Address = Annotated[
    Text, option(BEYOND, "--address ADDR", "Ray cluster: auto or HOST:PORT; by default a new one on this machine.")
]
Workers = Annotated[
    int | None,
    option(BEYOND, "--workers N", "Number of Ray workers; by default as many as the cluster holds.", min=1, max=65536),
]
GpusPerWorker = Annotated[
    Number, option(BEYOND, "--gpus-per-worker X", "GPUs of each Ray worker; 0 by default.", min=0)
]
Insecure = Annotated[bool, option(BEYOND, "--insecure", "Connect to a Ray cluster without a token.")]


@dataclass(frozen=True)
class Setup:
    """Options for the model, the machines and the messages of a run, named as those of the commands.

    `cluster`: where Ray runs it; None for this machine, without Ray.
    """

    loading: Loading
    cluster: Cluster | None
    threads: int | None
    scratch: Path | None
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
    from clapsep_cli.jobs.job import Options
    from clapsep_cli.query import parse_time

    times = {name: None if given[name] is None else parse_time(given[name]) for name in ("start", "end")}
    out = None if given["out"] is None else stage.path(given["out"])
    shard = None if given["shard"] is None else parse_shard(given["shard"])
    values = {**given, **times, "start": times["start"] or 0.0, "out": out, "shard": shard}
    on_ray = given["engine"] == "ray"
    values["markers"] = shard is not None or on_ray
    # So that the same command continues after a lost driver.
    values["skip_existing"] |= on_ray and not values["overwrite"]
    return Options(**_chosen(Options, values))


def _chosen(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `values` that are fields of the dataclass `kind`."""
    return {field.name: values[field.name] for field in fields(kind) if field.name in values}


def setup_of(given: Mapping[str, Any]) -> Setup:
    """Make a `Setup` from the arguments of a command, by name. Raises `UsageError` for an option of another engine."""
    from clapsep_cli.jobs.job import Cluster, Loading

    cluster = None
    if given["engine"] == "ray":
        cluster = Cluster(**_chosen(Cluster, {**given, "threads": given["threads"] or 1}))
    elif name := next((name for name in OF_RAY if given[name]), None):
        raise UsageError(f"--{name.replace('_', '-')} is for --engine ray: use them together")
    return Setup(loading=Loading(**_chosen(Loading, given)), cluster=cluster, **_chosen(Setup, given))


def check_free(path: Path, overwrite: bool, instead: str = "") -> None:
    """Raise `OutputError` if a file exists that is not to be replaced; `instead` is another way out."""
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: exists already; use --overwrite to replace it{instead}")

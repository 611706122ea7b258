"""`clapsep separate`: separates a recording into one part for each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Annotated, Any

from typer.core import TyperCommand

from clapsep_cli.cli import options as opt
from clapsep_cli.cli.run import find_recordings, run_requests
from clapsep_cli.errors import DownloadError, UsageError
from clapsep_cli.models.prompts import PROMPTS, TASKS
from clapsep_cli.registry import BUNDLED

PANEL = "Prompts"  # heading in --help
LISTS = ("--prompts", "--only")
DEFAULT = "tuss-medium"


Prompts = Annotated[
    opt.Texts,
    opt.option(PANEL, "--prompts NAME...", "All sounds in the recording; repeat a prompt for equal sounds.", PROMPTS),
]
Task = Annotated[
    opt.Text,
    opt.option(
        PANEL,
        "--task TASK",
        "Prompts by task: speech-enhancement, speech-separation, sound-events, music or cinematic.",
        list(TASKS),
        closed=True,
    ),
]
Only = Annotated[opt.Texts, opt.option(PANEL, "--only NAME...", "Write only these of the parts.", PROMPTS)]
Residual = Annotated[bool, opt.option(opt.OUTPUT, "--residual", "Also write the rest.")]
Consistent = Annotated[bool, opt.option(opt.OUTPUT, "--consistent", "Add the rest to the parts, so that they add up.")]


class ListCommand(TyperCommand):
    """A command whose options `--prompts` and `--only` take all words up to the next option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, repeated(args))


def repeated(args: Sequence[str]) -> list[str]:
    """Repeat a list option before each of its values: `--prompts a b` becomes `--prompts a --prompts b`."""
    out: list[str] = []
    option, first = "", False
    for position, word in enumerate(args):
        if word == "--":
            return out + list(args[position:])
        if word.startswith("-") and word != "-":
            option, first = (word, True) if word in LISTS else ("", False)
            out.append(word)
        else:
            out += [word] if not option or first else [option, word]
            first = False
    return out


def separate(
    inputs: opt.Inputs = None,
    prompts: Prompts = None,
    task: Task = None,
    only: Only = None,
    residual: Residual = False,
    consistent: Consistent = False,
    recursive: opt.Recursive = False,
    start: opt.Start = None,
    end: opt.End = None,
    lenient: opt.Lenient = False,
    stream: opt.Stream = None,
    expand: opt.Expand = 1.0,
    out: opt.Out = None,
    filename: opt.Filename = None,
    format: opt.Format = "wav",  # noqa: A002
    subtype: opt.Subtype = None,
    remux: opt.Remux = False,
    clip: opt.Clip = "warn",
    plot: opt.Plot = False,
    events: opt.Events = False,
    events_format: opt.EventsFormat = "csv",
    events_level: opt.EventsLevel = None,
    events_presence: opt.EventsPresence = None,
    events_length: opt.EventsLength = None,
    no_audio: opt.NoAudio = False,
    overwrite: opt.Overwrite = False,
    skip_existing: opt.SkipExisting = False,
    shard: opt.Shard = None,
    scratch: opt.Scratch = None,
    engine: opt.Engine = "local",
    address: opt.Address = None,
    workers: opt.Workers = None,
    gpus_per_worker: opt.GpusPerWorker = None,
    insecure: opt.Insecure = False,
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    device: opt.Device = "auto",
    precision: opt.Precision = "auto",
    refine: opt.Refine = False,
    _model_dir: opt.ModelDir = None,
    threads: opt.Threads = None,
    batch_size: opt.BatchSize = 0,
    jobs: opt.Jobs = 2,
    json: opt.Json = False,
    progress: opt.Progress = "auto",
    quiet: opt.Quiet = False,
) -> None:
    """Separate into MIX.NAME.wav for each prompt; the second equal prompt into MIX.NAME-2.wav, and so on.

    The prompts should name all sounds in the recording, not only the wanted ones: see --only.
    """
    given = locals()
    from clapsep_cli.files import is_there
    from clapsep_cli.query import Query

    if bool(prompts) == bool(task):
        raise UsageError("name the sounds in the recording: either --prompts NAME..., or --task")
    names = list(TASKS[task]) if task else list(prompts or ())
    if not inputs and (swallowed := [word for word in (*names, *(only or ())) if is_there(Path(word))]):
        raise UsageError(
            f"{swallowed[0]} was taken for a prompt: name recordings before the prompts, or after another option"
        )
    named = parts(names)
    unknown = set(only or ()) - {*named, *names}
    if unknown:
        raise UsageError(f"--only {min(unknown)}: is not one of the parts ({', '.join(named)})")
    chosen = [part for part, name in named.items() if {part, name} & set(only or ())]
    targets = {part: Query(pos=name) for part, name in named.items()}
    setup = opt.setup_of({**given, "model": model or DEFAULT})
    try:
        with opt.staging(scratch) as stage:
            options = opt.options_of({**given, "only": chosen}, stage)
            requests = [(item, targets) for item in find_recordings(inputs or [], recursive, options.out, stage)]
            run_requests(requests, options, setup, stage)
    except DownloadError as error:
        if model:
            raise
        instead = f"without a network, --model {BUNDLED} takes any words: --prompts {' '.join(names)}"
        raise DownloadError(f"{error}; {instead}") from error


def parts(names: Sequence[str]) -> dict[str, str]:
    """Name the part of each prompt: `speech`, `speech-2`. Returns the prompts by name.

    Raises `UsageError` for a name that another part has.
    """
    from clapsep_cli.jobs.inputs import folded
    from clapsep_cli.jobs.outputs import safe_name
    from clapsep_cli.jobs.requests import TAKEN

    found: dict[str, str] = {}
    for name in names:
        if folded(safe_name(name)) in TAKEN:
            raise UsageError(f"--prompts {name}: this name is reserved; choose another one")
        taken = set(map(folded, found))
        numbered = (safe_name(name) + (f"-{number}" if number > 1 else "") for number in count(1))
        found[next(part for part in numbered if folded(part) not in taken)] = name
    return found

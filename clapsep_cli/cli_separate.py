"""`clapsep separate`: a recording into as many parts as there are prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from clapsep_cli.cli_extract import carry_out, find
from clapsep_cli.cli_options import Common, takes
from clapsep_cli.errors import QueryError

PROMPTS = "Prompts"  # panel of --help
LISTS = ("--prompts", "--only")
DEFAULT = "tuss-medium"


class ListCommand(TyperCommand):
    """Lets `--prompts` and `--only` take all words up to the next option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, repeated(args))


def repeated(args: Sequence[str]) -> list[str]:
    """Each value of a list option with the option before it: `--prompts a b` becomes `--prompts a --prompts b`."""
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


@takes(Common)
def separate(
    common: Common,
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="MIX...", help="Recordings, folders, patterns, @list.txt; or - for a WAV from stdin."),
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts",
            metavar="NAME...",
            rich_help_panel=PROMPTS,
            help="All that there is; repeat equal sounds.",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="TASK",
            rich_help_panel=PROMPTS,
            help="Prompts by task: speech-enhancement, speech-separation, sound-events, music or cinematic.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME...", rich_help_panel=PROMPTS, help="Write only these of the parts."),
    ] = None,
    residual: Annotated[bool, typer.Option("--residual", help="Also write what the parts leave.")] = False,
    consistent: Annotated[
        bool, typer.Option("--consistent", help="Spread what the parts leave over them, so that they add up.")
    ] = False,
) -> None:
    """Separate into MIX.NAME.wav for each prompt; the second equal prompt into MIX.NAME-2.wav, and so on.

    The prompts should name all that is in the recording, not only what is wanted: see --only.
    """
    from clapsep_cli.planning import Destination
    from clapsep_cli.prompts import TASKS
    from clapsep_cli.query import Query

    if bool(prompts) == bool(task):
        raise QueryError("say what is in the recording: either --prompts NAME..., or --task")
    if task and task not in TASKS:
        raise QueryError(f"there is no task {task!r}; there are {', '.join(TASKS)}")
    names = list(TASKS[task]) if task else list(prompts or ())
    common = replace(common, model=common.model or DEFAULT)
    named = parts(names)
    targets = {part: Query(pos=name) for part, name in named.items()}
    chosen = [part for part, name in named.items() if {part, name} & set(only or ())]
    unknown = set(only or ()) - {*named, *names}
    if unknown:
        raise QueryError(f"--only {unknown.pop()}: is not among what is separated ({', '.join(named)})")
    destination = Destination(only=chosen, residual=residual)
    carry_out([(item, targets) for item in find(inputs, common)], common, destination, True, {"consistent": consistent})


def parts(names: Sequence[str]) -> dict[str, str]:
    """What the parts of a list of prompts are called: `speech`, `speech-2`, each with its prompt."""
    from clapsep_cli.outputs import safe_name

    seen: Counter[str] = Counter()
    found = {}
    for name in names:
        seen[name] += 1
        found[safe_name(name) + (f"-{seen[name]}" if seen[name] > 1 else "")] = name
    return found

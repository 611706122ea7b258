"""The command line: parses, makes one library call, prints, and sets the exit code."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperArgument
from typer.main import get_command

from clapsep_cli.cli.demo import demo
from clapsep_cli.cli.embed import embed
from clapsep_cli.cli.env import env
from clapsep_cli.cli.evaluate import evaluate
from clapsep_cli.cli.extract import extract
from clapsep_cli.cli.hear import hear
from clapsep_cli.cli.mixtures import mixtures
from clapsep_cli.cli.models import models
from clapsep_cli.cli.results import results
from clapsep_cli.cli.run import FAILED
from clapsep_cli.cli.separate import ListCommand, separate
from clapsep_cli.cli.terminal import note
from clapsep_cli.cli.train import train
from clapsep_cli.cli.ui import ui
from clapsep_cli.errors import ClapsepError, ModelError, forwarded_warnings
from clapsep_cli.startup import prepare, replace_closed_streams
from clapsep_cli.version import __version__

INTERRUPTED = 130
WIDE = 80  # columns; a narrower terminal gets plain help, as panels would truncate option names

app = typer.Typer(
    name="clapsep",
    no_args_is_help=True,
    rich_markup_mode="rich" if shutil.get_terminal_size().columns >= WIDE else None,
    pretty_exceptions_enable=False,
    help="Extract the sound you describe from a recording.",
    epilog='Example: clapsep extract mix.wav --pos "dog barking" --neg "rain"',
)

app.command()(extract)
app.command(cls=ListCommand)(separate)
app.command()(hear)
app.command()(results)
app.command()(ui)
app.command()(demo)
app.command()(train)
app.command()(evaluate)
app.command()(embed)
app.command()(env)
app.add_typer(mixtures, name="mixtures")
app.add_typer(models, name="models")


def run() -> NoReturn:
    """Run `main` as a process of its own. It exits at once: unloading torch would take half a second."""
    prepare()
    unprinted = replace_closed_streams()
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else FAILED
    if unprinted is not None and unprinted.getvalue():
        note("standard output is closed, so results could not be printed; use > /dev/null to discard them")
        code = code or FAILED
    try:
        sys.stdout.flush()
    except OSError:  # the output pipe was closed, or the disk is full
        code = code or FAILED
    with suppress(OSError):  # a lost note is no failure
        sys.stderr.flush()
    # All outputs are closed and renamed; only memory is left, which the system frees faster.
    os._exit(code)


def main() -> NoReturn:
    """Run the command. Errors are printed as one line on stderr, never as a traceback."""
    command = get_command(app)
    _simplify_help(command)
    try:
        with forwarded_warnings(note):
            command(standalone_mode=True)
    except ClapsepError as error:
        note(str(error))
        raise SystemExit(error.exit_code) from None
    except OSError as error:  # not handled elsewhere, e.g. a folder that cannot be written
        note(f"{error.filename or 'the system'}: {error.strerror or error}")
        raise SystemExit(FAILED) from None
    except ImportError as error:  # a library cannot be loaded: too little memory, or an incomplete installation
        note(f"{_first_line(error)}: is memory short, or a package missing?")
        raise SystemExit(ModelError.exit_code) from None
    except (MemoryError, RuntimeError, SystemError) as error:  # SystemError: of an incompletely imported library
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        note(f"out of memory ({_first_line(error)}): --jobs 1, --batch-size 1 and --model mini need the least")
        raise SystemExit(FAILED) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    raise SystemExit(0)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _simplify_help(command: Any) -> None:
    """Hide the type of flags and arguments in --help: `--overwrite <bool>` looks as if it took a value."""
    for parameter in command.get_params(command.context_class(command)):
        if isinstance(parameter, TyperArgument) or parameter.is_flag:
            parameter.display_type_rich = lambda ctx: None
    for nested in getattr(command, "commands", {}).values():
        _simplify_help(nested)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"clapsep {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    try:
        Path.cwd()
    except OSError as error:  # relative names would be undefined, and torch would end the process
        raise ClapsepError("the current folder was deleted; cd into another one") from error

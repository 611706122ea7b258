"""`clapsep models`: list, download, convert, check and remove models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from clapsep_cli.cli import options as opt
from clapsep_cli.cli.terminal import downloads, note, notes
from clapsep_cli.registry import MODELS

models = typer.Typer(no_args_is_help=True, help="List, download, convert, check and remove models.")

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", autocompletion=opt.completing(list(MODELS)), help="A name from `clapsep models list`."
    ),
]
Keep = Annotated[bool, opt.option(opt.RUN, "--keep-original", "Keep the downloaded files after conversion.")]


@models.command("list")
def list_models(
    as_json: Annotated[bool, opt.option(opt.RUN, "--json", "Print a JSON array instead.")] = False,
    _model_dir: opt.ModelDir = None,
) -> None:
    """List all models, with the folder of those that are installed."""
    from clapsep_cli.store.download import amount
    from clapsep_cli.store.library import facts, installed

    if as_json:
        typer.echo(json.dumps([facts(entry) for entry in MODELS.values()], indent=2))
        return
    for entry in MODELS.values():
        where = installed(entry) or f"not here; {amount(entry.download_bytes)} to download"
        typer.echo(f"{entry.name:13} {entry.about}\n{'':13} {where}")
        typer.echo(f"{'':13} takes: {', '.join(entry.takes)}; licence: {entry.licence}")


@models.command()
def download(
    name: Name, keep_original: Keep = False, quiet: opt.Quiet = False, _model_dir: opt.ModelDir = None
) -> None:
    """Download a model's pinned files, check and convert them."""
    from clapsep_cli.store.library import install

    with downloads(quiet) as progress:
        folder = install(name, keep_original=keep_original, say=notes(quiet), progress=progress)
    if not quiet:
        typer.echo(folder)


@models.command()
def convert(
    name: Name,
    files: Annotated[list[Path], opt.option(opt.INPUT, "--from FILE...", "The released files.")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="FILE", hidden=True)] = None,
    quiet: opt.Quiet = False,
    _model_dir: opt.ModelDir = None,
) -> None:
    """Convert released files that were downloaded elsewhere, for machines without a network."""
    from clapsep_cli.store.library import install

    # A parser gives an option one value: further files behind --from arrive as arguments.
    folder = install(name, [*files, *(more or [])], say=notes(quiet))
    if not quiet:
        typer.echo(folder)


@models.command()
def verify(name: Name, _model_dir: opt.ModelDir = None) -> None:
    """Check the hashes of a model's files, and of downloads that were kept."""
    from clapsep_cli.store.library import verify as verify_model

    for path in verify_model(name):
        typer.echo(f"{path}: intact")


@models.command()
def path(name: Name, _model_dir: opt.ModelDir = None) -> None:
    """Print the folder of an installed model."""
    from clapsep_cli.store.library import path_of

    typer.echo(path_of(name))


@models.command("rm")
def remove(name: Name, _model_dir: opt.ModelDir = None) -> None:
    """Delete a model, with everything left of its download and conversion."""
    from clapsep_cli.store.library import remove as remove_model

    for path in remove_model(name, note):
        typer.echo(f"{path}: removed")

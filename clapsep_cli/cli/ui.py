"""`clapsep ui`: opens a page in the browser to work by ear."""

from __future__ import annotations

import signal
import webbrowser
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from clapsep_cli.cli import options as opt
from clapsep_cli.cli.terminal import downloads, note
from clapsep_cli.errors import ExtraError, UsageError


def ui(
    mix: Annotated[Path | None, typer.Argument(metavar="[MIX]", help="A recording to open at once.")] = None,
    stream: opt.Stream = None,
    model: opt.Model = None,
    device: opt.Device = "auto",
    port: Annotated[
        int, opt.option(opt.RUN, "--port N", "Port to listen on; 0 takes any free one.", min=0, max=65535)
    ] = 0,
    no_browser: Annotated[bool, opt.option(opt.RUN, "--no-browser", "Only print the address.")] = False,
    _model_dir: opt.ModelDir = None,
) -> None:
    """Open a page in the browser: see a recording, mark sounds, extract, and compare by ear.

    The page and all sounds stay on this machine. Ctrl-C ends it, and removes results that were not downloaded.
    """
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ExtraError(f'clapsep ui needs {" and ".join(missing)}: pip install "clapsep[ui]"')
    if stream is not None and mix is None:
        raise UsageError("--stream chooses a sound track of MIX: name that, too, or choose on the page")
    from clapsep_cli.page.server import Page
    from clapsep_cli.page.session import Session
    from clapsep_cli.registry import MODELS
    from clapsep_cli.store.library import install

    if model in MODELS:
        with downloads(quiet=False) as progress:
            install(model, say=note, progress=progress)
    elif model is not None and not Path(model).is_dir():
        raise UsageError(f"no model {model!r}: name a folder with its files, or one of {', '.join(MODELS)}")
    # The server ends by the signal it was sent; raised as an exception, it lets the session tidy up.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    session = Session(model, device)
    try:
        if mix is not None:
            session.open(mix, str(mix), stream)
        with closing(Page(session, port)) as page:
            typer.echo(f"clapsep ui: {page.address}\nCtrl-C ends it.")
            if not no_browser:
                webbrowser.open(page.address)
            page.run()
    finally:
        session.close()
        signal.signal(signal.SIGTERM, before)

"""`clapsep embed`: embeds recordings and texts as queries are embedded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clapsep_cli.cli.terminal import (
    DeviceOption,
    ModelDirOption,
    ModelOption,
    QuietOption,
    downloads,
    notes,
    progress_bars,
)


def embed(
    files: Annotated[list[Path] | None, typer.Argument(metavar="[FILES]...", help="Recordings, folders.")] = None,
    texts: Annotated[list[str] | None, typer.Option("--text", metavar="TEXT", help="A text; repeatable.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.npz", help="The file to write.")] = Path(
        "embeddings.npz"
    ),
    model: ModelOption = None,
    device: DeviceOption = "auto",
    _model_dir: ModelDirOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Write embeddings of recordings and texts, for search, clustering and plots: `names` and `embeddings`.

    A folder stands for the recordings in it. Rows are unit vectors in one space, so products are cosines. NumPy reads
    the file: np.load("embeddings.npz")
    """
    if not files and not texts:
        raise typer.BadParameter("nothing to embed: name recordings, or texts with --text")
    import numpy as np

    from clapsep_cli.audio.sources import recordings
    from clapsep_cli.errors import OutputError
    from clapsep_cli.evaluation.evaluate import embedder_of
    from clapsep_cli.files import replacing
    from clapsep_cli.query import Query
    from clapsep_cli.store.library import load_model

    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists already; use --overwrite to replace it, or -o for another file")
    with downloads(quiet) as shown:
        loaded = load_model(model, device, "high", say=notes(quiet), progress=shown)
    asked = {
        **{str(file): Query(pos_audio=file) for given in files or () for file in recordings(given)},
        **{text: Query(text) for text in texts or ()},
    }
    loaded.check_taken(asked.values())
    embedder, rows = embedder_of(loaded), []
    embedder.embed_texts(texts or ())
    with progress_bars(quiet) as bars:
        task = bars.add_task(out.name, total=len(asked))
        for query in asked.values():
            rows.append(embedder.positive(query)[0].float().cpu().numpy())
            bars.advance(task)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary, temporary.open("wb") as file:
            np.savez(file, names=np.array(list(asked)), embeddings=np.stack(rows))
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror or error})") from error
    if not quiet:
        typer.echo(f"{out}: {len(rows)} embeddings of {len(rows[0])} numbers, by {loaded.name}")

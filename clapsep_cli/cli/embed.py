"""`clapsep embed`: embeds recordings and texts as queries are embedded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clapsep_cli.cli import options as opt
from clapsep_cli.cli.terminal import load_model, progress_bars

Files = Annotated[list[Path] | None, typer.Argument(metavar="[FILES]...", help="Recordings.")]
Words = Annotated[opt.Texts, opt.option(opt.INPUT, "--text TEXT", "A text; repeatable.")]
Out = Annotated[Path, opt.option(opt.OUTPUT, "--out -o FILE.npz", "The file to write.")]


def embed(
    files: Files = None,
    texts: Words = None,
    out: Out = Path("embeddings.npz"),
    model: opt.Model = None,
    device: opt.Device = "auto",
    _model_dir: opt.ModelDir = None,
    overwrite: opt.Overwrite = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write embeddings of recordings and texts, for search, clustering and plots: `names` and `embeddings`.

    Rows are unit vectors in one space, so products are cosines. NumPy reads the file: np.load("embeddings.npz")
    """
    if not files and not texts:
        raise typer.BadParameter("nothing to embed: name recordings, or texts with --text")
    import numpy as np

    from clapsep_cli.evaluation.evaluate import embedder_of
    from clapsep_cli.files import writing
    from clapsep_cli.query import Query

    opt.check_free(out, overwrite, ", or -o for another file")
    loaded = load_model(model, device, "high", quiet)
    asked = {
        **{str(file): Query(pos_audio=file) for file in files or ()},
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
    with writing(out) as temporary, temporary.open("wb") as file:
        np.savez(file, names=np.array(list(asked)), embeddings=np.stack(rows))
    if not quiet:
        typer.echo(f"{out}: {len(rows)} embeddings of {len(rows[0])} numbers, by {loaded.name}")

"""`clapsep demo`: extracts a dog from the rain, by words and by example, and measures both."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from clapsep_cli.cli import options as opt
from clapsep_cli.cli.extract import extract

Out = Annotated[Path, opt.option(opt.OUTPUT, "--out -o DIR", "Folder of the recordings.")]


def demo(out: Out = Path("clapsep-demo")) -> None:
    """Extract a dog from the rain with the bundled model, and measure the result against the clean dog."""
    import shutil

    from clapsep_cli.registry import examples_folder

    out.mkdir(parents=True, exist_ok=True)
    for name in ("mix.flac", "dog.flac", "another-dog.flac"):
        shutil.copy(examples_folder() / name, out / name)
    mix = out / "mix.flac"
    _run(mix, out / "by-text", pos=["dog barking"], neg=["rain"])
    _run(mix, out / "by-audio", query_audio=[out / "another-dog.flac"])


def _run(mix: Path, folder: Path, **query: Any) -> None:
    """Run `clapsep extract` on the example, and print the improvement of SDR and SI-SDR against the clean dog."""
    import soundfile

    from clapsep_cli.metrics import sdr, si_sdr

    options = [word for option, values in query.items() for word in (f"--{option.replace('_', '-')}", str(values[0]))]
    words = ["clapsep", "extract", str(mix), *options, "--model", "mini", "-o", str(folder), "--overwrite"]
    typer.echo(f"\n$ {shlex.join(words)}")
    extract(inputs=[str(mix)], model="mini", out=str(folder), overwrite=True, **query)
    files = (mix, mix.with_name("dog.flac"), folder / "mix.target.wav")
    mixture, dog, target = (soundfile.read(path, dtype="float32")[0] for path in files)
    for name, metric in (("SDRi", sdr), ("SI-SDRi", si_sdr)):
        typer.echo(f"  {name} against the clean dog: {metric(target, dog) - metric(mixture, dog):+.1f} dB")

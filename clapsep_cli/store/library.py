"""Finds, installs, checks and removes the models on this machine.

A bundled model lies in the package. Others are converted from downloaded files into a folder of `home()`, named after
the pinned files that it was made from, so a later pin never meets an older conversion.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clapsep_cli.errors import CheckpointError, ClapsepWarning, ModelError
from clapsep_cli.registry import BUNDLED, FAMILIES, MODELS, PREFERRED, SHORT, Entry, home, weights_folder
from clapsep_cli.store import download
from clapsep_cli.store.download import SUMS, Say, amount

if TYPE_CHECKING:  # it imports torch, which listing and finding models do not need
    from clapsep_cli.store.checkpoint import Model

FileProgress = Callable[[str, int, int], None]  # file, bytes done, bytes in all
_Sources = Mapping[str, Mapping[str, str]]  # by file name: its `sha256`, and the `source` of that


def ignore(*_: object) -> None:
    """Do nothing, as a callback."""


def _warn(line: str) -> None:
    warnings.warn(line, ClapsepWarning, stacklevel=3)


def entry_of(name: str) -> Entry:
    """Return the entry of that name. Raises `ModelError`."""
    if name not in MODELS:
        raise ModelError(f"no model {name!r}: there are {', '.join(MODELS)}")
    return MODELS[name]


def pin(entry: Entry) -> str:
    """Compute a short hash of all that an entry pins."""
    pinned = json.dumps([remote.pinned for remote in entry.remotes])
    return hashlib.sha256(pinned.encode()).hexdigest()[:SHORT]


def place(entry: Entry) -> Path:
    """Return the path of a model's folder, which may not exist."""
    return home() / "models" / f"{entry.name}-{pin(entry)}" if entry.remotes else weights_folder() / entry.name


def installed(entry: Entry) -> Path | None:
    """Return the model's folder; None if it is not installed. A folder gets its name once it is complete."""
    folder = place(entry)
    return folder if folder.is_dir() else None


def facts(entry: Entry) -> dict[str, object]:
    """Return all facts about a model in types that JSON has."""
    folder = installed(entry)
    here = {"here": folder is not None, "folder": folder and str(folder), "download_bytes": entry.download_bytes}
    return {**here, "takes": entry.takes, **asdict(entry)}


def best_installed() -> str:
    """Return the name of the best installed model."""
    return PREFERRED if installed(entry_of(PREFERRED)) else BUNDLED


def choices(given: str) -> list[dict[str, Any]]:
    """List all models: name, installed or not, kinds of queries; first the `given` one, if it is a folder."""
    known = [{"name": name, "here": installed(one) is not None, "takes": one.takes} for name, one in MODELS.items()]
    return known if given in MODELS else [{"name": given, "here": True, "takes": _taken_by(given)}, *known]


@cache
def _taken_by(folder: str) -> tuple[str, ...]:
    """Return the kinds of queries that the model in a folder takes. Raises `CheckpointError`."""
    from clapsep_cli.store.checkpoint import read_metadata

    return FAMILIES[read_metadata(Path(folder) / "separator.safetensors")["family"]].takes


def install(
    name: str,
    files: Sequence[Path] = (),
    keep_original: bool = False,
    say: Say = ignore,
    progress: FileProgress = ignore,
    instead: str = "",
) -> Path:
    """Install a model: download its files, or take the given ones, and convert them.

    Of two processes that install the same model, one waits for the other.

    Args:
        name: of the model.
        files: released files on this machine; none to download them.
        keep_original: keep downloads after conversion.
        say: called with messages: the size of a download before it begins, and warnings about files.
        progress: called during downloads with file, bytes done and bytes in all.
        instead: an alternative to the download, for that message.

    Returns:
        The model's folder.

    Raises:
        DownloadError: for a file that cannot be downloaded.
        CheckpointError: for a file that cannot be converted.
        ModelError: for an unknown model, and a folder that cannot be written.
    """
    entry = entry_of(name)
    if files and not entry.remotes:
        raise ModelError(f"{name} comes with clapsep: there is nothing to convert")
    here = installed(entry)
    if here:
        if files:
            say(f"{name} is here already, so the files were not read; to replace it: clapsep models rm {name}")
        return here
    with download.lock(entry.name, say):
        here = installed(entry)
        if here:  # by the process that this one waited for
            return here
        if files:
            return _convert(entry, files, _given(entry, files, say))
        size = sum(download.to_download(remote) for remote in entry.remotes)
        if size:
            say("; ".join(filter(None, (f"downloading {name}: {amount(size)}", f"licence: {entry.licence}", instead))))
        fetched = [download.fetch(remote, partial(progress, remote.name)) for remote in entry.remotes]
        sources = {file.path.name: {"sha256": file.sha256, "source": file.source} for file in fetched}
        folder = _convert(entry, [file.path for file in fetched], sources)
        if not keep_original:
            for remote in entry.remotes:
                download.clear(remote)
        return folder


def _given(entry: Entry, files: Sequence[Path], say: Say) -> _Sources:
    """Hash the given files; report those that are not the pinned ones to `say`."""
    pinned = {remote.sha256 for remote in entry.remotes}
    hashes = {file: download.digest(file) for file in files}
    for file, sha256 in hashes.items():
        if sha256 not in pinned:
            say(f"{file} is not the released file that is pinned here (SHA-256 {sha256})")
    return {
        file.name: {"sha256": sha256, "source": download.PINNED if sha256 in pinned else "given by hand"}
        for file, sha256 in hashes.items()
    }


def _convert(entry: Entry, files: Sequence[Path], sources: _Sources) -> Path:
    """Convert `files` into the model's folder; the caller holds the lock. Each part's metadata gets `sources`."""
    folder = place(entry)
    unfinished = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        unfinished.mkdir(parents=True)
        revision = ", ".join(remote.version for remote in entry.remotes)
        notes = {"revision": revision, "pin": pin(entry), "sources": json.dumps(sources)}
        converter(entry.family)(files, unfinished, **notes)
        write_tokenizer(entry, unfinished)
        download.write_sums(unfinished, {file.name: download.digest(file) for file in sorted(unfinished.iterdir())})
        unfinished.replace(folder)
    except OSError as error:
        raise ModelError(f"{folder}: the converted model cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def converter(family: str) -> Callable[..., None]:
    """Import the function that converts a family's released files: `convert_NAME` of the module `convert_NAME`."""
    convert: Callable[..., None] = getattr(import_module(f"clapsep_cli.store.convert_{family}"), f"convert_{family}")
    return convert


def write_tokenizer(entry: Entry, folder: Path) -> None:
    """Write the tokenizer of a released text encoder to `folder`; the package has it. Do nothing without one."""
    tokenizer = FAMILIES[entry.family].tokenizer
    if tokenizer:
        packed = weights_folder() / tokenizer
        (folder / "tokenizer.json").write_bytes(gzip.decompress(packed.read_bytes()))


def path_of(name: str) -> Path:
    """Return the folder of a model. Raises `ModelError` if it is not installed."""
    folder = installed(entry_of(name))
    if folder is None:
        raise ModelError(f"{name} is not here: clapsep models download {name}")
    return folder


def verify(name: str) -> list[Path]:
    """Check the hashes of an installed model's files, and of downloads that were kept; return these files.

    The hashes are compared with `SHA256SUMS` beside the files. Raises `CheckpointError`, `ModelError`.
    """
    entry, folder = entry_of(name), path_of(name)
    advice = "it comes with clapsep: install clapsep again"
    if entry.remotes:
        advice = f"clapsep models rm {name}, then clapsep models download {name}"
    sound = _check_sums(folder, [f"{part}.safetensors" for part in FAMILIES[entry.family].parts], advice)
    for remote in entry.remotes:
        original = download.find(remote)
        sound += _check_sums(original.parent, [remote.name], f"delete {original.parent}") if original else []
    return sound


def _check_sums(folder: Path, needed: Sequence[str], advice: str) -> list[Path]:
    """Return the files that `SHA256SUMS` of a folder names. Raises `CheckpointError` for a damaged or missing one."""
    try:
        sums = download.read_sums(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / SUMS}: cannot be read ({error}); {advice}") from error
    for name in dict.fromkeys((*needed, *sums)):
        if not (folder / name).is_file() or download.digest(folder / name) != sums.get(name):
            raise CheckpointError(f"{folder / name}: is not what {SUMS} in its folder says; {advice}")
    return [folder / name for name in sums]


def remove(name: str, say: Say = ignore) -> list[Path]:
    """Delete all versions of a model, converted, downloaded or unfinished; return the deleted files and folders.

    Files in the Hub's cache stay. Raises `ModelError` for a bundled model, and one that is not installed.
    """
    entry = entry_of(name)
    if not entry.remotes:
        raise ModelError(f"{name} comes with clapsep and cannot be removed")
    of_any_pin = re.compile(rf"\.?{re.escape(name)}-[0-9a-f]{{{SHORT}}}(\.partial)?")
    with download.lock(entry.name, say):
        models, texts = home() / "models", _text_cache(name)
        kept = sorted(p for p in models.iterdir() if of_any_pin.fullmatch(p.name)) if models.is_dir() else []
        kept += [texts] if texts and texts.is_dir() else []
        try:
            for folder in kept:
                shutil.rmtree(folder)
            removed = kept + [file for remote in entry.remotes for file in download.clear(remote)]
        except OSError as error:
            raise ModelError(f"{error.filename or home()}: cannot be deleted ({error.strerror or error})") from error
    if not removed:
        raise ModelError(f"there is nothing of {name} here: clapsep models list shows all models")
    return removed


def load_model(
    model: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    *,
    say: Say | None = None,
    progress: FileProgress = ignore,
) -> Model:
    """Load a model.

    Args:
        model: a name or a folder. By default `clapsep` if it is installed or can be downloaded, else the bundled
            `mini`.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: `high` (float32), `fast` (bfloat16), or `auto` (see `checkpoint.choose_precision`).
        say: called with each message, e.g. why `mini` is used; by default that is a `ClapsepWarning`.
        progress: called with file, bytes done and bytes in all of each download.

    Raises:
        ModelError: for an unknown model.
        DownloadError, CheckpointError: for files that cannot be downloaded or used.
        DeviceError: for an absent device.
    """
    from clapsep_cli.store.checkpoint import Model, choose_device, native_bfloat16

    chosen, warn, say = choose_device(device), say or _warn, say or ignore
    if precision == "fast" and not native_bfloat16(chosen):
        warn(f"--precision fast: bfloat16 is not known to be native to this {chosen.type}; high may be faster")
    if model is None:
        instead = f"without it: --model {BUNDLED}, smaller and bundled"
        try:
            folder = install(PREFERRED, say=say, progress=progress, instead=instead)
            return Model(PREFERRED, folder, chosen, _text_cache(PREFERRED), precision)
        except (ModelError, OSError) as error:
            warn(f"using the small bundled model, {BUNDLED} (--model {BUNDLED}), without {PREFERRED}: {error}")
            return Model(BUNDLED, place(MODELS[BUNDLED]), chosen, precision=precision)
    if isinstance(model, str) and model in MODELS:
        return Model(model, install(model, say=say, progress=progress), chosen, _text_cache(model), precision)
    folder = Path(model)
    if folder.is_dir():
        return Model(folder.resolve().name, folder, chosen, precision=precision)
    raise ModelError(f"no model {str(model)!r}: name a folder with its files, or one of {', '.join(MODELS)}")


def _text_cache(name: str) -> Path | None:
    """Return the folder for embeddings of texts; None for a model whose text encoder loads fast."""
    entry = MODELS[name]
    return home() / "texts" / pin(entry) if entry.remotes and "text" in FAMILIES[entry.family].parts else None

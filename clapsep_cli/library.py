"""The models on this machine: finding, getting, checking and removing them.

A bundled model lies in the package. Others are converted from downloaded files into a folder of `hub.home()`, named
after the pinned revisions that it was made from, so a later pin never meets an older conversion.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from clapsep_cli import hub
from clapsep_cli.errors import CheckpointError, DownloadError, ModelError
from clapsep_cli.registry import BUNDLED, FAMILIES, MODELS, PREFERRED, Entry, resolve, weights_folder

if TYPE_CHECKING:  # it imports torch, which listing and finding models do not need
    from clapsep_cli.checkpoint import Model

SHORT = 12  # digits of a hash that name a folder or a revision

Say = Callable[[str], None]  # is told, in a line, what the user should know
Progress = Callable[[str, int, int], None]  # file, bytes done, bytes in all


def _nothing(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Status:
    """A model and whether it is here. `folder` is None where it is not."""

    entry: Entry
    folder: Path | None

    def as_json(self) -> dict[str, object]:
        """Everything known of the model, in plain types."""
        return {
            "here": self.folder is not None,
            "folder": None if self.folder is None else str(self.folder),
            "download_bytes": self.entry.download_bytes,
            **asdict(self.entry),
        }


def find(name: str) -> Entry:
    """The entry of that name. Raises `ModelError`."""
    if name not in MODELS:
        raise ModelError(f"no model {name!r}: there are {', '.join(MODELS)}")
    return MODELS[name]


def pin(entry: Entry) -> str:
    """A short hash of all that an entry pins; for a bundled model, "bundled"."""
    if not entry.remotes:
        return "bundled"
    pinned = json.dumps([(r.repo, r.revision, r.path, r.size) for r in entry.remotes])
    return hashlib.sha256(pinned.encode()).hexdigest()[:SHORT]


def place(entry: Entry) -> Path:
    """Where the model's folder is, or would be."""
    return hub.home() / "models" / f"{entry.name}-{pin(entry)}" if entry.remotes else weights_folder() / entry.name


def installed(entry: Entry) -> Path | None:
    """The model's folder, if it is here. A folder gets its name only once it is complete."""
    folder = place(entry)
    return folder if folder.is_dir() else None


def statuses() -> list[Status]:
    """All models, and which of them are here."""
    return [Status(entry, installed(entry)) for entry in MODELS.values()]


def install(
    name: str,
    files: Sequence[Path] = (),
    keep_original: bool = False,
    say: Say = _nothing,
    progress: Progress = _nothing,
) -> Path:
    """Get a model: download its files, or take `files`, which somebody carried here, and convert them.

    Two processes may ask at once: one works, the other waits and finds it done. Downloaded originals are deleted after
    conversion unless `keep_original`. Raises `DownloadError`, `CheckpointError`, `ModelError`.
    """
    entry = find(name)
    here = installed(entry)
    if here:
        return here
    with hub.lock(entry.name, say):
        here = installed(entry)
        if here:  # by the process that this one waited for
            return here
        if files:
            hashes = {file.name: hub.digest(file) for file in files}
            pinned = {remote.sha256 for remote in entry.remotes}
            for unpinned in (file for file, sha256 in hashes.items() if sha256 not in pinned):
                say(f"{unpinned} is not the released file that is pinned here (SHA-256 {hashes[unpinned]})")
            return _convert(entry, files, hashes)
        size = sum(hub.to_download(remote) for remote in entry.remotes)
        if size:
            say(f"downloading {name}: {size / 1e9:.2f} GB; licence: {entry.licence}")
        fetched = [hub.fetch(remote, partial(progress, remote.path), say) for remote in entry.remotes]
        hashes = {file.path.name: file.sha256 for file in fetched}
        folder = _convert(entry, [file.path for file in fetched], hashes)
        if not keep_original:
            for original in fetched:
                hub.discard(original)
        return folder


def _convert(entry: Entry, files: Sequence[Path], hashes: dict[str, str]) -> Path:
    folder = place(entry)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        unfinished.mkdir(parents=True)
        notes = {"revision": _revision(entry), "pin": pin(entry), "sources": json.dumps(hashes)}
        resolve(FAMILIES[entry.family].convert)(files, unfinished, **notes)
        write_tokenizer(entry, unfinished)
        unfinished.replace(folder)
    except OSError as error:
        raise ModelError(f"{folder}: the converted model cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def write_tokenizer(entry: Entry, folder: Path) -> None:
    """Write the tokenizer of a released text encoder, which comes with the package, to `folder`."""
    packed = weights_folder() / FAMILIES[entry.family].tokenizer
    (folder / "tokenizer.json").write_bytes(gzip.decompress(packed.read_bytes()))


def _revision(entry: Entry) -> str:
    return ", ".join(f"{r.repo}@{r.revision[:SHORT]}" for r in entry.remotes)


def path_of(name: str) -> Path:
    """The folder of a model. Raises `ModelError` where it is not here."""
    folder = installed(find(name))
    if folder is None:
        raise ModelError(f"{name} is not here: clapsep models download {name}")
    return folder


def verify(name: str) -> Path:
    """Read every tensor of a model that is here, and build its networks. Raises `CheckpointError`, `ModelError`."""
    from clapsep_cli.checkpoint import PARTS, Model, choose_device, read_metadata

    entry, folder = find(name), path_of(name)
    again = f"clapsep models rm {name}, then download it again"
    model = Model(name, folder, choose_device("cpu"))
    for part in PARTS:
        if read_metadata(folder / f"{part}.safetensors").get("pin", "bundled") != pin(entry):
            raise CheckpointError(f"{folder}: its {part} is of another revision; {again}")
        network = getattr(model, part)
        for key, tensor in network.state_dict().items():
            if not bool(tensor.isfinite().all()):
                raise CheckpointError(f"{folder}: {part} {key} is not finite; {again}")
    return folder


def remove(name: str) -> Path:
    """Delete a converted model; its folder's former place. Raises `ModelError` for a bundled or absent one."""
    entry, folder = find(name), path_of(name)
    if not entry.remotes:
        raise ModelError(f"{name} comes with clapsep and cannot be removed")
    with hub.lock(entry.name):
        shutil.rmtree(folder)
    return folder


def load_model(
    model: str | Path | None = None, device: str = "auto", say: Say = _nothing, progress: Progress = _nothing
) -> Model:
    """Load a model by name or from a folder; without either, the best one that can be had.

    That is `clapsep` if it is here or can be downloaded, else the bundled `mini`, and `say` is told so. A model that is
    named loads or fails. `device`: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`. Raises `ModelError` where there is no such
    model, `DownloadError`, `CheckpointError` where files are not right, `DeviceError` where the device is not there.
    """
    from clapsep_cli.checkpoint import Model, choose_device

    chosen = choose_device(device)
    if model is None:
        try:
            return Model(PREFERRED, install(PREFERRED, say=say, progress=progress), chosen, _text_cache(PREFERRED))
        except DownloadError:
            say(
                f"using the small bundled model, {BUNDLED}: {PREFERRED} is not here and cannot be downloaded now; "
                f"to get it, or to see why not: clapsep models download {PREFERRED}"
            )
            return Model(BUNDLED, place(MODELS[BUNDLED]), chosen)
    if isinstance(model, str) and model in MODELS:
        return Model(model, install(model, say=say, progress=progress), chosen, _text_cache(model))
    folder = Path(model)
    if folder.is_dir():
        return Model(folder.resolve().name, folder, chosen)
    raise ModelError(f"no model {str(model)!r}: name a folder with its files, or one of {', '.join(MODELS)}")


def _text_cache(name: str) -> Path | None:
    """Where embeddings of texts are kept, for models whose text encoder takes long to load."""
    entry = MODELS[name]
    return hub.home() / "texts" / pin(entry) if entry.remotes else None

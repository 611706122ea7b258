"""Reads and writes files of tensors, each with notes, and copies a model's files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clapsep_cli.errors import CheckpointError, ModelError
from clapsep_cli.files import writing

PIECE_BYTES = 1 << 25  # of a file, mapped at a time


def save_tensors(tensors: Mapping[str, Tensor], path: Path, notes: Mapping[str, str]) -> None:
    """Write a file of tensors, completely or not at all.

    Args:
        tensors: the tensors by name.
        path: the file; its folder is created.
        notes: the file's metadata.

    Raises:
        ModelError: the file cannot be written.
    """
    with writing(path, ModelError) as temporary:
        mode = temporary.stat().st_mode  # as the umask has it; safetensors writes for the owner alone
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, dict(notes))
        except SafetensorError as error:
            raise OSError(f"{error}; is the disk full?") from error
        temporary.chmod(mode)


def copy(file: Path, place: Path) -> None:
    """Copy `file` to `place`, unless a copy is there already. Raises `ModelError`.

    A link to `file` is replaced by a copy, so that writing to one does not change the other.
    """
    if place.exists() and not place.samefile(file):
        return
    with writing(place, ModelError) as temporary:
        shutil.copyfile(file, temporary)


def read_notes(path: Path) -> dict[str, str]:
    """Read the metadata of a file of tensors. Raises `CheckpointError`."""
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file, memory-mapped. Raises `CheckpointError`.

    Each 32 MB have their own mapping, so that memory is freed piece by piece while tensors are converted.
    """
    tensors: dict[str, Tensor] = {}
    mapped = PIECE_BYTES
    try:
        with ExitStack() as stack:
            file = stack.enter_context(safe_open(path, "pt"))
            for name in list(file.keys()):
                if mapped >= PIECE_BYTES:
                    file, mapped = stack.enter_context(safe_open(path, "pt")), 0
                tensors[name] = file.get_tensor(name)
                mapped += tensors[name].nbytes
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    return tensors

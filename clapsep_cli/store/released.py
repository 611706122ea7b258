"""Reads released checkpoints and checks every tensor. The only file that opens pickles; it runs none of their code."""

from __future__ import annotations

import _codecs
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clapsep_cli.errors import CheckpointError
from clapsep_cli.store.checkpoint import save_part
from clapsep_cli.store.tensors import read_tensors

NESTINGS = ("state_dict", "model")  # keys under which a checkpoint may hold its tensors


class Released:
    """Returns the tensors of a released file by name and shape, and collects errors."""

    def __init__(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        self.what = what
        self.tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
        self.taken: set[str] = set()
        self.missing: list[str] = []
        self.misshapen: list[str] = []
        self.not_finite: list[str] = []

    def take(self, name: str, shape: torch.Size) -> Tensor:
        """Return tensor `name` as float32; a meta tensor if it is unusable."""
        self.taken.add(name)
        tensor = self.tensors.get(name)
        if tensor is None:
            self.missing.append(name)
        elif tensor.shape != shape:
            self.misshapen.append(f"{name} is {list(tensor.shape)} instead of {list(shape)}")
        elif not bool(tensor.isfinite().all()):
            self.not_finite.append(name)
        else:
            return tensor.float()
        return torch.empty(shape, device="meta")

    def check(self, superfluous: re.Pattern[str]) -> None:
        """Raise `CheckpointError` for missing, misshapen, infinite and unexpected tensors."""
        extra = [name for name in self.tensors if name not in self.taken and not superfluous.match(name)]
        problems = [
            f"{kind}: {first_few(names)}"
            for kind, names in (
                ("missing", self.missing),
                ("misshapen", self.misshapen),
                ("not finite", self.not_finite),
                ("unexpected", extra),
            )
            if names
        ]
        if problems:
            raise CheckpointError(f"the {self.what} checkpoint does not fit the network; {'; '.join(problems)}")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a PyTorch checkpoint by name, bare or nested under `state_dict` or `model`.

    They are mapped from the file. Only tensors, containers, numbers and the constructors of NumPy scalars are allowed.
    A pickle with anything else is refused, and none of its code is run. Raises `CheckpointError`.
    """
    scalar = np.float64(0).__reduce__()[0]
    scalars: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    allowed = [*scalars, np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.int64)), _codecs.encode]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual pickles, which are read or refused
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        asked = re.search(r"Unsupported global: GLOBAL ([\w.]+)", str(error))
        more = f" (it asks for {asked[1]})" if asked else ""
        raise CheckpointError(f"{path}: holds more than weights{more}; refused, and nothing of it was run") from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({reason})") from error
    for nesting in NESTINGS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(nesting), Mapping):
            loaded = loaded[nesting]
    tensors = dict(loaded) if isinstance(loaded, Mapping) else {}
    if not tensors or not all(isinstance(v, Tensor) and isinstance(k, str) for k, v in tensors.items()):
        raise CheckpointError(f"{path}: holds no tensors by name, neither bare nor under {' or '.join(NESTINGS)}")
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def write_part(folder: Path, part: str, family: str, config: Any, tensors: Mapping[str, Tensor], **notes: str) -> None:
    """Write a part, read it back and compare. The arguments are those of `save_part`.

    Raises:
        ModelError: the file cannot be written.
        CheckpointError: the file differs from the tensors.
    """
    save_part(folder, part, family, config, tensors, **notes)
    path = folder / f"{part}.safetensors"
    written = read_tensors(path)
    wrong = [name for name, tensor in tensors.items() if not torch.equal(written[name], tensor)]
    if wrong:
        raise CheckpointError(f"{path}: differs from the converted tensors ({first_few(wrong)}); is the disk faulty?")


def needed(module: torch.nn.Module) -> Iterator[tuple[str, torch.Size]]:
    """Yield names and shapes of the tensors that `module` needs."""
    for name, tensor in module.state_dict().items():
        if not name.endswith("num_batches_tracked"):  # unused with a fixed momentum
            yield name, tensor.shape


def first_few(names: Iterable[str], shown: int = 3) -> str:
    """List the first of `names`, and how many more there are."""
    listed = list(dict.fromkeys(names))
    return ", ".join(listed[:shown]) + (f" and {len(listed) - shown} more" if len(listed) > shown else "")

"""Models on disk: a folder of `separator`, `text` and `audio.safetensors`, and `tokenizer.json`, where there are such.

Each part's metadata names its family and holds the whole configuration. Parts are read when they are first needed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clapsep_cli.errors import CheckpointError, DeviceError, ModelError, QueryError, UsageError
from clapsep_cli.files import digest
from clapsep_cli.models.base import AudioEncoder, MaskSeparator, Separator, TextEncoder, go_on
from clapsep_cli.query import Query, mutual
from clapsep_cli.registry import FAMILIES, resolve
from clapsep_cli.store.texts import CachedTexts
from clapsep_cli.store.whole import save_whole

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PIECE_BYTES = 1 << 25  # of tensors that are mapped together


class Model:
    """A separator and its query encoders, ready for use on `device`. Get one from `load_model`.

    `text_cache` is a folder in which embeddings of texts are kept, if they are. `precision` decides the `dtype` of the
    separator's large products (`choose_precision`); queries are always embedded in float32.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        device: torch.device,
        text_cache: Path | None = None,
        precision: str = "auto",
    ) -> None:
        self.name, self.folder, self.device, self.text_cache = name, folder, device, text_cache
        metadata = read_metadata(folder / "separator.safetensors")
        self.family = metadata["family"]
        self.revision = metadata.get("revision", "")
        self.config = read_config(metadata, folder)
        self.dtype = choose_precision(precision, device, FAMILIES[self.family].near_in_bfloat16)

    @cached_property
    def separator(self) -> Separator:
        """The separator, in `dtype` on `device`; read when first used. Raises `CheckpointError`."""
        separator = cast(Separator, load_part(self.folder, "separator", self.family, self.config).to(self.device))
        if self.dtype != torch.float32:
            separator.lower(self.dtype)
        return separator

    @cached_property
    def text(self) -> TextEncoder:
        """What embeds texts, likewise; texts that were embedded before are not embedded anew. Raises `ModelError` where
        the family has none."""

        def load() -> TextEncoder:
            return cast(TextEncoder, load_part(self.folder, "text", self.family, self.config).to(self.device))

        return CachedTexts(load, self.text_cache, self.config.dim, self.device) if self.text_cache else load()

    @cached_property
    def audio(self) -> AudioEncoder:
        """What embeds recordings, likewise."""
        return cast(AudioEncoder, load_part(self.folder, "audio", self.family, self.config).to(self.device))

    @cached_property
    def identity(self) -> str:
        """What tells the separator's weights from all others: what they were converted from, or else their hash."""
        path = self.folder / "separator.safetensors"
        pin = read_metadata(path).get("pin")
        return f"{self.family} {pin or digest(path)}"

    @property
    def gains_by_refining(self) -> bool:
        """Whether two passes are worth their time, as far as was measured."""
        return FAMILIES[self.family].refine

    def refine(self) -> None:
        """Separate in two passes from now on (see `models.refined`), which takes more than twice the time.

        Raises `ModelError` for a model that does not take recordings as queries.
        """
        from clapsep_cli.models.refined import Refined

        if not FAMILIES[self.family].audio:
            raise ModelError(f"{self.name} takes no recordings as queries, so it cannot hear what a first pass left")
        refined = Refined(cast(MaskSeparator, self.separator), self.audio)
        self.__dict__.update(separator=refined, identity=f"{self.identity} refined")

    @property
    def precision(self) -> str:
        """The name of `dtype`, e.g. "float32"."""
        return str(self.dtype).removeprefix("torch.")

    def ask(self, queries: Sequence[Query], kept: Sequence[int] | None = None) -> Any:
        """What the separator is to be asked for, to get those of `queries` that are `kept`: by default all of them.

        Raises `QueryError` and `AudioError` where a query cannot be used.
        """
        return resolve(FAMILIES[self.family].ask)(self, queries, range(len(queries)) if kept is None else kept)

    def stream(self, wanted: Any, rate: int, channels: int) -> Any:
        """What joins the separator's results to the stems of a recording: a `stitch.windows.Stream` of the family."""
        return resolve(FAMILIES[self.family].stream)(self, wanted, rate, channels)

    def apart(self, targets: Mapping[str, Query]) -> Mapping[str, Query]:
        """The targets as they are to be asked for, so that each leaves what the others ask for.

        Raises `QueryError` where two ask for the same, which only a family that hears all at once can tell apart.
        """
        if FAMILIES[self.family].as_set:
            return targets
        names = list(targets)
        for position, name in enumerate(names):
            twin = next((other for other in names[:position] if targets[other] == targets[name]), None)
            if twin is not None:
                raise QueryError(f"{twin} and {name} ask {self.name} for the same sound: name it once")
        return mutual(targets)

    def doubts(self, queries: Sequence[Query]) -> list[str]:
        """Why `queries` may go wrong with this model, though they can be asked: a line for each reason."""
        tell = FAMILIES[self.family].doubts
        return cast("list[str]", resolve(tell)(self, queries)) if tell else []

    @property
    def tells_likeness(self) -> bool:
        """Whether `likeness` tells anything."""
        return bool(FAMILIES[self.family].likeness)

    def likeness(self, wanted: Any, stem: int, mono: NDArray[np.float32], rate: int) -> float | None:
        """The cosine of a recording (`[samples]` at `rate` Hz) to what a stem is asked for, if that can be told."""
        tell = FAMILIES[self.family].likeness
        return cast("float | None", resolve(tell)(self, wanted, stem, mono, rate)) if tell else None

    @torch.inference_mode()
    def infer(self, windows: Sequence[Tensor], wanted: Any, check: Callable[[], None] = go_on) -> Tensor:
        """Have windows (float32 `[window]` each) separated in one go; the results along the first axis.

        `check` raises where the user wants to stop (`Separator.infer`).
        """
        return self.separator.infer(torch.stack(list(windows)), wanted, check)


def load_part(folder: Path, part: str, family: str, config: Any) -> Any:
    """A network of a model, from `folder`, on the CPU, in eval mode. Raises `CheckpointError`, `ModelError`."""
    if part not in FAMILIES[family].parts:
        raise ModelError(f"{folder.name}: models of family {family!r} take no {part} queries; use another --model")
    path = folder / f"{part}.safetensors"
    tensors = read_tensors(path)
    arguments = [config, *([_tokenizer(folder / "tokenizer.json")] if part == "text" else [])]
    try:
        with torch.device("meta"):  # the weights come from the file: do not fill them twice
            module = resolve(getattr(FAMILIES[family], part))(*arguments)
        # Weights are stored as float16 where that is enough, and always computed with as float32.
        module.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, assign=True)
    except (RuntimeError, ValueError) as error:
        first = "; ".join(line.strip() for line in str(error).splitlines()[1:3]) or str(error)
        raise CheckpointError(f"{path}: is not a {part} of family {family!r} ({first})") from error
    return module.eval()


def _tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path}: cannot be read as a tokenizer ({error})") from error


def choose_device(name: str) -> torch.device:
    """The device asked for; `auto` prefers CUDA, then Apple's MPS. Raises `DeviceError`."""
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"no device {name!r}: use auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise DeviceError(f"device {name!r} is not there: PyTorch sees {count} CUDA devices; use -d auto or -d cpu")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device 'mps' is not there: PyTorch sees no Apple GPU; use -d auto or -d cpu")
    elif device.type not in ("cpu", "mps"):
        raise DeviceError(f"no device {name!r}: use auto, cpu, cuda, cuda:N or mps")
    return device


def choose_precision(name: str, device: torch.device, near: bool = True) -> torch.dtype:
    """`high` is float32 and `fast` bfloat16; `auto` is fast where the device computes natively in bfloat16, and the
    model's output is so `near` to that in float32 that nobody hears it.

    Raises `UsageError` for another name.
    """
    if name not in ("auto", "high", "fast"):
        raise UsageError(f"no precision {name!r}: use auto, high or fast")
    fast = name == "fast" or (name == "auto" and near and native_bfloat16(device))
    return torch.bfloat16 if fast else torch.float32


def native_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware. Elsewhere it works, and is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def save_part(
    folder: Path, part: str, family: str, config: DataclassInstance, tensors: Mapping[str, Tensor], **notes: str
) -> None:
    """Write one part of a model, atomically. `notes` go into the file's metadata. Raises `ModelError`."""
    metadata = {"family": family, "config": json.dumps(dataclasses.asdict(config)), **notes}
    save_whole(tensors, folder / f"{part}.safetensors", metadata)


def read_metadata(path: Path) -> dict[str, str]:
    """A part's metadata. Raises `CheckpointError` unless it names a known family and holds a configuration."""
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as a part of a model ({error})") from error
    if metadata.get("family") not in FAMILIES or "config" not in metadata:
        raise CheckpointError(f"{path}: is not of a model family known here ({', '.join(FAMILIES)})")
    return metadata


def read_config(metadata: Mapping[str, str], folder: Path) -> Any:
    """The frozen configuration of the family's own class. Raises `CheckpointError` where it does not fit."""
    try:
        values = json.loads(metadata["config"])
        arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return resolve(FAMILIES[metadata["family"]].config)(**arguments)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: has a configuration that is not understood here ({error})") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a part, mapped from the file. Raises `CheckpointError`.

    Every 32 MB are mapped by themselves, and so leave memory as soon as none of their tensors lies in the file any
    more: when they are converted, say.
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

"""Reads and writes models on disk: a folder of `separator`, `text` and `audio.safetensors` and `tokenizer.json`.

A folder holds the parts that its family has. The metadata of each part names the family and holds the whole
configuration. Parts are read when they are first needed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clapsep_cli.errors import CheckpointError, DeviceError, ModelError, QueryError, UsageError
from clapsep_cli.families.base import load_family
from clapsep_cli.files import digest, replacing
from clapsep_cli.models.base import AudioEncoder, MaskSeparator, Separator, TextEncoder, go_on
from clapsep_cli.query import Query, check_taken, mutual
from clapsep_cli.registry import FAMILIES
from clapsep_cli.startup import one_thread
from clapsep_cli.stitch.windows import Stream
from clapsep_cli.store.tensors import read_notes, read_tensors, save_tensors

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class Model:
    """A separator and its query encoders, ready for use. Get one from `load_model`.

    Args:
        name: the name in messages.
        folder: the folder of its files.
        device: where its networks compute.
        text_cache: folder in which embeddings of texts are kept; None to keep none.
        precision: decides the `dtype` of the separator's large products (`choose_precision`); queries are always
            embedded in float32.

    Raises:
        CheckpointError: for a folder that holds no model of a known family.
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
        self.kind = load_family(self.family)
        self.revision = metadata.get("revision", "")
        self.config = read_config(metadata, folder)
        self.dtype = choose_precision(precision, device, self.kind.near_in_bfloat16)

    refined = False  # True if it separates in two passes

    def __repr__(self) -> str:
        revision = f" ({self.revision})" if self.revision else ""
        takes = ", ".join(FAMILIES[self.family].takes) if self.family in FAMILIES else "queries"
        passes = ", two passes" if self.refined else ""
        return f"<Model {self.name}{revision} on {self.device}, {self.precision}{passes}; takes {takes}>"

    @cached_property
    def separator(self) -> Separator[Any]:
        """The separator in `dtype` on `device`, for inference, read when first used. Raises `CheckpointError`."""
        if isinstance(texts := self.__dict__.get("text"), CachedTexts):
            texts.release()  # the queries are embedded: the two are rarely needed at once
        separator: Separator[Any] = load_part(self.folder, "separator", self.family, self.config).to(self.device)
        separator.fuse()
        if self.dtype != torch.float32:
            separator.lower(self.dtype)
        return self._refined(separator) if self.refined else separator

    def _refined(self, separator: Separator[Any]) -> Separator[Any]:
        from clapsep_cli.models.refined import Refined

        return Refined(cast(MaskSeparator, separator), self.audio)

    @cached_property
    def text(self) -> TextEncoder:
        """The text encoder on `device`, read when first used; embeddings of earlier texts come from the disk.

        Raises `ModelError` if the family has none.
        """

        def load() -> TextEncoder:
            return cast(TextEncoder, load_part(self.folder, "text", self.family, self.config).to(self.device))

        return CachedTexts(load, self.text_cache, self.config.dim, self.device) if self.text_cache else load()

    @cached_property
    def audio(self) -> AudioEncoder:
        """The audio encoder on `device`, read when first used. Raises `ModelError` if the family has none."""
        return cast(AudioEncoder, load_part(self.folder, "audio", self.family, self.config).to(self.device))

    @cached_property
    def identity(self) -> str:
        """Identity of the separator's weights: the files they were converted from, or else their hash."""
        path = self.folder / "separator.safetensors"
        pin = read_metadata(path).get("pin")
        return f"{self.family} {pin or digest(path)}"

    def refine(self, wanted: bool = True) -> None:
        """Separate in two passes from now on (see `models.refined`). This takes more than twice the time.

        `wanted`: False changes nothing. Raises `ModelError` for a model that takes no recordings as queries.
        """
        if self.refined or not wanted:
            return
        if self.kind.audio is None:
            raise ModelError(f"{self.name} takes no recordings as queries, so it cannot refine: leave out --refine")
        self.refined = True
        self.__dict__["identity"] = f"{self.identity} refined"
        if "separator" in self.__dict__:  # read already
            self.__dict__["separator"] = self._refined(self.separator)

    @property
    def takes(self) -> tuple[str, ...]:
        """Kinds of queries it takes (see `registry.Traits`)."""
        return FAMILIES[self.family].takes

    @property
    def precision(self) -> str:
        """Name of `dtype`, e.g. "float32"."""
        return str(self.dtype).removeprefix("torch.")

    def ask(self, queries: Sequence[Query], kept: Sequence[int] | None = None) -> Any:
        """Turn queries into the input of the separator.

        Args:
            queries: the queries, of all targets.
            kept: positions of the queries that become stems; None for all.

        Returns:
            The input `wanted` of `infer` and `stream`; each family has its own type.

        Raises:
            QueryError, AudioError: for a query that cannot be used.
        """
        self.check_taken(queries)
        with one_thread():
            return self.kind.ask(self, queries, range(len(queries)) if kept is None else kept)

    def check_taken(self, queries: Iterable[Query]) -> None:
        """Raise `QueryError` for a query of a kind that this model does not take."""
        check_taken(queries, self.takes, self.name)

    def stream(self, wanted: Any, rate: int, channels: int) -> Stream:
        """Make the stream that joins the separator's results to the stems of a recording.

        Args:
            wanted: from `ask`.
            rate: sample rate of the recording in Hz.
            channels: number of channels of the recording.
        """
        return self.kind.stream(self.separator, wanted, rate, channels, self.device)

    def apart(self, targets: Mapping[str, Query]) -> Mapping[str, Query]:
        """Add to each target the others as negative queries, where the family takes them so.

        Raises `QueryError` if two targets have the same query: each would be its own negative.
        """
        if not self.kind.mutual:
            return targets
        names = list(targets)
        for position, name in enumerate(names):
            twin = next((other for other in names[:position] if targets[other] == targets[name]), None)
            if twin is not None:
                raise QueryError(f"{twin} and {name} ask {self.name} for the same sound: name it once")
        return mutual(targets)

    def doubts(self, queries: Sequence[Query]) -> list[str]:
        """Return a line for each reason why results for `queries` may be poor.

        Raises `QueryError` for queries that `ask` refuses, as far as that needs no network.
        """
        self.check_taken(queries)
        return self.kind.doubts(self, queries) if self.kind.doubts else []

    @property
    def tells_likeness(self) -> bool:
        """True if `likeness` returns numbers."""
        return self.kind.likeness is not None

    def likeness(
        self, wanted: Any, stem: int, rate: int, mono: NDArray[np.float32], *, moment: bool = False
    ) -> float | None:
        """Compare a recording with the query of a stem.

        Args:
            wanted: from `ask`.
            stem: number of the stem.
            rate: sample rate of the recording in Hz.
            mono: the recording, float32 `[samples]`.
            moment: compare its most alike moment, where the model can tell moments; else the whole.

        Returns:
            A cosine; None if the family has no such measure.
        """
        return self.kind.likeness(self, wanted, stem, rate, mono, moment) if self.kind.likeness else None

    @torch.inference_mode()
    def infer(self, windows: Sequence[Tensor], wanted: Any, check: Callable[[], None] = go_on) -> Tensor:
        """Separate windows of one length as one batch.

        Args:
            windows: float32 `[samples]` each.
            wanted: from `ask`.
            check: raises where the user wants to stop.

        Returns:
            The results, along the first axis.
        """
        return self.separator.infer(torch.stack(list(windows)), wanted, check)


class CachedTexts(TextEncoder):
    """Embeds texts, and keeps the embeddings on disk, so that a repeated query needs no text encoder.

    Args:
        load: returns the encoder; called when first needed, as it takes longer than embedding many texts.
        folder: holds a small file for each text, for one version of one model; if it is read-only, nothing is kept.
        dim: length of an embedding.
        device: where embeddings are returned.
    """

    def __init__(self, load: Callable[[], TextEncoder], folder: Path, dim: int, device: torch.device) -> None:
        super().__init__()
        self.load, self.folder, self.dim, self.device = load, folder, dim, device

    @cached_property
    def encoder(self) -> TextEncoder:
        """Encoder of texts that are not in the folder."""
        return self.load()

    def release(self) -> None:
        """Free the encoder's memory; it is loaded again when needed."""
        self.__dict__.pop("encoder", None)

    def embed(self, texts: Sequence[str]) -> Tensor:
        known = {text: found for text in texts if (found := self._read(text)) is not None}
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        if missing:
            for text, row in zip(missing, self.encoder.embed(missing), strict=True):
                known[text] = row
                with suppress(OSError):
                    self.folder.mkdir(parents=True, exist_ok=True)
                    with replacing(self._path(text)) as partial:
                        partial.write_bytes(row.cpu().numpy().astype("<f4").tobytes())
        return torch.stack([known[text].to(self.device) for text in texts])

    def _path(self, text: str) -> Path:
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.f32"

    def _read(self, text: str) -> Tensor | None:
        try:
            values = np.frombuffer(self._path(text).read_bytes(), "<f4").astype(np.float32)
        except (OSError, ValueError):
            return None
        # A whole embedding has length 1; anything else was cut short or is not ours.
        return torch.from_numpy(values) if len(values) == self.dim and abs(values @ values - 1) < 1e-3 else None


def load_part(folder: Path, part: str, family: str, config: Any) -> Any:
    """Load a network of a model.

    Args:
        folder: the model's folder.
        part: "separator", "text" or "audio".
        family: name of the family.
        config: the family's configuration, from `read_config`.

    Returns:
        The network, on the CPU, in eval mode.

    Raises:
        ModelError: where the family has no such part.
        CheckpointError: for a file that cannot be read or does not fit.
    """
    make = getattr(load_family(family), part)
    if make is None:
        raise ModelError(f"{folder.name}: models of family {family!r} take no {part} queries; use another --model")
    path = folder / f"{part}.safetensors"
    tensors = read_tensors(path)
    arguments = [config, *([_tokenizer(folder / "tokenizer.json")] if part == "text" else [])]
    try:
        with torch.device("meta"):  # the weights come from the file: do not fill them twice
            module = make(*arguments)
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
    """Return the device called `name`; `auto` prefers CUDA, then Apple's MPS. Raises `DeviceError`."""
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
    except RuntimeError as error:
        raise DeviceError(f"no device {name!r}: use auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise DeviceError(f"device {name!r} is not there: PyTorch sees {count} CUDA devices; use -d auto or -d cpu")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device 'mps' is not there: PyTorch sees no Apple GPU; use -d auto or -d cpu")
    return device


def choose_precision(name: str, device: torch.device, near: bool = True) -> torch.dtype:
    """Return the dtype of a separator's large products.

    Args:
        name: "high" for float32, "fast" for bfloat16, or "auto": fast where that is native to the device and `near`.
        device: where they are computed.
        near: True if no difference can be heard between the model's outputs in bfloat16 and float32.

    Raises:
        UsageError: for another name.
    """
    if name not in ("auto", "high", "fast"):
        raise UsageError(f"no precision {name!r}: use auto, high or fast")
    fast = name == "fast" or (name == "auto" and near and native_bfloat16(device))
    return torch.bfloat16 if fast else torch.float32


def native_bfloat16(device: torch.device) -> bool:
    """Return True if `device` multiplies bfloat16 matrices in hardware. Elsewhere they are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def save_part(
    folder: Path, part: str, family: str, config: DataclassInstance, tensors: Mapping[str, Tensor], **notes: str
) -> None:
    """Write one part of a model, completely or not at all.

    Args:
        folder: the model's folder.
        part: "separator", "text" or "audio".
        family: name of the family.
        config: the family's configuration, a dataclass.
        tensors: the weights by name.
        **notes: more for the file's metadata.

    Raises:
        ModelError: where the file cannot be written.
    """
    metadata = {"family": family, "config": json.dumps(dataclasses.asdict(config)), **notes}
    save_tensors(tensors, folder / f"{part}.safetensors", metadata)


def read_metadata(path: Path) -> dict[str, str]:
    """Read a part's metadata. Raises `CheckpointError` unless it names a known family and holds a configuration."""
    metadata = read_notes(path)
    if metadata.get("family") not in FAMILIES or "config" not in metadata:
        raise CheckpointError(f"{path}: is not of a model family known here ({', '.join(FAMILIES)})")
    return metadata


def read_config(metadata: Mapping[str, str], folder: Path) -> Any:
    """Read the configuration, of the family's own class. Raises `CheckpointError` where it does not fit."""
    try:
        values = json.loads(metadata["config"])
        arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return load_family(metadata["family"]).config(**arguments)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: has a configuration that is not understood here ({error})") from error

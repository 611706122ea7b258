"""Converts the released AudioSep checkpoint to our separator and text tower, strictly."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from clapsep_cli.errors import CheckpointError
from clapsep_cli.models.audiosep import AudioSep, AudioSepConfig
from clapsep_cli.store.convert_clapsep import convert_text
from clapsep_cli.store.released import Released, first_few, needed, read_checkpoint, write_part

SEPARATOR, CLAP = "ss_model.", "query_encoder.model."

# Tensors of the released file that are not used, or computed here.
_SUPERFLUOUS = re.compile(
    r"base\.i?stft\.|base\.decoder_block\d+\.bn2\.|film\.decoder_block\d+->beta2\.|.*num_batches_tracked$"
)
_SUPERFLUOUS_CLAP = re.compile(
    r"logit_scale_[at]$|(text|audio)_transform\.|audio_(branch|projection)\.|text_branch\.embeddings\.position_ids$"
)
_TOP = {"norm": "base.bn0", "stem": "base.pre_conv", "head": "base.after_conv"}


def convert_audiosep(files: Sequence[Path], folder: Path, config: AudioSepConfig | None = None, **notes: str) -> None:
    """Write the parts of an AudioSep model to `folder`, from its one released file.

    `config` is the released size by default. `notes` go into the metadata of every part. What was written is read back
    and compared. Raises `CheckpointError`.
    """
    if len(files) != 1:
        raise CheckpointError(f"an AudioSep model takes one checkpoint, not {len(files)}")
    config = config or AudioSepConfig()
    for part, tensors in convert(read_checkpoint(files[0]), config).items():
        write_part(folder, part, "audiosep", config, tensors, **notes)


def convert(tensors: Mapping[str, Tensor], config: AudioSepConfig) -> dict[str, dict[str, Tensor]]:
    """Convert the released tensors to state dicts of `AudioSep` ("separator") and `ClapTextEncoder` ("text"), float32.

    Raises `CheckpointError` for missing and unexpected tensors, and those of another shape than `config` has.
    """
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    foreign = [name for name in tensors if not name.startswith((SEPARATOR, CLAP))]
    if foreign:
        raise CheckpointError(f"the AudioSep checkpoint does not fit the network; unexpected: {first_few(foreign)}")
    clap = _below(CLAP, tensors)
    text = convert_text(clap, config)
    clap.check(_SUPERFLUOUS_CLAP)
    return {"separator": convert_separator(tensors, config), "text": text}


def convert_separator(tensors: Mapping[str, Tensor], config: AudioSepConfig) -> dict[str, Tensor]:
    """Convert the separator alone; tensors of CLAP are ignored. Raises `CheckpointError`."""
    released = _below(SEPARATOR, tensors)
    with torch.device("meta"):
        network = AudioSep(config)
    state = {name: released.take(_released(name), shape) for name, shape in needed(network)}
    released.check(_SUPERFLUOUS)
    return state


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> Released:
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return Released({SEPARATOR: "AudioSep", CLAP: "CLAP of the AudioSep"}[prefix], own)


def _released(name: str) -> str:
    """Return the released name of our tensor `name`, without `ss_model.`."""
    part, *inner, leaf = name.split(".")
    if part in _TOP:
        return f"{_TOP[part]}.{leaf}"
    if part == "bottleneck":
        path = ["conv_block7a", "conv_block1"]
    else:
        number, *inner = inner
        path = [f"{part.removesuffix('s')}_block{int(number) + 1}"]
        if inner[0] == "block":
            path.append({"encoders": "conv_block1", "decoders": "conv_block2"}[part])
            inner = inner[1:]
    layer = re.sub(r"^norm(\d?)$", lambda found: f"bn{found[1] or 1}", inner[0]).replace("enlarge", "conv1")
    if inner[1:] == ["beta"]:
        return f"film.{'->'.join([*path, layer.replace('bn', 'beta')])}.{leaf}"
    return f"base.{'.'.join([*path, layer])}.{leaf}"

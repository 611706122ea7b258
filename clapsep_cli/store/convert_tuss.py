"""Converts a released TUSS checkpoint to our separator, strictly."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clapsep_cli.errors import CheckpointError
from clapsep_cli.models.locoformer import BASE
from clapsep_cli.models.tuss import BANDS, LARGE, MEDIUM, TussConfig
from clapsep_cli.store.released import Released, first_few, read_checkpoint, write_part

PREFIX = "model."
ROTARY = re.compile(r"separator\.(cross_prompt|cond_tse)_module\.\d+\.(freq|frame)_path\.attn\.rope\.freqs$")
_STACKS = {"cross": "separator.cross_prompt_module", "conditional": "separator.cond_tse_module"}
_PATHS = {"bands": "freq_path", "frames": "frame_path"}
_FEED_FORWARD = {"first": 1, "last": 0}  # released: number 1 comes before the attention
_BANDS = "separator.band_split_module"


class _Part(NamedTuple):
    """Rule for one tensor: made by `make` from the `released` ones, all of one shape."""

    name: str
    released: Sequence[str]
    shape: tuple[int, ...]
    make: Callable[[list[Tensor]], Tensor]


def convert_tuss(files: Sequence[Path], folder: Path, config: TussConfig | None = None, **notes: str) -> None:
    """Write `separator.safetensors` of a TUSS to `folder`, from its one released file.

    `config` is medium or large by default, whichever the file is. `notes` go into the metadata. What was written is
    read back and compared. Raises `CheckpointError`.
    """
    if len(files) != 1:
        raise CheckpointError(f"a TUSS model takes one checkpoint, not {len(files)}")
    tensors = read_checkpoint(files[0])
    config = config or released_size(tensors)
    write_part(folder, "separator", "tuss", config, convert(tensors, config), **notes)


def released_size(tensors: Mapping[str, Tensor]) -> TussConfig:
    """Return the size of a released checkpoint, medium or large. Raises `CheckpointError`."""
    start = tensors.get(f"{PREFIX}separator.sos_token")
    width = start.shape[0] if start is not None and start.dim() else 0
    for config in (MEDIUM, LARGE):
        if config.width == width:
            return config
    raise CheckpointError(f"not a released TUSS checkpoint: it has no {PREFIX}separator.sos_token of 64 or 128 numbers")


def convert(tensors: Mapping[str, Tensor], config: TussConfig) -> dict[str, Tensor]:
    """Convert the tensors of a released file to a state dict of `Tuss`, float32.

    Raises `CheckpointError`, naming the first few, for tensors that are missing, unexpected or not of the shape that
    `config` has, and for rotary frequencies (which are computed, not kept) other than those computed here.
    """
    foreign = [name for name in tensors if not name.startswith(PREFIX)]
    if foreign:
        raise CheckpointError(f"the TUSS checkpoint does not fit the network; unexpected: {first_few(foreign)}")
    released = Released("TUSS", {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()})
    taken = [(part, [released.take(name, torch.Size(part.shape)) for name in part.released]) for part in _parts(config)]
    released.check(ROTARY)
    strange = [name for name, tensor in released.tensors.items() if ROTARY.match(name) and not _usual(tensor)]
    if strange:
        raise CheckpointError(f"the TUSS checkpoint has rotary frequencies of its own: {first_few(strange)}")
    return {part.name: part.make(sources).contiguous() for part, sources in taken}


def _usual(frequencies: Tensor) -> bool:
    count = frequencies.numel()
    expected = BASE ** (-torch.arange(count).double() / max(1, count))
    return frequencies.dim() == 1 and bool(torch.allclose(frequencies.double(), expected, rtol=1e-5, atol=0))


def _parts(config: TussConfig) -> Iterator[_Part]:
    width = config.width
    names = [f"separator.prompts.{prompt}" for prompt in config.prompts]
    yield _Part("prompts", names, (width, 1, 1), lambda tensors: torch.stack(tensors).flatten(1))
    yield _Part("start", ["separator.sos_token"], (width, 1, 1), lambda tensors: tensors[0].flatten())
    sizes = {
        "cross": (config.cross_blocks, config.cross_attention, config.cross_feed_forward, config.cross_kernels),
        "conditional": (
            config.conditional_blocks,
            config.conditional_attention,
            config.conditional_feed_forward,
            config.conditional_kernels,
        ),
    }
    for stack, (blocks, attention, feed_forward, kernels) in sizes.items():
        for block in range(blocks):
            for path, kernel in zip(_PATHS, kernels, strict=True):
                ours, theirs = f"{stack}.blocks.{block}.{path}", f"{_STACKS[stack]}.{block}.{_PATHS[path]}"
                yield from _path(ours, theirs, width, attention, feed_forward, kernel)
    yield from _bands(width)


def _path(ours: str, theirs: str, width: int, attention: int, feed_forward: int, kernel: int) -> Iterator[_Part]:
    for layer, number in _FEED_FORWARD.items():
        expand, contract = f"{theirs}.ffn.{number}.conv1d", f"{theirs}.ffn.{number}.deconv1d"
        yield _same(f"{ours}.{layer}.norm.gamma", f"{theirs}.ffn_norm.{number}.gamma", (width,))
        yield _Part(
            f"{ours}.{layer}.expand.weight",
            [f"{expand}.weight"],
            (2 * feed_forward, width, kernel),
            lambda tensors: tensors[0].transpose(1, 2),
        )
        yield _same(f"{ours}.{layer}.expand.bias", f"{expand}.bias", (2 * feed_forward,))
        # A transposed convolution, of which only the middle is kept, is a convolution with the kernel turned round.
        yield _Part(
            f"{ours}.{layer}.contract.weight",
            [f"{contract}.weight"],
            (feed_forward, width, kernel),
            lambda tensors: tensors[0].permute(1, 2, 0).flip(1),
        )
        yield _same(f"{ours}.{layer}.contract.bias", f"{contract}.bias", (width,))
    yield _same(f"{ours}.attention.norm.gamma", f"{theirs}.attn_norm.gamma", (width,))
    for layer, name, shape in (
        ("qkv", "qkv", (3 * attention, width)),
        ("out", "aggregate_heads.0", (width, attention)),
    ):
        source = f"{theirs}.attn.{name}.weight"
        yield _Part(f"{ours}.attention.{layer}.weight", [source], shape, lambda tensors: tensors[0][:, None])


def _bands(width: int) -> Iterator[_Part]:
    """Yield the rules for encoders and decoders of bands; those of equal width are one tensor in ours."""
    first = 0
    for group, (count, bins) in enumerate(BANDS):
        numbers = range(first, first + count)
        first += count
        encoder = [f"{_BANDS}.band_split_module.{number}" for number in numbers]
        yield from _normalised(f"encoder.{group}.norm", [f"{name}.0" for name in encoder], 2 * bins)
        yield from _linear(f"encoder.{group}.linear", [f"{name}.1" for name in encoder], 2 * bins, width)
        decoder = [f"{_BANDS}.bandwise_decoding_module.{number}" for number in numbers]
        yield from _normalised(f"decoder.{group}.norm", [f"{name}.0" for name in decoder], width)
        layers = ((1, width, 4 * width), (3, 4 * width, 4 * width), (5, 4 * width, 4 * bins))
        for layer, (number, width_in, width_out) in enumerate(layers, 1):
            names = [f"{name}.{number}" for name in decoder]
            yield from _linear(f"decoder.{group}.linear{layer}", names, width_in, width_out)


def _same(ours: str, theirs: str, shape: tuple[int, ...]) -> _Part:
    return _Part(ours, [theirs], shape, lambda tensors: tensors[0])


def _normalised(ours: str, theirs: Sequence[str], channels: int) -> Iterator[_Part]:
    for leaf in ("weight", "bias"):
        yield _Part(f"{ours}.{leaf}", [f"{name}.{leaf}" for name in theirs], (channels,), torch.stack)


def _linear(ours: str, theirs: Sequence[str], width_in: int, width_out: int) -> Iterator[_Part]:
    weights, biases = ([f"{name}.{leaf}" for name in theirs] for leaf in ("weight", "bias"))
    yield _Part(f"{ours}.weight", weights, (width_out, width_in, 1), lambda tensors: torch.stack(tensors)[..., 0].mT)
    yield _Part(f"{ours}.bias", biases, (width_out,), lambda tensors: torch.stack(tensors)[:, None])

"""Stand-in weights for the released TUSS files, and the signals of the golden outputs.

As with CLAPSep (`fill`), a tensor depends on its name, its shape and a seed alone; the rule is another one.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clapsep_cli.models.tuss import MEDIUM, Tuss, TussConfig
from clapsep_cli.store.checkpoint import save_part
from clapsep_cli.store.convert_tuss import convert
from clapsep_cli.store.released import read_checkpoint

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared" / "golden" / "tuss"  # beside the checkout, for those who have it
BINS = [2] * 22 + [4] * 11 + [12] * 8 + [24] * 8 + [48] * 8 + [66] * 3 + [67]

TINY = TussConfig(
    window=9600,
    width=16,
    groups=4,
    heads=2,
    cross_blocks=2,
    cross_attention=8,
    cross_feed_forward=12,
    conditional_blocks=1,
    conditional_attention=12,
    conditional_feed_forward=10,
)


def _rng(name: str, seed: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{name}|{seed}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def fill(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """The stand-in tensor called `name` (without `model.`), float32."""
    if name.endswith("rope.freqs"):
        return torch.from_numpy((10_000.0 ** (-np.arange(shape[0]) / shape[0])).astype(np.float32))
    noise = _rng(name, seed).standard_normal(math.prod(shape)).reshape(shape)
    if name.endswith(".gamma") or (name.endswith(".weight") and len(shape) == 1):
        noise = 1 + 0.1 * noise
    elif name.endswith(".bias"):
        noise = 0.05 * noise
    elif name.endswith(".weight"):
        fan_in = shape[0] * shape[2] if ".deconv1d." in name else math.prod(shape[1:])
        noise = noise / math.sqrt(fan_in)
    return torch.from_numpy(noise.astype(np.float32))


def wave(samples: int, seed: int) -> npt.NDArray[np.int16]:
    """Two chirps, clicks and coloured noise at 48 kHz."""
    rng, t = _rng(f"test_wave/{samples}/48000", seed), np.arange(samples) / 48_000
    x = 0.25 * np.sin(2 * np.pi * (180 * t + 150 * t**2)) * (0.6 + 0.4 * np.sin(2 * np.pi * 1.3 * t))
    x += 0.12 * np.sin(2 * np.pi * (3000 * t - 200 * t**2)) * (np.sin(2 * np.pi * 2.1 * t) > 0)
    noise = rng.standard_normal(samples)
    x += 0.02 * noise
    x += 0.05 * np.convolve(noise, np.ones(24) / 24, mode="same") * (1 + np.sin(2 * np.pi * 0.7 * t))
    for at in rng.integers(0, samples, size=max(1, samples // 12_000)):
        length = min(400, samples - at)
        x[at : at + length] += 0.4 * np.exp(-np.arange(length) / 60.0) * rng.standard_normal(length)
    return np.clip(np.round(x * 32_768), -32_768, 32_767).astype(np.int16)


def audio(pcm: npt.NDArray[np.int16]) -> Tensor:
    return torch.from_numpy(np.atleast_2d(pcm).astype(np.float32) / 32_768)


def shapes(config: TussConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a released file (without `model.`), written from the files' own naming."""
    width = config.width
    listed: dict[str, tuple[int, ...]] = {"separator.sos_token": (width, 1, 1)}
    for module, blocks, attention, inner, kernels in (
        (
            *("cross_prompt_module", config.cross_blocks, config.cross_attention),
            *(config.cross_feed_forward, config.cross_kernels),
        ),
        (
            *("cond_tse_module", config.conditional_blocks, config.conditional_attention),
            *(config.conditional_feed_forward, config.conditional_kernels),
        ),
    ):
        for block in range(blocks):
            for path, kernel in zip(("freq_path", "frame_path"), kernels, strict=True):
                name = f"separator.{module}.{block}.{path}"
                for number in range(2):
                    listed[f"{name}.ffn_norm.{number}.gamma"] = (width,)
                    listed[f"{name}.ffn.{number}.conv1d.weight"] = (2 * inner, width, kernel)
                    listed[f"{name}.ffn.{number}.conv1d.bias"] = (2 * inner,)
                    listed[f"{name}.ffn.{number}.deconv1d.weight"] = (inner, width, kernel)
                    listed[f"{name}.ffn.{number}.deconv1d.bias"] = (width,)
                listed[f"{name}.attn_norm.gamma"] = (width,)
                listed[f"{name}.attn.rope.freqs"] = (attention // config.heads // 2,)
                listed[f"{name}.attn.qkv.weight"] = (3 * attention, width)
                listed[f"{name}.attn.aggregate_heads.0.weight"] = (width, attention)
    for band, bins in enumerate(BINS):
        encoder = f"separator.band_split_module.band_split_module.{band}"
        decoder = f"separator.band_split_module.bandwise_decoding_module.{band}"
        for name, size in ((encoder, 2 * bins), (decoder, width)):
            listed |= {f"{name}.0.weight": (size,), f"{name}.0.bias": (size,)}
        for name, out, into in (
            (f"{encoder}.1", width, 2 * bins),
            (f"{decoder}.1", 4 * width, width),
            (f"{decoder}.3", 4 * width, 4 * width),
            (f"{decoder}.5", 4 * bins, 4 * width),
        ):
            listed |= {f"{name}.weight": (out, into, 1), f"{name}.bias": (out,)}
    return listed | {f"separator.prompts.{prompt}": (width, 1, 1) for prompt in config.prompts}


def recorded_shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Those of the released "medium" or "large"."""
    with gzip.open(GOLDEN / f"tuss-{size}.json.gz", "rt") as file:
        return {name: tuple(shape) for name, shape in json.load(file).items()}


def released(config: TussConfig = MEDIUM, seed: int = 0) -> dict[str, Tensor]:
    """Stand-ins for all tensors of a released file, by their names in it."""
    return {f"model.{name}": fill(name, shape, seed) for name, shape in shapes(config).items()}


def save_released(path: Path, tensors: dict[str, Tensor]) -> None:
    """As the released files are: one flat ordered dictionary, with the versions of modules beside it."""
    flat = OrderedDict(tensors)
    flat._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    torch.save(flat, path)


def separator(config: TussConfig = MEDIUM, tensors: dict[str, Tensor] | None = None) -> Tuss:
    with torch.device("meta"):
        model = Tuss(config)
    model.load_state_dict(convert(tensors or released(config), config), assign=True)
    return model.eval()


def convert_tiny(files: Sequence[Path], folder: Path, **notes: str) -> None:
    """What a registry may name in place of the conversion of the released sizes."""
    save_part(folder, "separator", "tuss", TINY, convert(read_checkpoint(files[0]), TINY), **notes)

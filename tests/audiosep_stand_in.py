"""Stand-in weights for the released AudioSep file: the rule of its golden outputs, for a network of any size.

As with CLAPSep (`fill`), which fills the text tower that lies in the same file, a tensor depends on its name, its shape
and a seed alone.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoint_shapes
import fill as clapsep
import numpy as np
import torch
from tiny_clapsep import ROBERTA
from torch import Tensor
from torch.nn import functional as F

from clapsep_cli.models.audiosep import AudioSep, AudioSepConfig
from clapsep_cli.store.convert_audiosep import CLAP, SEPARATOR, convert_separator

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared" / "golden" / "audiosep"  # beside the checkout, for those who have it

TINY = AudioSepConfig(
    dim=12,
    window=71 * 320,
    widths=(4, 6, 8),
    text_tokens=6,
    text_positions=8,
    text_width=16,
    text_layers=2,
    text_heads=4,
    text_feed_forward=20,
)


def fill(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """The stand-in for a tensor of the separator, `name` with its `ss_model.`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    draw, leaf = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)), name.rsplit(".", 1)[-1]
    if ".bn0.running_" in name:  # of magnitudes, some of which are above 100
        return 0.5 + 0.1 * draw if leaf == "running_mean" else 4 + 0.4 * draw.abs()
    if leaf == "running_var":
        return 1 + 0.1 * draw.abs()
    if leaf == "running_mean":
        return 0.1 * draw
    if leaf == "bias":
        return 0.05 * draw
    if name.endswith(".bn0.weight") or (".film." in name and len(shape) > 1):
        return draw
    if len(shape) == 1:
        return 1 + 0.1 * draw
    if ".after_conv." in name:
        return 0.3 * draw
    transposed = re.search(r"decoder_block\d\.conv1\.weight$", name)
    return draw / (shape[0] if transposed else int(np.prod(shape[1:]))) ** 0.5


def shapes(config: AudioSepConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the separator in the released file, written from the file's own naming."""
    widths, levels = config.widths, len(config.widths)
    listed: dict[str, tuple[int, ...]] = {"base.istft.ola_window": (2048,)}
    for part in ("real", "imag"):
        listed[f"base.stft.conv_{part}.weight"] = (1025, 1, 2048)
        listed[f"base.istft.conv_{part}.weight"] = (2048, 2048, 1)

    def norm(name: str, width: int) -> None:
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            listed[f"base.{name}.{leaf}"] = (width,)
        listed[f"base.{name}.num_batches_tracked"] = ()

    def shift(name: str, width: int) -> None:
        listed[f"film.{name}.weight"], listed[f"film.{name}.bias"] = (width, config.dim), (width,)

    def block(outer: str, inner: str, into: int, out: int) -> None:
        for number, width in ((1, into), (2, out)):
            norm(f"{outer}.{inner}.bn{number}", width)
            shift(f"{outer}->{inner}->beta{number}", width)
            listed[f"base.{outer}.{inner}.conv{number}.weight"] = (out, width, 3, 3)
        if into != out:
            listed[f"base.{outer}.{inner}.shortcut.weight"] = (out, into, 1, 1)
            listed[f"base.{outer}.{inner}.shortcut.bias"] = (out,)

    norm("bn0", 1025)
    for name, into, out in (("pre_conv", 1, widths[0]), ("after_conv", widths[0], 3)):
        listed[f"base.{name}.weight"], listed[f"base.{name}.bias"] = (out, into, 1, 1), (out,)
    for k in range(levels):
        block(f"encoder_block{k + 1}", "conv_block1", widths[max(0, k - 1)], widths[k])
        name, into, out = f"decoder_block{k + 1}", widths[min(-k, -1)], widths[-k - 1]
        for number in (1, 2):
            norm(f"{name}.bn{number}", into)
            shift(f"{name}->beta{number}", into)
        listed[f"base.{name}.conv1.weight"] = (into, out, 2 if k else 1, 2)
        block(name, "conv_block2", 2 * out, out)
    block("conv_block7a", "conv_block1", widths[-1], widths[-1])
    return listed


def recorded_shapes() -> dict[str, tuple[int, ...]]:
    """Those of the released file, the text tower's among them."""
    with gzip.open(GOLDEN / "audiosep-checkpoint.csv.gz", "rt") as lines:
        return {
            row["name"]: tuple(int(size) for size in row["shape"].split("x") if size) for row in csv.DictReader(lines)
        }


def separator_tensors(config: AudioSepConfig, seed: int = 0) -> dict[str, Tensor]:
    """Stand-ins for the separator's tensors, by their names in the released file. What no network reads is empty."""
    unread = re.compile(r".*stft\.|.*num_batches_tracked$")
    return {
        SEPARATOR + name: torch.zeros(shape) if unread.match(name) else fill(SEPARATOR + name, shape, seed)
        for name, shape in shapes(config).items()
    }


def text_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Stand-ins for the text tower, of `shapes` by their names in LAION-CLAP's file, by those in AudioSep's."""
    ours = (name for name in shapes if name.startswith(("text_branch.", "text_projection.")))
    return {CLAP + name: torch.from_numpy(clapsep.fill(name, shapes[name])) for name in ours}


def tiny_checkpoint() -> dict[str, Tensor]:
    """All that a released file has, of a tiny size."""
    text = replace(ROBERTA, dim=TINY.dim)
    tensors = separator_tensors(TINY) | text_tensors(checkpoint_shapes.clap(text))
    tensors[CLAP + "text_branch.embeddings.position_ids"] = torch.arange(TINY.text_positions)[None]
    for name in ("logit_scale_a", "audio_branch.norm.weight", "audio_projection.0.bias", "text_transform.x"):
        tensors[CLAP + name] = torch.zeros(3)
    return tensors


def save_released(path: Path, tensors: dict[str, Any]) -> None:
    """As the trainer nests it."""
    state = {0: {"step": torch.tensor(4e6), "exp_avg": torch.zeros(4)}}
    optimiser = {"state": state, "param_groups": [{"lr": 0.001, "betas": (0.9, 0.999), "params": [0]}]}
    torch.save(
        {
            "epoch": 0,
            "pytorch-lightning_version": "2.0.0",
            "state_dict": tensors,
            "loops": {},
            "optimizer_states": [optimiser],
            "lr_schedulers": [{"base_lrs": [0.001], "lr_lambdas": [{}]}],
        },
        path,
    )


def separator(config: AudioSepConfig = TINY, tensors: dict[str, Tensor] | None = None) -> AudioSep:
    with torch.device("meta"):
        model = AudioSep(config)
    model.load_state_dict(convert_separator(tensors or separator_tensors(config), config), assign=True)
    return model.eval()


def condition(key: int, dim: int = 512) -> Tensor:
    """In place of a text's embedding, `[1, dim]`."""
    return F.normalize(torch.from_numpy(clapsep.noise(dim, key)), dim=0)[None]

"""Stand-in weights for the two released CLAPSep files, and the signals of the golden outputs.

The released weights cannot be redistributed. A stand-in tensor depends on its name, its shape and a seed alone; the
golden outputs are the reference implementation's with the stand-ins of seed 0.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
from pathlib import Path
from typing import Any

import checkpoint_shapes
import numpy as np
import numpy.typing as npt
import torch
from checkpoint_shapes import Shapes
from torch import Tensor

from clapsep_cli.dsp import mel_filters
from clapsep_cli.models.clapsep import CLAPSepConfig
from clapsep_cli.models.htsat import MEL_BAND_HZ, RATE_HZ

Floats = npt.NDArray[np.float32]

GOLDEN = Path(__file__).parent / "golden"


def fill(name: str, shape: tuple[int, ...], seed: int = 0) -> Floats:
    """The stand-in tensor called `name`: float32, of `shape`.

    Matrices and kernels are N(0, 1/fan_in), gains and variances near 1, biases small: activations stay sane.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    noise = rng.standard_normal(shape, dtype=np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_var":
        return np.float32(1) + np.float32(0.1) * np.abs(noise)
    if leaf == "running_mean":
        return np.float32(0.1) * noise
    if "relative_position_bias" in leaf:
        return np.float32(0.2) * noise
    if leaf in ("bias", "in_proj_bias") or leaf.startswith("beta"):
        return np.float32(0.02) * noise
    if "embeddings" in name and len(shape) == 2:
        return np.float32(0.05) * noise
    if len(shape) <= 1:
        return np.float32(1) + np.float32(0.1) * noise
    return noise / np.float32(np.sqrt(np.prod(shape[1:])))


def noise(samples: int, key: int) -> Floats:
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(samples, dtype=np.float32)


def signal(seconds: float, rate: int, key: int) -> Tensor:
    """Gated chirp, decaying tone and noise: float32 `[samples]`."""
    t = np.arange(round(seconds * rate)) / rate
    chirp = 0.3 * np.sin(2 * np.pi * (220 * t + 40 * t**2)) * (np.sin(2 * np.pi * 0.7 * t) > 0)
    tone = 0.2 * np.sin(2 * np.pi * 1760 * t) * np.exp(-6 * (t % 1))
    return torch.from_numpy((chirp + tone + 0.05 * noise(len(t), key)).astype(np.float32))


def released_shapes(file: str) -> Shapes:
    """Names and shapes of a released file, "clap" or "clapsep"."""
    with gzip.open(GOLDEN / f"{file}-checkpoint.csv.gz", "rt") as lines:
        return {
            row["name"]: tuple(int(size) for size in row["shape"].split("x") if size) for row in csv.DictReader(lines)
        }


def checkpoints(config: CLAPSepConfig | None = None, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Stand-ins for the released CLAP and CLAPSep tensors, of the released size or of `config`.

    What no network reads (position indices, masks, DFT kernels and so on) is empty: only its name and shape count.
    """
    clap_shapes, tuned_shapes = (
        (checkpoint_shapes.clap(config), checkpoint_shapes.clapsep(config))
        if config
        else (released_shapes("clap"), released_shapes("clapsep"))
    )
    clap = {name: _stand_in(name, shape, seed) for name, shape in clap_shapes.items()}
    tuned = {}
    for name, shape in tuned_shapes.items():
        copied = name.removeprefix("clap_model.model.")
        tuned[name] = clap[copied] if copied != name else _stand_in(name, shape, seed)
    return clap, tuned


def _stand_in(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    unread = ("attn_mask", "relative_position_index", "num_batches_tracked", "tscam_conv.weight")
    if name.endswith(unread) or ".stft.conv_" in name or not shape:
        return torch.zeros(shape)
    if name.endswith("melW"):
        return mel_filters(RATE_HZ, shape[1], *MEL_BAND_HZ)
    return torch.from_numpy(fill(name, shape, seed))


def golden(entry: str) -> Any:
    """One array of the reference's outputs."""
    with np.load(GOLDEN / "clapsep_seed0.npz") as arrays:
        return arrays[entry]

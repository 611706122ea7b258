"""A CLAPSep of a few thousand weights, and its checkpoints in the form of the released ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fill import checkpoints

from clapsep_cli.models.clapsep import CLAPSepConfig
from clapsep_cli.store.convert_clapsep import convert_clapsep

WORDS = ["<s>", "<pad>", "</s>", "a", "dog", "barking", "rain", "on", "roof"]
TINY = CLAPSepConfig(
    window=40_320,
    dim=12,
    mels=32,
    image=64,
    width=8,
    depths=(2, 3),
    heads=(2, 4),
    mask_width=16,
    mask_layers=2,
    mask_heads=2,
    mask_feed_forward=24,
    vocabulary=len(WORDS),
    text_tokens=6,
    text_positions=8,
    text_width=16,
    text_layers=2,
    text_heads=4,
    text_feed_forward=20,
)


ROBERTA = replace(TINY, vocabulary=50_265)  # for use with the tokenizer that is bundled


def write_checkpoints(folder: Path, config: CLAPSepConfig = TINY) -> tuple[Path, Path]:
    """Write stand-ins as the released files are nested, optimiser state and NumPy scalars included."""
    clap, tuned = checkpoints(config)
    optimiser = {i: {"exp_avg": torch.zeros_like(t), "step": 3} for i, t in enumerate(clap.values())}
    nested = {
        "epoch": 15,
        "name": "stand-in",
        "optimizer": optimiser,
        "metric": np.float64(0.9),
        "state_dict": {f"module.{name}": tensor for name, tensor in clap.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "clap.pt", folder / "clapsep.ckpt"
    torch.save(nested, paths[0])
    torch.save(tuned, paths[1])
    return paths


def convert_tiny(files: Sequence[Path], folder: Path, **notes: str) -> None:
    """What a registry may name in place of the conversion of the released size."""
    convert_clapsep(files, folder, ROBERTA, **notes)

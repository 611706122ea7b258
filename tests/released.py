"""The networks of the released size with stand-in weights, in memory or on disk."""

from __future__ import annotations

from pathlib import Path

from fill import checkpoints
from torch import Tensor

from clapsep_cli.models.clapsep import CLAPSepConfig
from clapsep_cli.store.checkpoint import save_part
from clapsep_cli.store.convert_clapsep import convert


def released_parts(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """State dicts "separator", "text" and "audio" of the released size; about 1.1 GB."""
    return convert(*checkpoints(seed=seed))


def write_released(folder: Path, seed: int = 0, **notes: str) -> None:
    """Write `released_parts` as `separator`, `text` and `audio.safetensors`, with their configuration and `notes`."""
    for part, tensors in released_parts(seed).items():
        save_part(folder, part, "clapsep", CLAPSepConfig(), tensors, **notes)

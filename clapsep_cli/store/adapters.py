"""Handles low-rank adapters (LoRA): adds them to a network for training, saves them, and merges them into a model.

An adapted linear layer computes W·x + b + α/r · B·A·x. A file holds A, B and b of each such layer, by the names that
the layers have in the separator: `X.lora_A` `[r, in]`, `X.lora_B` `[out, r]`, `X.bias` `[out]`, float32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clapsep_cli.errors import CheckpointError, ExtraError
from clapsep_cli.store.checkpoint import Model, load_part
from clapsep_cli.store.tensors import read_notes, read_tensors, save_tensors

# Of an encoder's attention alone: a bare "proj" would also match its patch embedding.
TARGETS = r"layers\.\d+\.blocks\.\d+\.attn\.(?:qkv|proj)"
_DOWN, _UP, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."  # as peft names them


def inject(encoder: nn.Module, rank: int, alpha: float) -> None:
    """Wrap the attention layers of a network by peft. B is zero, so the output does not change yet.

    Only A, B and the biases of the wrapped layers require gradients afterwards.

    Args:
        encoder: the network.
        rank: r.
        alpha: α.

    Raises:
        ExtraError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ExtraError(f"LoRA needs {error.name}: pip install 'clapsep[train]'") from error
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS), encoder)  # type: ignore[arg-type]
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.endswith(_BASE + "bias"))


def merged(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return the weights by their names before `inject`, with W + scale · B·A in place of W."""
    plain = {n.replace(_BASE, "."): t for n, t in weights.items() if ".lora_" not in n}
    for layer in _layers(weights):
        down, up = weights[layer + _DOWN], weights[layer + _UP]
        plain[f"{layer}.weight"] = torch.addmm(plain[f"{layer}.weight"], up, down, alpha=scale)
    return plain


def save(path: Path, weights: Mapping[str, Tensor], base: Model, rank: int, alpha: float, settings: Any) -> None:
    """Write an adapter.

    Args:
        path: the file.
        weights: weights of the adapted network, of which those of the adapter are written.
        base: the model whose separator was adapted.
        rank: r.
        alpha: α.
        settings: of the training, for the file's notes.

    Raises:
        ModelError: if the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for layer in _layers(weights):
        parts = {"lora_A": layer + _DOWN, "lora_B": layer + _UP, "bias": f"{layer}{_BASE}bias"}
        tensors |= {f"{layer}.{part}": weights[name].contiguous().cpu() for part, name in parts.items()}
    notes = {
        "kind": "adapter",
        "family": base.family,
        "base": base.name,
        "revision": base.revision,
        "identity": base.identity,
        "rank": str(rank),
        "alpha": repr(float(alpha)),
        "settings": json.dumps(settings),
    }
    save_tensors(tensors, path, notes)


def apply(model: Model, path: Path) -> None:
    """Merge an adapter into the separator of `model`. Separation takes no longer.

    The separator is read again from disk, so call this first. Raises `CheckpointError` for a file that is no adapter,
    and for one trained on another separator.
    """
    tensors, notes = read_tensors(path), read_notes(path)
    if notes.get("kind") != "adapter":
        raise CheckpointError(f"{path}: is not an adapter")
    if notes.get("identity") != model.identity:
        trained = " ".join(filter(None, (notes.get("base"), notes.get("revision"))))
        raise CheckpointError(f"{path}: was trained on another model than {model.name}: on {trained}; use --model")
    separator = load_part(model.folder, "separator", model.family, model.config)
    state = separator.state_dict()  # its tensors are the network's own
    try:
        scale = float(notes["alpha"]) / int(notes["rank"])
        with torch.no_grad():
            for layer in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
                down, up, bias = (tensors[f"{layer}.{part}"] for part in ("lora_A", "lora_B", "bias"))
                state[f"{layer}.weight"].addmm_(up, down, alpha=scale)
                state[f"{layer}.bias"].copy_(bias)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: is damaged, or does not fit the separator of {model.name} ({error})") from error
    model.identity = f"{model.identity} {hashlib.sha256(path.read_bytes()).hexdigest()}"
    separator.to(model.device)
    if model.dtype != torch.float32:
        separator.lower(model.dtype)
    model.separator = separator


def _layers(names: Iterable[str]) -> list[str]:
    return [name.removesuffix(_DOWN) for name in names if name.endswith(_DOWN)]

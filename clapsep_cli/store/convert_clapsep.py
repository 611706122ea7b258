"""Converts the two released checkpoints of CLAPSep to the parts of our model; LoRA is merged on the way.

Every tensor is checked: those that a network needs must be there, in the right shape, and all others must be known as
superfluous.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from clapsep_cli.errors import CheckpointError
from clapsep_cli.models.clap import ClapAudioEncoder, ClapTextEncoder
from clapsep_cli.models.clapsep import CLAPSep, CLAPSepConfig, TextSize
from clapsep_cli.store.released import Released, needed, read_checkpoint, write_part

LORA_RANK = 16
LORA_SCALE = 1 / LORA_RANK  # alpha is 1

# Pattern of our names to the released ones; the first that matches holds. `text_branch` and `audio_branch` are CLAP's.
_Rules = tuple[tuple[str, str], ...]
_TRANSFORMER: _Rules = (
    (r"norm1\.", "attention.output.LayerNorm."),
    (r"norm2\.", "output.LayerNorm."),
    (r"out\.", "attention.output.dense."),
    (r"fc1\.", "intermediate.dense."),
    (r"fc2\.", "output.dense."),
)
_TEXT: _Rules = (
    (r"projection\.", "text_projection."),
    (r"pooler\.", "text_branch.pooler.dense."),
    (r"norm\.", "text_branch.embeddings.LayerNorm."),
    (r"(\w+_embeddings)\.", r"text_branch.embeddings.\1."),
    *((rf"layers\.(\d+)\.{ours}", rf"text_branch.encoder.layer.\1.{theirs}") for ours, theirs in _TRANSFORMER),
)
_HTSAT: _Rules = (("mel$", "audio_branch.logmel_extractor.melW"), ("", "audio_branch."))
_AUDIO: _Rules = (
    (r"projection\.", "audio_projection."),
    (r"norm\.", "audio_branch.norm."),
    *((r"htsat\." + ours, theirs) for ours, theirs in _HTSAT),
)
_ENCODER: _Rules = tuple((r"encoder\." + ours, theirs) for ours, theirs in _HTSAT)
_MASK_LAYER = r"decoder_model.mask_net.2.layers.\1."
_DECODER: _Rules = (
    (r"mask_net\.spec_norm\.", "decoder_model.spec_norm."),
    (r"mask_net\.input\.", "decoder_model.mask_net.0."),
    (r"mask_net\.norm\.", "decoder_model.mask_net.1."),
    (r"mask_net\.output\.", "decoder_model.mask_net.3."),
    (r"mask_net\.layers\.(\d+)\.qkv\.", _MASK_LAYER + "self_attn.in_proj_"),
    (r"mask_net\.layers\.(\d+)\.out\.", _MASK_LAYER + "self_attn.out_proj."),
    (r"mask_net\.layers\.(\d+)\.fc(\d)\.", _MASK_LAYER + r"linear\2."),
    (r"mask_net\.layers\.(\d+)\.", _MASK_LAYER),
    (r"aggregator\.(film|skip\.\d+)\.(gamma|beta)\.", r"decoder_model.\1.skip_conv.\2."),
    (r"aggregator\.layers\.(\d+)\.block\.", r"decoder_model.layers.\1.blocks.0."),
    (r"aggregator\.layers\.(\d+)\.expanding\.", r"decoder_model.layers.\1.downsample."),
    (r"aggregator\.", "decoder_model."),
)

# Tensors of the released files that are not used, or computed here.
_SUPERFLUOUS_CLAP = re.compile(
    r"logit_scale_[at]$|(text|audio)_transform\.|text_branch\.embeddings\.position_ids$"
    r"|audio_branch\.(spectrogram_extractor\.stft\.|tscam_conv\.|head\.)"
    r"|audio_branch\..*(attn_mask|relative_position_index|num_batches_tracked)$"
)
_SUPERFLUOUS_TUNED = re.compile(
    r"clap_model\.|decoder_model\..*(attn_mask|relative_position_index|num_batches_tracked)$"
)
_LORA_TARGET = re.compile(r"(audio_branch\.layers\..*\.attn\.(?:qkv|proj))\.(weight|bias)$")


def convert_clapsep(files: Sequence[Path], folder: Path, config: CLAPSepConfig | None = None, **notes: str) -> None:
    """Write the parts of a CLAPSep model to `folder` from its two released `files`, in any order.

    `notes` go into the metadata of every part. What was written is read back and compared. Raises `CheckpointError`.
    """
    config = config or CLAPSepConfig()
    clap: dict[str, Tensor] | None = None
    tuned: dict[str, Tensor] | None = None
    for file in files:
        tensors = read_checkpoint(file)
        if any(name.startswith("text_branch.") for name in tensors):
            clap = tensors
        elif any(name.startswith("decoder_model.") for name in tensors):
            tuned = tensors
        else:
            raise CheckpointError(f"{file}: is neither LAION-CLAP's checkpoint nor CLAPSep's")
    if clap is None or tuned is None:
        lacking = "LAION-CLAP's music_audioset_epoch_15_esc_90.14.pt" if clap is None else "CLAPSep's best_model.ckpt"
        raise CheckpointError(f"a CLAPSep model takes two checkpoints, and {lacking} is not among the files given")
    for part, tensors in convert(clap, tuned, config).items():
        write_part(folder, part, "clapsep", config, tensors, **notes)


def convert(
    clap: Mapping[str, Tensor], tuned: Mapping[str, Tensor], config: CLAPSepConfig | None = None
) -> dict[str, dict[str, Tensor]]:
    """Convert the tensors of both checkpoints to state dicts.

    Args:
        clap: tensors of the LAION-CLAP checkpoint by their released names, with or without `module.` before them.
        tuned: tensors of the CLAPSep checkpoint, with names as those of `clap`.
        config: the model's size, by default the released one.

    Returns:
        State dicts of `CLAPSep` ("separator"), `ClapTextEncoder` ("text") and `ClapAudioEncoder` ("audio"), float32.
        Tensors that need no change are shared, not copied.

    Raises:
        CheckpointError: names the first few tensors that are missing, unexpected or of another shape.
    """
    config = config or CLAPSepConfig()
    towers, decoder = Released("LAION-CLAP", clap), Released("CLAPSep", tuned)
    with torch.device("meta"):
        separator, audio = CLAPSep(config), ClapAudioEncoder(config)

    encoder_part = {
        name: _merged(_released(name, _ENCODER), shape, towers, decoder)
        for name, shape in needed(separator)
        if name.startswith("encoder.")
    }
    decoder_part = {
        name: decoder.take(_released(name, _DECODER), shape)
        for name, shape in needed(separator)
        if not name.startswith("encoder.")
    }
    state_dicts = {
        "separator": encoder_part | decoder_part,
        "text": convert_text(towers, config),
        "audio": {name: towers.take(_released(name, _AUDIO), shape) for name, shape in needed(audio)},
    }
    towers.check(_SUPERFLUOUS_CLAP)
    decoder.check(_SUPERFLUOUS_TUNED)
    return state_dicts


def convert_text(clap: Released, config: TextSize) -> dict[str, Tensor]:
    """Make the state dict of `ClapTextEncoder` from the tensors of a CLAP by their released names."""
    with torch.device("meta"):
        text = ClapTextEncoder(config, None)
    return {name: _text_tensor(name, shape, clap) for name, shape in needed(text)}


def _released(name: str, rules: _Rules) -> str:
    for ours, theirs in rules:
        if re.match(ours, name):
            return re.sub(f"^(?:{ours})", theirs, name)
    raise AssertionError(f"{name} has no released name")


def _text_tensor(name: str, shape: torch.Size, clap: Released) -> Tensor:
    """Make a tensor of the text tower; the checkpoint's layers for query, key and value are joined to one."""
    fused = re.match(r"layers\.(\d+)\.qkv\.(\w+)$", name)
    if not fused:
        return clap.take(_released(name, _TEXT), shape)
    third = torch.Size((shape[0] // 3, *shape[1:]))
    prefix = f"text_branch.encoder.layer.{fused[1]}.attention.self"
    parts = [clap.take(f"{prefix}.{part}.{fused[2]}", third) for part in ("query", "key", "value")]
    return torch.cat([part if not part.is_meta else torch.zeros(third) for part in parts])


def _merged(name: str, shape: torch.Size, clap: Released, tuned: Released) -> Tensor:
    """Make a tensor of the separator's encoder: CLAP's, with the tuned biases and W + B·A/16 where LoRA tuned it."""
    target = _LORA_TARGET.match(name)
    if not target:
        return clap.take(name, shape)
    if target[2] == "bias":
        return tuned.take(name, shape)
    weight = clap.take(name, shape)
    down = tuned.take(f"{target[1]}.lora_A", torch.Size((LORA_RANK, shape[1])))
    up = tuned.take(f"{target[1]}.lora_B", torch.Size((shape[0], LORA_RANK)))
    complete = not (weight.is_meta or down.is_meta or up.is_meta)
    return torch.addmm(weight, up, down, alpha=LORA_SCALE) if complete else weight

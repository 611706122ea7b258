"""Every tensor name and shape of the two released files, for a network of any size.

Written from the files' own naming, not from our networks: for the released size it must equal the recorded lists.
"""

from __future__ import annotations

from clapsep_cli.models.clapsep import CLAPSepConfig

Shapes = dict[str, tuple[int, ...]]

BINS, FFT, CLASSES, RANK = 513, 1024, 527, 16


def clap(config: CLAPSepConfig) -> Shapes:
    dim, deepest = config.dim, config.width << len(config.depths) - 1
    shapes: Shapes = {"logit_scale_a": (), "logit_scale_t": ()}
    for part in ("real", "imag"):
        shapes[f"audio_branch.spectrogram_extractor.stft.conv_{part}.weight"] = (BINS, 1, FFT)
    shapes["audio_branch.logmel_extractor.melW"] = (BINS, config.mels)
    shapes |= _batch_norm("audio_branch.bn0", config.mels)
    shapes |= {"audio_branch.patch_embed.proj.weight": (config.width, 1, 4, 4)}
    shapes |= {"audio_branch.patch_embed.proj.bias": (config.width,)}
    shapes |= _norm("audio_branch.patch_embed.norm", config.width)
    for i, (depth, heads) in enumerate(zip(config.depths, config.heads, strict=True)):
        width, side = config.width << i, (config.image // 4) >> i
        for j in range(depth):
            window = min(side, config.attention_window)
            block = f"audio_branch.layers.{i}.blocks.{j}"
            shapes |= _swin_block(block, width, heads, window)
            if j % 2 and side > window:
                shapes[f"{block}.attn_mask"] = ((side // window) ** 2, window**2, window**2)
        if i < len(config.depths) - 1:
            shapes[f"audio_branch.layers.{i}.downsample.reduction.weight"] = (2 * width, 4 * width)
            shapes |= _norm(f"audio_branch.layers.{i}.downsample.norm", 4 * width)
    shapes |= _norm("audio_branch.norm", deepest)
    bands = config.mels >> len(config.depths) + 1
    shapes |= {
        "audio_branch.tscam_conv.weight": (CLASSES, deepest, bands, 3),
        "audio_branch.tscam_conv.bias": (CLASSES,),
    }
    shapes |= _linear("audio_branch.head", CLASSES, CLASSES)
    shapes |= _roberta(config)
    for tower, width in (("text", config.text_width), ("audio", deepest)):
        shapes |= _linear(f"{tower}_transform.sequential.0", dim, dim) | _linear(
            f"{tower}_transform.sequential.3", dim, dim
        )
        shapes |= _linear(f"{tower}_projection.0", width, dim) | _linear(f"{tower}_projection.2", dim, dim)
    return shapes


def clapsep(config: CLAPSepConfig) -> Shapes:
    shapes: Shapes = {}
    for i, depth in enumerate(config.depths):
        width = config.width << i
        for j in range(depth):
            for layer, out in (("qkv", 3 * width), ("proj", width)):
                name = f"audio_branch.layers.{i}.blocks.{j}.attn.{layer}"
                shapes |= {f"clap_model.model.{name}.bias": (out,), f"{name}.bias": (out,)}
                shapes |= {f"{name}.lora_A": (RANK, width), f"{name}.lora_B": (out, RANK)}
    shapes["decoder_model.inverse_patch_embed.proj.weight"] = (config.width, 1, 4, 4)
    shapes["decoder_model.inverse_patch_embed.proj.bias"] = (1,)
    shapes |= _norm("decoder_model.inverse_patch_embed.norm", config.width)
    stages = list(enumerate(config.heads))[::-1]
    for i, (stage, heads) in enumerate(stages):
        width, side = config.width << stage, (config.image // 4) >> stage
        layer = f"decoder_model.layers.{i}"
        shapes |= _swin_block(f"{layer}.blocks.0", width, heads, min(side, config.attention_window))
        if i:
            shapes[f"{layer}.downsample.expand.weight"] = (4 * width, 2 * width)
            shapes |= _norm(f"{layer}.downsample.norm", width)
        shapes |= _film(f"decoder_model.skip.{i}", width, 2 * config.dim)
    shapes |= _film("decoder_model.film", config.width << stages[0][0], 2 * config.dim)
    return shapes | _mask_net(config)


def _mask_net(config: CLAPSepConfig) -> Shapes:
    width, hidden = config.mask_width, config.mask_feed_forward
    net = "decoder_model.mask_net"
    shapes = _batch_norm("decoder_model.spec_norm", BINS)
    shapes |= _linear(f"{net}.0", BINS + config.mels, width) | _norm(f"{net}.1", width)
    for i in range(config.mask_layers):
        layer = f"{net}.2.layers.{i}"
        shapes |= {f"{layer}.self_attn.in_proj_weight": (3 * width, width)}
        shapes |= {f"{layer}.self_attn.in_proj_bias": (3 * width,)}
        shapes |= _linear(f"{layer}.self_attn.out_proj", width, width)
        shapes |= _linear(f"{layer}.linear1", width, hidden) | _linear(f"{layer}.linear2", hidden, width)
        shapes |= _norm(f"{layer}.norm1", width) | _norm(f"{layer}.norm2", width)
    return shapes | _linear(f"{net}.3", width, BINS)


def _roberta(config: CLAPSepConfig) -> Shapes:
    width, hidden = config.text_width, config.text_feed_forward
    shapes: Shapes = {}
    for table, rows in (("word", config.vocabulary), ("position", config.text_positions), ("token_type", 1)):
        shapes[f"text_branch.embeddings.{table}_embeddings.weight"] = (rows, width)
    shapes |= _norm("text_branch.embeddings.LayerNorm", width)
    for i in range(config.text_layers):
        layer = f"text_branch.encoder.layer.{i}"
        for part in ("query", "key", "value"):
            shapes |= _linear(f"{layer}.attention.self.{part}", width, width)
        shapes |= _linear(f"{layer}.attention.output.dense", width, width)
        shapes |= _norm(f"{layer}.attention.output.LayerNorm", width)
        shapes |= _linear(f"{layer}.intermediate.dense", width, hidden)
        shapes |= _linear(f"{layer}.output.dense", hidden, width) | _norm(f"{layer}.output.LayerNorm", width)
    return shapes | _linear("text_branch.pooler.dense", width, width)


def _swin_block(name: str, width: int, heads: int, window: int) -> Shapes:
    shapes: Shapes = {f"{name}.attn.relative_position_bias_table": ((2 * window - 1) ** 2, heads)}
    shapes[f"{name}.attn.relative_position_index"] = (window**2, window**2)
    shapes |= _linear(f"{name}.attn.qkv", width, 3 * width) | _linear(f"{name}.attn.proj", width, width)
    shapes |= _linear(f"{name}.mlp.fc1", width, 4 * width) | _linear(f"{name}.mlp.fc2", 4 * width, width)
    return shapes | _norm(f"{name}.norm1", width) | _norm(f"{name}.norm2", width)


def _film(name: str, width: int, condition: int) -> Shapes:
    shapes = _linear(f"{name}.skip_conv.gamma", condition, width) | _linear(f"{name}.skip_conv.beta", condition, width)
    return shapes | _linear(f"{name}.feature_proj", width, width) | _norm(f"{name}.norm", width)


def _linear(name: str, width_in: int, width_out: int) -> Shapes:
    return {f"{name}.weight": (width_out, width_in), f"{name}.bias": (width_out,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _batch_norm(name: str, width: int) -> Shapes:
    statistics: Shapes = {f"{name}.running_mean": (width,), f"{name}.running_var": (width,)}
    return _norm(name, width) | statistics | {f"{name}.num_batches_tracked": ()}

"""TUSS as one would first write it down, from the released tensors: an oracle for the network, and what it is timed
against. Unfused attention, whole arrays, every band and every layer a call of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

BINS = [2] * 22 + [4] * 11 + [12] * 8 + [24] * 8 + [48] * 8 + [66] * 3 + [67]


class PlainTuss:
    """`tensors`: by their released names, without `model.`."""

    def __init__(self, tensors: Mapping[str, Tensor], groups: int, heads: int, rounded: bool = False) -> None:
        self.tensors, self.groups, self.heads, self.rounded = tensors, groups, heads, rounded

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[f"separator.{name}"]

    def separate(self, audio: Tensor, prompts: Sequence[str]) -> Tensor:
        """`[batch, samples]` to `[batch, stems, samples]`."""
        scale = audio.std(-1, keepdim=True) + 1e-8
        length, count = audio.shape[-1], len(prompts)
        window = torch.hann_window(2048, dtype=audio.dtype).sqrt()
        padded = F.pad(audio / scale, (1024, 1024 + -length % 512))
        spec = torch.stft(padded, 2048, 512, window=window, center=False, return_complex=True)
        x = self.encode(spec)
        tokens = torch.stack([self[f"prompts.{prompt}"] for prompt in prompts] + [self["sos_token"]])
        tokens = tokens.permute(3, 1, 0, 2).expand(len(audio), -1, -1, len(BINS))  # [batch, width, tokens, bands]
        x = self.stack(torch.cat([tokens, x], 2), "cross_prompt_module")
        tokens, x = x[:, :, :count], x[:, :, count + 1 :]
        each = torch.stack([x * tokens[:, :, [n]] for n in range(count)], 1)
        masks = self.decode(self.stack(each.flatten(0, 1), "cond_tse_module")).unflatten(0, each.shape[:2])
        spectra = (masks * spec[:, None]).flatten(0, 1)
        stems = torch.istft(spectra, 2048, 512, window=window, length=length)
        return stems.unflatten(0, each.shape[:2]) * scale[:, None]

    def encode(self, spec: Tensor) -> Tensor:
        """`[batch, bins, frames]` to `[batch, width, frames, bands]`."""
        bands = []
        for band, bins in enumerate(spec.split(BINS, 1)):
            parts = torch.view_as_real(bins).permute(0, 1, 3, 2).flatten(1, 2)
            name = f"band_split_module.band_split_module.{band}"
            parts = F.group_norm(parts, 1, self[f"{name}.0.weight"], self[f"{name}.0.bias"], 1e-5)
            bands.append(F.conv1d(parts, self[f"{name}.1.weight"], self[f"{name}.1.bias"]))
        return torch.stack(bands, -1)

    def decode(self, x: Tensor) -> Tensor:
        masks = []
        for band in range(len(BINS)):
            name = f"band_split_module.bandwise_decoding_module.{band}"
            h = F.group_norm(x[..., band], 1, self[f"{name}.0.weight"], self[f"{name}.0.bias"], 1e-5)
            h = F.conv1d(h, self[f"{name}.1.weight"], self[f"{name}.1.bias"]).tanh()
            h = F.conv1d(h, self[f"{name}.3.weight"], self[f"{name}.3.bias"]).tanh()
            h = F.glu(F.conv1d(h, self[f"{name}.5.weight"], self[f"{name}.5.bias"]), 1)
            masks.append(torch.complex(*h.chunk(2, 1)))
        return torch.cat(masks, 1)

    def stack(self, x: Tensor, module: str) -> Tensor:
        """Blocks over `[batch, width, frames, bands]`."""
        blocks = {name.split(".")[2] for name in self.tensors if name.startswith(f"separator.{module}.")}
        for block in range(len(blocks)):
            y = x.permute(0, 2, 3, 1)
            y = self.path(y.flatten(0, 1), f"{module}.{block}.freq_path").view(y.shape).transpose(1, 2)
            y = self.path(y.flatten(0, 1), f"{module}.{block}.frame_path").view(y.shape)
            x = y.permute(0, 3, 2, 1)
        return x

    def path(self, x: Tensor, name: str) -> Tensor:
        x = x + self.feed_forward(self.norm(x, f"{name}.ffn_norm.1"), f"{name}.ffn.1")
        x = x + self.attention(self.norm(x, f"{name}.attn_norm"), f"{name}.attn")
        return x + self.feed_forward(self.norm(x, f"{name}.ffn_norm.0"), f"{name}.ffn.0")

    def norm(self, x: Tensor, name: str) -> Tensor:
        grouped = x.unflatten(-1, (self.groups, -1))
        rms = torch.linalg.vector_norm(grouped, dim=-1, keepdim=True) / grouped.shape[-1] ** 0.5
        return (grouped / (rms + 1e-5)).flatten(-2) * self[f"{name}.gamma"]

    def feed_forward(self, x: Tensor, name: str) -> Tensor:
        weight = self[f"{name}.conv1d.weight"]
        reach, length = weight.shape[-1] - 1, x.shape[1]
        h = F.conv1d(F.pad(x.transpose(1, 2), (reach, reach)), weight, self[f"{name}.conv1d.bias"])
        value, gate = h.chunk(2, 1)
        h = F.conv_transpose1d(value * F.silu(gate), self[f"{name}.deconv1d.weight"], self[f"{name}.deconv1d.bias"])
        return h[..., reach : reach + length].transpose(1, 2)

    def attention(self, x: Tensor, name: str) -> Tensor:
        qkv = F.linear(x, self[f"{name}.qkv.weight"]).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        at = torch.arange(x.shape[1])
        at = (at.bfloat16() if self.rounded else at).to(x.dtype)
        angles = (at[:, None] * self[f"{name}.rope.freqs"]).repeat_interleave(2, -1)
        q, k = (y * angles.cos() + self.turned(y) * angles.sin() for y in (q, k))
        heads = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        return F.linear(heads.transpose(1, 2).flatten(2), self[f"{name}.aggregate_heads.0.weight"])

    @staticmethod
    def turned(x: Tensor) -> Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([-odd, even], -1).flatten(-2)

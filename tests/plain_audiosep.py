"""AudioSep's separator, written down plainly on the released tensors: what the fast one is compared with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

N_FFT, HOP = 2048, 320


class PlainAudioSep:
    """`tensors` by their released names, without `ss_model.`; of so many `levels`."""

    def __init__(self, tensors: Mapping[str, Tensor], levels: int = 6) -> None:
        self.tensors, self.levels = tensors, levels
        self.stages: dict[str, Tensor] = {}

    def separate(self, audio: Tensor, condition: Tensor) -> Tensor:
        """float32 `[batch, samples]` and `[batch, dim]` to `[batch, samples]`; stages are noted on the way."""
        window = torch.hann_window(N_FFT)
        spec = torch.stft(audio, N_FFT, HOP, window=window, return_complex=True).mT[:, None]
        self.stages = {"magnitude": spec.abs().clamp(min=1e-5)}
        maps = self.maps(self.stages["magnitude"], condition)
        a, p, q = F.pad(maps[:, :, : spec.shape[2]], (0, 1)).chunk(3, 1)
        turn = torch.complex(p.tanh(), q.tanh())
        turn = turn / turn.abs().clamp(min=1e-10)
        self.stages |= {"mask_mag": a.sigmoid(), "mask_cos": turn.real, "mask_sin": turn.imag}
        masked = (a.sigmoid() * turn * spec)[:, 0]
        return torch.istft(masked.mT, N_FFT, HOP, window=window, length=audio.shape[1])

    def maps(self, magnitude: Tensor, condition: Tensor) -> Tensor:
        """`[batch, 1, frames, bins]` to `[batch, 3, frames, bins]`, both padded and short of the last bin."""
        x = self._norm(magnitude.transpose(1, 3), "base.bn0").transpose(1, 3)
        self.stages["bn0"] = x
        x = F.pad(x, (0, -1, 0, -x.shape[2] % 2 ** (self.levels - 1)))
        x = self.stages["pre_conv"] = self._conv(x, "base.pre_conv")
        kept = []
        for k in range(1, self.levels + 1):
            x = self.stages[f"encoder{k}"] = self._block(x, f"encoder_block{k}", "conv_block1", condition)
            kept.append(x)
            x = F.avg_pool2d(x, (1 if k == self.levels else 2, 2))
        x = self.stages["bottleneck"] = self._block(x, "conv_block7a", "conv_block1", condition)
        for k in range(1, self.levels + 1):
            h = self._active(x, f"base.decoder_block{k}.bn1", f"film.decoder_block{k}->beta1", condition)
            weight = self.tensors[f"base.decoder_block{k}.conv1.weight"]
            h = F.conv_transpose2d(h, weight, stride=weight.shape[2:])
            x = self._block(torch.cat([h, kept.pop()], 1), f"decoder_block{k}", "conv_block2", condition)
            self.stages[f"decoder{k}"] = x
        x = self.stages["after_conv"] = self._conv(x, "base.after_conv")
        return x

    def _block(self, x: Tensor, block: str, name: str, condition: Tensor) -> Tensor:
        h = x
        for i in (1, 2):
            h = self._active(h, f"base.{block}.{name}.bn{i}", f"film.{block}->{name}->beta{i}", condition)
            h = F.conv2d(h, self.tensors[f"base.{block}.{name}.conv{i}.weight"], padding=1)
        shortcut = f"base.{block}.{name}.shortcut"
        return h + (self._conv(x, shortcut) if f"{shortcut}.weight" in self.tensors else x)

    def _active(self, x: Tensor, norm: str, film: str, condition: Tensor) -> Tensor:
        beta = F.linear(condition, self.tensors[f"{film}.weight"], self.tensors[f"{film}.bias"])
        return F.leaky_relu(self._norm(x, norm) + beta[:, :, None, None], 0.01)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            self.tensors[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-5)

    def _conv(self, x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

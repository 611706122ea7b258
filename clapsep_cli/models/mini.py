"""mini: CLAPSep's ideas at a thirtieth of its size, for the bundled model.

A trunk that knows many sounds (`trunk.Trunk`) hears the mixture once. Queries live in a space of what it hears: a
recording is embedded by the trunk's mean features, a text by its words' vectors and a linear map. A small decoder makes
a mask for each query: FiLM layers tell it the query, and maps of likeness where in time and frequency the mixture
resembles either side of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from clapsep_cli import dsp
from clapsep_cli.models import base, trunk

SILENCE_RMS = 1e-5  # quieter windows are not brought to level: there is nothing in them (−100 dBFS)
LIKENESS = 10  # maps of likeness that the decoder is given


@dataclass(frozen=True)
class MiniConfig:
    """Sizes of a mini model. `dim`: of the space of queries; `words`: rows of the word table; `word_dim`: its columns;
    `channels`: of the decoder, from fine to coarse."""

    dim: int = 192
    words: int = 85_000
    word_dim: int = 160
    seconds: int = 10
    bands: int = 64
    linear_bands: int = 16  # the lowest bands are single bins, to tell close partials apart
    channels: tuple[int, int, int] = (32, 72, 160)
    query: int = 192
    narrow: int = 32  # channels that the GRU hears of each band
    hidden: int = 128  # of the GRU, each way
    fine: int = 8  # channels of the refinement at full resolution


@lru_cache
def band_matrix(bands: int, linear: int) -> Tensor:
    """Return the share of each bin in each band, float32 `[bands, 513]`, columns of sum 1.

    The first `linear` bands are bins 0 … linear − 1; the others are triangles that widen evenly on a log scale up to
    16 kHz and overlap so that every bin is shared out completely.
    """
    top = dsp.N_FFT // 2
    with torch.device("cpu"):  # a constant, also where a model is built without memory
        steps = torch.arange(1, bands - linear + 1) / (bands - linear)
        centres = torch.cat([torch.arange(linear), (linear - 1) * (top / (linear - 1)) ** steps])
        bins = torch.arange(top + 1, dtype=torch.float32)
        upper = torch.bucketize(bins, centres[1:-1], right=True) + 1
        share = ((bins - centres[upper - 1]) / (centres[upper] - centres[upper - 1])).clamp(0, 1)
        matrix = torch.zeros(bands, top + 1)
        matrix[upper, bins.long()] = share
        matrix[upper - 1, bins.long()] = 1 - share
    return matrix


class Residual(nn.Module):
    """Two 3×3 convolutions; FiLM (paper III-C: γ(c)·x + β(c), here with γ around 1) before the second activation."""

    def __init__(self, channels: int, query: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.film = nn.Linear(query, 2 * channels) if query else None

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        h = self.norm2(self.conv2(F.relu_(self.norm1(self.conv1(x)))))
        if self.film is not None:
            gain, bias = self.film(query)[:, :, None, None].chunk(2, 1)
            return F.relu_((x + bias).addcmul_(h, 1 + gain))
        return F.relu_(h + x)


def fuse_norm(norm: nn.Module, conv: nn.Module) -> None:
    """Make a 1×1 convolution of an input do what it does of the normed input. (PyTorch fuses only norms that follow.)

    With the norm as s · x + t of each channel, W (s · x + t) + b = (W s) x + (W t + b).
    """
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    conv.bias = nn.Parameter(conv.bias + conv.weight[:, :, 0, 0] @ (norm.bias - norm.running_mean * scale))
    conv.weight = nn.Parameter(conv.weight * scale[:, None, None])


def rows_to_bands(rows: int, bands: int, config: MiniConfig) -> Tensor:
    """Return the linear interpolation from rows of a trunk's map to bands of the decoder, float32 `[rows, bands]`."""
    with torch.device("cpu"):
        share = band_matrix(config.bands, config.linear_bands).double()
        bins = torch.arange(share.shape[1], dtype=torch.float64)
        hertz = (share @ bins / share.sum(1)).view(bands, -1).mean(1) * (dsp.RATE_HZ / dsp.N_FFT)
        at = torch.log1p(hertz / 700)
        centres = torch.log1p(trunk.mel_centres(rows) / 700)
        place = ((at - centres[0]) / (centres[1] - centres[0])).clamp(0, rows - 1)
        return (1 - (place - torch.arange(rows)[:, None]).abs()).clamp(min=0).float()


class Context(nn.Module):
    """A bidirectional GRU over time, on all bands at once: `[batch, channels, frames, bands]` in and out."""

    def __init__(self, channels: int, bands: int, narrow: int, hidden: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(channels, narrow, 1)
        self.join = nn.Linear(narrow * bands, 2 * hidden)
        self.gru = nn.GRU(2 * hidden, hidden, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.join(self.narrow(x).permute(0, 2, 1, 3).flatten(2)))
        added: Tensor = self.out(self.gru(h)[0])
        return x + added.transpose(1, 2)[..., None]


class Features(NamedTuple):
    """Features of mixtures, the same for all queries: `[batch, …, frames, bands]`, frames of 20, 40, 80 and 160 ms."""

    levels: Tensor  # 1 channel
    fine: Tensor
    middle: Tensor
    coarse: Tensor
    keys: Tensor  # where the mixture's places lie in the space of queries, [batch, dim, frames, rows]

    def of(self, which: Tensor) -> Features:
        """Repeat mixtures, by their indices."""
        return Features(*(each[which] for each in self))


class Mini(base.MaskSeparator):
    """Separates by positive and negative conditions."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        fine, middle, coarse = config.channels
        q = config.query
        self.config = config
        self.rate = dsp.RATE_HZ
        self.window = config.seconds * dsp.RATE_HZ
        spread = band_matrix(config.bands, config.linear_bands)
        self.register_buffer("shares", spread, persistent=False)  # of bands in the bins of their mask
        mean = (spread / spread.sum(1, keepdim=True)).T.contiguous().T  # a product by its transpose is faster so
        self.register_buffer("bands", mean, persistent=False)  # bins in each band
        self.shares: Tensor
        self.bands: Tensor
        self.trunk = trunk.Trunk()
        channels = tuple(trunk.MAPS.values())
        for number, (stride, halvings) in enumerate(zip(trunk.STRIDES, (1, 2, 3, 3), strict=True)):
            places = rows_to_bands(trunk.MELS // stride, config.bands // 2**halvings, config)
            self.register_buffer(f"places{number}", places.T.contiguous(), persistent=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in channels)
        self.lateral = nn.ModuleList(
            nn.Conv2d(n, m, 1) for n, m in zip(channels, (fine, middle, coarse, coarse), strict=True)
        )
        self.stem = nn.Conv2d(1, fine, 4, stride=2, padding=1)
        self.halve = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(config.channels))
        self.down = nn.ModuleList(Residual(n, 0) for n in config.channels)
        self.context = Context(coarse, config.bands // 8, config.narrow, config.hidden)
        self.keys = Keys(config)
        self.query = nn.Sequential(nn.Linear(2 * config.dim + 2, q), nn.ReLU(), nn.Linear(q, q), nn.ReLU())
        self.scale: nn.Module = nn.BatchNorm2d(LIKENESS)
        self.alike = nn.Conv2d(LIKENESS, coarse, 1)
        self.up = nn.ModuleList(Residual(n, q) for n in config.channels)
        self.narrow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(config.channels))
        self.head = nn.ConvTranspose2d(fine, config.fine, 4, stride=2, padding=1)
        self.fine = nn.Sequential(
            nn.Conv2d(config.fine + 1, config.fine, 3, padding=1), nn.ReLU(), nn.Conv2d(config.fine, 1, 3, padding=1)
        )
        self.dtype = torch.float32  # in which it computes
        self.register_load_state_dict_post_hook(lay_out)  # type: ignore[no-untyped-call]

    @property
    def spread(self) -> Tensor:
        return self.shares

    def lower(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    @torch.no_grad()
    def fuse(self) -> None:
        for block in (*self.down, *self.up):
            for conv, norm in (("conv1", "norm1"), ("conv2", "norm2")):
                setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
                setattr(block, norm, nn.Identity())
        for before, pointwise in zip((*self.norms, self.scale), (*self.lateral, self.alike), strict=True):
            fuse_norm(before, pointwise)
        self.norms, self.scale = nn.ModuleList(nn.Identity() for _ in self.norms), nn.Identity()

    def encode(self, mixture: Tensor) -> Features:
        bands = torch.cat([dsp.power(each) @ self.bands.T for each in dsp.spectra(mixture)], 1)
        energy = (bands @ self.shares.sum(1)).mean(1)  # each bin is shared out completely
        levels, heard = self.levels(bands, energy), self.trunk.hear(mixture)
        with torch.autocast(mixture.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.features(levels, self.trunk(heard))

    def levels(self, bands: Tensor, energy: Tensor) -> Tensor:
        """Compute the levels of bands, of two frames at once. Loud and soft mixtures look alike.

        Args:
            bands: mean power in each of a mixture's bands, float32 `[batch, frames, bands]`.
            energy: of a mean frame, Σ |X|², `[batch]`.

        Returns:
            float32 `[batch, 1, frames, bands]`, about unit range; a multiple of 16 frames of 20 ms.
        """
        padded = F.pad(bands, (0, 0, 0, -bands.shape[1] % trunk.STRIDES[-1]))
        # The square of the RMS to within a constant: |X|² sums to N_FFT/2 · 3/8 · N_FFT · rms² a frame (Hann window).
        gain = 10 / (energy / (3 / 16 * dsp.N_FFT**2)).clamp(min=SILENCE_RMS**2)
        pairs = padded.reshape(len(bands), -1, 2, bands.shape[2]).mean(2)
        return trunk.one_channel((torch.log1p(pairs * gain[:, None, None]) - 2) / 2)

    def features(self, levels: Tensor, maps: list[Tensor]) -> Features:
        """Compute the features of mixtures from `levels` and the trunk's maps."""
        keys = self.keys(maps)
        normed = [norm(each) for norm, each in zip(self.norms, maps, strict=True)]
        given = [
            self.placed(trunk.pointwise(lateral, each), number)
            for number, (lateral, each) in enumerate(zip(self.lateral, normed, strict=True))
        ]
        given[2:] = [given[2] + F.interpolate(given[3], scale_factor=(2.0, 1.0))]
        x, scales = self.stem(levels), []
        for scale, (block, heard) in enumerate(zip(self.down, given, strict=True)):
            x = block((self.halve[scale - 1](x) if scale else x) + heard)
            scales.append(x)
        return Features(levels, scales[0], scales[1], self.context(scales[2]), keys)

    def placed(self, rows: Tensor, number: int) -> Tensor:
        """Interpolate rows of the trunk's map of that number to bands, with channels last."""
        return (self.get_buffer(f"places{number}") @ rows.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def mask(self, features: Features, condition: Tensor) -> Tensor:
        frames = self.window // dsp.HOP + 1
        count = max(len(features.levels), len(condition))
        features = Features(*(each.expand(count, -1, -1, -1) for each in features))
        with torch.autocast(condition.device.type, self.dtype, enabled=self.dtype != torch.float32):
            mask = self.band_mask(features, condition.expand(count, -1)).float()
        mask = F.interpolate(mask.transpose(1, 2), scale_factor=2, mode="linear").transpose(1, 2)
        return mask[:, :frames]

    def band_mask(self, features: Features, condition: Tensor, told: Tensor | None = None) -> Tensor:
        """Compute masks of bands.

        Args:
            features: of as many mixtures as there are conditions.
            condition: float32 `[batch, 2 · dim]`.
            told: float32 `[batch, 1]`, 0 where FiLM is not told what the query is, only which sides it has: training
                does so now and then, so that the maps of likeness, which know no labels, learn to do without.

        Returns:
            float32 `[batch, frames of 20 ms, bands]`, in [0, 1].
        """
        sides = condition.chunk(2, 1)
        lengths = [side.norm(dim=1, keepdim=True) for side in sides]
        asked = [side / length.clamp(min=1e-3) for side, length in zip(sides, lengths, strict=True)]
        # A condition has length 1; at unit variance it drives the first layer from the start of training.
        known = condition * math.sqrt(condition.shape[1])
        query = self.query(
            torch.cat([known if told is None else known * told, *((n > 1e-3) + 0.0 for n in lengths)], 1)
        )
        alike = self.alike(self.scale(likeness(features.keys, asked)))
        x = self.up[2](F.relu_(features.coarse + self.placed(alike, 2)), query)
        for level, given in ((1, features.middle), (0, features.fine)):
            x = self.up[level](F.interpolate(self.narrow[level](x), scale_factor=2) + given, query)
        mask: Tensor = self.fine(torch.cat([F.relu(self.head(x)), features.levels], 1))
        return torch.sigmoid(mask[:, 0])


class Keys(nn.Module):
    """The linear map from the trunk's features into the space of queries."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        finer, coarser = list(trunk.MAPS.values())[-2:]
        self.finer = nn.Conv2d(finer, config.dim, 1)
        self.coarser = nn.Conv2d(coarser, config.dim, 1, bias=False)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Map each place: float32 `[batch, dim, frames of 160 ms, 4 rows]`."""
        # Half of the values are 0, of which MKL takes roots twenty times slower.
        finer, coarser = (
            trunk.pointwise(layer, each.clamp(min=1e-20).sqrt_())
            for layer, each in zip((self.finer, self.coarser), maps[-2:], strict=True)
        )
        keys: Tensor = finer + F.interpolate(coarser, scale_factor=2)
        return keys

    def put(self, matrix: Tensor, offset: Tensor) -> None:
        """Set the map: `matrix`, `[1536, dim]`, and `offset`, `[dim]`."""
        kernels = matrix.T[:, :, None, None]
        finer, coarser = kernels.tensor_split([self.finer.in_channels], 1)
        self.load_state_dict({"finer.weight": finer, "finer.bias": offset, "coarser.weight": coarser})

    def project(self, means: Tensor) -> Tensor:
        """Map what recordings sound like on average (`trunk.pooled`): float32 `[batch, dim]`, length 1."""
        weight = torch.cat([self.finer.weight, self.coarser.weight], 1)[:, :, 0, 0]
        projected: Tensor = F.normalize(F.linear(means, weight, self.finer.bias), dim=1)
        return projected


def likeness(keys: Tensor, asked: Sequence[Tensor]) -> Tensor:
    """Compare the places of mixtures with both sides of queries.

    Args:
        keys: float32 `[batch, dim, frames, rows]`.
        asked: the positive and the negative, float32 `[batch, dim]` each, length 1, or 0 where a side is missing.

    Returns:
        Products and cosines for each side, the cosines' difference; over time, the cosines' mean and maximum for each
        side and the mean difference: float32 `[batch, LIKENESS, frames, rows]`.
    """
    length = keys.norm(dim=1).clamp(min=1e-3)
    products = [torch.einsum("bctf,bc->btf", keys, side) for side in asked]
    first, second = (product / length for product in products)
    over = [first.mean((1, 2)), second.mean((1, 2)), first.amax((1, 2)), second.amax((1, 2))]
    over.append(over[0] - over[1])
    whole = [value[:, None, None].expand_as(first) for value in over]
    return torch.stack([*products, first, second, first - second, *whole], 1)


def lay_out(net: nn.Module, *_: object) -> None:
    """Lay kernels out with their channels last, as a CPU convolves them faster by a quarter."""
    for parameter in net.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

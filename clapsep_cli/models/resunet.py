"""Blocks of AudioSep's U-Net: what is trained, and how a processor infers with it in half the time.

Images are `[batch, channels, frames, bins]`. For inference all of them are laid out with their channels last, what
follows a convolution and does not depend on the condition is part of its weights, and a block is run on a few frames at
a time, with those beside them that they depend on: what it needs in between then stays in a processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clapsep_cli.models.layers import Kernel

SLOPE = 0.01  # of the leaky ReLU
MOMENTUM = 0.01  # of the normalisation's running statistics
ROWS = 32  # frames that a block is run on at a time; with half as many at the finest level it is no faster

Rows = Callable[[int, int], Tensor]  # the frames from one to another of an image


class ShiftedNorm(nn.BatchNorm2d):
    """Batch normalisation, then the condition's shift of each channel: β(c), a linear layer."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__(channels, momentum=MOMENTUM)
        self.beta = nn.Linear(dim, channels)

    def activated(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return `x`, normalised, shifted by `condition` (`[batch, dim]`) and through the leaky ReLU."""
        return F.leaky_relu(self(x) + self.beta(condition)[:, :, None, None], SLOPE)

    def scale(self) -> Tensor:
        """Return the factor of each channel in inference, `[channels]`."""
        return self.weight * torch.rsqrt(cast(Tensor, self.running_var) + self.eps)

    def shift(self, condition: Tensor) -> Tensor:
        """Return what is added to each channel in inference, `[channels]`; `condition`: `[dim]`."""
        return cast(Tensor, self.bias - cast(Tensor, self.running_mean) * self.scale() + self.beta(condition))

    def quick(self, condition: Tensor) -> Callable[[Tensor], Tensor]:
        """`activated` for one condition (`[dim]`), in inference."""
        scale, shift = self.scale()[:, None, None], self.shift(condition)[:, None, None]
        return lambda x: F.leaky_relu_(torch.addcmul(shift, x, scale), SLOPE)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions, each behind a norm, beside a shortcut."""

    def __init__(self, width_in: int, width_out: int, dim: int) -> None:
        super().__init__()
        self.norm1 = ShiftedNorm(width_in, dim)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1, bias=False)
        self.norm2 = ShiftedNorm(width_out, dim)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else None
        self.kernels: tuple[Kernel, Kernel] | None = None

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """`x`: an image; `condition`: `[batch, dim]`."""
        h = self.conv1(self.norm1.activated(x, condition))
        h = self.conv2(self.norm2.activated(h, condition))
        return cast(Tensor, h + (self.shortcut(x) if self.shortcut else x))

    def prepare(self, bins: int) -> None:
        """Fold the second norm into the first convolution, for `pieces` of images of so many bins."""
        folded = self.conv1.weight * self.norm2.scale()[:, None, None, None]
        self.kernels = Kernel(folded, bins), Kernel(self.conv2.weight, bins)

    def pieces(self, source: Rows, frames: int, condition: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the output for one condition (`[dim]`) piece by piece, each with its first frame.

        `source` gives the input, of so many `frames`; it is asked for some of them twice.
        """
        assert self.kernels is not None, "prepare() comes first"
        first, second = self.kernels
        activate, shift = self.norm1.quick(condition), self.norm2.shift(condition)
        for top in range(0, frames, ROWS):
            bottom = min(frames, top + ROWS)
            begin = max(0, top - 2)
            x = source(begin, min(frames, bottom + 2))
            # Beyond the image each convolution sees zeros, not what the one before would make of zeros.
            h = F.leaky_relu_(first(_between_zeros(activate(x), top == 0, bottom > frames - 2), shift), SLOPE)
            bias = self.shortcut.bias if self.shortcut else None
            h = second(_between_zeros(h, top == 0, bottom == frames), bias)
            yield top, self._add_shortcut(h, x[:, :, top - begin : bottom - begin])

    def _add_shortcut(self, h: Tensor, x: Tensor) -> Tensor:
        """Add the shortcut of `x`, without its bias, to `h` in place."""
        if self.shortcut is None:
            return h.add_(x)
        # PyTorch is slow at convolutions of one pixel.
        _by_pixels(h).addmm_(_by_pixels(x), self.shortcut.weight.flatten(1).T)
        return h


def _by_pixels(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _between_zeros(x: Tensor, above: bool, below: bool) -> Tensor:
    return F.pad(x, (0, 0, above, below)) if above or below else x


class Encoder(nn.Module):
    """A residual block, and the means over `cell` (frames, bins) of what it makes."""

    def __init__(self, width_in: int, width_out: int, cell: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.cell = cell
        self.block = ResidualBlock(width_in, width_out, dim)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Return the block's output, and its means."""
        kept = self.block(x, condition)
        return kept, F.avg_pool2d(kept, self.cell)

    def quick(self, source: Rows, size: tuple[int, int, int], condition: Tensor) -> tuple[Tensor, Tensor]:
        """Compute `forward` in inference; `size`: the input's batch, frames and bins."""
        batch, frames, bins = size
        width, (high, wide) = self.block.conv2.out_channels, self.cell
        kept, means = _image(batch, width, frames, bins), _image(batch, width, frames // high, bins // wide)
        for top, piece in self.block.pieces(source, frames, condition):
            _put(kept, top, piece)
            pooled = F.avg_pool2d(piece, self.cell)
            _put(means, top // high, pooled)
        return kept, means


class Decoder(nn.Module):
    """Enlarges an image by `cell` and joins it with what an encoder kept."""

    def __init__(self, width_in: int, width_out: int, cell: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.cell = cell
        self.norm = ShiftedNorm(width_in, dim)
        self.enlarge = nn.ConvTranspose2d(width_in, width_out, cell, cell, bias=False)
        self.block = ResidualBlock(2 * width_out, width_out, dim)

    def forward(self, x: Tensor, kept: Tensor, condition: Tensor) -> Tensor:
        """`kept`: of the output's size."""
        larger = self.enlarge(self.norm.activated(x, condition))
        return cast(Tensor, self.block(torch.cat([larger, kept], 1), condition))

    def quick(self, x: Tensor, kept: Tensor, condition: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield `forward` in inference piece by piece, each with its first frame."""
        activate, (high, wide) = self.norm.quick(condition), self.cell
        weight = self.enlarge.weight.permute(0, 2, 3, 1).flatten(1)

        def joined(begin: int, end: int) -> Tensor:
            # No cell overlaps another, so the transposed convolution is one product, of which each row is a cell.
            above, below = begin // high, -(-end // high)
            cells = activate(x[:, :, above:below]).permute(0, 2, 3, 1) @ weight
            image = _image(len(x), 2 * kept.shape[1], (below - above) * high, kept.shape[3])
            larger, beside = image.permute(0, 2, 3, 1).chunk(2, -1)
            rows, columns, width = below - above, x.shape[3], kept.shape[1]
            by_cells = larger.view(len(x), rows, high, columns, wide, width).transpose(2, 3)
            by_cells.copy_(cells.view(len(x), rows, columns, high, wide, width))
            beside.copy_(kept[:, :, above * high : below * high].permute(0, 2, 3, 1))
            return image[:, :, begin - above * high :][:, :, : end - begin]

        return self.block.pieces(joined, kept.shape[2], condition)

    def quick_image(self, x: Tensor, kept: Tensor, condition: Tensor) -> Tensor:
        """Compute `quick` into `kept`, which spares an image in memory; return it."""
        ahead: tuple[int, Tensor] | None = None
        for top, piece in self.quick(x, kept, condition):
            if ahead is not None:  # its neighbours are computed, and do not need what is overwritten any more
                _put(kept, *ahead)
            ahead = top, piece
        assert ahead is not None, "an image has frames"
        return _put(kept, *ahead)


def _put(image: Tensor, top: int, piece: Tensor) -> Tensor:
    image[:, :, top : top + piece.shape[2]] = piece
    return image


def _image(batch: int, channels: int, frames: int, bins: int) -> Tensor:
    return torch.empty(batch, frames, bins, channels).permute(0, 3, 1, 2)

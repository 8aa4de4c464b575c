"""Patch moments of a 3x3 convolution from correlations of its input, without laying out patches.

The product of two places of a kernel, x(p + a) x(p + b), summed over all positions p, depends on b - a alone, but
for the rim: 13 correlations (the other 12 mirror them) stand for 81 products, which is a sixth of the work. Moments are
exact to 2e-6 of the largest entry, whatever the batches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from heal.values import LayerStats

TOGETHER = 32
"""Images whose products are formed at once. Measured on ResNet-56: 16 take a twentieth longer."""

FEW, PIECE = 16, 1024
"""Products of fewer rows are formed over so many positions at once."""

PLACES: tuple[tuple[int, int], ...] = tuple((down, right) for down in (-1, 0, 1) for right in (-1, 0, 1))
"""Of a 3x3 kernel, (down, right), in the order of its flattened weight."""


def is_correlated(layer: nn.Module) -> bool:
    """A 3x3 convolution of stride 1 whose zero padding keeps the size."""
    return isinstance(layer, nn.Conv2d) and (
        (layer.kernel_size, layer.stride, layer.dilation) == ((3, 3), (1, 1), (1, 1))
        and layer.padding_mode == "zeros"
        and tuple(layer._reversed_padding_repeated_twice) == (1, 1, 1, 1)
    )


class Correlation:
    """Sums of z = x - shift, the shift near the mean of each channel; float32 within a few images, float64 beyond.

    inner [c, c / groups, 3, 5]: z(q) z(q + step) for steps 0..2 down, -2..2 right. rows, columns [2, c, c / groups, 5]:
    the same along the first and the last of them. corners [4, c, c / groups]: z z of these pixels. map [c, h, w]: z.
    """

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        self.groups = layer.groups
        channels, height, width = x.shape[1:]
        self.shift = x[:1].float().mean((0, 2, 3)).view(1, -1, 1, 1)
        self.size = (height, width)
        self.images = 0
        within = channels // self.groups
        self.inner = x.new_zeros(channels, within, 3, 5, dtype=torch.float64)
        self.rows, self.columns = (x.new_zeros(2, channels, within, 5, dtype=torch.float64) for _ in range(2))
        self.corners = x.new_zeros(4, channels, within, dtype=torch.float64)
        self.map = x.new_zeros(channels, height, width, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Inputs [n, c, h, w], float32."""
        for z in torch.split(x - self.shift, TOGETHER):
            rows = torch.cat((z[:, :, :1], z[:, :, -1:]), 1)
            columns = torch.cat((z[..., :1], z[..., -1:]), 1).mT
            corners = torch.cat((columns[..., :1], columns[..., -1:]), 1)
            self.inner += _around(z, self.groups)
            self.rows += _around(rows, 2 * self.groups)[:, :, 0].view(self.rows.shape)
            self.columns += _around(columns, 2 * self.groups)[:, :, 0].view(self.columns.shape)
            self.corners += _around(corners, 4 * self.groups)[:, :, 0, 2].view(self.corners.shape)
            self.map += z.sum(0)
        self.images += len(x)

    def moments(self) -> LayerStats:
        """Of all patches so far: [groups, d, d] with d = 9 c / groups."""
        count = self.images * self.size[0] * self.size[1]
        groups, within = self.groups, self.inner.shape[1]
        shift = self.shift.flatten().double()
        one = shift.reshape(groups, within)
        pairs = [(a, b) for a in PLACES for b in PLACES]
        products = torch.stack([self._products(a, b) for a, b in pairs]).reshape(9, 9, groups, within, within)
        sums = torch.stack([self._summed(a, b) for a, b in pairs]).reshape(9, 9, groups, within)
        pixels = torch.tensor([float(self._pixels(a, b)) for a, b in pairs], dtype=torch.float64).reshape(9, 9)
        mine = torch.einsum("abgi,gj->abgij", sums, one)
        both = torch.einsum("ab,gi,gj->abgij", pixels.to(one), one, one)
        second = products + mine + mine.transpose(0, 1).mT + both
        centre = PLACES.index((0, 0))
        mean = (sums[:, centre] + torch.einsum("a,gi->agi", pixels[:, centre].to(one), one)) / count
        mean = mean.permute(1, 2, 0).reshape(groups, -1)
        second = second.permute(2, 3, 0, 4, 1).reshape(groups, within * 9, within * 9)
        return finished(count, mean, second - count * torch.einsum("gi,gj->gij", mean, mean))

    def _products(self, a: tuple[int, int], b: tuple[int, int]) -> Tensor:
        """Sum over p inside of z(p + a) z(p + b) [c, c / groups], z being 0 outside."""
        down, right = b[0] - a[0], b[1] - a[1]
        if (down, right) < (0, 0):
            other = self._products(b, a).reshape(self.groups, -1, self.inner.shape[1])
            return other.mT.flatten(0, 1)
        found = self.inner[:, :, down, right + 2].clone()
        # Where p itself would lie outside: both pixels in the same first or last line, a and b beyond it.
        row = _BEYOND.get(a[0]) if a[0] == b[0] else None
        column = _BEYOND.get(a[1]) if a[1] == b[1] else None
        if row is not None:
            found -= self.rows[row, :, :, right + 2]
        if column is not None:
            found -= self.columns[column, :, :, down + 2]
        if row is not None and column is not None:
            found += self.corners[2 * row + column]
        return found

    def _summed(self, a: tuple[int, int], b: tuple[int, int]) -> Tensor:
        """Sum of z(p + a) [c] over the p for which p, p + a and p + b all lie inside."""
        rows, columns = (_inside(self.size[axis], a[axis], b[axis]) for axis in (0, 1))
        moved = self.map[:, rows[0] + a[0] : rows[1] + a[0], columns[0] + a[1] : columns[1] + a[1]]
        return moved.sum((1, 2))

    def _pixels(self, a: tuple[int, int], b: tuple[int, int]) -> int:
        """How many such p there are, over all images."""
        rows, columns = (_inside(self.size[axis], a[axis], b[axis]) for axis in (0, 1))
        return max(rows[1] - rows[0], 0) * max(columns[1] - columns[0], 0) * self.images


_BEYOND = {1: 0, -1: 1}
"""The line, first or last, along which a pixel one step down (or right) of a position has the position outside."""


def _around(z: Tensor, groups: int) -> Tensor:
    """Sums of z(q) z(q + step) [c, c / groups, 3, 5], float64, for steps 0..2 down, -2..2 right; z is [n, c, h, w].

    Row by row the images lie beside each other, two zeros behind each, so that a step is one offset for all.
    """
    images, channels, height, width = z.shape
    beside = z.new_zeros(channels, height, images, width + 2)
    beside[..., :width] = z.permute(1, 2, 0, 3)
    flat = beside.view(groups, channels // groups, -1)
    row = images * (width + 2)
    found = z.new_zeros(3, 5, groups, flat.shape[1], flat.shape[1], dtype=torch.float64)
    for down in range(min(3, height)):
        many = row * (height - down) - 2  # the last two are zeros, from which a step right would leave the image
        for right in range(0 if down == 0 else -2, 3):
            start = row * down + right
            found[down, right + 2] = _inner(flat[..., :many], flat[..., start : start + many])
    found[0, :2] = found[0, 3:].flip(0).mT
    return found.permute(2, 3, 4, 0, 1).flatten(0, 1)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """x y^T [groups, k, k] of [groups, k, positions].

    A product of many rows is blocked by the library and rounds little; one of few is added up position by position,
    so it is cut into pieces.
    """
    if x.shape[1] == 1:
        return (x * y).sum(-1, keepdim=True)
    if x.shape[1] >= FEW or x.shape[2] <= PIECE:
        return torch.bmm(x, y.mT)
    pieces = zip(torch.split(x, PIECE, -1), torch.split(y, PIECE, -1), strict=True)
    return torch.stack([torch.bmm(a, b.mT) for a, b in pieces]).sum(0, dtype=torch.float64)


def finished(count: int, mean: Tensor, comoment: Tensor) -> LayerStats:
    """Of mean [groups, d] and comoment [groups, d, d]."""
    m2 = comoment.diagonal(dim1=-2, dim2=-1).clamp(min=0)
    return LayerStats(count, mean.flatten().cpu(), m2.flatten().cpu(), comoment.cpu())


def _inside(size: int, a: int, b: int) -> tuple[int, int]:
    """The range of p with p, p + a and p + b in [0, size)."""
    return max(0, -a, -b), size - max(0, a, b)

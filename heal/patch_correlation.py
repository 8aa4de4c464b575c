"""Patch moments of a 3x3 convolution from correlations of its input, without laying out patches.

The product of two places of a kernel, x(p + a) x(p + b), summed over all positions p, depends on b - a alone, but
for the rim: 15 correlations (the other 10 mirror them) stand for 81 products, which is a fifth of the work.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from heal.values import LayerStats

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
    """Sums of z = x - shift, the shift near the mean of each channel; float32 within a batch, float64 beyond.

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
        z = x - self.shift
        shape = (*self.inner.shape[:2], 3, 5)
        self.inner += conv2d_weight(F.pad(z, (2, 2, 0, 2)), shape, z, groups=self.groups)  # type: ignore[no-untyped-call]
        rows, columns = torch.stack((z[:, :, 0], z[:, :, -1])), torch.stack((z[..., 0], z[..., -1]))
        self.rows += _along(rows, self.groups)
        self.columns += _along(columns, self.groups)
        self.corners += _products(rows[..., [0, -1]].permute(0, 3, 2, 1).flatten(0, 1), self.groups)
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


def _along(lines: Tensor, groups: int) -> Tensor:
    """Sums of line(q) line(q + step) [2, c, c / groups, 5] for steps -2..2; lines are [2, n, c, pixels]."""
    many, images, channels, pixels = lines.shape
    steps = F.pad(lines, (2, 2)).unfold(-1, pixels, 1)  # [2, n, c, 5, pixels]
    first = (
        lines.view(many, images, groups, -1, pixels).permute(0, 2, 3, 1, 4).reshape(many * groups, -1, images * pixels)
    )
    second = steps.view(many, images, groups, -1, 5, pixels).permute(0, 2, 3, 4, 1, 5)
    found = torch.bmm(first, second.reshape(many * groups, -1, images * pixels).mT)
    return found.view(many, channels, -1, 5)


def _products(pixels: Tensor, groups: int) -> Tensor:
    """Sums over images of x x [4, c, c / groups] of pixels [4, c, n]."""
    many, channels, images = pixels.shape
    grouped = pixels.reshape(many * groups, -1, images)
    return torch.bmm(grouped, grouped.mT).view(many, channels, -1)


def finished(count: int, mean: Tensor, comoment: Tensor) -> LayerStats:
    """Of mean [groups, d] and comoment [groups, d, d]."""
    m2 = comoment.diagonal(dim1=-2, dim2=-1).clamp(min=0)
    return LayerStats(count, mean.flatten().cpu(), m2.flatten().cpu(), comoment.cpu())


def _inside(size: int, a: int, b: int) -> tuple[int, int]:
    """The range of p with p, p + a and p + b in [0, size)."""
    return max(0, -a, -b), size - max(0, a, b)

"""Patch moments of a 3x3 convolution from correlations of its input, without laying out patches.

The product of two places of a kernel, x(p + a) x(p + b), summed over all positions p, depends on b - a alone, but
for the rim: 25 correlations, of which 10 mirror others, stand for 81 products. They are the inverse transform of the
power spectrum (the theorem of Wiener and Khinchin), which takes one product of channels a frequency instead of one a
step: on ResNet-56 a little more than half the time of products of shifted maps. Moments are exact to 3e-6 of the
layer's largest entry, whatever the batches; an entry much smaller than that one (the corner of a kernel on maps that
are zero but at their rim) is known no better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from heal.values import LayerStats

TOGETHER, NUMBERS = 32, 1 << 25
"""Images whose products are formed at once, fewer where their maps have more numbers than this: their spectra take 16
bytes for each. Measured on ResNet-56: 16 images take a twentieth longer."""

ROOM = 1 << 18
"""Products of the spectrum held at once: a row of frequencies at least, and as many as this has room for."""

DOWN, RIGHT = (0, 1, 2), (-2, -1, 0, 1, 2)
"""Steps from one place of a kernel to another; the rest mirror them."""

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

    With k = c / groups, inner [3, 5, groups, k, k]: z(q) z(q + step) for the steps DOWN and RIGHT. lines
    [5, 4, groups, k, k]: the same along the first and the last row, the first and the last column, for the steps
    RIGHT along them. corners [4, groups, k, k]: z z of these pixels. map [c, h, w]: z.
    """

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        self.groups = layer.groups
        self.within = x.shape[1] // layer.groups
        self.size = (x.shape[2], x.shape[3])
        self.images = 0
        self.padded = (_fast(self.size[0] + 2), _fast(self.size[1] + 2))
        self.down = _waves(DOWN, self.padded[0], half=False).to(x.device)
        self.right = _waves(RIGHT, self.padded[1], half=True).to(x.device)
        self.shift = x[:1].float().mean((0, 2, 3)).view(1, -1, 1, 1)
        self.inner, self.lines, self.corners = (
            x.new_zeros(*steps, layer.groups, self.within, self.within, dtype=torch.float64)
            for steps in ((3, 5), (5, 4), (4,))
        )
        self.map = x.new_zeros(x.shape[1:], dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Inputs [n, c, h, w], float32."""
        together = max(1, min(TOGETHER, NUMBERS // self.map.numel()))
        for z in torch.split(x - self.shift, together):
            self.inner += self._around(z)
            self.lines += self._along(z)
            corners = torch.stack([z[..., down, right] for down in (0, -1) for right in (0, -1)])
            self.corners += _products(self._by_channel(corners))
            self.map += z.sum(0)
        self.images += len(x)

    def moments(self) -> LayerStats:
        """Of all patches so far: [groups, d, d] with d = 9 c / groups."""
        count = self.images * self.size[0] * self.size[1]
        groups, within = self.groups, self.within
        one = self.shift.double().reshape(groups, within)
        pairs = [(a, b) for a in PLACES for b in PLACES]
        products = torch.stack([self._multiplied(a, b) for a, b in pairs]).reshape(9, 9, groups, within, within)
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

    def _around(self, z: Tensor) -> Tensor:
        """What `inner` sums, of z [n, c, h, w]. Two zeros behind each line keep the ends of a map from meeting."""
        waves = torch.fft.rfft2(z, s=self.padded).permute(2, 3, 0, 1)
        rows = waves.reshape(*waves.shape[:3], self.groups, self.within).transpose(2, 3).contiguous()
        together = max(1, ROOM // (self.right.shape[1] * self.groups * self.within**2))
        found = torch.zeros_like(self.inner, dtype=torch.complex64).flatten(1)
        for some, down in zip(torch.split(rows, together), torch.split(self.down, together, 1), strict=True):
            right = self.right @ _products(some).flatten(2)
            found.addmm_(down, right.flatten(1))
        return found.real.double().view_as(self.inner)

    def _along(self, z: Tensor) -> Tensor:
        """What `lines` sums, of z [n, c, h, w]. The images lie beside each other, two zeros behind each."""
        length = max(self.size) + 2
        beside = z.new_zeros(4, z.shape[1], len(z), length)
        for line, pixels in zip(beside, (z[:, :, 0], z[:, :, -1], z[..., 0], z[..., -1]), strict=True):
            line[..., : pixels.shape[-1]] = pixels.transpose(0, 1)
        flat = self._by_channel(beside.flatten(2).mT)
        many = flat.shape[-2] - 2
        ahead = [_products(flat[..., :many, :], flat[..., step : step + many, :]) for step in (0, 1, 2)]
        return torch.stack([ahead[2].mT, ahead[1].mT, *ahead])

    def _by_channel(self, lines: Tensor) -> Tensor:
        """[m, values, c] as [m, groups, values, k]."""
        return lines.reshape(*lines.shape[:2], self.groups, self.within).transpose(1, 2)

    def _multiplied(self, a: tuple[int, int], b: tuple[int, int]) -> Tensor:
        """Sum over p inside of z(p + a) z(p + b) [groups, k, k], z being 0 outside.

        With q = p + a it is the correlation at step b - a, less the q whose p lies outside. So for a = b = (1, 0), one
        down of p, all q count but those of the first row, above which there is no p.
        """
        down, right = b[0] - a[0], b[1] - a[1]
        if (down, right) < (0, 0):
            return self._multiplied(b, a).mT
        found = self.inner[down, right + 2].clone()
        # Where p itself would lie outside: both pixels in the same first or last line, a and b beyond it.
        row = _BEYOND.get(a[0]) if a[0] == b[0] else None
        column = _BEYOND.get(a[1]) if a[1] == b[1] else None
        if row is not None:
            found -= self.lines[right + 2, row]
        if column is not None:
            found -= self.lines[down + 2, 2 + column]
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


def _products(x: Tensor, y: Tensor | None = None) -> Tensor:
    """x^H y [..., k, k] of [..., n, k]; y is x unless it is given."""
    y = x if y is None else y
    return x.mH @ y if x.shape[-1] > 1 else (x.conj() * y).sum(-2, keepdim=True)


def _waves(steps: Sequence[int], size: int, half: bool) -> Tensor:
    """exp(2 pi i step frequency / size) / size [steps, frequencies], complex64: transforms a spectrum back.

    half: of the frequencies up to size / 2 alone, those that stand for two counted twice; the real part is meant.
    """
    frequencies = torch.arange(size // 2 + 1 if half else size, dtype=torch.float64)
    weight = torch.full_like(frequencies, 1 / size)
    if half:
        weight[1 : (size + 1) // 2] *= 2
    angles = torch.outer(torch.tensor(steps, dtype=torch.float64), frequencies * (2 * math.pi / size))
    return torch.polar(weight.expand_as(angles).contiguous(), angles).to(torch.complex64)


def _fast(size: int) -> int:
    """The least number from `size` on without prime factors beyond 5, of which a transform is fast."""
    rest = size
    for factor in (2, 3, 5):
        while rest % factor == 0:
            rest //= factor
    return size if rest == 1 else _fast(size + 1)


def finished(count: int, mean: Tensor, comoment: Tensor) -> LayerStats:
    """Of mean [groups, d] and comoment [groups, d, d]."""
    m2 = comoment.diagonal(dim1=-2, dim2=-1).clamp_(min=0)
    return LayerStats(count, mean.flatten().cpu(), m2.flatten().cpu(), comoment.cpu())


def _inside(size: int, a: int, b: int) -> tuple[int, int]:
    """The range of p with p, p + a and p + b in [0, size)."""
    return max(0, -a, -b), size - max(0, a, b)

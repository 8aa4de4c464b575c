"""Second moments of a layer's patches, streamed, in two halves of the images.

With them every variance and covariance of a layer's output, dense or masked, is a quadratic form in its
weight: a whole grid of densities costs one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from heal.errors import NumericalError
from heal.patches import patches
from heal.values import LayerStats

HALVES = (0, 1)


class PatchStream:
    """Moments [groups, d, d] of the patches of images with even (0) and odd (1) number.

    Products are float32 within an image, around a shift near the mean, and float64 beyond.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        self.layer = layer
        self.seen = 0
        self.shift: Tensor | None = None
        self.count = [0, 0]
        self.sums: list[Tensor] = []
        self.products: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Take in a batch of the layer's input."""
        for image in torch.split(x, 1):
            columns = patches(self.layer, image)[0].float()
            if self.shift is None:
                self._begin(columns)
            assert self.shift is not None
            half = self.seen % 2
            centred = columns - self.shift
            self.sums[half] += centred.sum(-1).double()
            self.products[half] += torch.bmm(centred, centred.mT).double()
            self.count[half] += columns.shape[-1]
            self.seen += 1

    def _begin(self, columns: Tensor) -> None:
        groups, width, _ = columns.shape
        self.shift = columns.mean(-1, keepdim=True)
        self.sums = [columns.new_zeros(groups, width, dtype=torch.float64) for _ in HALVES]
        self.products = [columns.new_zeros(groups, width, width, dtype=torch.float64) for _ in HALVES]

    def results(self, tap: str) -> dict[str, LayerStats]:
        """By tap: "<layer>.patches/0" and "/1"; mean and m2 [groups * d], comoment [groups, d, d]."""
        if min(self.count) == 0 or self.shift is None:
            raise NumericalError(f"statistics: {tap} needs two images at least; {self.seen} passed it")
        return {f"{tap}/{half}": self._result(half) for half in HALVES}

    def _result(self, half: int) -> LayerStats:
        assert self.shift is not None
        count, sums = self.count[half], self.sums[half]
        comoment = self.products[half] - torch.einsum("gi,gj->gij", sums, sums) / count
        mean = self.shift[..., 0].double() + sums / count
        m2 = comoment.diagonal(dim1=-2, dim2=-1).clamp(min=0)
        return LayerStats(count, mean.flatten().cpu(), m2.flatten().cpu(), comoment.cpu())
